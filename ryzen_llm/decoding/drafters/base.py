"""What a drafter is asked, what it answers, and what it learns of the outcome."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next: one text, or a tree of several.

    Attributes:
        tokens: Their ids; a token comes after the one that it follows.
        signals: For each token, which of its drafter's kinds of guess it is (a length of match, a
            confidence), so that each kind's running acceptance can be kept apart.
        parents: For each token, the index of the one that it follows, -1 for the text's last; None where each
            follows the one before.
    """

    tokens: Sequence[int] = ()
    signals: Sequence[int] = ()
    parents: Sequence[int] | None = None

    @property
    def follows(self) -> Sequence[int]:
        """The `parents`, also where they are None."""
        return range(-1, len(self.tokens) - 1) if self.parents is None else self.parents


@dataclass(frozen=True)
class Step:
    """What one pass of the model over the last token and a draft showed.

    Attributes:
        inputs: Ids that the model read: the text's last one and what was drafted.
        parents: For each of them, the index of the one that it follows; -1 for the first.
        predictions: The likeliest token after each of them, given those that it follows.
        accepted: The text's new tokens.
        stood: Which inputs the text is made of, as many as `accepted`: each is what came before one of these.
        hidden_states: What the output head saw at each input, (width, hidden_size).
    """

    inputs: Sequence[int]
    parents: Sequence[int]
    predictions: Sequence[int]
    accepted: Sequence[int]
    stood: Sequence[int]
    hidden_states: Tensor


class DraftSession(ABC):
    """A drafter at work on one text."""

    @abstractmethod
    def propose(self, most: int) -> Draft:
        """What may follow the text so far, at most `most` tokens in a row."""

    @abstractmethod
    def update(self, step: Step) -> None:
        """Take in what came of it, whoever's draft it was."""


class Drafter(ABC):
    """Guesses the next tokens. It cannot change the output, only how soon it is there: the model decides.

    Attributes:
        name: What it is called in reports.
    """

    name: str

    def forget(self) -> None:  # noqa: B027
        """Forget what earlier texts have taught, for measurements that repeat a text."""

    def likelihood(self, signal: int) -> float:
        """How likely a token with this signal is right, 0 to 1, as long as none has been tried."""
        return 0.5

    @abstractmethod
    def begin(self, tokens: Sequence[int], hidden_state: Tensor) -> DraftSession:
        """A session for a text: the prompt and its first new token.

        `hidden_state` (hidden_size,) is what the output head saw at the prompt's last token.
        """
