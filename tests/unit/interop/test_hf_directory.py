"""A directory of transformers gives a model of the same logits, or is refused by the name of the obstacle."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from random_models import LAYERS, TEMPLATE, random_ids, save
from safetensors.torch import load_file, save_file

from ryzen_llm.data import Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.interop import export_pretrained, load_pretrained, render_chat


def test_logits_equal_those_of_transformers(every_kind: tuple[Path, Any]) -> None:
    """At 70 tokens, beyond every window, and with yarn's stretched part in use."""
    directory, reference = every_kind
    model, _ = load_pretrained(directory)
    ids = random_ids(2, 70)
    with torch.no_grad():
        expected = reference(ids).logits
        found = model(ids)
    assert expected.std() > 0.1, "logits as good as equal prove little"
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save("llama", tmp_path / "llama")
    return tmp_path / "llama"


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; one set to `...` is taken out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(directory: Path, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(weights, directory / "model.safetensors")
    model, _ = load_pretrained(directory)
    assert model.norm.weight.dtype == torch.float32
    assert torch.equal(model.norm.weight, weights["model.norm.weight"].float())
    assert torch.equal(model.embedding.get_parameter("weight"), weights["model.embed_tokens.weight"].float())


def test_gemmas_norms_in_half_precision_lose_nothing(tmp_path: Path) -> None:
    """They are stored less one, which bf16 could not hold beside small weights."""
    save("gemma3", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model, _ = load_pretrained(tmp_path)
    ids = random_ids(2, 70)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=2e-5, rtol=1e-5)


def test_shards_give_the_same_model_as_one_file(directory: Path, tmp_path: Path) -> None:
    save("llama", tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole, _ = load_pretrained(directory)
    sharded, _ = load_pretrained(tmp_path / "sharded")
    for (name, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_tied_head_saved_a_second_time_is_no_surprise(tmp_path: Path) -> None:
    """transformers leaves it out; older converters did not."""
    save("llama tied, as SmolLM2", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    model, _ = load_pretrained(tmp_path)
    assert model.head is None


def test_rope_frequencies_in_old_files_are_passed_over(directory: Path) -> None:
    """Llama 2's early conversions have them in every layer."""
    expected, _ = load_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    for layer in range(expected.config.num_layers):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    save_file(weights, directory / "model.safetensors")
    model, _ = load_pretrained(directory)
    with torch.no_grad():
        torch.testing.assert_close(model(random_ids(1, 9)), expected(random_ids(1, 9)), atol=0, rtol=0)


def test_a_head_that_is_not_the_embedding_it_is_said_to_be_is_refused(tmp_path: Path) -> None:
    """transformers 5 computes with both of them, those before it with the embedding."""
    save("llama tied, as SmolLM2", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head.weight is not the embedding that config.json ties it to"):
        load_pretrained(tmp_path)
    del weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 missing: model.embed_tokens.weight"):
        load_pretrained(tmp_path)


def test_of_one_file_and_an_index_transformers_takes_the_file_and_so_do_we(directory: Path) -> None:
    """An index is left over where a model of several files was trained on and saved in one."""
    weights = load_file(directory / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, directory / "old.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "old.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model, _ = load_pretrained(directory)
    with torch.no_grad():
        torch.testing.assert_close(model(random_ids(1, 9)), theirs(random_ids(1, 9)).logits)


@pytest.mark.parametrize("name", ["sliding_window_pattern", "_sliding_window_pattern"])
def test_gemmas_pattern_is_read_by_the_name_that_transformers_reads(name: str, tmp_path: Path) -> None:
    """It writes the second name, and never reads it."""
    save("gemma3 of 7 layers", tmp_path)
    edit(tmp_path / "config.json", **{"layer_types": ..., "_sliding_window_pattern": 6} | {name: 2})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model, _ = load_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            model(random_ids(1, 40)), theirs(random_ids(1, 40)).logits, atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("llama", ["full_attention"] * 3),
        ("mistral with a window", ["full_attention"] * 3),
        ("mistral with a window", ["sliding_attention"] * 3),
        ("mistral with a window", LAYERS),
    ],
)
def test_layer_types_of_llama_and_mistral_are_read_as_by_transformers(
    kind: str, layers: list[str], tmp_path: Path
) -> None:
    """Which takes a Mistral that has them for a Ministral."""
    save(kind, tmp_path)
    edit(tmp_path / "config.json", layer_types=layers)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model, _ = load_pretrained(tmp_path)
    ids = random_ids(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=2e-5, rtol=1e-5)


def test_a_mistral_of_full_layers_without_a_window_is_one_without_layer_types(tmp_path: Path) -> None:
    """Ministral's code asks for a window that no layer has, and fails."""
    reference = save("mistral", tmp_path)
    edit(tmp_path / "config.json", layer_types=["full_attention"] * 3)
    model, _ = load_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            model(random_ids(1, 40)), reference(random_ids(1, 40)).logits, atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("kind", "layers", "message"),
    [
        ("llama", LAYERS, "layer_types has sliding_attention, expected full_attention: llama has no windows"),
        ("mistral", LAYERS, "layer_types has sliding layers, but no sliding_window is in use"),
        ("llama", ["full_attention"] * 2, "layer_types is not full_attention or .* for each of 3 layers"),
        ("mistral", ["chunked_attention"] * 3, "layer_types is not full_attention or"),
        ("llama", "full_attention", "layer_types is 'full_attention', expected a list of str"),
    ],
)
def test_layer_types_that_cannot_be_are_refused(kind: str, layers: Any, message: str, tmp_path: Path) -> None:
    save(kind, tmp_path)
    edit(tmp_path / "config.json", layer_types=layers)
    with pytest.raises(InputError, match=message):
        load_pretrained(tmp_path)


def test_what_transformers_wrote_before_its_fifth_version_reads_the_same(tmp_path: Path) -> None:
    """rope_theta and rope_scaling beside each other, and the kind of scaling as `type`."""
    reference = save("llama with linear rope", tmp_path)
    edit(
        tmp_path / "config.json",
        rope_parameters=...,
        rope_theta=10000.0,
        rope_scaling={"type": "linear", "factor": 2.0},
    )
    model, _ = load_pretrained(tmp_path)
    ids = random_ids(1, 60)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, atol=2e-5, rtol=1e-5)


def test_the_published_config_of_smollm2_is_understood(directory: Path) -> None:
    """Its keys that are nobody else's: is_llama_config, rope_interleaved, transformers.js_config."""
    edit(
        directory / "config.json",
        is_llama_config=True,
        rope_interleaved=False,
        rope_scaling=None,
        pretraining_tp=1,
        torch_dtype="bfloat16",
        return_dict=True,  # not SmolLM2's, but of others of its time
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    )
    load_pretrained(directory)


def test_the_tokenizer_knows_what_ends_a_generation_and_its_template(directory: Path) -> None:
    edit(directory / "generation_config.json", eos_token_id=[2, 0])
    _, tokenizer = load_pretrained(directory)
    assert tokenizer.stop_ids == (0, 2)
    assert tokenizer.special.eos == "<|im_end|>"
    assert tokenizer.special.chat_template == TEMPLATE
    assert tokenizer.decode(tokenizer.encode("the cat, naïve")) == "the cat, naïve"


NAMED = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ sep_token is defined }}"


