"""A run writes into its output directory and the cache directory, and nowhere else."""

from pathlib import Path

from tiny import arguments, run_script

# Python tells such a hook of every file that it opens and every name that it makes.
WATCHED = """
import atexit, os, sys
changed = set()
def watch(event, args):
    if event == "open":
        args = args[:1] if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else ()
    elif event not in ("os.mkdir", "os.rename", "os.link", "os.symlink"):
        args = ()
    changed.update(os.path.abspath(os.fsdecode(a)) for a in args if isinstance(a, (str, bytes, os.PathLike)))
sys.addaudithook(watch)
os.chdir(os.environ["WORKING"])
atexit.register(lambda: os.write(1, "".join(f"changed: {path}\\n" for path in changed).encode()))
"""


def test_a_run_writes_into_its_output_directory_and_the_cache_only(tmp_path: Path, corpus: Path) -> None:
    """Temporary files are gone at the end. What a library writes without Python's knowledge would be seen in
    the folders where it might put it.
    """
    output_dir, cache, temporary = (tmp_path / name for name in ("out", "cache", "temporary"))
    unused = [tmp_path / "home", tmp_path / "working", temporary]
    for folder in unused:
        folder.mkdir()
    environment = {
        "HOME": str(unused[0]),
        "WORKING": str(unused[1]),
        "TMPDIR": str(temporary),
        "RYZEN_LLM_CACHE": str(cache),
        # PyTorch keeps compiled code in places of its own, that of C++ beside modules, too.
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "compiler"),
        "TORCH_EXTENSIONS_DIR": str(cache / "extensions"),
    }
    before = {path: path.stat().st_mtime_ns for path in corpus.iterdir()}
    done = run_script("train", arguments(corpus, output_dir), environment, prelude=WATCHED)
    assert done.returncode == 0, done.stderr
    paths = [Path(line[9:]) for line in done.stdout.splitlines() if line.startswith("changed: ")]
    allowed = [output_dir, cache, temporary, Path("/dev")]
    assert [path for path in paths if not any(path.is_relative_to(folder) for folder in allowed)] == []
    assert output_dir / "report.html" in {path.with_name("report.html") for path in paths}, "nothing was seen"
    assert [list(folder.iterdir()) for folder in unused] == [[], [], []]
    assert {path: path.stat().st_mtime_ns for path in corpus.iterdir()} == before
