"""Documents made of a few words, for the tests of this folder."""

import random

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "naïve",
    "東京",
    "return",
    "def",
    "import",
    "(x):\n    ",
    "\n",
    "\n\n",
]


def random_text(seed: int, words: int) -> str:
    """Words in an order that the seed decides; different seeds give different documents."""
    chooser = random.Random(seed)
    return f"document {seed}: " + " ".join(chooser.choices(WORDS, k=words))
