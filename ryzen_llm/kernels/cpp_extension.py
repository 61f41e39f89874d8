"""C++ beside a module, compiled when it is first used."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from filelock import FileLock


def compile_beside(module_file: str, otherwise: str, **shapes: Callable[..., object]) -> bool:
    """Compile the .cpp file beside a module and load its ops: up to half a minute in a machine's first call.

    The file finds FOR_AVX512 or FOR_AVX2 defined where this machine, or ATEN_CPU_CAPABILITY, has it. `shapes`
    has for each op a function of its arguments that makes empty results, for torch.compile.

    Returns False, with a warning that ends in `otherwise`, where that fails: it needs a C++ compiler and
    ninja.
    """
    source = Path(module_file).with_suffix(".cpp")
    processor = torch.backends.cpu.get_cpu_capability().replace(" ", "_")  # "NO AVX"
    logging.getLogger(__name__).info("compiling %s", source.name)
    # Where pip has put ninja, an environment that is not activated does not look.
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    name = f"ryzen_llm_{source.stem}_{processor.lower()}"  # a home may be shared by machines
    try:
        from torch.utils.cpp_extension import _get_build_directory, load

        folder = Path(_get_build_directory(name, False))
        with patch.dict(os.environ, PATH=path), FileLock(folder / "ryzen_llm.lock"):
            # PyTorch's own lock, for which it would wait forever, is of a process that was killed.
            (folder / "lock").unlink(missing_ok=True)
            load(
                name=name,
                sources=[str(source)],
                build_directory=str(folder),
                extra_cflags=["-O3", "-fopenmp", f"-DFOR_{processor}"],
                is_python_module=False,
            )
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"{source.name} could not be compiled, which needs a C++ compiler and ninja "
            f"({' '.join(str(error).split())[:200]}): {otherwise}",
            stacklevel=3,
        )
        return False
    for op, shape in shapes.items():
        torch.library.register_fake(f"ryzen_llm::{op}", shape)
    return True
