"""Speculative decoding: several tokens a step, the same text."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ryzen_llm.cache import KVCache
from ryzen_llm.decoding.adaptive import DraftControl
from ryzen_llm.decoding.drafters import Draft, Drafter, Step, build_drafters
from ryzen_llm.decoding.drafting import Drafting, SpeculationStatistics
from ryzen_llm.decoding.fixed_width import WIDEST
from ryzen_llm.decoding.frame_room import with_frame_room
from ryzen_llm.decoding.generation import Generation, joined, require_finite
from ryzen_llm.decoding.sampling import Sampling, seed_generator
from ryzen_llm.decoding.verification import verify
from ryzen_llm.errors import InputError

if TYPE_CHECKING:
    from ryzen_llm.decoding.generator import Generator

WIDTHS = (1, 2, 4, 8)


@dataclass
class _Text:
    prompt: list[int]
    rng: torch.Generator
    new: list[int] = field(default_factory=list)
    ended: bool = False


class SpeculativeDecoder:
    """Generates what `generator` does, several tokens a step where drafts hold.

    At every step drafters propose tokens, the model reads as many of them as pay, and `verify` keeps what the
    model would have written itself. The width of a step is one of a few, each with a compiled graph of its
    own; which one, and whose draft, follows from running acceptance and the measured time of each width
    (`DraftControl`). The first call measures these, and compiles.

    With a single width there is no choice and nothing is measured; without drafters, too, that is the run to
    compare ids with. Between widths the model's output may differ in its last bits, and so the text may where
    two tokens are as likely to that precision.

    Args:
        generator: The model and how to decode it.
        drafter: A name in `drafters.DRAFTERS`, a `Drafter`, or several to choose from at each step.
        widths: How many tokens a step may read, the last one of the text and a draft.

    Attributes:
        statistics: Of the last call.

    Raises InputError for an unknown drafter and for widths that cannot work.
    """

    def __init__(
        self,
        generator: Generator,
        drafter: str | Drafter | Sequence[str | Drafter],
        *,
        widths: Sequence[int] = WIDTHS,
    ) -> None:
        if not widths or min(widths) < 1 or max(widths) > WIDEST:
            raise InputError(f"widths are {list(widths)}, expected one or more numbers from 1 to {WIDEST}")
        self.generator = generator
        self.drafters = build_drafters(drafter, generator.model, generator.compile)
        self.widths = sorted(set(widths))
        self.statistics = SpeculationStatistics()
        self._controls: dict[int, DraftControl] = {}  # by batch size

    def forget(self) -> None:
        """Have the drafters forget earlier texts: else one that is generated again comes at once."""
        for drafter in self.drafters:
            drafter.forget()

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
        """See `Generator.generate`. What is drawn for a seed is the same, too, for a single text; of several,
        each draws by itself.
        """
        started = time.perf_counter()
        generator = self.generator
        sampling = Sampling(temperature, top_k, top_p)
        prompts = generator.check_prompts(input_ids, max_new_tokens)
        longest_prompt = max(map(len, prompts))
        cache = generator.new_cache(len(prompts), longest_prompt + max_new_tokens + self.widths[-1])
        hidden_states = generator.read_prompts(prompts, cache)
        logits = generator.model.logits(hidden_states)
        require_finite(logits.isfinite().all(), generator.dtype)
        stops = frozenset(stop_tokens)
        texts = [
            _Text(prompt.tolist(), rng)
            for prompt, rng in zip(prompts, self._rngs(len(prompts), seed), strict=True)
        ]
        for row, text in enumerate(texts):
            text.new.append(int(sampling.sample(logits[row : row + 1], text.rng)))
            text.ended = text.new[0] in stops or max_new_tokens == 1
        drafting = Drafting(
            self.drafters,
            self._control(cache),
            generator.model.config.vocab_size,
            [[*text.prompt, *text.new] for text in texts],
            hidden_states,
        )
        self.statistics = drafting.statistics
        stream = _Stream(texts, on_token)
        stream.send()
        first_token_at = time.perf_counter()
        while not all(text.ended for text in texts):
            if len(texts) == 1 and drafting.control.pauses.left:
                self._rest(texts[0], drafting, cache, sampling, stops, max_new_tokens, stream)
            else:
                self._step(texts, drafting, cache, sampling, stops, max_new_tokens)
                stream.send()
        drafting.catch_up()
        seconds = time.perf_counter() - first_token_at
        longest = max(len(text.new) for text in texts)
        new_ids = torch.tensor(
            [text.new + text.new[-1:] * (longest - len(text.new)) for text in texts], device=generator.device
        )
        timed = drafting.statistics.tokens
        return Generation(
            ids=joined(prompts, new_ids),
            new_ids=new_ids,
            stop_reason="stop" if all(text.new[-1] in stops for text in texts) else "length",
            time_to_first_token_s=first_token_at - started,
            tokens_per_second=timed / seconds if timed else None,
            accepted_per_step=timed / drafting.statistics.steps if timed else None,
        )

    def _step(
        self,
        texts: Sequence[_Text],
        drafting: Drafting,
        cache: KVCache,
        sampling: Sampling,
        stops: frozenset[int],
        max_new_tokens: int,
    ) -> None:
        """One pass of the model over all texts; those that have ended read their last token again."""
        rows = [row for row, text in enumerate(texts) if not text.ended]
        fixed_width = self.generator.fixed_width
        branching = fixed_width.reads_trees(cache)
        room = [max_new_tokens - len(texts[row].new) - 1 for row in rows]
        plan = drafting.plan(rows, room, branching)
        drafts = dict(zip(rows, plan.drafts, strict=True))
        inputs, parents = [], []
        for row, text in enumerate(texts):
            draft = drafts.get(row, Draft())
            known = [text.new[-1], *draft.tokens]
            inputs.append(known + known[:1] * (plan.width - len(known)))
            follows = [-1, *(parent + 1 for parent in draft.follows)]
            parents.append([*follows, *range(len(known) - 1, plan.width - 1)])  # filler after the last
        tokens = torch.tensor(inputs, device=self.generator.device)
        outcome = fixed_width(tokens, cache, parents if branching else None)
        require_finite(outcome.finite, self.generator.dtype)
        predictions: list[list[int]] = outcome.likeliest.tolist()

        def draw(row: int, i: int) -> int:
            if sampling.temperature == 0:
                return predictions[row][i]
            return int(sampling.sample(outcome.logits[row, i : i + 1], texts[row].rng))

        steps = []
        kept: list[list[int]] = [[] for _ in texts]
        for row in rows:
            text = texts[row]
            room_left = max_new_tokens - len(text.new)
            accepted, kept[row] = verify(drafts[row], functools.partial(draw, row), stops, room_left)
            text.new += accepted
            text.ended = accepted[-1] in stops or len(text.new) == max_new_tokens
            read = 1 + len(drafts[row].tokens)
            steps.append(
                Step(
                    inputs[row][:read],
                    parents[row][:read],
                    predictions[row][:read],
                    accepted,
                    kept[row],
                    outcome.hidden_states[row],
                )
            )
        cache.keep(kept)
        drafting.learn(rows, plan, steps)

    def _rest(
        self,
        text: _Text,
        drafting: Drafting,
        cache: KVCache,
        sampling: Sampling,
        stops: frozenset[int],
        max_new_tokens: int,
        stream: _Stream,
    ) -> None:
        """The steps of a pause, one token each, without what drafts need: that takes a while after a pass."""
        steps: list[Step] = []
        started = time.perf_counter()
        for _ in range(drafting.control.pauses.left):
            token = text.new[-1]
            outcome = self.generator.fixed_width(torch.tensor([[token]], device=self.generator.device), cache)
            require_finite(outcome.finite, self.generator.dtype)
            likeliest = drawn = int(outcome.likeliest)
            if sampling.temperature:
                drawn = int(sampling.sample(outcome.logits[0], text.rng))
            steps.append(Step([token], [-1], [likeliest], [drawn], [0], outcome.hidden_states[0]))
            text.new.append(drawn)
            text.ended = drawn in stops or len(text.new) == max_new_tokens
            stream.send()
            if text.ended:
                break
        drafting.rested(steps, (time.perf_counter() - started) / len(steps))

    def _control(self, cache: KVCache) -> DraftControl:
        batch_size = len(cache.lengths)
        if batch_size not in self._controls:
            choice = len(self.widths) > 1
            seconds = (
                self.generator.fixed_width.measure(self.widths, cache) if choice else {self.widths[0]: 1.0}
            )
            self._controls[batch_size] = DraftControl(seconds, self.drafters)
        return self._controls[batch_size]

    def _rngs(self, batch_size: int, seed: int | None) -> list[torch.Generator]:
        rngs = [torch.Generator(self.generator.device) for _ in range(batch_size)]
        first = seed_generator(rngs[0], seed)
        for row, rng in enumerate(rngs[1:], start=1):
            rng.manual_seed((first + row) % 2**63)
        return rngs


class _Stream:
    """Passes on the tokens that all texts have, in their order."""

    def __init__(self, texts: Sequence[_Text], on_token: Callable[[list[int]], None] | None) -> None:
        self.texts = texts
        self.on_token = on_token
        self.sent = 0

    def send(self) -> None:
        if self.on_token is None:
            return
        longest = max(len(text.new) for text in self.texts)
        known = min((len(text.new) for text in self.texts if not text.ended), default=longest)
        for index in range(self.sent, known):
            self.on_token([text.new[min(index, len(text.new) - 1)] for text in self.texts])
        self.sent = max(self.sent, known)
