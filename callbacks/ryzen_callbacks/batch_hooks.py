"""Hooks that are called at every batch: leaving out those that a callback has no use for, and adding what
Lightning has no hook for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback

BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def leave_out(callback: Callback, hooks: tuple[str, ...], base: type[Callback]) -> None:
    """Keep Lightning from calling those of `hooks` that `callback` has from `base`.

    Lightning calls every hook of every callback, empty ones too, in a profiler's context and some
    microseconds each; it passes over what is not callable. A subclass's own hooks are left alone.
    """
    for name in hooks:
        if getattr(type(callback), name) is getattr(base, name):
            setattr(callback, name, None)


def put_back(callback: Callback, hooks: tuple[str, ...]) -> None:
    """Undo `leave_out`."""
    for name in hooks:
        vars(callback).pop(name, None)


def follow(owner: object, method: str, then: Callable[[], None]) -> Callable[[], None]:
    """Have `then` called after every call of `owner`'s `method`; returns what undoes it."""
    followed = getattr(owner, method)
    before = vars(owner).get(method)

    @functools.wraps(followed)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return followed(*args, **kwargs)
        finally:
            then()

    def undo() -> None:
        if vars(owner).get(method) is not call:
            return  # somebody else's is around it
        if before is None:
            delattr(owner, method)
        else:
            setattr(owner, method, before)

    setattr(owner, method, call)
    return undo
