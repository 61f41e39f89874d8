"""The model over a fixed number of tokens of each text: one compiled graph for each such width."""

import hashlib
import inspect
import itertools
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ryzen_llm.cache import KVCache, LayerCache
from ryzen_llm.decoding.cuda_graph import GraphedStep
from ryzen_llm.kernels import Rope, shared_compilations
from ryzen_llm.model import Transformer

WIDEST = 32
"""Tokens of each text that a compiled pass can read: C++ attention knows by bits what each follows."""
ROUNDS = 5
"""How often each width is timed, two passes of several in a row."""


class Outcome(NamedTuple):
    """What a pass gives.

    Attributes:
        logits: (batch, width, vocab_size).
        hidden_states: (batch, width, hidden_size).
        likeliest: (batch, width) int64, the tokens with the largest logits.
        finite: A scalar, whether all logits are.
    """

    logits: Tensor
    hidden_states: Tensor
    likeliest: Tensor
    finite: Tensor


class FixedWidthPass:
    """Reads `width` tokens of each text with a cache; plain decoding is that with a width of 1.

    Compiled on a CPU that has the C++ attention and product, with weights of 8 or 4 bits and a dense
    embedding, what follows a token is the same to the bit whatever the width.

    The whole pass is one graph: a graph a block would pay for Python and guards once a block. On CUDA it is
    recorded and replayed, and the results are overwritten by the next call.

    `model` is not to be changed afterwards: before each call Dynamo would look at every attribute of every
    module, which takes longer than attention does, and looks at `layout` instead. Models of one share graphs.
    """

    def __init__(self, model: Transformer, device: torch.device, compile: bool) -> None:
        self.model = model
        self.device = device
        self.compile = compile
        self.layout = layout_of(model)
        self._run = self._forward
        if compile:
            self._run = compiled(self._forward)
        self._graphs: dict[int, GraphedStep[Outcome]] = {}
        self._cache: KVCache | None = None
        self._compiled: set[torch.Size] = set()
        self._prepared: weakref.ref[Tensor] | None = None
        self._branching: weakref.ref[KVCache] | None = None

    def reads_trees(self, cache: KVCache) -> bool:
        """Whether the next tokens may be a tree, of which each is read as if its text were all there is.

        The C++ attention does, of compiled passes on a CPU, from the second one on.
        """
        if self._branching is None or self._branching() is not cache:  # asked at every step
            on_cpu = self.compile and self.device.type == "cpu"
            if not on_cpu or not all(layer.reads_trees for layer in cache.layers):
                return False
            self._branching = weakref.ref(cache)
        return min(cache.lengths) >= cache.sinks

    def __call__(
        self, tokens: Tensor, cache: KVCache, parents: Sequence[Sequence[int]] | None = None
    ) -> Outcome:
        """What follows each of `tokens` (batch, width) int64, which are added to `cache`.

        Where that `reads_trees`, `parents` may say for each token of each text which one it follows, -1 for
        the first, which the others all follow; otherwise each follows the one before.
        """
        width = tokens.shape[1]
        if self.device.type == "cuda":
            if cache is not self._cache:
                self._cache, self._graphs = cache, {}
                cache.reserve(cache.max_length)
            if width not in self._graphs:
                with shared_compilations():  # each width, batch and cache size is a graph of the same code
                    self._graphs[width] = GraphedStep(self._run, cache, tokens)
            return self._graphs[width](tokens)
        positions = cache.append(width)
        if tokens.numel() > 1:  # texts of one length take the graph of texts of different lengths
            positions = positions.view(-1, width).expand(tokens.shape).contiguous()
            ancestors = None
            if self.compile and width > 1:
                depths, ancestors = _tree(parents or [range(-1, width - 1)] * len(tokens))
                positions = positions[:, :1] + depths
            for layer in cache.layers:
                layer.positions, layer.ancestors = positions, ancestors
        # Outside the graph, which would compute them in every layer and, of one token, not to the same bit.
        ropes = self.model.rotary_tables(positions)
        if not self.compile:
            return self._run(tokens, positions, cache.layers, ropes)
        codes = cache.layers[-1].keys.codes
        if self._prepared is None or self._prepared() is not codes:  # until they grow
            for layer in cache.layers:
                layer.prepare_to_compile()
            self._prepared = weakref.ref(cache.layers[-1].keys.codes)
            self._compiled.clear()  # a cache of another length may have ring buffers where this one has none
        if tokens.shape in self._compiled:
            return self._run(tokens, positions, cache.layers, ropes)
        self._compiled.add(tokens.shape)
        with shared_compilations():  # each width and batch is a graph of the same code
            return self._run(tokens, positions, cache.layers, ropes)

    def measure(self, widths: Sequence[int], cache: KVCache) -> dict[int, float]:
        """Seconds of a pass of each width among its like, the median; adds nothing to `cache`."""
        for width in widths:
            for _ in range(2):  # compiles
                self._seconds(width, cache)
        rounds = [
            [[self._seconds(width, cache) for _ in range(4)][2:] for width in widths] for _ in range(ROUNDS)
        ]
        return {
            width: statistics.median(itertools.chain(*passes))
            for width, passes in zip(widths, zip(*rounds, strict=True), strict=True)
        }

    def _seconds(self, width: int, cache: KVCache) -> float:
        lengths = cache.lengths
        tokens = torch.zeros(len(lengths), width, dtype=torch.int64, device=self.device)
        started = time.perf_counter()
        self(tokens, cache).logits.amax(-1).tolist()  # which waits for the device
        seconds = time.perf_counter() - started
        cache.truncate(lengths)
        return seconds

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        layers: Sequence[LayerCache],
        ropes: tuple[Rope, Rope] | None = None,
    ) -> Outcome:
        if not self.layout:  # read here, so that the graph is for this layout only
            raise AssertionError("a model has a layout")
        hidden_states = self.model.run_blocks(tokens, positions, layers, ropes)
        logits = self.model.logits(hidden_states)
        return Outcome(logits, hidden_states, logits.argmax(-1), logits.isfinite().all())


def _tree(parents: Sequence[Sequence[int]]) -> Tensor:
    """(2, batch, width): how far each token is from the first and, by bits, itself and which it follows."""
    depths, ancestors = [], []
    for row in parents:
        depth, seen = [0], [1]
        for index, parent in enumerate(row[1:], start=1):
            depth.append(depth[parent] + 1)
            seen.append(seen[parent] | 1 << index)
        depths.append(depth)
        ancestors.append(seen)
    return torch.tensor([depths, ancestors])


P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` as one graph, which sees no change of a module but in the `layout_of` it that it gets."""
    return torch.compile(
        function,
        fullgraph=True,
        dynamic=False,
        options={
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
            "size_asserts": False,  # some 16 a layer, of what Dynamo's guards have seen
            "emulate_precision_casts": True,  # or what is rounded to bf16 depends on the width
        },
    )


def layout_of(model: nn.Module) -> str:
    """A hash of all that a model's compiled graphs depend on: everything but its tensors' values."""
    digest = hashlib.sha256()
    everywhere = vars(nn.Module()).keys()
    for path, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in everywhere}
        named = {k: (v.__module__, v.__qualname__) if inspect.isfunction(v) else v for k, v in own.items()}
        digest.update(f"{path} {type(module)} {module.training} {named}".encode())
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{path} {tensor.shape} {tensor.stride()} {tensor.dtype} {tensor.device}".encode())
    return digest.hexdigest()
