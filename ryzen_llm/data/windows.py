"""Cut a run of tokens into training windows: no padding, every token predicted once."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ryzen_llm.data.splits import Split
from ryzen_llm.data.token_store import TokenStore


class TokenWindows(Dataset[torch.Tensor]):
    """Windows of context + 1 tokens over a split, one every `context` tokens.

    Window i is `tokens[i * context : i * context + context + 1]`, int64. Neighbours share one token: the last
    target of one is the first input of the next.
    """

    def __init__(self, store: TokenStore, split: Split, context: int) -> None:
        self.store, self.split, self.context = store, split, context
        self._tokens = store.tokens(split)

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self.context

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.context
        return torch.from_numpy(self._tokens[start : start + self.context + 1].astype(np.int64))

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map is a copy of the whole file; a worker process shall map it itself.
        return TokenWindows, (self.store, self.split, self.context)
