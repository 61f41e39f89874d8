"""What is exported is what transformers computes with, and what comes back in."""

import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from random_models import TEMPLATE, random_ids, save
from safetensors.torch import load_file, save_file

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


def assert_transformers_agrees(exported: Path, model: Transformer, ids: torch.Tensor) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=2e-5, rtol=1e-5)


def test_in_and_out_and_in_again_is_bit_exact_and_transformers_agrees(
    every_kind: tuple[Path, Any], tmp_path: Path
) -> None:
    directory, reference = every_kind
    model, tokenizer = load_pretrained(directory)
    exported = export_pretrained(model, tokenizer, tmp_path / "out")
    again, same_tokenizer = load_pretrained(exported)
    assert same(model, again)
    assert {file.stat().st_mode & 0o777 for file in exported.iterdir()} == {0o644}
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
    with pytest.raises(InputError, match="~nobodyx/out: Could not determine home directory"):
        export_pretrained(model, tokenizer, "~nobodyx/out")
    out = tmp_path / "out"

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr("ryzen_llm.interop.export.save_file", fail)
        with pytest.raises(InputError, match=r"cannot be written .disk full"):
            export_pretrained(model, tokenizer, out)
    assert set(tmp_path.iterdir()) == before

    most, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # safetensors has an error of its own
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most[1]))
        with pytest.raises(InputError, match=r"cannot be written .*File too large"):
            export_pretrained(model, tokenizer, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
        signal.signal(signal.SIGXFSZ, handler)
    assert set(tmp_path.iterdir()) == before


def test_a_gemma_without_windows_is_one_that_transformers_runs(directory: Path, tmp_path: Path) -> None:
    """Which wants a window in config.json, also where no layer has one."""
    _, tokenizer = load_pretrained(directory)
    gemma = {"qk_norm": True, "post_norms": True, "scale_embeddings": True, "activation": "gelu_tanh"}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE, **gemma)).eval()
    exported = export_pretrained(model, tokenizer, tmp_path / "out")
    assert same(load_pretrained(exported)[0], model)
    assert_transformers_agrees(exported, model, random_ids(1, 20))


def test_gemmas_norms_in_bf16_are_exported_exactly(directory: Path, tmp_path: Path) -> None:
    """Less one, they need more than bf16."""
    _, tokenizer = load_pretrained(directory)
    model = Transformer(
        ModelConfig(**SHAPE, qk_norm=True, post_norms=True, scale_embeddings=True, activation="gelu_tanh")
    )
    with torch.no_grad():
        model.norm.weight.uniform_(0.01, 0.2)
    model.to(torch.bfloat16)
    again, _ = load_pretrained(export_pretrained(model, tokenizer, tmp_path / "out"))
    torch.testing.assert_close(again.norm.weight, model.norm.weight.float(), atol=1e-7, rtol=0)


def test_a_mistral_with_windows_in_some_layers_is_exported(directory: Path, tmp_path: Path) -> None:
    """As an architecture that computes the same."""
    _, tokenizer = load_pretrained(directory)
    model = Transformer(ModelConfig(**SHAPE, sliding_window=7, sliding_layers=(0, 2))).eval()
    exported = export_pretrained(model, tokenizer, tmp_path / "out")
    assert same(load_pretrained(exported)[0], model)
    assert_transformers_agrees(exported, model, random_ids(1, 40))


def test_a_combination_that_no_architecture_has_is_refused(directory: Path, tmp_path: Path) -> None:
    _, tokenizer = load_pretrained(directory)
    model = Transformer(ModelConfig(**SHAPE, qkv_bias=True, qk_norm=True))
    with pytest.raises(InputError, match="no architecture of transformers has"):
        export_pretrained(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


COMPRESSED: dict[str, dict[str, Any]] = {
    "factorized": {"rank": 4},
    "hashed": {"buckets": 20},
    "product": {"width": 4, "entries": 16},
    "quantized": {"bits": 4, "packed": True},
}


@pytest.fixture(params=COMPRESSED)
def compressed(request: pytest.FixtureRequest, directory: Path) -> tuple[Transformer, Any]:
    kind = request.param
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE, embedding=kind, embedding_settings=COMPRESSED[kind]))
    with torch.no_grad():
        for tensor in model.embedding.state_dict().values():
            if tensor.dtype == torch.uint8 and kind == "quantized":  # zero until something is compressed
                tensor.random_(256)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.2)
    return model.eval(), load_pretrained(directory)[1]


