"""scripts/generate.py gives the text of the checkpoint's model, whole or as a stream."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import load_script, run_script

from ryzen_llm.data import StreamDecoder
from ryzen_llm.interop import load_pretrained

PROMPT = "return alpha\n"


@pytest.fixture
def checkpoint(finished: Path, tmp_path: Path) -> Path:
    """That of the finished run, with noise on the weights; without it, one token is likeliest everywhere."""
    content = torch.load(finished / "checkpoints" / "step=40.ckpt", weights_only=True)
    noise = torch.Generator().manual_seed(0)
    for tensor in content["state_dict"].values():
        tensor += 0.3 * torch.randn(tensor.shape, generator=noise)
    torch.save(content, tmp_path / "noisy.ckpt")
    return tmp_path / "noisy.ckpt"


@pytest.fixture
def generate(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the script prints, run in this process."""
    main = load_script("generate").main

    def printed(*options: str) -> str:
        assert main(["--model", str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", "20", *options]) == 0
        return capsys.readouterr().out

    return printed


def test_greedy_text_is_that_of_an_argmax_without_a_cache(
    generate: Callable[..., str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In fp32, where no two logits are as good as equal.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    with pytest.warns(UserWarning, match="no bf16"):
        found: dict[str, Any] = json.loads(generate("--temperature=0", "--json"))
    model, tokenizer = load_pretrained(checkpoint)
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    new: list[int] = []
    with torch.no_grad():
        while len(new) < 20 and tokenizer.end_of_text_id not in new:
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
            new.append(int(ids[0, -1]))
    assert len(set(new)) > 3, "a token for ever would prove little"
    assert found["ids"] == new
    assert found["text"] == tokenizer.decode(new)
    assert found["prompt"] == PROMPT
    assert found["stop_reason"] == ("stop" if new[-1] == tokenizer.end_of_text_id else "length")
    assert found["time_to_first_token_s"] > 0


def test_a_seed_repeats_the_text_and_another_changes_it(generate: Callable[..., str]) -> None:
    first, again, other = (
        json.loads(generate("--temperature=1", f"--seed={seed}", "--json"))["ids"] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_the_stream_of_the_script_is_the_prompt_and_the_text(
    generate: Callable[..., str], checkpoint: Path
) -> None:
    expected = json.loads(generate("--temperature=1", "--seed=3", "--json"))["text"]
    options = ["--prompt", PROMPT, "--max-new-tokens=20", "--temperature=1", "--seed=3"]
    done = run_script("generate", ["--model", str(checkpoint), *options])
    assert done.returncode == 0, done.stderr
    assert done.stdout == PROMPT + expected + "\n"


def test_tokens_are_printed_as_they_come(
    generate: Callable[..., str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as soon as its characters are whole, not at the end in one piece."""
    ids = json.loads(generate("--temperature=1", "--seed=3", "--json"))["ids"]
    decoder = StreamDecoder(load_pretrained(checkpoint)[1])
    expected = [PROMPT, *(decoder.push([token]) for token in ids), decoder.finish()]
    pieces: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *values, **_: pieces.append("".join(values)))
    generate("--temperature=1", "--seed=3")
    assert [piece for piece in pieces if piece] == [piece for piece in expected if piece]
    assert sum(piece != "" for piece in pieces) > 5
