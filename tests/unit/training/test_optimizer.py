"""AdamW decays matrices only and steps by its formula; schedules follow theirs; bad settings are refused."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig, Transformer
from ryzen_llm.training import OptimizerConfig, build_adamw

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_norms_and_biases_are_not_decayed_and_every_parameter_is_in_one_group(tie_embeddings: bool) -> None:
    model = Transformer(ModelConfig(**SHAPE, tie_embeddings=tie_embeddings, qkv_bias=True, qk_norm=True))
    groups = build_adamw(model, OptimizerConfig(weight_decay=0.3)).param_groups
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) == len(decay_of)
    for name, parameter in model.named_parameters():
        undecayed = name.endswith(("norm.weight", ".bias"))
        assert decay_of[id(parameter)] == (0.0 if undecayed else 0.3), name


def test_a_frozen_parameter_is_left_out_and_so_is_an_empty_group() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2, bias=False))
    model[0].requires_grad_(False)
    (group,) = build_adamw(model, OptimizerConfig()).param_groups
    assert [id(p) for p in group["params"]] == [id(model[1].weight)]


def test_not_fused_it_is_as_fast_as_pytorchs_default() -> None:
    """Which takes the forms for many tensors at once where both are left to it, as on a GPU."""
    model = torch.nn.Linear(3, 2)
    found, default = build_adamw(model, OptimizerConfig(), fused=False), torch.optim.AdamW(model.parameters())
    for group in found.param_groups:
        assert [group[key] for key in ("fused", "foreach")] == [
            default.defaults[key] for key in ("fused", "foreach")
        ]


@pytest.mark.parametrize("fused", [True, False])
def test_steps_equal_the_formula_in_fp64(fused: bool) -> None:
    """Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2, written out."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    config = OptimizerConfig(learning_rate=0.02, weight_decay=0.3, beta1=0.8, beta2=0.9)
    optimizer = build_adamw(model, config, fused=fused)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.items()}
    for step in range(1, 5):
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape)
            parameter.grad = gradient.clone()
            decay = 0.3 if name == "weight" else 0.0
            first, second = moments[name]
            first = 0.8 * first + 0.2 * gradient.double()
            second = 0.9 * second + 0.1 * gradient.double() ** 2
            moments[name] = first, second
            update = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
            expected[name] = expected[name] * (1 - 0.02 * decay) - 0.02 * update
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def curve(config: OptimizerConfig, total: int) -> list[float]:
    return [config.factor(step, total) for step in range(total)]


def test_cosine_rises_linearly_then_falls_along_half_a_cosine_to_its_end() -> None:
    config = OptimizerConfig(warmup_fraction=0.1, final_fraction=0.2)
    warmup = [(step + 1) / 11 for step in range(10)]  # the step before the first one would have rate 0
    decay = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 89)) / 2 for step in range(90)]
    assert curve(config, 100) == pytest.approx(warmup + decay, rel=1e-12)
    assert decay[0] == 1.0
    assert decay[-1] == pytest.approx(0.2)


def test_wsd_rises_holds_and_falls_linearly_to_its_end() -> None:
    config = OptimizerConfig(schedule="wsd", warmup_fraction=0.1, decay_fraction=0.3, final_fraction=0.05)
    corners = [-1, 10, 70, 99], [0.0, 1.0, 1.0, 0.05]
    assert curve(config, 100) == pytest.approx(np.interp(range(100), *corners).tolist(), rel=1e-12)


@given(
    schedule=st.sampled_from(["cosine", "wsd"]),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    final=st.floats(0, 1),
    total=st.integers(1, 300),
)
def test_any_schedule_rises_once_then_falls_and_stays_at_its_end(
    schedule: Any, warmup: float, decay: float, final: float, total: int
) -> None:
    """Also for runs of a few steps, and past the end, where Lightning asks once more."""
    config = OptimizerConfig(
        schedule=schedule, warmup_fraction=warmup, decay_fraction=decay, final_fraction=final
    )
    factors = curve(config, total)
    peak = factors.index(max(factors))
    rising, falling = factors[: peak + 1], factors[peak:]
    assert rising == sorted(rising)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(falling))
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[0] > 0 or final == 0
    decaying = round(decay * total) if schedule == "wsd" else total - round(warmup * total)
    if decaying >= 2:
        assert factors[-1] == pytest.approx(final)
        assert config.factor(total, total) == pytest.approx(final)


@pytest.mark.parametrize(
    ("settings", "naming"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta1": -0.1}, "beta1"),
        ({"beta2": 1.5}, "beta2"),
        ({"beta2": math.nan}, "beta2"),
        ({"warmup_fraction": -0.1}, "warmup_fraction"),
        ({"warmup_fraction": 1.1}, "warmup_fraction"),
        ({"decay_fraction": math.nan}, "decay_fraction"),
        ({"final_fraction": 2.0}, "final_fraction"),
        ({"schedule": "wsd", "warmup_fraction": 0.6, "decay_fraction": 0.5}, "warmup_fraction"),
    ],
)
def test_a_setting_that_cannot_work_is_named(settings: dict[str, Any], naming: str) -> None:
    with pytest.raises(InputError, match=f"optimizer.{naming}"):
        OptimizerConfig(**settings)
