"""Caches of random tokens, for the tests of attention on them."""

from typing import Any

import torch

from ryzen_llm.cache import CACHES, Int4
from ryzen_llm.cache.fp8 import Fp8

FORMATS = {
    "dense": CACHES["dense"].keys,
    "int8": CACHES["int8"].keys,
    "int4": CACHES["int4"].keys,
    "int4, 4 fine": Int4(fine=4),
    "fp8": Fp8(),
}
PAIRS = [
    ("dense", "dense"),
    ("int8", "int8"),
    ("int8", "int4"),
    ("int4", "int4"),
    ("int4", "dense"),
    ("int4, 4 fine", "int4"),
]


def case(
    keys: str,
    values: str,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 16,
    length: int = 150,
    time: int = 1,
    ring: int = 0,
    room: int = 160,
    ragged: bool = False,
) -> dict[str, Any]:
    """A cache of random tokens, `length` of them read by `time` queries at its end, in `room` slots."""
    draw = torch.Generator().manual_seed(length + time)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=draw)

    ends = torch.tensor([[length], [length - 7 if ragged else length]])
    positions = ends - time + torch.arange(time)
    slots = ring or room
    return {
        "queries": FORMATS[keys].against_codes(2 * normal(heads, time, head_dim)),
        "keys": FORMATS[keys].encode(normal(kv_heads, slots, head_dim)),
        "values": FORMATS[values].encode(1 + normal(kv_heads, slots, head_dim)),
        "positions": positions if ragged else positions[:1],
        "ring": ring,
    }


SETTINGS: list[dict[str, Any]] = [
    {},
    {"time": 5},
    {"time": 5, "ragged": True},
    {"ring": 60, "length": 150},
    {"ring": 60, "length": 40, "time": 3, "ragged": True},
    {"head_dim": 24, "kv_heads": 1},
    {"length": 700, "room": 720, "time": 3, "ragged": True},
]
