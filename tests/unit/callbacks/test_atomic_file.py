"""A report on disk is whole, strict JSON and readable by others, whatever happens while it is written."""

import json
import math
import os
from pathlib import Path

import pytest
from ryzen_callbacks import write_json
from ryzen_callbacks.atomic_file import write_text


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    path = write_json(tmp_path / "r.json", {"a": [math.nan, 1.5, (math.inf,)], "b": {"c": -math.inf}})

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {"a": [None, 1.5, [None]], "b": {"c": None}}


def test_a_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_text(tmp_path / "r.json", "old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_value_that_is_no_json_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "r.json", {"a": object()})
    assert os.listdir(tmp_path) == []


def test_folders_are_made_and_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    os.umask(mask)
    path = write_text(tmp_path / "a" / "b" / "r.txt", "text")
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
