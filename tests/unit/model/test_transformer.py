"""The transformer computes what transformers' Llama, Qwen2 and Qwen3 compute, forward and backward."""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hf_weights import reference_pair, to_our_names

from ryzen_llm.cache import build_cache
from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig, Transformer

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {
        "hidden_size": 64,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 96,
    },
    "multi_query": {
        "hidden_size": 48,
        "num_layers": 2,
        "num_heads": 6,
        "num_kv_heads": 1,
        "intermediate_size": 80,
    },
    "every_head_its_own": {
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "intermediate_size": 40,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-6,
    },
    "wide_heads": {
        "hidden_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "intermediate_size": 64,
    },
}
SMALL = ModelConfig(vocab_size=97, max_position_embeddings=64, **SHAPES["grouped"])


def random_ids(*shape: int, vocab_size: int = 97) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("architecture", "shape"),
    [(a, s) for a in ("Llama", "Qwen2", "Qwen3") for s in SHAPES if (a, s) != ("Qwen2", "wide_heads")],
)
def test_logits_equal_those_of_transformers(architecture: str, shape: str, tied: bool) -> None:
    """Qwen2 has no head_dim of its own in transformers, so it is not tried with wide heads."""
    model, reference = reference_pair(architecture, vocab_size=97, tie_embeddings=tied, **SHAPES[shape])
    ids = random_ids(2, 70)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("architecture", "tied"), [("Llama", True), ("Qwen2", False), ("Qwen3", True)])
