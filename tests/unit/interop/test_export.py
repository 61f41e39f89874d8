"""What is exported is what transformers computes with, and what comes back in."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from random_models import TEMPLATE, random_ids, save

from ryzen_llm.errors import InputError
from ryzen_llm.interop import export_pretrained, load_pretrained
from ryzen_llm.model import ModelConfig, Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def same(a: Transformer, b: Transformer) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return a.config == b.config and all(m == n and torch.equal(x, y) for (m, x), (n, y) in pairs)


def test_in_and_out_and_in_again_is_bit_exact_and_transformers_agrees(
    every_kind: tuple[Path, Any], tmp_path: Path
) -> None:
    directory, reference = every_kind
    model, tokenizer = load_pretrained(directory)
    exported = export_pretrained(model, tokenizer, tmp_path / "out")
    again, same_tokenizer = load_pretrained(exported)
    assert same(model, again)
    assert same_tokenizer.to_json() == tokenizer.to_json()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    if model.config.sliding_window or reference.config.model_type != "mistral":
        assert type(theirs) is type(reference)  # Mistral without a window is Llama
    ids = random_ids(2, 70)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, reference(ids).logits)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save("llama", tmp_path / "llama")
    return tmp_path / "llama"


def test_transformers_reads_the_tokenizer_with_its_template(directory: Path, tmp_path: Path) -> None:
    model, tokenizer = load_pretrained(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(export_pretrained(model, tokenizer, tmp_path / "out"))
    text = "the cat sat on naïve 東京 1234\n\n  return"
    assert theirs(text).input_ids == tokenizer.encode_prompt(text)
    assert theirs.eos_token == "<|im_end|>"
    assert theirs.chat_template == TEMPLATE


def test_shards_are_under_the_limit_and_read_the_same(directory: Path, tmp_path: Path) -> None:
    model, tokenizer = load_pretrained(directory)
    exported = export_pretrained(model, tokenizer, tmp_path / "out", max_shard_bytes=40_000)
    files = list(exported.glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 40_000 + 4_000 for file in files)  # the header comes on top
    assert same(load_pretrained(exported)[0], model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(random_ids(1, 9)).logits, model(random_ids(1, 9)), atol=2e-5, rtol=0
        )


def test_bf16_is_half_as_large_and_rounded_to_nearest(directory: Path, tmp_path: Path) -> None:
    model, tokenizer = load_pretrained(directory)
    whole = export_pretrained(model, tokenizer, tmp_path / "fp32")
    half = export_pretrained(model, tokenizer, tmp_path / "bf16", dtype="bf16")
    sizes = [(d / "model.safetensors").stat().st_size for d in (whole, half)]
    assert sizes[1] < 0.55 * sizes[0]
    expected = model.norm.weight.detach().to(torch.bfloat16).float()
    assert torch.equal(load_pretrained(half)[0].norm.weight, expected)
    assert transformers.AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16


def test_nothing_is_written_over_and_nothing_is_left_half_written(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_pretrained(directory)
    with pytest.raises(InputError, match="is there already"):
        export_pretrained(model, tokenizer, directory)
    out = tmp_path / "out"

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("ryzen_llm.interop.export.save_file", fail)
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"cannot be written .disk full"):
        export_pretrained(model, tokenizer, out)
    assert set(tmp_path.iterdir()) == before


def test_a_combination_that_no_architecture_has_is_refused(directory: Path, tmp_path: Path) -> None:
    _, tokenizer = load_pretrained(directory)
    model = Transformer(ModelConfig(**SHAPE, qkv_bias=True, qk_norm=True))
    with pytest.raises(InputError, match="no architecture of transformers has"):
        export_pretrained(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
