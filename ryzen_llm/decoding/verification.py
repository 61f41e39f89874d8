"""Which tokens of a draft stand, and what follows them: exactly what the model would have written alone."""

from collections.abc import Callable, Collection

from ryzen_llm.decoding.drafters import Draft


def verify(
    draft: Draft, draw: Callable[[int], int], stops: Collection[int], most: int
) -> tuple[list[int], list[int]]:
    """The text's next tokens, at least one, and what each follows: 0, or 1 + a drafted token's index.

    `draw(0)` gives the model's token after the text, `draw(i + 1)` the one after the draft's token `i`,
    by the same `Sampling` and from the same random numbers as without a draft. Where it is among the
    tokens that the draft has there, the one after it may be drawn, too; where not, it is the text's next
    token. So the text follows the model's distribution whatever the draft is, and for one seed even is
    the same text. Drawn so, a drafted token x stands with probability p(x), and otherwise the token has
    the distribution (p - p(x) 1_x) / (1 - p(x)), of several in the same way: speculative sampling
    (Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318) for a draft that is
    certain of itself, with shared random numbers as in Daliri et al. 2024 (arXiv:2408.07978).

    A token of `stops` is the last one, and there are `most` at most.
    """
    if not draft.tokens:
        return [draw(0)], [0]
    following = {
        (parent, token): index
        for index, (parent, token) in enumerate(zip(draft.follows, draft.tokens, strict=True))
    }
    accepted: list[int] = []
    stood: list[int] = []
    last: int | None = -1
    while last is not None and len(accepted) < most:
        token = draw(last + 1)
        stood.append(last + 1)
        accepted.append(token)
        last = None if token in stops else following.get((last, token))
    return accepted, stood
