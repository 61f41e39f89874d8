"""A GGUF file gives the model that it was made of, or is refused by the name of the obstacle."""

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from random_models import LLAMA3, TEMPLATE, random_ids, small_tokenizer

from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_pretrained
from ryzen_llm.interop.gguf_reader import GGUFFile
from ryzen_llm.interop.gguf_tokenizer import read_tokenizer

STRING, FLOAT, UINT = gguf.GGUFValueType.STRING, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.UINT32
BOOL = gguf.GGUFValueType.BOOL
YARN = {
    "llama.rope.scaling.type": ("yarn", STRING),
    "llama.rope.scaling.factor": (4.0, FLOAT),
    "llama.rope.scaling.original_context_length": (32, UINT),
}


def check(path: Path, reference: Any) -> None:
    model, _ = load_pretrained(path)
    ids = random_ids(2, 70)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("llama", "llama"),
        ("llama tied, as SmolLM2", "llama"),
        ("llama with wide heads", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("gemma3 of 7 layers", "gemma3"),
    ],
)
def test_logits_equal_those_of_the_model_it_was_made_of(kind: str, architecture: str, tmp_path: Path) -> None:
    check(tmp_path / "m.gguf", write_gguf(tmp_path / "m.gguf", kind, architecture))


def test_linear_rope_scaling_is_read(tmp_path: Path) -> None:
    scaling = {"llama.rope.scaling.type": ("linear", STRING), "llama.rope.scaling.factor": (2.0, FLOAT)}
    path = tmp_path / "m.gguf"
    check(path, write_gguf(path, "llama with linear rope", "llama", metadata=scaling))


def test_a_rope_factor_without_a_type_is_linear_as_in_llama_cpp(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    scaling = {"llama.rope.scaling.factor": (2.0, FLOAT)}
    check(path, write_gguf(path, "llama with linear rope", "llama", metadata=scaling))


def test_gemmas_local_rope_and_pattern_are_read(tmp_path: Path) -> None:
    """Newer converters write them, older files leave them to the architecture."""
    path = tmp_path / "m.gguf"
    written = {
        "gemma3.rope.freq_base_swa": (300.0, FLOAT),
        "gemma3.attention.sliding_window_pattern": (2, UINT),
    }
    check(path, write_gguf(path, "gemma3 with a local rope of its own", "gemma3", metadata=written))


def test_yarn_rope_scaling_is_read(tmp_path: Path) -> None:
    """With the ramp and the amplitude that llama.cpp and transformers take where a file is silent."""
    path = tmp_path / "m.gguf"
    check(path, write_gguf(path, "llama with yarn and the usual ramp", "llama", metadata=YARN))
    ramp = {
        "llama.rope.scaling.yarn_beta_fast": (20.0, FLOAT),
        "llama.rope.scaling.yarn_beta_slow": (1.0, FLOAT),
    }
    check(path, write_gguf(path, "llama with yarn rope", "llama", metadata=YARN | ramp))


def test_llama3_rope_scaling_is_recognised_by_its_divisors(tmp_path: Path) -> None:
    """The file holds no parameters of it, only the result."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = LLAMA3 | {"original_max_position_embeddings": 8192, "factor": 32.0}
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=9999
    )
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = rope["rope_theta"] ** -(torch.arange(0, 8, 2) / 8)
    divisors = (plain / stretched).float().numpy()
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama with llama3 rope", "llama", extra={"rope_freqs.weight": divisors})
    model, _ = load_pretrained(path)
    scaling = model.config.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("llama3", pytest.approx(32.0))

    write_gguf(path, "llama", "llama", extra={"rope_freqs.weight": np.array([1, 1, 3, 4], np.float32)})
    with pytest.raises(InputError, match=r"rope_freqs.weight is not the llama3 scaling"):
        load_pretrained(path)


@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_are_those_that_they_decode_to(
    quantisation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F32 norms beside them; sizes in whole blocks of 32."""
    monkeypatch.setitem(__import__("random_models").SIZES, "intermediate_size", 64)
    path = tmp_path / "m.gguf"
    check(path, write_gguf(path, "llama", "llama", quantisation=quantisation))


def test_the_tokenizer_of_the_metadata_is_the_one_written(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", "llama")
    _, tokenizer = load_pretrained(tmp_path / "m.gguf")
    text = "the cat sat <|im_end|> on naïve 東京\n\n  def main(): return 1234"
    expected = small_tokenizer()
    expected.encode_special_tokens = True
    assert tokenizer.encode(text) == expected.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_rendered("<|im_end|>") == [2]
    assert tokenizer.stop_ids == (0, 2)
    assert tokenizer.special.chat_template == TEMPLATE


def test_special_tokens_of_the_metadata_have_the_names_that_templates_call_them(tmp_path: Path) -> None:
    """One that is beyond the vocabulary, as in some files, has none."""
    ids = {"padding": 1, "unknown": 0, "mask": 10**6}
    metadata = {f"tokenizer.ggml.{name}_token_id": (index, UINT) for name, index in ids.items()}
    write_gguf(tmp_path / "m.gguf", "llama", "llama", metadata=metadata)
    _, tokenizer = load_pretrained(tmp_path / "m.gguf")
    assert tokenizer.special.others == {"pad_token": "<|im_start|>", "unk_token": "<|endoftext|>"}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another architecture": ("falcon", {}, "'falcon' is not supported, expected one of llama"),
    "experts": ("llama", {"llama.expert_count": (8, UINT)}, "'expert_count' = 8 is not a known option"),
    "a kind of rope": ("llama", {"llama.rope.scaling.type": ("longrope", STRING)}, "'longrope'"),
    "yarn with an amplitude": ("llama", YARN | {"llama.rope.scaling.attn_factor": (2.0, FLOAT)}, "attn_"),
    "a partial rope": ("llama", {"llama.rope.dimension_count": (4, UINT)}, "dimension_count = 4"),
    "attention to what follows": ("llama", {"llama.attention.causal": (False, BOOL)}, "causal = False"),
    "yarn switched off": (
        "llama",
        YARN | {"llama.rope.scaling.yarn_ext_factor": (0.0, FLOAT)},
        "yarn_ext_factor = 0.0",
    ),
    "another vocabulary": ("llama", {"llama.vocab_size": (7, UINT)}, "vocab_size = 7"),
    "softcapping": ("gemma3", {"gemma3.final_logit_softcapping": (30.0, FLOAT)}, "softcapping"),
    "no pattern": (
        "gemma3",
        {"gemma3.attention.sliding_window_pattern": (0, UINT)},
        "sliding_window_pattern is 0, expected 1 or more",
    ),
    "tensors of another architecture": ("qwen2", {}, "9 missing: model.layers.0.self_attn.k_proj.bias"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_supported_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    architecture, metadata, message = REFUSED[kind]
    model = "gemma3" if architecture == "gemma3" else "llama"
    write_gguf(tmp_path / "m.gguf", model, architecture, metadata=metadata)
    with pytest.raises(InputError, match=message):
        load_pretrained(tmp_path / "m.gguf")


# What the pre-tokenizers have to tell apart: digits, contractions, line breaks, spaces, scripts.
HARD_TEXT = (
    "It's 12345 O'CLOCK, we'll\n\n\n  see...   def f(x):\r\n\treturn x**2  "
    "# naïve café 東京 ١٢٣ \u00a0 é e\u0301 !?\n "
)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["1", "2", "3"]),
        ("qwen2", ["1", "2", "3"]),
        ("llama-bpe", ["123", "45"]),
        ("gpt-2", ["Ġ12345"]),
    ],
)
def test_pre_tokenizers_cut_text_as_the_models_own(pre: str, pieces: list[str]) -> None:
    """Against the tokenizer.json that transformers makes of each model's class."""
    import transformers
    from tokenizers import pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    for token in ("12", "123", "45"):
        vocabulary[token] = len(vocabulary)
    merges = [("1", "2"), ("12", "3"), ("4", "5")]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": list(vocabulary),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = read_tokenizer(metadata, "file")
    cut = [piece for piece, _ in tokenizer._backend.pre_tokenizer.pre_tokenize_str(HARD_TEXT)]
    position = cut.index(pieces[0])
    assert cut[position : position + len(pieces)] == pieces
    assert "".join(cut).count("Ġ") >= 10
    if pre == "qwen2":
        theirs = transformers.Qwen2TokenizerFast(vocab=vocabulary, merges=merges)
        assert tokenizer.encode(HARD_TEXT) == theirs(HARD_TEXT).input_ids
        expected = theirs.backend_tokenizer.pre_tokenizer.pre_tokenize_str(HARD_TEXT)
        assert cut == [piece for piece, _ in expected]


