"""scripts/generate.py with several prompts, with a chat template, from files; scripts/export.py after it."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import load_script

sys.path.append(str(Path(__file__).parents[1] / "unit" / "interop"))
from random_models import save

from ryzen_llm.decoding import Generator
from ryzen_llm.interop import load_pretrained

PROMPTS = ["the cat", "the dog ran and sat", "def main():", "the mat", "a", "on the mat the cat and the dog"]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save("llama", path)
    return path


@pytest.fixture
def run(directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """What the script prints, in this process and in fp32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    main = load_script("generate").main

    def printed(*options: str, status: int = 0) -> str:
        assert main(["--model", str(directory), "--max-new-tokens=12", *options]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    return printed


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """The prompts of every call of `Generator.generate`."""
    seen: list[list[torch.Tensor]] = []
    generate = Generator.generate

    def spy(self: Generator, ids: list[torch.Tensor], **settings: Any) -> Any:
        seen.append(ids)
        return generate(self, ids, **settings)

    monkeypatch.setattr(Generator, "generate", spy)
    return seen


def prompts(*texts: str) -> list[str]:
    return [f"--prompt={text}" for text in texts]


@pytest.mark.filterwarnings("ignore:.*no bf16")
@pytest.mark.parametrize("options", [["--temperature=0"], ["--temperature=1", "--seed=5"]])
def test_prompts_of_different_lengths_give_the_texts_that_they_give_alone(
    run: Run, options: list[str]
) -> None:
    together: list[dict[str, Any]] = json.loads(run(*prompts(*PROMPTS), "--json", *options))
    assert [answer["prompt"] for answer in together] == PROMPTS
    assert len({answer["text"] for answer in together}) == len(PROMPTS)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        alone = json.loads(run(*prompts(prompt), "--json", *options))
        assert (answer["ids"], answer["text"]) == (alone["ids"], alone["text"])
        assert answer["stop_reason"] == alone["stop_reason"]
        assert answer["time_to_first_token_s"] > 0


@pytest.mark.filterwarnings("ignore:.*no bf16")
def test_greedy_prompts_are_decoded_together_and_others_alone(
    run: Run, given: list[list[torch.Tensor]]
) -> None:
    texts = ("the cat", "the mat", "the dog ran")
    for temperature in ("0", "0.5"):
        run(*prompts(*texts), "--json", f"--temperature={temperature}")
    assert [len(batch) for batch in given] == [3, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:.*no bf16")
def test_prompts_come_from_a_file_or_from_stdin(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("the cat\n\nthe dog ran\n")
    options = ["--json", "--temperature=0"]
    from_file = json.loads(run(f"--prompt-file={tmp_path / 'prompts.txt'}", *options))
    assert [answer["prompt"] for answer in from_file] == ["the cat", "the dog ran"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\nthe dog ran\n"))
    from_stdin = json.loads(run("--prompt-file=-", *options))
    assert [answer["ids"] for answer in from_stdin] == [answer["ids"] for answer in from_file]
    shown = run(f"--prompt-file={tmp_path / 'prompts.txt'}", "--temperature=0")
    assert shown == "\n\n".join(answer["prompt"] + answer["text"] for answer in from_file) + "\n"


@pytest.mark.filterwarnings("ignore:.*no bf16")
def test_a_conversation_goes_through_the_template_and_remembers(
    run: Run, directory: Path, given: list[list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokenizer = load_pretrained(directory)
    said = iter(["the cat", "the dog"])

    def answer(_: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    shown = run("--chat", "--temperature=0")
    seen = [ids[0].tolist() for ids in given]
    first = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(seen[0]) == first
    assert seen[0] == tokenizer.encode_rendered(first)
    reply = shown.split("\n")[0]
    assert tokenizer.decode(seen[1]).startswith(first + reply[:5])
    assert tokenizer.decode(seen[1]).endswith("<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n")
    asked = json.loads(run("--chat", "--prompt=the cat", "--json", "--temperature=0"))
    assert given[2][0].tolist() == seen[0]
    assert asked["text"].startswith(reply[:5])


@pytest.mark.filterwarnings("ignore:.*no bf16")
def test_the_cache_and_the_weights_are_those_asked_for(run: Run, directory: Path) -> None:
    model, tokenizer = load_pretrained(directory)
    ids = torch.tensor([tokenizer.encode_prompt(PROMPTS[-1])])
    found = {}
    for cache in ("dense", "int4"):
        expected = Generator(model, cache=cache, weights="fp32").generate(ids, max_new_tokens=12)
        options = [*prompts(PROMPTS[-1]), "--json", "--temperature=0", f"--cache={cache}", "--weights=fp32"]
        found[cache] = json.loads(run(*options))["ids"]
        assert found[cache] == expected.new_ids[0].tolist()[: len(found[cache])]
    assert found["dense"] != found["int4"], "4 bits change some token of a model with random weights"
    expected = Generator(model, weights="int8").generate(ids, max_new_tokens=12)
    found = json.loads(run(*prompts(PROMPTS[-1]), "--json", "--temperature=0", "--weights=int8"))["ids"]
    assert found == expected.new_ids[0].tolist()[: len(found)]


def test_drafters_change_the_speed_only(run: Run, directory: Path) -> None:
    drafters = ["--drafter=suffix", "--drafter=recycling", f"--drafter=draft_model:{directory}"]
    for settings in ("--temperature=0", "--temperature=0.9"):
        options = [*prompts(PROMPTS[-1]), "--json", settings, "--seed=3", "--weights=fp32"]
        plain, drafted = (json.loads(run(*options, *more)) for more in ([], drafters))
        assert drafted["ids"] == plain["ids"]
        assert plain["accepted_per_step"] is None
        assert drafted["accepted_per_step"] >= 1


@pytest.mark.filterwarnings("ignore:.*no bf16")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt=a", "--drafter=eagle"], "unknown drafter 'eagle': choose of suffix"),
        (["--prompt=a", "--drafter=heads:/nowhere"], "draft heads /nowhere: no such file"),
        (["--prompt=a", "--cache=int5"], "unknown cache 'int5': choose one of dense,"),
        (["--prompt=a", "--cache=fp8"], "fp8"),
        ([], "there is no prompt; give --prompt"),
        (["--prompt="], "--prompt is empty"),
        (["--prompt-file=/nowhere"], "/nowhere: cannot be read"),
        (["--chat", "--json"], "--json needs a --prompt"),
    ],
)
def test_bad_prompts_are_one_line(run: Run, options: list[str], message: str) -> None:
    printed = run(*options, status=2)
    assert message in printed
    assert printed.count("\n") == 1


def test_the_export_script_writes_what_load_pretrained_reads(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = load_script("export").main
    assert main(["--model", str(directory), "--out", str(tmp_path / "out")]) == 0
    before, after = load_pretrained(directory)[0], load_pretrained(tmp_path / "out")[0]
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    capsys.readouterr()
    assert main(["--model", str(directory), "--out", str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err