def test_a_compressed_embedding_is_exported_as_the_dense_one_that_it_stands_for(
    compressed: tuple[Transformer, Any], tmp_path: Path
) -> None:
    model, tokenizer = compressed
    exported = export_pretrained(model, tokenizer, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    again, _ = load_pretrained(exported)
    assert again.config.embedding == "dense"
    ids = random_ids(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again(ids), model(ids), atol=1e-5, rtol=1e-5)


def test_asked_to_it_stays_compressed_and_transformers_refuses_it(
    compressed: tuple[Transformer, Any], tmp_path: Path
) -> None:
    model, tokenizer = compressed
    exported = export_pretrained(model, tokenizer, tmp_path / "out", densify=False, dtype="bf16")
    again, same_tokenizer = load_pretrained(exported)
    assert same_tokenizer.to_json() == tokenizer.to_json()
    model.replace_embedding(model.embedding.compressed())
    assert again.config == model.config
    theirs = again.embedding.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.embedding.state_dict().items())
    assert torch.equal(again.norm.weight, model.norm.weight.to(torch.bfloat16).float())
    with pytest.raises((ValueError, KeyError), match="ryzen_llm"):
        transformers.AutoModelForCausalLM.from_pretrained(exported)
    in_half, _ = load_pretrained(exported, "bf16")
    ids = random_ids(1, 20)
    with torch.no_grad():
        agreement = torch.nn.functional.cosine_similarity(in_half(ids).float(), again(ids), dim=-1)
    assert agreement.min() > 0.99


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("quantized", {"bits": [[100, 4], [200, 2]]}),
        ("product", {"width": 4, "entries": 16}),
    ],
)
def test_an_embedding_in_the_form_that_is_trained_stays_compressed_by_being_packed(
    kind: str, settings: dict[str, Any], directory: Path, tmp_path: Path
) -> None:
    _, tokenizer = load_pretrained(directory)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE, embedding=kind, embedding_settings=settings)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported = export_pretrained(model, tokenizer, tmp_path / "out", densify=False)
    assert model.config.embedding_settings == settings
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(name == "embedding.weight" for name in load_file(exported / "model.safetensors"))
    again, _ = load_pretrained(exported)
    model.replace_embedding(model.embedding.compressed())
    assert same(again, model)
    with torch.no_grad():
        assert torch.equal(again(random_ids(2, 20)), model(random_ids(2, 20)))


@pytest.mark.parametrize("compressed", ["factorized"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 10**6}, "1000000 layers, expected 1 to 1000"),
        ({"num_layers": 2}, "not expected: blocks.2"),
        ({"hidden_size": 64}, "of another shape"),
        ({"hidden_size": 2**30, "head_dim": 8}, "of another shape|its sizes make no model"),
        ({"embedding": "unknown"}, "model.embedding is 'unknown'"),
        ({"embedding_settings": {"rank": 5}}, "of another shape"),
        ({"embedding_settings": {"rank": [5]}}, "rank"),
        ({"rope_scaling": {"kind": []}}, "rope_scaling"),
        ({"nonsense": 1}, "unknown model field 'nonsense'"),
    ],
)
def test_a_compressed_directory_that_lies_is_refused(
    change: dict[str, Any], message: str, compressed: tuple[Transformer, Any], tmp_path: Path
) -> None:
    exported = export_pretrained(*compressed, tmp_path / "out", densify=False)
    values = json.loads((exported / "config.json").read_text())
    values["model"] |= change
    (exported / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        load_pretrained(exported)


@pytest.mark.parametrize(
    ("kind", "name", "harm", "message"),
    [
        ("product", "codes", lambda codes: codes + 200, "codes reach 215, expected less than 16"),
        (
            "product",
            "codes",
            lambda codes: codes.float() + 0.5,
            "embedding.codes is of dtype float32, expected",
        ),
        ("quantized", "position", lambda order: order + 1, "position is no order of 300 rows"),
        ("quantized", "position", lambda order: order * 0, "position is no order of 300 rows"),
        ("quantized", "signs", lambda signs: signs * 3, "signs are not all 1 or -1"),
        ("quantized", "scale_0", lambda scale: scale.int(), "embedding.scale_0 is of dtype int32, expected"),
    ],
)
def test_a_compressed_embedding_that_is_damaged_is_refused(
    kind: str, name: str, harm: Any, message: str, directory: Path, tmp_path: Path
) -> None:
    _, tokenizer = load_pretrained(directory)
    settings: dict[str, Any] = {"width": 4, "entries": 16, "packed": True}
    if kind == "quantized":
        settings = {"bits": [[100, 4], [200, 2]], "reordered": True, "packed": True}
    model = Transformer(ModelConfig(**SHAPE, embedding=kind, embedding_settings=settings))
    if kind == "product":
        model.embedding.get_buffer("codes").fill_(15)
    exported = export_pretrained(model, tokenizer, tmp_path / "out", densify=False)
    load_pretrained(exported)
    weights = load_file(exported / "model.safetensors")
    harmed = harm(weights[f"embedding.{name}"].to(torch.int32 if name == "position" else None))
    weights[f"embedding.{name}"] = harmed.to(torch.uint16) if name == "position" else harmed
    save_file(weights, exported / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load_pretrained(exported)
