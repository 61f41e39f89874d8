"""A small network that goes on from the model's own hidden state."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ryzen_llm.decoding.drafters.base import Draft, Drafter, DraftSession, Step
from ryzen_llm.decoding.fixed_width import compiled, layout_of
from ryzen_llm.decoding.huge_pages import move_to_huge_pages
from ryzen_llm.decoding.weights import Int4Linear
from ryzen_llm.errors import InputError
from ryzen_llm.kernels import rms_norm, shared_compilations, swiglu
from ryzen_llm.kernels.quantised_linear import GROUP
from ryzen_llm.model import Transformer
from ryzen_llm.model.embedding import Embedding

CONFIDENCE_LEVELS = 12
SURENESS = 0.6
"""How likely a token is, about, as part of what heads say it is: SmolLM2's on Spec-Bench's prompts."""
BRANCHES = 4
"""Tokens that are drafted after one."""
MOST_STATES = 2
"""Of the drafted tokens of one depth, how many are followed."""
UNLIKELY = 0.02
"""Tokens that are less likely than this, with all that they follow, are left out."""
_MOST = {"hidden_size": 1 << 20, "intermediate_size": 1 << 20, "depth": 16}
FORMAT = "ryzen-llm draft heads 1"


@dataclass(frozen=True)
class HeadsConfig:
    """Shape of `DraftHeads`. Raises InputError for a number out of range.

    Attributes:
        hidden_size: The model's.
        intermediate_size: Width of the network's hidden layer.
        depth: How many tokens it drafts at a time.
    """

    hidden_size: int
    intermediate_size: int = 1024
    depth: int = 3

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or not 1 <= value <= _MOST[name]:
                raise InputError(f"draft heads: {name} is {value!r}, expected 1 to {_MOST[name]}")


class DraftHeads(nn.Module):
    """s' = s + W_out swiglu(W_in [norm(s); norm(e)]): from one position's hidden state to the next one's.

    `s` starts as what the model's output head saw at the last token but one, `e` is the embedding of the
    token that came then, and s' takes the place of what the head will see at it. The next token is the
    likeliest by the model's own tied matrix, of which only the rows of the `vocabulary` are multiplied, and
    so on from s'. One network for all depths: an EAGLE head (Li et al. 2024, arXiv:2401.15077) with a gated
    layer in the place of its transformer block, like the recurrent drafter of Cheng et al. 2024
    (arXiv:2403.09919).

    Args:
        config: Shape.
        vocabulary: Ids that can be drafted, (draft_vocab_size,) int64.
    """

    vocabulary: Tensor

    def __init__(self, config: HeadsConfig, vocabulary: Tensor) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.state_norm = nn.Parameter(torch.ones(size))
        self.token_norm = nn.Parameter(torch.ones(size))
        self.w_in = nn.Linear(2 * size, 2 * config.intermediate_size, bias=False)
        self.w_out = nn.Linear(config.intermediate_size, size, bias=False)
        nn.init.normal_(self.w_in.weight, std=0.02)
        nn.init.zeros_(self.w_out.weight)
        self.register_buffer("vocabulary", vocabulary)

    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """States and embedded tokens, (..., hidden_size) each, to the next states."""
        x = torch.cat(
            (rms_norm(states, self.state_norm, 1e-5), rms_norm(embedded, self.token_norm, 1e-5)), dim=-1
        )
        output: Tensor = states + self.w_out(swiglu(self.w_in(x)))
        return output

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        path = Path(path)
        metadata = {"format": FORMAT, "config": json.dumps(asdict(self.config))}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        temporary = path.with_name(path.name + ".part")
        temporary.write_bytes(save(tensors, metadata))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> DraftHeads:
        """Raises InputError for a file that is missing, damaged or something else."""
        if not Path(path).is_file():
            raise InputError(f"draft heads {path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("format") != FORMAT:
                raise InputError(f"draft heads {path}: something else; train them with train_drafter.yaml")
            config: dict[str, Any] = json.loads(metadata["config"])
            vocabulary = tensors["vocabulary"]
            if vocabulary.dtype != torch.int64 or vocabulary.dim() != 1 or int(vocabulary.min()) < 0:
                raise ValueError("the vocabulary is no list of ids")
            heads = cls(HeadsConfig(**config), vocabulary)
            heads.load_state_dict(tensors)
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise InputError(f"draft heads {path}: damaged ({' '.join(str(error).split())[:200]})") from error
        return heads.eval()


class HeadsDrafter(Drafter):
    """Drafts trees with `DraftHeads`; its signal is how likely the token seems, at which depth.

    The likeliest texts are followed (Li et al. 2024, "EAGLE-2", arXiv:2406.16858).

    The matrix is taken from `model`, quantised like the heads to 4 bits where a CPU can multiply these:
    drafts need no precision.

    Args:
        heads: Trained for this model.
        model: The one that is drafted for, as its `Generator` has it.
        compile: Compile the whole draft.

    Raises InputError for heads of another model's shape.
    """

    name = "heads"

    def __init__(self, heads: DraftHeads, model: Transformer, compile: bool = False) -> None:
        config = model.config
        vocabulary = heads.vocabulary
        if heads.config.hidden_size != config.hidden_size or int(vocabulary.max()) >= config.vocab_size:
            raise InputError(
                f"draft heads: are for a hidden_size of {heads.config.hidden_size} and ids up to "
                f"{int(vocabulary.max())}, the model has {config.hidden_size} and {config.vocab_size} tokens"
            )
        weight = next(model.parameters())
        draft = _Unrolled(heads, output_rows(model, vocabulary)).to(weight.device, weight.dtype)
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
            draft.quantise()
        move_to_huge_pages((*draft.parameters(), *draft.buffers()))
        draft.embedding = model.embedding
        self.depth = heads.config.depth
        self._run = draft.forward
        self._layout = layout_of(draft)
        if compile:  # each depth is a graph, and compiles before anyone takes the time
            self._run = compiled(draft.forward)
            with torch.inference_mode(), shared_compilations():
                for depth in range(1, self.depth + 1):
                    self.draft(weight.new_zeros(config.hidden_size), int(vocabulary[0]), depth)

    def begin(self, tokens: Sequence[int], hidden_state: Tensor) -> DraftSession:
        """See `Drafter.begin`."""
        return _Session(self, tokens[-1], hidden_state)

    def likelihood(self, signal: int) -> float:
        """See `Drafter.likelihood`: what the heads said it is, of texts unlike those that they know."""
        return float(SURENESS * 2 ** (-(signal % CONFIDENCE_LEVELS + 0.5) / 2))

    def draft(self, hidden_state: Tensor, token: int, most: int) -> Draft:
        """At most `most` tokens in a row after `token`, which the model found after `hidden_state`.

        That is (hidden_size,).
        """
        last = torch.tensor(token, device=hidden_state.device)
        drafted = self._run(hidden_state, last, min(most, self.depth), self._layout).tolist()
        places = {-1: -1}
        tokens: list[int] = []
        signals: list[int] = []
        parents: list[int] = []
        for index, (token, signal, parent, permille) in enumerate(zip(*drafted, strict=True)):
            if permille >= 1000 * UNLIKELY:  # then what it follows is, too
                places[index] = len(tokens)
                tokens.append(token)
                signals.append(signal)
                parents.append(places[parent])
        return Draft(tokens, signals, parents)


def output_rows(model: Transformer, vocabulary: Tensor) -> Tensor:
    """The rows of the output matrix for these ids, (draft_vocab_size, hidden_size)."""
    vocabulary = vocabulary.to(next(model.parameters()).device)
    if model.config.tie_embeddings:
        return model.embedding.lookup(vocabulary).detach()
    size = model.config.hidden_size
    every = torch.eye(size, dtype=next(model.parameters()).dtype, device=vocabulary.device)
    return model.logits(every).T[vocabulary].detach()  # whatever kind of weights the head has


class _Unrolled(nn.Module):
    """All of a draft at once, so that one graph holds it: after a pass, each call of an op takes a while."""

    embedding: Embedding

    def __init__(self, heads: DraftHeads, rows: Tensor) -> None:
        super().__init__()
        self.heads = DraftHeads(heads.config, heads.vocabulary)
        self.heads.load_state_dict(heads.state_dict())
        self.rows = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
        self.rows.weight = nn.Parameter(rows, requires_grad=False)

    def quantise(self) -> None:
        """Where the sizes suit."""
        for parent, name in ((self.heads, "w_in"), (self.heads, "w_out"), (self, "rows")):
            linear = getattr(parent, name)
            if linear.in_features % GROUP == 0 and linear.out_features % 16 == 0:
                setattr(parent, name, Int4Linear(linear, name))

    def forward(self, state: Tensor, token: Tensor, depth: int, layout: str) -> Tensor:
        """State (hidden_size,) and token () to a tree of up to `depth` tokens in a row, (4, tokens) int64.

        Its ids, signals, parents (see `Draft`) and how likely each is with all that it follows, in permille.
        `layout` is the draft's, which is all that a compiled graph knows it by.
        """
        if not layout:  # read here, so that the graph is for this layout only
            raise AssertionError("a draft has a layout")
        drafted: list[Tensor] = []
        branches = min(BRANCHES, len(self.heads.vocabulary))
        states, tokens = state[None], token[None]
        indices = torch.full_like(tokens, -1)
        above = torch.zeros_like(tokens, dtype=torch.float32)
        for d in range(depth):
            states = self.heads(states, self.embedding.lookup(tokens))
            chances, found = self.rows(states).float().log_softmax(-1).topk(branches)
            level = (chances * (-2 / math.log(2))).long().clamp(max=CONFIDENCE_LEVELS - 1)
            joint = (above[:, None] + chances).flatten()
            ids = self.heads.vocabulary[found].flatten()
            signals = d * CONFIDENCE_LEVELS + level.flatten()
            parents = indices[:, None].expand_as(found).flatten()
            permille = (joint.exp() * 1000).long()
            first = sum(part.shape[1] for part in drafted)
            drafted.append(torch.stack((ids, signals, parents, permille)))
            if d + 1 < depth:
                above, followed = joint.topk(min(MOST_STATES, len(joint)))
                states, tokens, indices = states[followed // branches], ids[followed], first + followed
        return torch.cat(drafted, 1)


class _Session(DraftSession):
    def __init__(self, drafter: HeadsDrafter, token: int, hidden_state: Tensor) -> None:
        self.drafter = drafter
        self.token = token
        self.hidden_states, self.index = hidden_state[None], 0

    def propose(self, most: int) -> Draft:
        return self.drafter.draft(self.hidden_states[self.index], self.token, most)

    def update(self, step: Step) -> None:
        self.token = step.accepted[-1]
        # Taken out when it is asked for: that takes a while, and not every step asks.
        self.hidden_states, self.index = step.hidden_states, step.stood[-1]
