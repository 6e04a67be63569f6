from __future__ import annotations

import os
from pathlib import Path

import pytest

from loracompose.durable import whole_file, write_whole


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, done = tmp_path / "a.json", []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append("fsync"), fsync(number))[1])
    monkeypatch.setattr(Path, "replace", lambda aside, target: (done.append("replace"), replace(aside, target))[1])
    write_whole(file, "né")
    assert file.read_bytes() == "né".encode()
    assert done == ["fsync", "replace"]
    assert list(tmp_path.iterdir()) == [file]


def test_what_fails_half_way_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(TypeError), whole_file(file) as stream:
        stream.writelines([b"ne", 0])
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
