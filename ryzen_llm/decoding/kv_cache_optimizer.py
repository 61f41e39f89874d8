"""Choosing a cache format for each layer, by what it costs in quality on a text and saves in memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ryzen_llm.cache import BLOCK, CACHES, KeyTransform, KVCache, LayerFormat, build_cache
from ryzen_llm.errors import InputError
from ryzen_llm.model import Transformer

CANDIDATES = ("int8", "k8v4", "int4-sinks")
"""From the most bytes to the fewest; before all of them comes dense."""


@dataclass(frozen=True)
class LayerCost:
    """One layer in one format, all others dense: mean KL divergence from the dense model, in nats a token."""

    layer: int
    format: str
    kl: float


@dataclass(frozen=True)
class CacheChoice:
    """What `KVCacheOptimizer` chose.

    Attributes:
        names: Each layer's format by name.
        formats: The same with the measured key transforms, for `Generator(cache=...)`.
        bytes_per_token: Of all layers.
        saving: Share of the bytes per token of a dense cache in bf16.
        kl: Measured mean KL divergence from the dense model on the calibration text, in nats a token.
        perplexity_increase: Measured there, relative.
        costs: Every single measurement that led to the choice.
    """

    names: tuple[str, ...]
    formats: tuple[LayerFormat, ...]
    bytes_per_token: float
    saving: float
    kl: float
    perplexity_increase: float
    costs: tuple[LayerCost, ...]

    def report(self) -> dict[str, object]:
        """The choice in plain types, fit for JSON."""
        chosen = dataclasses.asdict(dataclasses.replace(self, formats=()))
        del chosen["formats"]
        return chosen


class KVCacheOptimizer:
    """Picks formats for a model's layers within a budget of memory or quality.

    Each layer is measured in each format while the others stay dense; then, from dense on, the change with
    the least divergence for the bytes that it saves is made, one after the other. Keys of 4 bits get a
    `KeyTransform` measured on the same text.

    Args:
        model: The model, left as it is.
        calibration: Token ids of real text, (batch, time) int64; a few hundred tokens or more.

    Raises InputError for a calibration text that cannot work.
    """

    def __init__(self, model: Transformer, calibration: Tensor) -> None:
        if calibration.dim() != 2 or calibration.dtype != torch.int64 or calibration.shape[1] < 16:
            raise InputError(
                f"calibration is {tuple(calibration.shape)} {calibration.dtype}, expected token ids (batch, "
                "time) int64 of 16 tokens or more"
            )
        self.model = model
        self.calibration = calibration.to(next(model.parameters()).device)
        self._costs: list[LayerCost] | None = None
        with torch.inference_mode():
            self._dense_logits = self._logits(["dense"] * model.config.num_layers)
            transforms = self._key_transforms()
        self._formats = [
            {
                name: dataclasses.replace(CACHES[name], key_transform=transform)
                if CACHES[name].keys.rotated
                else CACHES[name]
                for name in ("dense", *CANDIDATES)
            }
            for transform in transforms
        ]

    @torch.inference_mode()
    def choose(self, *, saving: float | None = None, perplexity_increase: float | None = None) -> CacheChoice:
        """The first on the way from dense to small that saves `saving` of a bf16 cache's bytes, or the last
        whose relative increase of perplexity on the calibration text is at most `perplexity_increase`.

        Raises InputError unless exactly one budget is given, and for a saving that no choice reaches.
        """
        if (saving is None) == (perplexity_increase is None):
            raise InputError("give saving or perplexity_increase, one of them")
        path = self._path()
        if saving is not None:
            for names in path:
                if self._saving(names) >= saving:
                    return self._measured(names)
            raise InputError(f"saving is {saving}, the most that is possible is {self._saving(path[-1]):.3f}")
        assert perplexity_increase is not None
        low, high = 0, len(path) - 1  # path[0] is dense, and increases nothing
        best = self._measured(path[0])
        while low < high:
            middle = (low + high + 1) // 2
            found = self._measured(path[middle])
            if found.perplexity_increase <= perplexity_increase:
                low, best = middle, found
            else:
                high = middle - 1
        return best

    def formats(self, names: Sequence[str]) -> tuple[LayerFormat, ...]:
        """Formats by name with this model's key transforms."""
        return tuple(layer[name] for layer, name in zip(self._formats, names, strict=True))

    def _path(self) -> list[list[str]]:
        """From all dense to the smallest, one layer's step at a time, the cheapest for its bytes first."""
        layers = range(self.model.config.num_layers)
        if self._costs is None:
            self._costs = [
                LayerCost(layer, name, self._divergence(self._alone(layer, name)))
                for layer in layers
                for name in CANDIDATES
            ]
        costs = {(cost.layer, cost.format): cost.kl for cost in self._costs}
        costs |= {(layer, "dense"): 0.0 for layer in layers}
        size = {name: self._bytes(name) for name in ("dense", *CANDIDATES)}
        names = ["dense"] * len(layers)
        path = [list(names)]
        order = ("dense", *CANDIDATES)
        while steps := [
            ((costs[i, new] - costs[i, names[i]]) / (size[names[i]] - size[new]), i, new)
            for i in layers
            for new in order[order.index(names[i]) + 1 :]
        ]:
            _, layer, name = min(steps)
            names[layer] = name
            path.append(list(names))
        return path

    def _alone(self, layer: int, name: str) -> list[str]:
        names = ["dense"] * self.model.config.num_layers
        names[layer] = name
        return names

    def _measured(self, names: Sequence[str]) -> CacheChoice:
        logits = self._logits(self.formats(names))
        targets = self.calibration[:, 1:].flatten()
        loss, dense = (
            float(F.cross_entropy(x[:, :-1].flatten(0, 1), targets)) for x in (logits, self._dense_logits)
        )
        return CacheChoice(
            names=tuple(names),
            formats=self.formats(names),
            bytes_per_token=sum(map(self._bytes, names)),
            saving=self._saving(names),
            kl=self._kl(logits),
            perplexity_increase=math.exp(loss - dense) - 1,
            costs=tuple(self._costs or ()),
        )

    def _divergence(self, names: Sequence[str]) -> float:
        return self._kl(self._logits(self.formats(names)))

    def _kl(self, logits: Tensor) -> float:
        mine, dense = (x.flatten(0, 1).log_softmax(-1) for x in (logits, self._dense_logits))
        return float(F.kl_div(mine, dense, log_target=True, reduction="batchmean"))

    def _logits(self, kinds: Sequence[str | LayerFormat]) -> Tensor:
        logits: Tensor = self.model(self.calibration, self._cache(kinds))
        return logits.float()

    def _cache(self, kinds: Sequence[str | LayerFormat]) -> KVCache:
        weight = next(self.model.parameters())
        return build_cache(
            kinds,
            self.model.config,
            batch_size=self.calibration.shape[0],
            max_length=self.calibration.shape[1],
            dtype=weight.dtype,
            device=weight.device,
        )

    def _saving(self, names: Sequence[str]) -> float:
        return 1 - sum(map(self._bytes, names)) / (len(names) * self._bytes("dense"))

    def _bytes(self, name: str) -> float:
        """A layer's bytes per token, of tensors as they are allocated; dense in bf16."""
        cache = build_cache(
            name,
            self.model.config,
            batch_size=1,
            max_length=2 * BLOCK,
            dtype=torch.bfloat16,
            device=self.calibration.device,
        )
        fixed = cache.bytes_allocated
        cache.reserve(BLOCK)
        return (cache.bytes_allocated - fixed) / BLOCK / len(cache.layers)

    def _key_transforms(self) -> list[KeyTransform]:
        cache = self._cache(["dense"] * self.model.config.num_layers)
        squares: list[Tensor] = []
        for layer in cache.layers:
            layer.attend = _recording(layer.attend, squares)  # type: ignore[method-assign, assignment]
        self.model(self.calibration, cache)
        transforms = []
        for layer, query_square in zip(cache.layers, squares, strict=True):
            keys = layer.keys.codes[:, :, CACHES["int4-sinks"].sinks : cache.length].float()
            offset = keys.mean((0, 2))[:, None]
            key_square = (keys - offset).square().mean((0, 2))[:, None]
            ratio = query_square.clamp(min=1e-12) / key_square.clamp(min=1e-12)
            transforms.append(KeyTransform(offset, ratio**0.25))
        return transforms


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _recording(attend: Attend, squares: list[Tensor]) -> Attend:
    """`attend` that also notes the queries' mean squares, (kv_heads, 1, head_dim)."""

    def attend_and_note(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        grouped = torch.unflatten(queries.float(), 1, (keys.shape[1], -1))
        squares.append(grouped.square().mean((0, 2, 3))[:, None])
        return attend(queries, keys, values)

    return attend_and_note
