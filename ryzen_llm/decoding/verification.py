"""Which tokens of a draft stand, and what follows them: exactly what the model would have written alone."""

from collections.abc import Callable, Collection, Sequence


def verify(draft: Sequence[int], draw: Callable[[int], int], stops: Collection[int], most: int) -> list[int]:
    """The text's next tokens: at least one, at most one more than the draft has.

    `draw(i)` gives the model's token after the first `i` tokens of the draft, by the same `Sampling` and from
    the same random numbers as without a draft. Where it is the draft's next token, the one after it may be
    drawn, too; where not, it is the text's next token itself. So the text follows the model's distribution
    whatever the draft is, and for one seed even is the same text. Drawn so, a drafted token x stands with
    probability p(x), and otherwise the token has the distribution (p - p(x) 1_x) / (1 - p(x)): speculative
    sampling (Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318) for a draft that is
    certain of itself, with shared random numbers as in Daliri et al. 2024 (arXiv:2408.07978).

    A token of `stops` is the last one, and there are `most` at most.
    """
    accepted: list[int] = []
    for i in range(min(len(draft) + 1, most)):
        token = draw(i)
        accepted.append(token)
        if token in stops or i == len(draft) or token != draft[i]:
            break
    return accepted