def test_loss_and_gradients_equal_those_of_transformers(architecture: str, tied: bool) -> None:
    model, reference = reference_pair(architecture, vocab_size=97, tie_embeddings=tied, **SHAPES["grouped"])
    ids = random_ids(2, 41)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, 5:9] = -100
    loss, num_correct = model.loss(inputs, targets)
    loss.backward()

    logits = reference(inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    assert num_correct.item() == (logits.argmax(-1) == targets).sum().item()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    for name, expected_gradient in to_our_names(gradients, model.config).items():
        gradient = model.get_parameter(name).grad
        assert expected_gradient.abs().max() > 1e-4, f"{name}: the reference gradient tests nothing"
        torch.testing.assert_close(
            gradient, expected_gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_bf16_autocast_stays_near_fp32_and_the_loss_is_fp32() -> None:
    torch.manual_seed(0)
    model = Transformer(SMALL)
    ids = random_ids(2, 33)
    exact, _ = model.loss(ids[:, :-1], ids[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = model.loss(ids[:, :-1], ids[:, 1:])
    assert rounded.dtype == torch.float32
    assert rounded.item() != exact.item()
    assert abs(rounded.item() - exact.item()) < 0.01 * exact.item()


def test_casting_the_model_to_bf16_leaves_the_rotary_angles_exact() -> None:
    """bf16 holds 8 bits, so a cast table would give positions 250 and 251 the same angles."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=97, max_position_embeddings=256, **SHAPES["grouped"])
    model = Transformer(config).to(torch.bfloat16)
    rounded_weights = copy.deepcopy(model).float()
    ids = random_ids(1, 256)
    with torch.no_grad():
        difference = (model(ids).float() - rounded_weights(ids)).abs().max()
        spread = rounded_weights(ids).std()
    assert difference < 0.1 * spread


def test_initial_weights_follow_gpt2_and_the_global_seed() -> None:
    config = ModelConfig.from_name("tiny", qkv_bias=True)
    torch.manual_seed(3)
    model = Transformer(config)
    torch.manual_seed(3)
    again = Transformer(config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    residual_std = 0.02 / math.sqrt(2 * config.num_layers)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(parameter.mean().item()) < 0.02 * expected, name


def test_an_untrained_model_predicts_uniformly() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_name("tiny"))
    ids = random_ids(4, 65, vocab_size=4096)
    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(4096), rel=0.02)


# Published parameter counts: the safetensors totals on each model's page.
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
        ("tinyllama-1.1b", 1_100_048_384),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, published: int) -> None:
    with torch.device("meta"):
        assert Transformer(ModelConfig.from_name(name)).num_parameters() == published


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_the_matrix_products(tied: bool) -> None:
    """Counted by PyTorch's own counter on the meta device, with attention as plain matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(
        vocab_size=64, max_position_embeddings=64, tie_embeddings=tied, **SHAPES["every_head_its_own"]
    )
    model = Transformer(config)
    ids = random_ids(2, 64, vocab_size=64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.loss(ids, ids)[0].backward()
    norms = config.hidden_size * (2 * config.num_layers + 1)  # parameters of no matrix product
    assert model.flops_per_token(64) * ids.numel() == counter.get_total_flops() + 6 * norms * ids.numel()


def test_num_parameters_counts_a_tied_matrix_once() -> None:
    tied, untied = Transformer(SMALL), Transformer(ModelConfig(**SMALL.to_dict() | {"tie_embeddings": False}))
    table = SMALL.vocab_size * SMALL.hidden_size
    assert untied.num_parameters() - tied.num_parameters() == table
    assert tied.num_parameters() - tied.num_parameters(exclude_embedding=True) == table
    assert untied.num_parameters() - untied.num_parameters(exclude_embedding=True) == table


def test_compiled_regions_change_neither_loss_nor_gradients_nor_names() -> None:
    """At 70 tokens, so that the CPU's attention in query blocks of 64 takes two."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL.to_dict() | {"num_layers": 2, "max_position_embeddings": 70}))
    compiled = copy.deepcopy(model)
    compiled.compile_blocks()
    ids = random_ids(2, 71)
    losses = [m.loss(ids[:, :-1], ids[:, 1:]) for m in (model, compiled)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-6)
    for loss, _ in losses:
        loss.backward()
    assert list(compiled.state_dict()) == list(model.state_dict())
    for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_document_in_a_row_of_several_has_the_logits_that_it_has_alone(compiled: bool) -> None:
    """Rotary positions are differences, so that they need not start anew; nothing else may be seen."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL.to_dict() | {"num_layers": 2, "max_position_embeddings": 140}))
    plain = copy.deepcopy(model)
    ids = random_ids(1, 140) % (SMALL.vocab_size - 1) + 1
    ends = [20, 90]
    ids[0, ends] = 0
    model.document_separator = 0
    if compiled:
        model.compile_blocks()
    logits = model(ids)
    for first, end in pairwise([0, *(at + 1 for at in ends), 140]):
        torch.testing.assert_close(logits[:, first:end], plain(ids[:, first:end]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[:, 91:], plain(ids)[:, 91:], atol=1e-3)


def test_activation_checkpointing_keeps_less_and_changes_no_gradient() -> None:
    model = Transformer(ModelConfig.from_name("tiny", num_layers=2, vocab_size=64))
    ids = torch.arange(2 * 33).view(2, 33) % 64
    results, kept = [], []
    for model.checkpoint_activations in (False, True):
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        kept.append(sum(seen.values()))
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    for with_checkpoints, without in zip(*results, strict=True):
        assert torch.equal(with_checkpoints, without)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert kept[1] - weights < 0.5 * (kept[0] - weights)


def small_cache(max_length: int) -> Any:
    return build_cache(
        "dense", SMALL, batch_size=1, max_length=max_length, dtype=torch.float32, device=torch.device("cpu")
    )


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 3, dtype=torch.int32), "int32, expected .batch, time. int64"),
        (torch.zeros(3, dtype=torch.int64), r"\(3,\)"),
        (torch.zeros(1, 0, dtype=torch.int64), "has 0 tokens"),
        (torch.zeros(1, 65, dtype=torch.int64), "65 tokens.*max_position_embeddings = 64"),
    ],
)
def test_bad_input_ids_are_named(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Transformer(SMALL)(ids)


def test_a_cache_does_not_stretch_the_context_or_record_gradients() -> None:
    model, cache = Transformer(SMALL), small_cache(100)
    with torch.no_grad():
        model(random_ids(1, 60), cache)
        with pytest.raises(InputError, match="65 tokens"):
            model(random_ids(1, 5), cache)
    assert cache.length == 60
    with pytest.raises(InputError, match="inference"):
        model(random_ids(1, 1), cache)


def test_misshapen_targets_are_named() -> None:
    with pytest.raises(InputError, match=r"targets are \(1, 4\)"):
        Transformer(SMALL).loss(random_ids(1, 5), random_ids(1, 4))


def test_an_unknown_embedding_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"model.embedding is 'pq', expected one of dense"):
        Transformer(ModelConfig(**SMALL.to_dict() | {"embedding": "pq"}))


def test_embedding_bytes_are_those_of_its_table() -> None:
    model = Transformer(SMALL)
    assert model.embedding.bytes_resident == 97 * 64 * 4
    assert model.to(torch.bfloat16).embedding.bytes_resident == 97 * 64 * 2
