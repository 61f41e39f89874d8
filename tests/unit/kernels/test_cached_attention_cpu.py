"""The op of a decoding step: what it stores beside the formats' own code, what it attends to beside fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ryzen_llm.cache import CACHES, Int4, LayerCache, LayerFormat, Transform
from ryzen_llm.kernels import append_and_attend, hadamard
from ryzen_llm.kernels.cached_attention_cpu import is_in_cpp

HEADS = 6
CPU = torch.device("cpu")
FORMATS = {name: format for name, format in CACHES.items() if name != "fp8"}
FORMATS["int4 keys only"] = LayerFormat(Int4(), FORMATS["dense"].values)
FORMATS["fine"] = LayerFormat(Int4(fine=4), Int4(), sinks=3)


def _transform(head_dim: int, kv_heads: int) -> Transform:
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(kv_heads, head_dim, head_dim, generator=draw)
    matrix = (torch.eye(head_dim) + 0.3 / head_dim**0.5 * noise).half()
    offset = torch.randn(kv_heads, 1, head_dim, generator=draw)
    return Transform(offset, matrix, torch.linalg.inv(matrix.float()).half())


def a_format(name: str, head_dim: int, kv_heads: int) -> LayerFormat:
    if name == "calibrated":
        return LayerFormat(Int4(fine=4), Int4(), sinks=4, key_transform=_transform(head_dim, kv_heads))
    return FORMATS[name]


def rotated(layer: LayerCache) -> tuple[bool, bool]:
    return layer.format.keys.rotated, layer.format.values.rotated


def dtypes(layer: LayerCache) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    unused = torch.float32
    sinks = unused if layer.sinks is None else layer.sinks.dtype
    return layer.keys.codes.dtype, layer.values.codes.dtype, sinks


class Case:
    """A layer that has read `length` tokens of two texts, the second of them shorter where `ragged`."""

    def __init__(
        self,
        name: str,
        *,
        dtype: torch.dtype = torch.float32,
        head_dim: int = 64,
        kv_heads: int = 2,
        length: int = 300,
        window: int = 0,
        ragged: bool = False,
    ) -> None:
        assert is_in_cpp()
        self.draw = torch.Generator().manual_seed(length + head_dim)
        self.dtype, self.head_dim, self.length, self.ragged = dtype, head_dim, length, ragged
        self.layer = LayerCache(
            a_format(name, head_dim, kv_heads),
            batch_size=2,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=window,
            max_length=2000,
            dtype=dtype,
            device=CPU,
        )
        self.layer.grow(length + 20)
        self.held = torch.full((2, self.layer.num_slots), -1)
        if length:
            self.layer.positions = torch.arange(length)[None]
            self.layer.attend(*self.vectors(length))
            self.note(self.layer.positions)

    def vectors(self, time: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; keys have a channel that stands out."""
        shapes = [
            (2, heads, time, self.head_dim) for heads in (HEADS, self.layer.kv_heads, self.layer.kv_heads)
        ]
        queries, keys, values = (torch.randn(shape, generator=self.draw) for shape in shapes)
        keys[..., 3] += 4
        return queries.to(self.dtype), keys.to(self.dtype), (values + 1).to(self.dtype)

    def positions(self, time: int) -> Tensor:
        ends = torch.tensor([[self.length], [self.length - 7 if self.ragged else self.length]])
        found = ends + torch.arange(time)
        return found if self.ragged else found[:1]

    def note(self, positions: Tensor) -> None:
        """What each slot holds from now on."""
        for text, row in enumerate(positions.expand(2, -1).tolist()):
            for position in row:
                self.held[text, position % self.layer.ring if self.layer.ring else position] = position

    def run(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        ancestors: Tensor | None = None,
    ) -> Tensor:
        layer = self.layer
        self.note(positions)
        layer.prepare_to_compile()
        assert layer.memory is not None
        return append_and_attend(
            queries,
            keys,
            values,
            layer.memory,
            dtypes(layer),
            positions,
            ancestors,
            sinks=layer.format.sinks,
            fine=layer.keys.width - self.head_dim,
            ring=layer.ring,
            window=layer.window,
            rotated=rotated(layer),
            transformed=bool(layer.key_transform),
        )

    def expected(self, queries: Tensor, positions: Tensor, *, magnitudes: bool = False) -> Tensor:
        """Softmax attention in fp64 on what the slots stand for: nothing rotated, each query by itself.

        With `magnitudes`, of the values' magnitudes.
        """
        layer, size = self.layer, self.head_dim
        rotation = hadamard(torch.eye(size)).double()
        channels = layer.format.keys.against_codes(torch.eye(size)).double()
        keys, values = layer.keys.dequantised().double() @ channels.T, layer.values.dequantised().double()
        if layer.format.values.rotated:
            values = values @ rotation
        if layer.key_transform:
            offset, _, inverse = layer.key_transform
            keys = keys @ inverse.double().mT + offset.double()
        elif layer.format.keys.rotated:
            keys = keys @ rotation
        if layer.sinks is not None and not layer.key_transform:
            keys = keys + layer.sinks[0].double().mean(2, keepdim=True)
        out = torch.zeros(queries.shape, dtype=torch.float64)
        for text, head, t in torch.cartesian_prod(*(torch.arange(n) for n in queries.shape[:3])).tolist():
            at, kv = int(positions.expand(2, -1)[text, t]), head * layer.kv_heads // HEADS
            first = max(at - layer.window + 1, 0) if layer.window else 0
            k, v = [], []
            for position in range(first, at + 1):
                if layer.sinks is not None and position < layer.format.sinks:
                    key, value = (part[text, kv, position].double() for part in layer.sinks)
                else:
                    (slot,) = (self.held[text] == position).nonzero()[0].tolist()
                    key, value = keys[text, kv, slot], values[text, kv, slot]
                k.append(key)
                v.append(value)
            scores = torch.stack(k) @ queries[text, head, t].double() / size**0.5
            read = torch.stack(v).abs() if magnitudes else torch.stack(v)
            out[text, head, t] = scores.softmax(-1) @ read
        return out


