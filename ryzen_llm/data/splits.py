"""Which split a document belongs to: decided by its text alone, never by its position."""

from hashlib import blake2b
from typing import Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def unit_hash(text: str, purpose: str) -> float:
    """Map a text to a number in [0, 1), uniform over texts and independent between purposes."""
    digest = blake2b(text.encode(), digest_size=8, person=purpose.encode()).digest()
    # 53 bits: more would round the largest hashes up to 1.0.
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def split_of(text: str, val_fraction: float, test_fraction: float) -> Split:
    """Return the split of a document; equal documents always land in the same one."""
    position = unit_hash(text, "split")
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"
