"""Attention on the quantised form against softmax attention on the dequantised cache, on every path."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ryzen_llm.kernels import cached_attention, hadamard
from ryzen_llm.kernels.cached_attention import Stored, reference
from ryzen_llm.kernels.hadamard import _kept_matrix

sys.path.append(str(Path(__file__).parent))
from random_cache import FORMATS, PAIRS, SETTINGS, case


@pytest.mark.parametrize("window", [0, 33])
@pytest.mark.parametrize(
    # The reference puts sinks in the first slots, which a ring overwrites.
    ("setting", "sinks"),
    [(s, n) for s in SETTINGS for n in (0, 3) if not (n and "ring" in s)],
    ids=str,
)
@pytest.mark.parametrize(("keys", "values"), PAIRS)
def test_it_is_attention_on_the_dequantised_cache(
    keys: str,
    values: str,
    setting: dict[str, Any],
    window: int,
    sinks: int,
) -> None:
    arguments = case(keys, values, **setting) | {"window": window}
    if sinks:
        arguments["sinks"] = tuple(
            torch.randn(2, stored.codes.shape[1], sinks, stored.width)
            for stored in (arguments["keys"], arguments["values"])
        )
    torch.testing.assert_close(cached_attention(**arguments), reference(**arguments), atol=2e-5, rtol=2e-5)


def test_many_queries_and_keys_are_done_block_by_block() -> None:
    """1100 queries over 1100 keys: three blocks of each, most of the upper half skipped."""
    draw = torch.Generator().manual_seed(0)
    keys, values = (FORMATS[n].encode(torch.randn(1, 1, 1100, 16, generator=draw)) for n in ("int8", "int4"))
    queries = torch.randn(1, 2, 1100, 16, generator=draw)
    positions = torch.arange(1100)[None]
    got = cached_attention(queries, keys, values, positions)
    torch.testing.assert_close(got, reference(queries, keys, values, positions), atol=2e-5, rtol=2e-5)


def test_a_prompts_attention_does_not_depend_on_the_room_in_the_cache() -> None:
    """To the bit: a decoder that needs some more room writes the same text."""
    torch.manual_seed(0)
    positions = torch.arange(132)[None]
    queries = torch.randn(1, 9, 132, 64).bfloat16()
    keys, values = (torch.randn(1, 3, 132, 64).bfloat16() for _ in range(2))
    contexts = []
    for room in (0, 96, 104, 200):
        slots = [Stored(F.pad(x, (0, 0, 0, room), value=7.0)) for x in (keys, values)]
        contexts.append(cached_attention(queries, *slots, positions))
    assert all(torch.equal(context, contexts[0]) for context in contexts)


def test_the_hadamard_rotation_is_orthonormal_and_its_own_inverse() -> None:
    x = torch.randn(3, 96)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-5)
    assert torch.allclose(hadamard(x).norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    spike = torch.zeros(64)
    spike[5] = 8.0
    assert torch.allclose(hadamard(spike).abs(), torch.ones(64)), "an outlier is spread over all channels"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_rotation_first_used_in_inference_can_be_trained_through(compiled: bool) -> None:
    """Its matrix is kept for the process: generation, then training, in one process failed in autograd."""
    _kept_matrix.cache_clear()
    form = torch.compile(hadamard, fullgraph=True) if compiled else hadamard
    x = torch.randn(3, 64)
    with torch.inference_mode():
        form(x)
    x.requires_grad_()
    form(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), atol=1e-5, rtol=1e-5)


triton_kernel = pytest.importorskip("ryzen_llm.kernels.cached_attention_triton", reason="needs triton")


def test_the_kernel_in_the_interpreter() -> None:
    """In a process of its own, since Triton decides when it is imported whether it interprets."""
    path = Path(__file__).with_name("interpreted_cached_attention.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]


CONTEXT, LOGSUMEXP = (
    triton_kernel.attend_split.arg_names.index(f"{n}_ptr") for n in ("context", "logsumexp")
)


class Ones:
    """In the kernel's place: contexts of 1."""

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        return self.start

    def start(self, *arguments: Any, **constants: Any) -> None:
        # Inductor would give a float as fp64, and the kernel's sums would not stay fp32.
        assert not any(isinstance(argument, float) for argument in arguments)
        arguments[CONTEXT].fill_(1)
        arguments[LOGSUMEXP].fill_(0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_decoding_step_on_a_gpu_can_be_one_graph(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `Generator` compiles it there: nothing around the kernel ends the graph."""
    monkeypatch.setattr(triton_kernel, "attend_split", Ones())
    a = case("int4", "int4", time=2)
    decode: Callable[..., torch.Tensor] = triton_kernel.decode
    if compiled:
        decode = torch.compile(decode, fullgraph=True, backend="eager")
    got = decode(a["queries"], [(a["keys"], a["values"], 0, 0)], a["positions"], 0)
    assert torch.equal(got, torch.ones_like(a["queries"]))


KINDS = {"dense": (0, "", False, False), "int8": (0, "i8", True, False), "int4": (1, "u8", True, True)}
KINDS["fp8"] = (2, "u8", True, False)
KINDS["int4, fine"] = KINDS["int4"]


def fits_a_gpu(keys: str, values: str, capability: int, head_dim: int, rows: int, dtype: torch.dtype) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants: dict[str, Any] = {
        "KEY_DIM": head_dim + (head_dim // 8 if keys == "int4, fine" else 0),
        "HEAD_DIM": head_dim,
        "ROWS": rows,
        "BLOCK": triton_kernel.block_slots(head_dim, dtype),
    }
    types = dict.fromkeys(triton_kernel.attend_split.arg_names, "i32")
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    types |= {"q_ptr": f"*{name}", "positions_ptr": "*i64"}
    types |= {"context_ptr": "*fp32", "logsumexp_ptr": "*fp32"}
    for prefix, (kind, codes, scale, minimum) in (("k", KINDS[keys]), ("v", KINDS[values])):
        upper = prefix.upper()
        constants |= {f"{upper}_KIND": kind, f"{upper}_SCALE": scale, f"{upper}_MINIMUM": minimum}
        types |= {f"{prefix}_ptr": f"*{codes or name}"}
        types |= {f"{prefix}_{part}_ptr": "*fp16" for part in ("scale", "minimum")}
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=triton_kernel.attend_split, signature=types, constexprs=constants)
    built = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert built.asm["cubin"]
    assert built.metadata.shared <= 160 * 1024, "more shared memory than an A100 has for a block"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ("dense", "dense"),
        ("int8", "int8"),
        ("int8", "int4"),
        ("int4", "int4"),
        ("int4, fine", "int4"),
        ("fp8", "fp8"),
    ],
)
@pytest.mark.parametrize(
    ("head_dim", "rows"),
    [
        pytest.param(head_dim, rows, marks=() if (head_dim, rows) == (64, 16) else pytest.mark.slow)
        for head_dim in (64, 96, 128, 256)
        for rows in (16, 64)
    ],
)
def test_every_configuration_compiles_without_a_gpu(
    keys: str, values: str, capability: int, head_dim: int, rows: int
) -> None:
    """Types and shared memory, which the interpreter does not check."""
    fits_a_gpu(keys, values, capability, head_dim, rows, torch.bfloat16)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("keys", ["dense", "fp8"])
def test_full_precision_fits_a_gpu(keys: str, head_dim: int) -> None:
    fits_a_gpu(keys, keys, 80, head_dim, 64, torch.float32)