SETTINGS: list[dict[str, Any]] = [
    {},
    {"ragged": True},
    {"length": 1},
    {"length": 0},
    {"head_dim": 24, "kv_heads": 1, "length": 40},
    {"head_dim": 128, "length": 70},
    {"window": 100, "length": 290, "ragged": True},
    {"window": 100, "length": 60},
    {"length": 700},
]
CODES = [torch.float32, torch.bfloat16, torch.int8, torch.uint8]
NAMES = [*FORMATS, "calibrated"]


@pytest.mark.parametrize("time", [1, 5])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_it_attends_to_what_it_stores(name: str, setting: dict[str, Any], time: int) -> None:
    case = Case(name, **setting)
    positions, (queries, keys, values) = case.positions(time), case.vectors(time)
    got = case.run(queries, keys, values, positions)
    torch.testing.assert_close(got.double(), case.expected(queries, positions), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_it_stores_the_bytes_that_the_formats_do(
    name: str, setting: dict[str, Any], dtype: torch.dtype
) -> None:
    """So that a token is read back the same whether a prompt brought it or a step."""
    case, other = (Case(name, dtype=dtype, **setting) for _ in range(2))
    positions, new = case.positions(5), case.vectors(5)
    case.run(*new, positions)
    other.layer.positions = positions
    other.layer.attend(*new)
    a, b = case.layer, other.layer
    for kept, wanted in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True):
        assert kept is wanted is None or torch.equal(kept, wanted)
    if a.sinks is not None and b.sinks is not None:
        assert torch.equal(a.sinks, b.sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", [s for s in SETTINGS if "window" not in s], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_query_gives_the_same_alone_and_with_others(
    name: str, setting: dict[str, Any], dtype: torch.dtype
) -> None:
    """To the bit, so that a pass over drafted tokens scores them as plain decoding does."""
    together, alone = (Case(name, dtype=dtype, **setting) for _ in range(2))
    positions, new = together.positions(7), together.vectors(7)
    all_at_once = together.run(*new, positions)
    for t in range(7):
        one = alone.run(*(x[:, :, t : t + 1] for x in new), positions[:, t : t + 1])
        assert torch.equal(one, all_at_once[:, :, t : t + 1])


PARENTS = [-1, 0, 0, 1, 2, 2, 5, 3, 6]
"""Of a tree's tokens: the token that each follows."""


