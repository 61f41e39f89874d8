"""Choosing a cache format for each layer, by what it costs in quality on a text and saves in memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ryzen_llm.cache import CACHES, Int4, KVCache, LayerFormat, Transform, build_cache
from ryzen_llm.errors import InputError
from ryzen_llm.model import Transformer

CANDIDATES = ("int8", "k8v4", "int4-sinks")
"""From the most bytes to the fewest; before all of them comes dense."""
LEAST_SHARE = 1e-3
"""Of the mean variance, that every direction is taken to have at least."""
COST_TOKENS = 1024
"""Tokens of the calibration text that each layer is measured on in each format."""
FINE_SIZE = 1 / 3
"""Standard deviation of the channels with 8 bits over that of the others, whose range they share."""


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
        formats: The same with the measured `Transform`s, for `Generator(cache=...)`.
        bytes: Of a cache of the length asked for, transforms included.
        saving: Share of the bytes of a dense cache in bf16.
        kl: Measured mean KL divergence from the dense model on the calibration text, in nats a token.
        perplexity_increase: Measured there, relative.
        costs: Every single measurement that led to the choice.
    """

    names: tuple[str, ...]
    formats: tuple[LayerFormat, ...]
    bytes: int
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

    Each layer is measured in each format while the others stay dense, on the calibration text's first 1024
    tokens; then, from dense on, the change with the least divergence for the bytes that it saves is made, one
    after the other. Keys of 4 bits get a `Transform` measured on the whole text, which gathers what matters
    most in one channel of eight, and those have 8 bits; but not where its matrices take more than it saves.

    Args:
        model: The model, left as it is.
        calibration: Token ids of real text, (batch, time) int64; some thousand tokens are better than few.
        length: Tokens of one text that the cache is to hold, for which bytes are counted: a transform takes
            as many for few as for many, and a sliding window few for many. If not given, the calibration's.

    Raises InputError for a calibration text or a length that cannot work.
    """

    def __init__(self, model: Transformer, calibration: Tensor, length: int | None = None) -> None:
        if calibration.dim() != 2 or calibration.dtype != torch.int64 or calibration.shape[1] < 16:
            raise InputError(
                f"calibration is {tuple(calibration.shape)} {calibration.dtype}, expected token ids (batch, "
                "time) int64 of 16 tokens or more"
            )
        most = model.config.max_position_embeddings
        self.length = calibration.shape[1] if length is None else length
        if not 1 <= self.length <= most:
            raise InputError(f"length is {self.length}, expected 1 to max_position_embeddings = {most}")
        self.model = model
        self.calibration = calibration.to(next(model.parameters()).device)
        self._costs: list[LayerCost] | None = None
        fine = model.config.head_dim // 8
        fine += (model.config.head_dim - fine) % 2  # the others are packed in pairs
        with torch.inference_mode():
            self._dense_logits = self._logits(["dense"] * model.config.num_layers, self.calibration)
            transforms = self._key_transforms(fine)
        self._formats: dict[str, list[LayerFormat]] = {}
        self._bytes: dict[str, list[int]] = {}
        larger: Sequence[float] = [math.inf] * len(transforms)
        for name in ("dense", *CANDIDATES):
            formats = [_with_transform(CACHES[name], transform, fine) for transform in transforms]
            smaller = (new < old for new, old in zip(self._layers_bytes(formats), larger, strict=True))
            formats = [
                format if saves else CACHES[name] for format, saves in zip(formats, smaller, strict=True)
            ]
            self._formats[name], self._bytes[name] = formats, self._layers_bytes(formats)
            larger = self._bytes[name]

    @torch.inference_mode()
    def choose(self, *, saving: float | None = None, perplexity_increase: float | None = None) -> CacheChoice:
        """The first on the way from dense to small that saves `saving` of a bf16 cache's bytes, or the last
        whose relative increase of perplexity on the calibration text is at most `perplexity_increase`.

        Raises InputError unless exactly one budget is given, and for a saving that no choice reaches.
        """
        if (saving is None) == (perplexity_increase is None):
            raise InputError("give saving or perplexity_increase, one of them")
        least = sum(map(min, zip(*self._bytes.values(), strict=True)))
        most = 1 - least / sum(self._bytes["dense"])
        if saving is not None and not saving <= most:
            raise InputError(f"saving is {saving}, the most that is possible is {most:.3f}")
        path = self._path()
        if saving is not None:
            return self._measured(next(names for names in path if self._saving(names) >= saving))
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
        """Formats by name, with this model's `Transform`s where those pay."""
        return tuple(self._formats[name][layer] for layer, name in enumerate(names))

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
        names = ["dense"] * len(layers)
        path = [list(names)]
        order = ("dense", *CANDIDATES)
        while steps := [
            ((costs[i, new] - costs[i, names[i]]) / saved, i, new)
            for i in layers
            for new in order[order.index(names[i]) + 1 :]
            if (saved := self._bytes[names[i]][i] - self._bytes[new][i]) > 0
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
        logits = self._logits(self.formats(names), self.calibration)
        targets = self.calibration[:, 1:].flatten()
        loss, dense = (
            float(F.cross_entropy(x[:, :-1].flatten(0, 1), targets)) for x in (logits, self._dense_logits)
        )
        return CacheChoice(
            names=tuple(names),
            formats=self.formats(names),
            bytes=self._size(names),
            saving=self._saving(names),
            kl=self._kl(logits),
            perplexity_increase=math.exp(loss - dense) - 1,
            costs=tuple(self._costs or ()),
        )

    def _divergence(self, names: Sequence[str]) -> float:
        return self._kl(self._logits(self.formats(names), self.calibration[:1, :COST_TOKENS]))

    def _kl(self, logits: Tensor) -> float:
        """Of the dense model from `logits`, on as much of the calibration text as those are for."""
        texts, tokens, _ = logits.shape
        mine, dense = (x.flatten(0, 1).log_softmax(-1) for x in (logits, self._dense_logits[:texts, :tokens]))
        return float(F.kl_div(mine, dense, log_target=True, reduction="batchmean"))

    def _logits(self, kinds: Sequence[str | LayerFormat], ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, self._cache(kinds, ids))
        return logits.float()

    def _cache(self, kinds: Sequence[str | LayerFormat], ids: Tensor) -> KVCache:
        weight = next(self.model.parameters())
        return build_cache(
            kinds,
            self.model.config,
            batch_size=ids.shape[0],
            max_length=ids.shape[1],
            dtype=weight.dtype,
            device=weight.device,
        )

    def _saving(self, names: Sequence[str]) -> float:
        return 1 - self._size(names) / self._size(["dense"] * len(names))

    def _size(self, names: Sequence[str]) -> int:
        return sum(self._bytes[name][layer] for layer, name in enumerate(names))

    def _layers_bytes(self, formats: Sequence[LayerFormat]) -> list[int]:
        """Each layer's in a cache of `length` tokens, of tensors as they are allocated; dense in bf16."""
        cache = build_cache(
            formats,
            self.model.config,
            batch_size=1,
            max_length=self.length,
            dtype=torch.bfloat16,
            device=torch.device("meta"),
        )
        cache.reserve(self.length)
        return [sum(tensor.nbytes for tensor in layer.tensors) for layer in cache.layers]

    def _key_transforms(self, fine: int) -> list[Transform]:
        """Of each layer."""
        cache = self._cache(["dense"] * self.model.config.num_layers, self.calibration)
        moments: list[Tensor] = []
        for layer in cache.layers:
            layer.attend = _recording(layer.attend, moments)  # type: ignore[method-assign, assignment]
        self.model(self.calibration, cache)
        transforms = []
        for layer, queries in zip(cache.layers, moments, strict=True):
            # Sinks are stored as they are, too, and are too unlike other keys to have a say here.
            keys = layer.keys.codes[:, :, CACHES["int4-sinks"].sinks : cache.length].double()
            transforms.append(_transform(keys.transpose(0, 1), queries, fine))
        return transforms


def _with_transform(format: LayerFormat, transform: Transform, fine: int) -> LayerFormat:
    if not isinstance(format.keys, Int4):
        return format
    return dataclasses.replace(format, keys=Int4(fine), key_transform=transform)


def _transform(keys: Tensor, queries: Tensor, fine: int) -> Transform:
    """The transform under which rounding keys costs the scores least, `fine` channels of it hardly at all.

    `keys` is (kv_heads, batch, time, head_dim) fp64, `queries` the second moments of what is multiplied with
    them, (kv_heads, head_dim, head_dim). After a transform A the error of a score q · k is about |q A⁻¹|² |A
    k|². With C the covariance of k and R = `queries`, tr(A⁻ᵀ R A⁻¹) tr(A C Aᵀ) is least where AᵀA is M with
    M C M = R, the geometric mean of R and C⁻¹; with diagonal matrices only, this is SmoothQuant's balance
    (Xiao et al. 2022, arXiv:2211.10438). What rotation A has left goes to the principal axes, which hold very
    different shares of that trace: the first `fine` of them are set apart, as are the others, and within
    either group rotated once more, so that all its channels have the same variance. Of the others this is 1,
    which suits fp16.
    """
    keys = keys.flatten(1, 2)
    offset = keys.mean(1, keepdim=True)
    covariance = _regular((keys - offset).mT @ (keys - offset) / keys.shape[1])
    root = _power(covariance, 0.5)
    inverse_root = _power(covariance, -0.5)
    mean = inverse_root @ _power(root @ _regular(queries) @ root, 0.5) @ inverse_root
    stretch = _power(mean, 0.5)
    variances, axes = (x.flip(-1) for x in torch.linalg.eigh(stretch @ covariance @ stretch))
    groups = ((slice(fine), FINE_SIZE), (slice(fine, None), 1.0))
    mixed = [
        axes[..., part] @ _even(axes[..., part]) * (size / variances[:, None, part].mean(-1, True).sqrt())
        for part, size in groups
    ]
    matrix = (stretch @ torch.cat(mixed, -1)).half().contiguous()
    return Transform(offset.float(), matrix, torch.linalg.inv(matrix.double()).half().contiguous())


def _even(axes: Tensor) -> Tensor:
    """For `axes`, (..., size), an orthonormal matrix of which all entries are about as large: a discrete
    cosine transform, (size, size). `kernels.hadamard` has such blocks of powers of two only.
    """
    size = axes.shape[-1]
    steps = torch.arange(size, dtype=axes.dtype, device=axes.device)
    cosines = torch.cos(math.pi / max(size, 1) * (steps[:, None] + 0.5) * steps)
    matrix: Tensor = cosines / cosines.norm(dim=0)
    return matrix


def _regular(moments: Tensor) -> Tensor:
    """With a little of the same in all directions, so that none that the text did not have counts nothing."""
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)[:, None, None]
    return moments + LEAST_SHARE * mean * torch.eye(
        moments.shape[-1], dtype=moments.dtype, device=moments.device
    )


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Of symmetric positive matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    powers = values.clamp(min=1e-24).pow(exponent)
    result: Tensor = (vectors * powers[..., None, :]) @ vectors.mT
    return result


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _recording(attend: Attend, moments: list[Tensor]) -> Attend:
    """`attend` that also notes the queries' second moments, (kv_heads, head_dim, head_dim) fp64."""

    def attend_and_note(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        grouped = torch.unflatten(queries.double(), 1, (keys.shape[1], -1)).transpose(0, 1).flatten(1, 3)
        moments.append(grouped.mT @ grouped / grouped.shape[1])
        return attend(queries, keys, values)

    return attend_and_note
