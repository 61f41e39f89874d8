"""On a GPU: the Triton kernel against the fp32 formula, a CUDA graph against single steps on the CPU."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ryzen_llm.decoding import Generator
from ryzen_llm.kernels import Stored, cached_attention
from ryzen_llm.kernels.cached_attention import reference
from ryzen_llm.model import ModelConfig, Transformer

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from random_cache import PAIRS, SETTINGS, case

pytestmark = pytest.mark.gpu


def on_gpu(value: Any) -> Any:
    if isinstance(value, Stored):
        return value.map(torch.Tensor.cuda)
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize(("keys", "values"), [*PAIRS, ("fp8", "fp8")])
def test_the_kernel_gives_attention_on_the_dequantised_cache(
    keys: str, values: str, setting: dict[str, Any]
) -> None:
    arguments = case(keys, values, **setting)
    got = cached_attention(**{name: on_gpu(value) for name, value in arguments.items()})
    torch.testing.assert_close(got.cpu(), reference(**arguments), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dense", "int8", "k8v4", "int4-sinks", "fp8"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_cuda_graph_gives_the_ids_of_single_steps(cache: str, compile: bool) -> None:
    torch.manual_seed(1)  # which leaves no near tie among the first tokens
    config = ModelConfig(
        vocab_size=101,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=64,
        max_position_embeddings=256,
    )
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompt = torch.randint(0, 101, (2, 120))
    cuda = Generator(model.cuda(), cache=cache, weights="fp32", compile=compile)
    ids = cuda.generate(prompt, max_new_tokens=30).ids.cpu()
    with torch.no_grad():
        if cache == "dense":
            scored = model.cpu()(ids)[:, 119:-1]
            chosen = scored.gather(-1, ids[:, 120:, None])[..., 0]
            assert (chosen >= scored.amax(-1) - 1e-3).all()
        else:
            on_cpu = Generator(model.cpu(), cache="int8" if cache == "fp8" else cache, weights="fp32")
            expected = on_cpu.generate(prompt, max_new_tokens=30).ids
            # Rounding may tip a near tie after some steps; the first are far from that.
            assert torch.equal(ids[:, :122], expected[:, :122])
