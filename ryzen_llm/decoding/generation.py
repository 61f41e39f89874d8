"""What decoding gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ryzen_llm.errors import InputError


@dataclass(frozen=True)
class Generation:
    """What `Generator.generate` made, and how fast.

    Attributes:
        ids: Prompt and new tokens, (batch, time) int64; a row whose prompt is shorter than others is filled
            up with its last token.
        new_ids: The new tokens alone, a stop token included; a row that stopped before the others is filled
            up with its stop token.
        stop_reason: "stop" if every row met a stop token, otherwise "length".
        time_to_first_token_s: Seconds from the call to the first new token.
        tokens_per_second: New tokens of all rows after the first, over the seconds they took; None if there
            was only the first.
        accepted_per_step: Tokens that a step of speculative decoding gave a row on average; None without a
            drafter.
    """

    ids: Tensor
    new_ids: Tensor
    stop_reason: Literal["stop", "length"]
    time_to_first_token_s: float
    tokens_per_second: float | None
    accepted_per_step: float | None


def joined(prompts: Sequence[Tensor], new_ids: Tensor) -> Tensor:
    """`Generation.ids` of prompts (time,) and their new tokens (batch, new)."""
    rows = [torch.cat(parts) for parts in zip(prompts, new_ids, strict=True)]
    longest = max(map(len, rows))
    return torch.stack([torch.cat((row, row[-1:].expand(longest - len(row)))) for row in rows])


def require_finite(finite: Tensor, dtype: torch.dtype) -> None:
    """Raise InputError unless `finite`, a scalar: whether all logits, computed in `dtype`, are finite."""
    if not finite:
        raise InputError(
            "the model's logits are not finite: its weights are damaged, or its activations overflow in "
            f"{dtype}: try weights fp32"
        )
