"""Settings of every test run: no model hub is asked, and property tests draw the same examples every time."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")
