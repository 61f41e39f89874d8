"""The decoding loop."""

import copy
import os
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ryzen_llm.cache import KVCache, LayerFormat, build_cache, check_names
from ryzen_llm.decoding.drafters import Drafter
from ryzen_llm.decoding.fixed_width import FixedWidthPass
from ryzen_llm.decoding.frame_room import with_frame_room
from ryzen_llm.decoding.generation import Generation, joined, require_finite
from ryzen_llm.decoding.huge_pages import move_to_huge_pages
from ryzen_llm.decoding.sampling import Sampling, seed_generator
from ryzen_llm.decoding.speculative import SpeculativeDecoder
from ryzen_llm.decoding.weights import KINDS, multiply_few_rows, quantise_weights
from ryzen_llm.errors import InputError
from ryzen_llm.kernels import supports_bf16
from ryzen_llm.model import Transformer

WEIGHTS = ("bf16", "fp32", *KINDS)
STOP_CHECK_INTERVAL = 16
"""Tokens between two looks at whether all rows have stopped, where a look makes the host wait for a GPU."""
SLOTS = 256
"""On a GPU a compiled decoder's cache has room for a multiple of so many tokens."""


def room_for(max_length: int, device: torch.device) -> int:
    """Tokens that a compiled decoder's cache is built for: a GPU compiles anew for each number of them."""
    return -(-max_length // SLOTS) * SLOTS if device.type == "cuda" else max_length


class Generator:
    """Generates with a model whose own weights, mode and compilation are left as they are.

    Args:
        model: The model; its weights are taken as they are now.
        cache: Kind of key-value cache, a name in `ryzen_llm.cache.CACHES`, or one for each
            layer, also as `KVCacheOptimizer` makes them.
        drafter: For speculative decoding: a name in `drafters.DRAFTERS`, a `Drafter`, or several to choose
            from at each step; the ids stay those of decoding without one (`SpeculativeDecoder`).
        weights: "bf16", which falls back to "fp32" with a warning where the hardware has no bf16, "fp32", or
            "int8" or "int4", which decode faster and change the output a little (`decoding.weights`); what
            they are multiplied by is in bf16, which a CPU with AVX512-VNNI rounds to 8 bits, or in fp32 where
            the hardware has no bf16.
        compile: Compile the step that decodes one token; the first call then takes up to a minute longer.

    Raises InputError for an unknown cache, drafter or kind of weights, and for weights that the model's sizes
    do not allow.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        cache: str | Sequence[str | LayerFormat] = "dense",
        drafter: str | Drafter | Sequence[str | Drafter] | None = None,
        weights: str = "bf16",
        compile: bool = False,
    ) -> None:
        check_names([cache] if isinstance(cache, str) else cache)
        if weights not in WEIGHTS:
            raise InputError(f"unknown weights {weights!r}: choose one of {', '.join(WEIGHTS)}")
        self.device = next(model.parameters()).device
        has_bf16 = supports_bf16(self.device)
        if weights == "bf16" and not has_bf16:
            warnings.warn(f"{self.device} has no bf16 arithmetic: decoding with fp32 weights", stacklevel=2)
            weights = "fp32"
        self.weights = weights
        self.dtype = torch.bfloat16 if has_bf16 and weights != "fp32" else torch.float32
        self.cache = cache
        self.compile = compile
        # A copy of the modules around the weights in their decoding dtype; where that is theirs already, the
        # memory is shared. An embedding in the form that training needs is packed first.
        embedding = model.embedding.compressed()
        cast: dict[int, nn.Module] = {
            id(p): nn.Parameter(p.detach().to(self.dtype), requires_grad=False)  # type: ignore[misc]
            for p in (*model.parameters(), *embedding.parameters())
        }
        cast[id(model.embedding)] = embedding = copy.deepcopy(embedding, cast)
        self.model: Transformer = copy.deepcopy(model, cast).eval()
        self.model.replace_embedding(embedding)
        if weights in KINDS:
            quantise_weights(self.model, weights)
        else:
            multiply_few_rows(self.model)
        shared = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        tensors = (*self.model.parameters(), *self.model.buffers())
        move_to_huge_pages(tensor for tensor in tensors if tensor.data_ptr() not in shared)
        # Asking for one graph is an error where the user has switched the compiler off.
        disabled = torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1"
        self.fixed_width = FixedWidthPass(self.model, self.device, compile and not disabled)
        self.speculation = SpeculativeDecoder(self, drafter) if drafter else None

    @with_frame_room
    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor | Sequence[Tensor],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_tokens: Sequence[int] = (),
        on_token: Callable[[list[int]], None] | None = None,
    ) -> Generation:
        """Continue one prompt or several.

        Args:
            input_ids: (time,) or (batch, time) int64, or a sequence of (time,) for prompts of different
                lengths, which are read one after the other and continued together, without padding.
            max_new_tokens: How many tokens to add at most.
            temperature: See `Sampling`; 0 is greedy.
            top_k: See `Sampling`.
            top_p: See `Sampling`.
            seed: Makes sampling repeatable; None draws a new seed.
            stop_tokens: Ids that end a row.
            on_token: Called with the new id of every row as soon as it is known, for streaming.

        Raises InputError for prompts or settings that cannot work.
        """
        if self.speculation:
            return self.speculation.generate(
                input_ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stop_tokens=stop_tokens,
                on_token=on_token,
            )
        started = time.perf_counter()
        sampling = Sampling(temperature, top_k, top_p)
        prompts = self.check_prompts(input_ids, max_new_tokens)
        batch_size = len(prompts)
        rng = torch.Generator(self.device)
        seed_generator(rng, seed)
        cache = self.new_cache(batch_size, max(map(len, prompts)) + max_new_tokens)
        stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=self.device)
        stopped = torch.zeros(batch_size, dtype=torch.bool, device=self.device)
        # Waiting for the device at every token would leave it idle; a CPU is not waited for.
        interval = 1 if self.device.type == "cpu" or on_token is not None else STOP_CHECK_INTERVAL
        logits = self.model.logits(self.read_prompts(prompts, cache))
        finite, likeliest = logits.isfinite().all(), logits.argmax(-1)
        new_ids: list[Tensor] = []
        first_token_at = started
        while True:
            token = likeliest if temperature == 0 else sampling.sample(logits, rng)
            new_ids.append(torch.where(stopped, new_ids[-1], token) if new_ids else token)
            if len(new_ids) == 1:
                first_token_at = self._now()
            if on_token is not None:
                on_token(new_ids[-1].tolist())
            if stop_tokens:
                stopped |= torch.isin(new_ids[-1], stops)
                if len(new_ids) % interval == 0 and stopped.all():
                    break
            if len(new_ids) == max_new_tokens:
                break
            outcome = self.fixed_width(new_ids[-1][:, None], cache)
            logits, likeliest = outcome.logits[:, 0], outcome.likeliest[:, 0]
            finite &= outcome.finite

        seconds = self._now() - first_token_at
        require_finite(finite, self.dtype)
        added = torch.stack(new_ids, dim=1)
        if stop_tokens:  # what was generated between the last row's stop and noticing it
            ended = torch.isin(added, stops).cumsum(1).bool().all(0)
            added = added[:, : added.shape[1] - max(0, int(ended.sum()) - 1)]
        timed_tokens = batch_size * (len(new_ids) - 1)
        return Generation(
            ids=joined(prompts, added),
            new_ids=added,
            stop_reason="stop" if stopped.all() else "length",
            time_to_first_token_s=first_token_at - started,
            tokens_per_second=timed_tokens / seconds if timed_tokens else None,
            accepted_per_step=None,
        )

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache of the kind asked for, for `max_length` tokens of each text or some more."""
        return build_cache(
            self.cache,
            self.model.config,
            batch_size=batch_size,
            max_length=room_for(max_length, self.device) if self.compile else max_length,
            dtype=self.dtype,
            device=self.device,
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def read_prompts(self, prompts: Sequence[Tensor], cache: KVCache) -> Tensor:
        """Add `prompts` to an empty cache; their last tokens' hidden states, (batch, hidden_size)."""
        if len(set(map(len, prompts))) == 1:
            positions = cache.append(len(prompts[0]))
            return self.model.run_blocks(torch.stack(list(prompts)), positions, cache.layers)[:, -1]
        cache.reserve(max(map(len, prompts)))  # what grows later is no longer shared with the rows
        last = []
        for index, prompt in enumerate(prompts):
            row = cache.row(index, len(prompt))
            last.append(self.model.run_blocks(prompt[None], row.append(len(prompt)), row.layers)[:, -1])
        return torch.cat(last)

    def check_prompts(self, input_ids: Tensor | Sequence[Tensor], max_new_tokens: int) -> list[Tensor]:
        """Each prompt as (time,) on the model's device; raises InputError where one cannot work."""
        config = self.model.config
        given, dims = ([input_ids], (1, 2)) if isinstance(input_ids, Tensor) else (input_ids, (1,))
        for ids in given:
            if not isinstance(ids, Tensor):
                raise InputError(
                    f"input_ids hold {type(ids).__name__}, expected tensors of int64: torch.tensor(...)"
                )
            if ids.dtype != torch.int64 or ids.dim() not in dims or not ids.numel():
                raise InputError(
                    f"input_ids are {tuple(ids.shape)} {ids.dtype}, expected one or more tokens as (time,) "
                    "or (batch, time) int64, or a sequence of (time,)"
                )
        if not given:
            raise InputError("input_ids are empty, expected one prompt or more")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        prompts = [row.to(self.device) for ids in given for row in ids.view(-1, ids.shape[-1])]
        longest = max(map(len, prompts))
        length = longest + max_new_tokens
        if length > config.max_position_embeddings:
            raise InputError(
                f"a prompt of {longest} and {max_new_tokens} new tokens make {length}, expected "
                f"at most max_position_embeddings = {config.max_position_embeddings}: shorten one of them"
            )
        every = torch.cat(prompts)
        low, high = int(every.min()), int(every.max())
        if low < 0 or high >= config.vocab_size:
            raise InputError(
                f"input_ids reach from {low} to {high}, expected 0 to {config.vocab_size - 1}: "
                "is this the model's own tokenizer?"
            )
        return prompts
