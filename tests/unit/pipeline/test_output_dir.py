"""One run at a time in a folder, and nothing that an earlier run wrote is ever lost."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from ryzen_llm.errors import InputError
from ryzen_llm.pipeline.output_dir import claim_output_dir


def write(folder: Path, text: str) -> None:
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last").write_text(text)


def read(folder: Path) -> str:
    return (folder / "checkpoints" / "last").read_text()


def test_an_earlier_run_moves_to_the_first_free_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "out"
    for number in range(3):
        with claim_output_dir(out, keep=False):
            assert [path.name for path in out.iterdir()] == [".lock"]
            write(out, f"run {number}")
        said = capsys.readouterr().out
        assert (str(out.with_name(f"out-{number}")) in said) == (number > 0)
    assert [read(out.with_name(name)) for name in ("out-1", "out-2", "out")] == ["run 0", "run 1", "run 2"]
    assert {path.name for path in out.parent.iterdir()} == {"out", "out-1", "out-2"}
    assert not list(out.parent.glob("*/.lock"))


def test_an_empty_folder_is_used_as_it_is(tmp_path: Path) -> None:
    with claim_output_dir(tmp_path, keep=False):
        pass
    assert not tmp_path.with_name(f"{tmp_path.name}-1").exists()


def test_what_is_no_run_is_never_moved(tmp_path: Path) -> None:
    """Texts to train on, or a home directory, given as output_dir by mistake."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("mine")
    refused = pytest.raises(InputError, match="is not empty and holds no earlier run; choose another folder")
    with refused, claim_output_dir(texts, keep=False):
        pass
    assert list(tmp_path.rglob("*")) == [texts, texts / "a.txt"]


@pytest.mark.parametrize("name", ["run", ".", "", ".."])
def test_the_working_directory_stays_where_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a run is in it: whoever works there would be left in the renamed folder."""
    run = tmp_path / "run"
    (run / "deeper").mkdir(parents=True)
    write(run, "run 0")
    monkeypatch.chdir(run / "deeper" if name == ".." else run)
    path = run if name == "run" else Path(name).absolute()
    refused = pytest.raises(InputError, match="is the working directory or above it")
    with refused, claim_output_dir(path, keep=False):
        pass
    assert list(tmp_path.iterdir()) == [run]
    with claim_output_dir(path, keep=True):
        assert read(run) == "run 0"


def test_resuming_leaves_everything_in_place(tmp_path: Path) -> None:
    write(tmp_path, "run 0")
    with claim_output_dir(tmp_path, keep=True):
        assert read(tmp_path) == "run 0"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_run_is_refused_while_the_first_goes_on(resume: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claim_output_dir(out, keep=False):
        write(out, "the first")
        with pytest.raises(InputError, match="another run is writing to it"), claim_output_dir(out, resume):
            pass
        assert read(out) == "the first"
        with pytest.raises(InputError, match="another run is writing to it"), claim_output_dir(out, resume):
            pass  # being refused has not let go of the first one's lock
    with claim_output_dir(out, keep=True):
        assert read(out) == "the first"


def test_a_run_that_failed_or_was_killed_holds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), claim_output_dir(out, keep=False):
        raise ZeroDivisionError
    hold = (
        "import os, signal, sys; from pathlib import Path\n"
        "from ryzen_llm.pipeline.output_dir import claim_output_dir\n"
        "with claim_output_dir(Path(sys.argv[1]), False): os.kill(os.getpid(), signal.SIGKILL)"
    )
    search = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    killed = subprocess.run([sys.executable, "-c", hold, str(out)], env=search, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert (out / ".lock").exists()
    with claim_output_dir(out, keep=False):
        pass
    assert list(tmp_path.iterdir()) == [out], "a lock alone is no earlier run"


def test_a_run_that_began_in_between_keeps_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment after an earlier run was moved aside, when the folder is nobody's."""
    out = tmp_path / "out"
    out.mkdir()
    write(out, "run 0")
    rename, others = Path.rename, ExitStack()

    def rename_and_begin(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        others.enter_context(claim_output_dir(out, keep=False))
        return moved

    monkeypatch.setattr(Path, "rename", rename_and_begin)
    refused = pytest.raises(InputError, match="another run is writing to it")
    with others:
        for _ in range(2):
            with refused, claim_output_dir(out, keep=False):
                pass
            assert (out / ".lock").exists()
    assert read(tmp_path / "out-1") == "run 0"


def test_a_folder_removed_in_mid_run_can_be_left(tmp_path: Path) -> None:
    with claim_output_dir(tmp_path / "out", keep=False):
        shutil.rmtree(tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a file, where the kernel lets nobody write; and, of what a test cannot have, a full disk."""

    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = "output_dir {}: cannot be written ({}); choose another folder"
    with pytest.raises(InputError) as below_a_file, claim_output_dir(Path("/dev/null/out"), keep=False):
        pass
    assert str(below_a_file.value) == message.format("/dev/null/out", "Not a directory")
    with pytest.raises(InputError) as in_proc, claim_output_dir(Path("/proc/out"), keep=False):
        pass
    assert "/proc/out: cannot be written" in str(in_proc.value)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(InputError) as on_a_full_disk, claim_output_dir(tmp_path / "out", keep=False):
        pass
    assert str(on_a_full_disk.value) == message.format(tmp_path / "out", "No space left on device")


def test_a_file_is_not_taken_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file"), claim_output_dir(tmp_path / "out", keep=False):
        pass
    assert (tmp_path / "out").read_text() == "mine"
