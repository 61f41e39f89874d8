"""Draft heads are trained for a model by the same script, and used by generate.py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import arguments, load_script, report, run_script

DRAFTER = {
    "drafter__texts": 96,
    "drafter__length": 64,
    "drafter__vocab_size": 64,
    "drafter__intermediate_size": 16,
    "data__batch_size": 256,
    "trainer__max_epochs": 1,
    "validation_rounds": 2,
}


@pytest.fixture(scope="module")
def heads_run(finished: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it wrote; the last line on its screen says how to use the heads."""
    output_dir = tmp_path_factory.mktemp("drafter") / "run"
    options = arguments(
        corpus,
        output_dir,
        drafter__target=finished,
        data__cache_dir=output_dir.parent / "cache",
        **DRAFTER,
    )
    done = run_script("train", options)
    assert done.returncode == 0, done.stderr
    usage = f"--model {finished} --drafter heads:{output_dir / 'heads.safetensors'}"
    assert f'generate.py {usage} --prompt "..."' in done.stdout.splitlines()[-1]
    return output_dir


def test_the_reports_are_those_of_any_run(heads_run: Path) -> None:
    final = report(heads_run, "phase2_final_report")
    assert final["status"] == "done"
    assert [phase["status"] for phase in final["phases"]] == ["done"] * 5
    claim = final["optimizations"]["speculative_decoding"]
    assert claim["measured"] > 0
    assert list(final["optimizations"]) == ["speculative_decoding"]
    training = report(heads_run, "training_metrics_report")
    assert training["statistics"]["loss"]["last"] < training["statistics"]["loss"]["first"]
    assert final["accuracy"]["val_loss"] > 0
    assert (heads_run / "report.html").is_file()


def test_generate_drafts_with_the_heads(
    heads_run: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--model={finished}", "--prompt=alpha", "--max-new-tokens=20", "--temperature=0", "--json"]
    found = []
    for more in ([], [f"--drafter=heads:{heads_run / 'heads.safetensors'}"]):
        capsys.readouterr()
        assert load_script("generate").main([*options, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[1]["ids"] == found[0]["ids"]
    assert found[1]["accepted_per_step"] >= 1


def test_a_finished_run_is_resumed_from_its_checkpoint(
    heads_run: Path,
    finished: Path,
    corpus: Path,
    train: Callable[[list[str]], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not trained anew, with the same outcome. Its folder is not taken for a language model's."""
    out = Path(shutil.copytree(heads_run, tmp_path / "run"))
    settings = {"drafter__target": finished, "data__cache_dir": heads_run.parent / "cache", **DRAFTER}
    before = report(heads_run, "phase2_final_report")
    assert train(arguments(corpus, out, resume=True, phases="training", **settings)) == 0
    assert f"resuming from {Path(before['checkpoint']).name}" in capsys.readouterr().out
    after = report(out, "phase2_final_report")
    assert after["checkpoint"] == before["checkpoint"]
    assert after["accuracy"] == pytest.approx(before["accuracy"])
    assert train(arguments(corpus, out, resume=True, phases="training")) == 2
    assert "is of draft heads, expected one of a language model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drafter__target": "/nowhere"}, "model /nowhere: no such file or directory"),
        ({"drafter__length": 65}, "length is 65, expected more than 1 and at most"),
        ({"drafter__length": 8}, "drafter.length is 8, expected 64 or more"),
        ({"drafter__depth": 0}, "drafter.depth is 0, expected 1 or more"),
    ],
)
def test_bad_settings_are_named(
    train: Callable[[list[str]], int],
    finished: Path,
    corpus: Path,
    tmp_path: Path,
    change: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"drafter__target": finished, "data__cache_dir": tmp_path / "cache", **DRAFTER, **change}
    assert train(arguments(corpus, tmp_path / "run", **settings)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
