"""Many steps' scalars as the records of a TensorBoard event file, encoded together.

tensorboard's own writer makes a checksum in pure Python for each step, with Python's lock held in its thread,
so that the training step waits; here the checksums of all steps since the last drain are made together.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from ryzen_callbacks.step_recorder import Step

_MAX_UINT32 = 0xFFFFFFFF


def encode(steps: Sequence[Step], prefix: str, wall_time: float) -> bytes:
    """One record a step, with an `Event` of all its values under the tags `prefix` + name, as float32.

    A record (TFRecord) is the length of its data (uint64), the length's checksum, the data and theirs.
    """
    events = [_event(step, prefix, wall_time) for step in steps]
    parts: list[bytes] = []
    for event, check in zip(events, _masked_crc32c(events), strict=True):
        parts += (_record_head(len(event)), event, check)
    return b"".join(parts)


@functools.lru_cache(maxsize=64)
def _record_head(length: int) -> bytes:
    encoded = struct.pack("<Q", length)
    return encoded + _masked_crc32c([encoded])[0]


def _event(step: Step, prefix: str, wall_time: float) -> bytes:
    head, packing, tags = _layout(tuple(step.values), prefix)
    try:
        packed = _packed(packing, tags, step.values.values())
    except OverflowError:
        packed = _packed(packing, tags, map(_to_float32, step.values.values()))
    # Messages that are written one after the other are merged: the time and the step, then the summary.
    return b"".join((Event(wall_time=wall_time, step=step.step).SerializeToString(), head, packed))


def _packed(packing: struct.Struct, tags: Sequence[bytes], values: Iterable[float]) -> bytes:
    return packing.pack(*(part for pair in zip(tags, values, strict=True) for part in pair))


def _to_float32(value: float) -> float:
    """What float32 makes of a value, which is infinite beyond its range; `struct` refuses it there."""
    return ctypes.c_float(value).value


@functools.lru_cache(maxsize=64)
def _layout(names: tuple[str, ...], prefix: str) -> tuple[bytes, struct.Struct, tuple[bytes, ...]]:
    """What steps with the same `names` have in common: all of the summary but its numbers.

    A number is the last field of its value, four bytes long unless it is 0, which is left out.
    """
    values = [Summary.Value(tag=prefix + name, simple_value=1.0) for name in names]
    tags = tuple(Summary(value=[value]).SerializeToString()[:-4] for value in values)
    summary = Summary(value=values)
    head = Event(summary=summary).SerializeToString()[: -summary.ByteSize() or None]
    return head, struct.Struct("<" + "".join(f"{len(tag)}sf" for tag in tags)), tags


def _masked_crc32c(texts: Sequence[bytes]) -> list[bytes]:
    """CRC-32C (Castagnoli) of each text, of 4 bytes or more, rotated and shifted as TFRecords have it.

    The checksum is linear in the bits: each byte adds what it would give with zeros after it, whatever the
    others are. So the texts' ends are lined up, and each byte is looked up by its distance from the end.
    """
    width = max(map(len, texts))
    lined_up = np.frombuffer(b"".join(text.rjust(width, b"\0") for text in texts), np.uint8)
    lined_up = lined_up.reshape(len(texts), width).copy()
    for row, text in zip(lined_up, texts, strict=True):
        row[width - len(text) : width - len(text) + 4] ^= 0xFF  # the register starts with all bits set
    table = _byte_checks(-(-width // 256) * 256)[-width:]
    checks = np.bitwise_xor.reduce(table[np.arange(width), lined_up], axis=1) ^ np.uint32(_MAX_UINT32)
    masked = ((checks >> np.uint32(15)) | (checks << np.uint32(17))) + np.uint32(0xA282EAD8)
    encoded = masked.astype("<u4").tobytes()
    return [encoded[i : i + 4] for i in range(0, len(encoded), 4)]


@functools.lru_cache(maxsize=4)
def _byte_checks(width: int) -> npt.NDArray[np.uint32]:
    """(width, 256): the checksum, from a register of zeros, of a byte with width - 1 - row zeros after it."""
    single = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        single = (single >> np.uint32(1)) ^ (np.uint32(0x82F63B78) * (single & np.uint32(1)))
    table = np.empty((width, 256), np.uint32)
    table[-1] = single
    for row in range(width - 2, -1, -1):
        table[row] = (table[row + 1] >> np.uint32(8)) ^ single[table[row + 1] & np.uint32(0xFF)]
    return table