@pytest.mark.parametrize("place", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_chat_template_has_the_special_tokens_that_the_files_name(
    place: str, directory: Path, tmp_path: Path
) -> None:
    """In the older place, too, and still after an export and in a checkpoint's form of the tokenizer."""
    (directory / "chat_template.jinja").write_text(NAMED)
    named = {"unk_token": "<|endoftext|>", "pad_token": {"content": "<|im_start|>"}, "mask_token": None}
    if place == "special_tokens_map.json":
        (directory / place).write_text("{}")
    edit(directory / place, **named)
    model, tokenizer = load_pretrained(directory)
    text = "|<|im_end|>|<|endoftext|>|<|im_start|>|False"
    messages = [{"role": "user", "content": "hi"}]
    assert render_chat(tokenizer, messages) == text
    assert render_chat(Tokenizer.from_json(tokenizer.to_json()), messages) == text
    exported = export_pretrained(model, tokenizer, tmp_path / "out")
    assert render_chat(load_pretrained(exported)[1], messages) == text
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    assert theirs.apply_chat_template(messages, tokenize=False) == text


# By what is changed in config.json, the words of the refusal.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"model_type": "mixtral"}, "'mixtral' is not supported, expected one of llama"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
    "no architecture": ({"model_type": ...}, "model_type is missing"),
    "an activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, expected 'silu'"),
    "attention biases": ({"attention_bias": True}, "attention_bias = True is not supported"),
    "MLP biases": ({"mlp_bias": True}, "mlp_bias"),
    "a kind of rope": (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}},
        "'longrope' is not supported",
    ),
    "a partial rope": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "'partial_rotary_factor' = 0.5 is not a known option",
    ),
    "rope twice": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "both rope_scaling and"),
    "quantised weights": ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
    "an unknown option": ({"logit_scale": 0.5}, "'logit_scale' = 0.5 is not a known option"),
    "experts": ({"num_local_experts": 8}, "'num_local_experts'"),
    "softcapping": ({"final_logit_softcapping": 30.0}, "'final_logit_softcapping'"),
    "attention to what follows": ({"is_causal": False}, "is_causal = False is not supported"),
    "a window in llama": ({"sliding_window": 4096}, "'sliding_window'"),
    "a text for a number": ({"hidden_size": "32"}, "hidden_size is '32', expected a whole number"),
    "true for a number": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "a list for a number": ({"vocab_size": [300]}, "vocab_size is"),
    "a number for a flag": ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
    "null for what is needed": ({"hidden_size": None}, "hidden_size is missing"),
    "a huge number": ({"hidden_size": 10**400}, "hidden_size is"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "1000000000 layers, expected 1 to"),
    "no layers": ({"num_hidden_layers": 0}, "0 layers"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_kv_heads is 3"),
    "an infinite base": ({"rope_parameters": None, "rope_theta": float("inf")}, "rope_theta is inf"),
    "another size": ({"intermediate_size": 64}, "of another shape: model.layers.0.mlp.down_proj.weight is"),
    "more layers": ({"num_hidden_layers": 4}, "9 missing: model.layers.3.input_layernorm.weight"),
    "fewer layers": ({"num_hidden_layers": 2}, "9 not expected: model.layers.2"),
    "a tied head": (
        {"vocab_size": 301},
        r"2 of another shape: lm_head.weight is \[300, 32\], expected \[301",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_supported_is_refused_by_name(kind: str, directory: Path) -> None:
    changes, message = REFUSED[kind]
    edit(directory / "config.json", **changes)
    with pytest.raises(InputError, match=message) as raised:
        load_pretrained(directory)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_gemmas_softcapping_and_bidirectional_attention_are_refused(tmp_path: Path) -> None:
    save("gemma3", tmp_path)
    for name, value in {"attn_logit_softcapping": 50.0, "use_bidirectional_attention": True}.items():
        edit(tmp_path / "config.json", **{name: value})
        with pytest.raises(InputError, match=name):
            load_pretrained(tmp_path)
        edit(tmp_path / "config.json", **{name: ...})


def test_a_quantised_tensor_is_refused(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"model.norm.weight is of dtype I8.*quantised"):
        load_pretrained(directory)


def test_a_directory_of_pickles_is_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin is a pickle, which is never read"):
        load_pretrained(directory)


def test_a_directory_without_tokenizer_says_how_to_get_one(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer.json; save it"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    "name",
    ["../llama/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "a\0.safetensors", "x.bin"],
)
def test_shards_are_of_the_directory_itself(directory: Path, name: str) -> None:
    (directory / "model.safetensors").rename(directory.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"expected a .safetensors file of the same directory"):
        load_pretrained(directory)


def test_a_tensor_in_two_shards_is_refused(directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory / "again.safetensors")
    (directory / "model.safetensors").rename(directory / "once.safetensors")
    index = {"weight_map": {"a": "once.safetensors", "b": "again.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="is in another file of the model too"):
        load_pretrained(directory)
