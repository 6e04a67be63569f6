"""Importing the package runs nothing, and the catalog works without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import loracompose


@pytest.mark.parametrize("module", ["loracompose", "loracompose.retrieval.catalog", "loracompose.cli"])
def test_import_does_not_load_torch(module):
    code = f"import sys, {module}; print('torch' in sys.modules, 'faiss' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]


def test_every_public_name_is_there():
    assert all(getattr(loracompose, name) is not None for name in loracompose.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Composers'"):
        loracompose.__getattr__("Composers")
