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

from ryzen_llm.decoding import Generation, Generator
from ryzen_llm.interop import load_pretrained
from ryzen_llm.interop.gguf_tokenizer import read_tokenizer

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


def answer_with(monkeypatch: pytest.MonkeyPatch, *new: int) -> None:
    """Make every prompt be continued with these ids."""

    def generate(_: Generator, ids: list[torch.Tensor], *, on_token: Any = None, **__: Any) -> Generation:
        for token in new if on_token else ():
            on_token([token])
        rows = torch.tensor([new] * len(ids))
        return Generation(rows, rows, "stop", 0.1, None, None)

    monkeypatch.setattr(Generator, "generate", generate)


def say(monkeypatch: pytest.MonkeyPatch, *texts: str) -> None:
    """Make these be what the user types, and the end of input after them."""
    said = iter(texts)

    def answer(_: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)


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
    say(monkeypatch, "the cat", "the dog")
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
def test_a_turn_that_is_too_long_is_dropped_and_the_conversation_goes_on(
    directory: Path,
    given: list[list[torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is reported, and nothing of what was said before is lost."""
    _, tokenizer = load_pretrained(directory)
    say(monkeypatch, "the cat", "mat " * 200, "the dog")
    arguments = ["--model", str(directory), "--max-new-tokens=12", "--chat", "--temperature=0"]
    assert load_script("generate").main(arguments) == 0
    assert capsys.readouterr().err.startswith("error: a prompt of ")
    first, _, last = (tokenizer.decode(ids[0].tolist()) for ids in given)
    assert last.startswith(first)
    assert "mat " * 200 not in last
    assert last.endswith("<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.filterwarnings("ignore:.*no bf16")
def test_the_token_that_ends_a_turn_is_in_no_text_of_a_chat(
    run: Run, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed, as JSON and for several prompts; without a chat it is shown, and the ids always have it."""
    _, tokenizer = load_pretrained(directory)
    ids = [*tokenizer.encode("the mat"), tokenizer.end_of_text_id]
    answer_with(monkeypatch, *ids)
    asked = json.loads(run("--chat", "--json", "--prompt=a"))
    assert (asked["text"], asked["ids"], asked["stop_reason"]) == ("the mat", ids, "stop")
    assert run("--chat", "--prompt=a") == "the mat\n"
    assert run("--chat", "--prompt=a", "--prompt=b") == "athe mat\n\nbthe mat\n"
    assert json.loads(run("--json", "--prompt=a"))["text"] == "the mat<|endoftext|>"


@pytest.mark.filterwarnings("ignore:.*no bf16")
def test_a_space_between_the_prompt_and_the_text_is_kept(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Llama 2's tokenizer decodes ids alone without the space that they begin with."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = read_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * len(tokens),
            "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (len(tokens) - 3),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_space_prefix": True,
            "tokenizer.chat_template": "{{ messages[0].content }}",
        },
        "file",
    )
    script = load_script("generate")
    model, _ = load_pretrained(directory)
    monkeypatch.setattr(script, "load_pretrained", lambda _: (model, tokenizer))
    answer_with(monkeypatch, *(tokens.index(token) for token in "▁paris"))

    def printed(*options: str) -> str:
        assert script.main(["--model=m", *options]) == 0
        return capsys.readouterr().out

    assert printed("--prompt=capital of the") == "capital of the paris\n"
    assert printed("--prompt=the", "--prompt=a") == "the paris\n\na paris\n"
    assert json.loads(printed("--prompt=the", "--json"))["text"] == " paris"
    assert printed("--chat", "--prompt=the") == "paris\n", "an answer does not go on with what was asked"


@pytest.mark.filterwarnings("ignore:.*no bf16")
def test_a_prompt_ends_at_a_newline_only(run: Run, tmp_path: Path) -> None:
    """Text has other characters that Python takes for the end of a line."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("a\fb\u2028c\u0085d\r\nthe cat\n".encode())
    answers = json.loads(run(f"--prompt-file={path}", "--json", "--temperature=0"))
    assert [answer["prompt"] for answer in answers] == ["a\fb\u2028c\u0085d", "the cat"]


@pytest.mark.filterwarnings("ignore:.*no bf16")
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_end_a_conversation_with_one_line(
    run: Run, errors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However Python was told to read them."""
    stdin = io.TextIOWrapper(io.BytesIO(b"h\xffi\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run("--chat", status=2) == "error: what was said is not UTF-8 text\n"


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
        (
            ["--prompt=a", "--drafter=heads:/nowhere"],
            "drafter heads:/nowhere: no such file; expected heads:PATH",
        ),
        (["--prompt=a", "--cache=int5"], "unknown cache 'int5': choose one of dense,"),
        (["--prompt=a", "--cache=fp8"], "fp8"),
        ([], "there is no prompt; give --prompt"),
        (["--prompt="], "--prompt is empty"),
        (["--prompt-file=/nowhere"], "/nowhere: cannot be read"),
        (["--chat", "--json"], "--json needs a --prompt"),
        (["--prompt=a", "--seed=99999999999999999999"], "--seed is 99999999999999999999, expected a number"),
        (["--prompt=h\udcffi"], "a prompt is not UTF-8 text"),
        (["--prompt=a", "--model=~nobodyx/foo"], "model ~nobodyx/foo: Could not determine home directory"),
        (["--prompt=a", "--model=" + "m" * 300], "mmm: File name too long"),
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
