"""How the Triton kernels of packed and trellis rows are tried: in a process of their own, and compiled."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_interpreted(file: str, settings: dict[str, str]) -> None:
    """In a process of its own, since Triton decides when it is imported whether it interprets."""
    path = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


def build(kernel: Any, constants: dict[str, int], capability: int) -> Any:
    """The kernel compiled for bf16 numbers and a GPU that need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    pointers = {"codes_ptr": "*u8", "scale_ptr": "*bf16", "out_ptr": "*bf16"}
    pointers |= {"indices_ptr": "*i64", "x_ptr": "*bf16"}
    types = {name: pointers.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(
        constants, "constexpr"
    )
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