def path_to(token: int) -> list[int]:
    return [*path_to(PARENTS[token]), token] if token >= 0 else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [5, 119, 125, 128, 300])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_token_of_a_tree_sees_its_own_text(
    name: str, ragged: bool, length: int, dtype: torch.dtype
) -> None:
    """To the bit what it sees where that is all there is, also over the edge of a span, and in odd slots."""
    setting: dict[str, Any] = {"dtype": dtype, "length": max(length, 12) if ragged else length}
    tree = Case(name, ragged=ragged, **setting)
    new = tree.vectors(len(PARENTS))
    paths = [path_to(token) for token in range(len(PARENTS))]
    bits = torch.tensor([sum(1 << i for i in path) for path in paths]).expand(2, -1).contiguous()
    depths = torch.tensor([len(path) - 1 for path in paths])
    got = tree.run(*new, tree.positions(1)[:, :1] + depths, bits)
    for token, path in enumerate(paths):
        alone = Case(name, ragged=ragged, **setting)
        alone.vectors(len(PARENTS))
        expected = alone.run(*(x[:, :, path] for x in new), alone.positions(len(path)))
        assert torch.equal(got[:, :, token], expected[:, :, -1])


@pytest.mark.parametrize(
    ("ancestors", "message"),
    [
        (torch.tensor([[1, 3, 7]]), r"ancestors are \[1, 3\]"),
        (torch.tensor([[1, 3, 7]] * 2).int(), "expected .* int64"),
        (torch.tensor([[1, 3, 5]] * 2), "token 2 at position 22 with ancestors 5"),
        (torch.tensor([[1, 3, 6]] * 2), "token 2 at position 22 with ancestors 6"),
        (torch.tensor([[1, 3, 15]] * 2), "token 2 at position 22 with ancestors 15"),
    ],
    ids=["texts", "integers", "depth", "no first", "later ones"],
)
def test_ancestors_that_are_no_tree_are_refused(ancestors: Tensor, message: str) -> None:
    case = Case("int8", length=20)
    with pytest.raises(RuntimeError, match=message):
        case.run(*case.vectors(3), case.positions(3), ancestors)


def test_no_tree_is_among_the_first_tokens_or_in_a_ring() -> None:
    """Where siblings would be kept in one place, or might overwrite what others see."""
    for case in (Case("int4-sinks", length=2), Case("dense", length=300, window=100)):
        siblings = torch.tensor([[1, 3, 5]] * 2)
        new, positions = case.vectors(3), torch.tensor([[0, 1, 1]]) + case.length
        with pytest.raises(RuntimeError, match="no tree is in a ring buffer or among the first"):
            case.run(*new, positions, siblings)
        case.run(*new, positions[:, :1] + torch.arange(3), torch.tensor([[1, 3, 7]] * 2))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_bf16_is_rounded_where_it_is_said_to_be(name: str, setting: dict[str, Any]) -> None:
    """Sums are fp32 whatever the queries and the cache are; results are bf16, and what values in bf16 are
    weighted by, where there is an instruction for pairs of these.
    """
    case = Case(name, dtype=torch.bfloat16, **setting)
    positions, (queries, keys, values) = case.positions(5), case.vectors(5)
    got, exact = case.run(queries, keys, values, positions), case.expected(queries, positions)
    assert got.dtype == torch.bfloat16
    error = (got.double() - exact).abs()
    weighted = case.expected(queries, positions, magnitudes=True) if name == "dense" else 0
    assert (error <= 2.0**-8 * exact.abs() + 2.0**-9 * weighted + 2e-5).all()


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("length", [3, 128, 256])
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in NAMES), ("dense", torch.bfloat16)]
)
def test_what_is_no_number_does_not_get_lost(
    name: str, dtype: torch.dtype, length: int, which: int, damage: float
) -> None:
    """Also where a chunk or a span has no others, whose largest score no comparison finds. What fp16 cannot
    scale is no number either.
    """
    case = Case(name, dtype=dtype, length=length)
    stored = (case.layer.keys, case.layer.values)[which - 1]
    if damage == 1e30 and (stored.scale is None or length < case.layer.format.sinks):
        pytest.skip("as it is, it is a number")
    new = case.vectors(1)
    new[which][..., 5] = damage
    got = case.run(*new, case.positions(1))
    assert not got.isfinite().all(-1).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"queries": torch.zeros(2, 6, 1, 24)}, "queries, keys or values are"),
        ({"queries": torch.zeros(2, 5, 1, 64)}, "do not fit"),
        ({"keys": torch.zeros(2, 3, 1, 64)}, "do not fit"),
        ({"values": torch.zeros(2, 2, 1, 64).double()}, "queries, keys or values are"),
        ({"positions": torch.zeros(2, 3, dtype=torch.int64)}, "do not fit"),
        ({"positions": torch.zeros(1, 1, dtype=torch.int32)}, "do not fit"),
        ({"positions": torch.tensor([[320]])}, "position 320 is not in the 320 slots"),
        ({"positions": torch.tensor([[-1]])}, "position -1"),
    ],
    ids=["width", "heads", "key heads", "dtype", "time", "integers", "beyond", "negative"],
)
def test_what_does_not_fit_is_refused_and_nothing_written(wrong: dict[str, Any], message: str) -> None:
    case = Case("int8")
    case.layer.prepare_to_compile()
    before = [x.clone() for x in case.layer.tensors]
    queries, keys, values = case.vectors(1)
    arguments = {"queries": queries, "keys": keys, "values": values, "positions": case.positions(1)} | wrong
    case.note = lambda positions: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=message):
        case.run(**arguments)
    assert all(torch.equal(x, y) for x, y in zip(before, case.layer.tensors, strict=True))


