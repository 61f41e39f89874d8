"""scripts/evaluate.py: what it prints is what was measured, and bad input is one line."""

import json
import sys
from pathlib import Path

import pytest
from tiny import load_script

sys.path.append(str(Path(__file__).parents[1] / "unit" / "interop"))
from random_models import save

from ryzen_llm.evaluation import measure_perplexity
from ryzen_llm.interop import load_pretrained

TEXT = "the cat sat on the mat and the dog ran\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    save("llama", folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text("")
    return folder


def arguments(folder: Path, data: str, *more: str) -> list[str]:
    return ["--model", str(folder / "model"), "--data", str(folder / data), *more]


def test_it_prints_the_figure_and_how_it_was_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = load_script("evaluate").main
    options = ("--context=50", "--stride=20")
    expected = measure_perplexity(*load_pretrained(folder / "model"), TEXT, context=50, stride=20)
    assert main(arguments(folder, "text.txt", *options, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert (printed["context"], printed["stride"], printed["dtype"]) == (50, 20, "fp32")
    assert (printed["scored_tokens"], printed["vocab_size"]) == (expected.scored_tokens, expected.vocab_size)
    assert main(arguments(folder, "text.txt", *options)) == 0
    shown = capsys.readouterr().out
    for part in (
        f"perplexity {expected.perplexity:.4f}",
        "of 293 tokens",
        "at most 50",
        "every 20",
        "nothing put",
    ):
        assert part in shown


def test_line_ends_are_scored_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TEXT.replace("\n", "\r\n")
    (folder / "windows.txt").write_bytes(text.encode())
    assert load_script("evaluate").main(arguments(folder, "windows.txt", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = measure_perplexity(*load_pretrained(folder / "model"), text)
    assert (printed["scored_tokens"], printed["loss"]) == (
        expected.scored_tokens,
        pytest.approx(expected.loss),
    )


def test_half_precision_is_another_figure_close_by(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = load_script("evaluate").main
    figures = []
    for dtype in ("fp32", "bf16"):
        assert main(arguments(folder, "text.txt", f"--dtype={dtype}", "--json")) == 0
        figures.append(json.loads(capsys.readouterr().out)["loss"])
    assert figures[0] != figures[1]
    assert figures[0] == pytest.approx(figures[1], rel=0.02)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("none.txt", [], "none.txt: cannot be read"),
        ("latin1.txt", [], "is not UTF-8 text"),
        ("empty.txt", [], "too short"),
        ("text.txt", ["--context=999"], "context is 999, expected 1 to the model's longest sequence, 128"),
        ("text.txt", ["--stride=0"], "stride is 0"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, data: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_script("evaluate").main(arguments(folder, data, *options)) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("error:") == 1
