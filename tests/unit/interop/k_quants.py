"""What the bytes of ggml's K-quantised blocks mean, value by value, as ggml-quants.c says, in fp64."""

import struct
from collections.abc import Callable, Iterator

VALUES = 256
"""In a block."""


def _half(block: bytes, at: int) -> float:
    value: float = struct.unpack("<e", block[at : at + 2])[0]
    return value


def _q2(block: bytes) -> Iterator[float]:
    scales, quants, d, minimum = block[:16], block[16:80], _half(block, 80), _half(block, 82)
    for i in range(VALUES):
        half, shift, byte = i // 128, i % 128 // 32, i % 32
        scale = scales[i // 16]
        yield d * (scale & 15) * (quants[32 * half + byte] >> 2 * shift & 3) - minimum * (scale >> 4)


def _q3(block: bytes) -> Iterator[float]:
    high, quants, packed, d = block[:32], block[32:96], block[96:108], _half(block, 108)
    for i in range(VALUES):
        half, shift, byte = i // 128, i % 128 // 32, i % 32
        s = i // 16
        low_bits = packed[s] & 15 if s < 8 else packed[s - 8] >> 4
        scale = (low_bits | (packed[8 + s % 4] >> 2 * (s // 4) & 3) << 4) - 32
        quant = quants[32 * half + byte] >> 2 * shift & 3
        yield d * scale * (quant - (0 if high[byte] >> (4 * half + shift) & 1 else 4))


def _scale_and_minimum(packed: bytes, s: int) -> tuple[int, int]:
    if s < 4:
        return packed[s] & 63, packed[s + 4] & 63
    return packed[s + 4] & 15 | packed[s - 4] >> 6 << 4, packed[s + 4] >> 4 | packed[s] >> 6 << 4


def _q4(block: bytes) -> Iterator[float]:
    d, minimum, packed, quants = _half(block, 0), _half(block, 2), block[4:16], block[16:]
    for i in range(VALUES):
        scale, least = _scale_and_minimum(packed, i // 32)
        quant = quants[i // 64 * 32 + i % 32] >> 4 * (i // 32 % 2) & 15
        yield d * scale * quant - minimum * least


def _q5(block: bytes) -> Iterator[float]:
    d, minimum, packed, high, quants = _half(block, 0), _half(block, 2), block[4:16], block[16:48], block[48:]
    for i in range(VALUES):
        scale, least = _scale_and_minimum(packed, i // 32)
        quant = quants[i // 64 * 32 + i % 32] >> 4 * (i // 32 % 2) & 15
        yield d * scale * (quant + 16 * (high[i % 32] >> i // 32 & 1)) - minimum * least


def _q6(block: bytes) -> Iterator[float]:
    low, high, scales, d = (
        block[:128],
        block[128:192],
        struct.unpack("<16b", block[192:208]),
        _half(block, 208),
    )
    for i in range(VALUES):
        half, quarter, byte = i // 128, i % 128 // 32, i % 32
        quant = low[64 * half + 32 * (quarter % 2) + byte] >> 4 * (quarter // 2) & 15
        quant |= (high[32 * half + byte] >> 2 * quarter & 3) << 4
        yield d * scales[i // 16] * (quant - 32)


BLOCKS: dict[str, tuple[int, tuple[int, ...], Callable[[bytes], Iterator[float]]]] = {
    "Q2_K": (84, (80, 82), _q2),
    "Q3_K": (110, (108,), _q3),
    "Q4_K": (144, (0, 2), _q4),
    "Q5_K": (176, (0, 2), _q5),
    "Q6_K": (210, (208,), _q6),
}
"""By kind: bytes of a block, where its halves lie, and its values."""
