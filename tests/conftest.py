"""Settings of every test run: no model hub is asked."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