def test_an_unknown_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", "llama")
    metadata = GGUFFile(tmp_path / "m.gguf").metadata | {"tokenizer.ggml.pre": "tekken"}
    with pytest.raises(InputError, match="pre-tokenizer 'tekken' is not supported, expected one of gpt-2"):
        read_tokenizer(metadata, "file")


@pytest.mark.parametrize("bos", ["a b", "$A", "$B", "x:y"])
def test_a_first_token_that_a_template_would_misread_is_refused(bos: str) -> None:
    """The tokenizers library would repeat the text, or panic when it encodes one."""
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", bos, "</s>"],
        "tokenizer.ggml.scores": [0.0] * 3,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    with pytest.raises(InputError, match=re.escape(f"{bos!r} cannot be the token that begins a text")):
        read_tokenizer(metadata, "file")


def test_sentencepiece_is_merged_by_score_with_bytes_for_the_rest() -> None:
    """A vocabulary small enough to merge by hand: `hello` has the higher score than `ll`, spaces are kept."""
    pieces = ["<unk>", "<bos>", "<eos>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["h", "e", "l", "o", "▁", "he", "ll", "hell", "hello", "▁he", "lo"]
    scores = [0.0] * len(pieces) + [-100.0 - i for i in range(5)] + [-1.0, -2.0, -3.0, -4.0, -5.0, -1.5]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + words,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = read_tokenizer(metadata, "file")
    index = {piece: i for i, piece in enumerate(pieces + words)}
    # `lo` (-1.5) is merged before `ll` (-2), so `hello` cannot be reached.
    assert tokenizer.encode("hello") == [index["he"], index["l"], index["lo"]]
    assert tokenizer.encode("hell") == [index["hell"]]
    assert tokenizer.encode(" he") == [index["▁he"]]
    assert tokenizer.encode("é") == [index["<0xC3>"], index["<0xA9>"]]
    assert tokenizer.encode_prompt("he") == [1, index["he"]]
    text = "hello  héllo 東京\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    prefixed = read_tokenizer(metadata | {"tokenizer.ggml.add_space_prefix": True}, "file")
    assert prefixed.encode("he") == [index["▁he"]]
    assert prefixed.decode(prefixed.encode("hello hell")) == "hello hell"