def test_a_batch_of_no_texts_is_refused() -> None:
    """It ended the process: a slot of none of them has no bytes."""
    assert is_in_cpp()
    texts, fp32 = torch.zeros(0, 2, 1, 64), torch.float32
    memory, positions = torch.zeros(0, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="do not fit"):
        append_and_attend(texts, texts, texts, memory, (fp32, fp32, fp32), positions)


def test_memory_and_sinks_that_do_not_fit_are_refused() -> None:
    case = Case("int4-sinks", length=20)
    layer, new, positions = case.layer, case.vectors(1), case.positions(1)
    layer.prepare_to_compile()
    assert layer.memory is not None
    keys, values, _ = dtypes(layer)
    settings: dict[str, Any] = {"sinks": layer.format.sinks, "rotated": rotated(layer)}
    for memory, sinks, message in (
        (layer.memory[:-1], torch.float32, "memory is .* expected contiguous bytes"),
        (layer.memory[:64], torch.float32, "memory is .* expected contiguous bytes"),
        (layer.memory, torch.int8, "sinks of another type"),
    ):
        with pytest.raises(RuntimeError, match=message):
            append_and_attend(*new, memory, (keys, values, sinks), positions, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_the_op_is_what_it_is_registered_as(name: str) -> None:
    """That it changes what it says it does only, and that shape and dtype are those that tracing goes by."""
    case = Case(name, length=20)
    layer = case.layer
    layer.prepare_to_compile()
    torch.library.opcheck(
        torch.ops.ryzen_llm.append_and_attend.default,
        (
            *case.vectors(3),
            layer.memory,
            case.positions(3),
            None,
            *(CODES.index(dtype) for dtype in dtypes(layer)),
            layer.format.sinks,
            layer.keys.width - 64,
            layer.ring,
            layer.window,
            *rotated(layer),
            bool(layer.key_transform),
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("in_cpp", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_layer_gives_the_same(name: str, in_cpp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any number of slots, as a cache grows, and with PyTorch's ops where there is no compiler."""
    monkeypatch.setattr("ryzen_llm.cache.layer.is_in_cpp", lambda: in_cpp)
    torch._dynamo.reset()
    case = Case(name, length=40, ragged=True)
    positions, new = case.positions(2), case.vectors(2)
    case.layer.positions = positions
    case.layer.prepare_to_compile()
    assert (case.layer.memory is not None) is in_cpp
    with torch.inference_mode():
        got = torch.compile(case.layer.attend, fullgraph=True, dynamic=False)(*new)
    case.note(positions)
    # PyTorch's form takes sinks through the matrix and its rounded inverse, too.
    close = 5e-4 if name == "calibrated" and not in_cpp else 2e-5
    torch.testing.assert_close(got.double(), case.expected(new[0], positions), atol=close, rtol=close)
