"""Packing: windows against slicing a list by hand."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ryzen_llm.data.splits import Split
from ryzen_llm.data.windows import TokenWindows


class ListStore:
    """A store of the tokens given."""

    def __init__(self, tokens: list[int], dtype: str = "<u2") -> None:
        self._tokens = np.array(tokens, dtype=dtype)

    def tokens(self, split: Split) -> Any:
        return self._tokens


@given(st.lists(st.integers(0, 65_535), max_size=60), st.integers(1, 12))
def test_windows_are_slices_that_share_one_token(tokens: list[int], context: int) -> None:
    """All windows that fit, and no other; every token but the first is a target at most once."""
    windows = TokenWindows(ListStore(tokens), "train", context)  # type: ignore[arg-type]
    expected = []
    start = 0
    while start + context + 1 <= len(tokens):
        expected.append(tokens[start : start + context + 1])
        start += context
    assert len(windows) == len(expected)
    assert [windows[i].tolist() for i in range(len(windows))] == expected
    targets = [token for window in expected for token in window[1:]]
    assert targets == tokens[1 : 1 + len(targets)]
    assert len(tokens) - 1 - len(targets) < context or not tokens


def test_large_ids_become_int64() -> None:
    """Embedding lookups want int64; ids above 2**31 must not wrap."""
    window = TokenWindows(ListStore([2**32 - 1, 1], "<u4"), "train", 1)[0]  # type: ignore[arg-type]
    assert window.dtype == torch.int64
    assert window.tolist() == [2**32 - 1, 1]


def test_pickling_for_a_worker_copies_no_tokens(tmp_path: Path) -> None:
    """A memory map would be pickled as its whole content; the worker maps the file itself."""
    from ryzen_llm.data.corpus import open_corpus
    from ryzen_llm.data.token_store import Recipe, open_store

    (tmp_path / "a.md").write_text("word " * 100_000)
    store = open_store(open_corpus(str(tmp_path / "a.md")), Recipe(258, 0.0, 0.0), tmp_path / "cache")
    windows = TokenWindows(store, "train", 64)
    pickled = pickle.dumps(windows)
    assert len(pickled) < len(store.tokens("train"))
    assert torch.equal(pickle.loads(pickled)[3], windows[3])
