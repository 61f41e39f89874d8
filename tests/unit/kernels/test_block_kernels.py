"""Triton kernels of a block and of quantised weights: interpreted, on a GPU, and compiled for two of them."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is there on Linux only")


def run(environment: dict[str, str]) -> None:
    script = str(Path(__file__).with_name("interpreted_block_kernels.py"))
    command = [sys.executable, "-m", "pytest", "-q", script, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, which the interpreter is not for")
def test_interpreted() -> None:
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    run({"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    run({})


def build(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, warps: int = 4
) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature = {
        name: "constexpr" if name in constants else types.get(name, "fp32" if name in FLOATS else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


FLOATS = ("eps", "query_scale")
FP32_POINTERS = ("weight_ptr", "inverse_rms_ptr", "by_", "cos_ptr", "sin_ptr")


def pointers(kernel: Any, dtype: str) -> dict[str, str]:
    """Activations of `dtype`; weights, tables and sums fp32, as under autocast."""
    names = [name for name in kernel.arg_names if name.endswith("_ptr")]
    return {name: "*fp32" if any(p in name for p in FP32_POINTERS) else f"*{dtype}" for name in names}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("flag", [True, False])
def test_every_kernel_compiles_without_a_gpu(capability: int, dtype: str, flag: bool) -> None:
    """Type and shared-memory errors, which the interpreter cannot see; at the largest sizes."""
    import triton.language as tl

    from ryzen_llm.kernels import gated_triton, rms_norm_triton, rotary_qkv_triton
    from ryzen_llm.kernels.rms_norm import LARGEST_TRITON_ROW

    wide = {"ARITHMETIC": tl.float32}
    block = LARGEST_TRITON_ROW if flag else 64
    norm = {**wide, "ADD": flag, "BLOCK": block}
    gate = {**wide, "GELU": flag, "BLOCK": gated_triton.BLOCK}
    qkv = {**wide, "NORM": flag, "HEADS": rotary_qkv_triton.HEADS_BLOCK, "HALF": 128 if flag else 32}
    for module, constants, warps in (
        (rms_norm_triton, norm, rms_norm_triton.num_warps(block)),
        (gated_triton, gate, 4),
        (rotary_qkv_triton, qkv, 4),
    ):
        for kernel in (module.forward_kernel, module.backward_kernel):
            built = build(kernel, pointers(kernel, dtype), constants, capability, warps)
            assert built.asm["cubin"]
            assert built.metadata.shared < 160 * 1024, "what an A100 gives a block"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_linear_on_gpu_compiles_without_a_gpu(capability: int, dtype: str) -> None:
    from ryzen_llm.kernels import linear_on_gpu_triton as module

    tile = {"ROWS": module.ROWS, "OUTPUTS": module.OUTPUTS, "INPUTS": module.INPUTS}
    types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "codes_ptr": "*i8", "packed_ptr": "*u8"}
    types |= dict.fromkeys(("scale_ptr", "scales_ptr", "zeros_ptr"), "*bf16")
    for kernel, constants in (
        (module.int8_kernel, tile),
        (module.int4_kernel, {**tile, "GROUP": module.GROUP}),
    ):
        assert build(kernel, types, constants, capability, 4).asm["cubin"]
