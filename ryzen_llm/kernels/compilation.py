"""One set of compilations for everything in the process that runs the same code on the same shapes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MOST_COMPILATIONS = 64


@contextmanager
def shared_compilations() -> Iterator[None]:
    """For whatever calls compiled code: it takes what training, or anything before it, has compiled.

    Beyond Dynamo's usual 8 compilations of one code object it would silently run eager. Shapes are static:
    those that one caller compiled for would make the compilation of the next dynamic, and slower.
    """
    with torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS, automatic_dynamic_shapes=False):
        yield
