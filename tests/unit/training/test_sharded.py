"""A checkpoint in shards reads as one in a file does, and runs no code."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata

from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_pretrained
from ryzen_llm.training import LanguageModule, load_checkpoint, newest_checkpoint
from ryzen_llm.training.sharded import REST

Checkpoint = tuple[Path, LanguageModule]


@pytest.fixture
def sharded(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """What `checkpoint` holds, laid out as Lightning lays out a checkpoint of several processes."""
    content = torch.load(checkpoint[0], weights_only=True)
    folder = tmp_path / "shards" / "step=8.ckpt"
    tensors = {
        "state_dict": content.pop("state_dict"),
        "optimizer_0": {"state": {"x": torch.ones(3), "n": 1}},
    }
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    content.pop("optimizer_states")
    torch.save(content, folder / REST)
    return folder


def assert_reads_as(sharded: Path, file: Path) -> None:
    expected, tokenizer = load_checkpoint(file)
    for found, other in (load_checkpoint(sharded), load_pretrained(sharded)):
        assert other.to_json() == tokenizer.to_json()
        assert found.config == expected.config
        for (name, read), (_, written) in zip(
            found.state_dict().items(), expected.state_dict().items(), strict=True
        ):
            assert torch.equal(read, written), name


def test_it_reads_as_a_file_does(checkpoint: Checkpoint, sharded: Path) -> None:
    assert_reads_as(sharded, checkpoint[0])
    assert newest_checkpoint(sharded.parent) == sharded


class Payload:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


class Attribute:
    """`getattr(of, name)` when it is unpickled."""

    def __init__(self, of: object, name: str) -> None:
        self.arguments = (of, name)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, str]]:
        return getattr, self.arguments


def test_members_of_enums_are_read_as_every_python_writes_them(
    checkpoint: Checkpoint, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 3.11.4 (Debian 12 has 3.11.2) as attributes of their class; other attributes are refused."""
    path, enum = sharded / ".metadata", dcp_metadata._MEM_FORMAT_ENCODING
    with monkeypatch.context() as older:
        older.setattr(enum, "__reduce_ex__", lambda member, _: Attribute(enum, member.name).__reduce__())
        path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes())))
    assert b"getattr" in path.read_bytes()
    assert_reads_as(sharded, checkpoint[0])
    for of, name in ((enum, "__init__"), (dcp_metadata.Metadata, "__init__")):
        path.write_bytes(pickle.dumps(Attribute(of, name)))
        with pytest.raises(InputError, match="asks for '__init__'"):
            load_checkpoint(sharded)


def test_a_path_is_read_as_python_3_13_writes_it(checkpoint: Checkpoint, sharded: Path) -> None:
    """There its class is in another module."""
    path = sharded / ".metadata"
    content = path.read_bytes()
    unframed = content[:2] + content[11:]  # whose length would be another
    assert unframed.count(b"\x8c\x07pathlib") == 1
    path.write_bytes(unframed.replace(b"\x8c\x07pathlib", b"\x8c\x0epathlib._local"))
    assert_reads_as(sharded, checkpoint[0])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "code in the list of tensors": lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Payload())),
    "another list": lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({"a": 1})),
    "code in the rest": lambda folder: torch.save({"a": Payload()}, folder / REST),
    "no list of tensors": lambda folder: (folder / ".metadata").unlink(),
    "a missing shard": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "a cut shard": lambda folder: os.truncate(next(folder.glob("*.distcp")), 1000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_hostile_one_is_refused(
    damage: str, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the one before is taken where there is one."""
    monkeypatch.chdir(tmp_path)
    before = Path(shutil.copytree(sharded, sharded.with_name("step=4.ckpt")))
    DAMAGE[damage](sharded)
    with pytest.raises(InputError, match="checkpoint"):
        load_checkpoint(sharded)
    assert not (tmp_path / "ran").exists()
    with pytest.warns(UserWarning, match="taking the one before"):
        assert newest_checkpoint(sharded.parent) == before
