"""Splits follow from the text alone and hold the shares asked for."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ryzen_llm.data.splits import split_of, unit_hash


@pytest.mark.parametrize(("val", "test"), [(0.05, 0.05), (0.3, 0.1), (0.0, 0.2)])
def test_shares_are_those_asked_for(val: float, test: float) -> None:
    """Each share is within 4 standard deviations of a binomial's mean over 20,000 documents."""
    n = 20_000
    counts = Counter(split_of(f"document {i}", val, test) for i in range(n))
    for split, share in (("val", val), ("test", test)):
        assert abs(counts[split] - n * share) <= 4 * (n * share * (1 - share)) ** 0.5


@given(st.text(), st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0, 0.19))
def test_a_larger_test_share_keeps_the_test_documents(
    text: str, val: float, test: float, more: float
) -> None:
    """Raising test_fraction never lets a former test document into training."""
    if split_of(text, val, test) == "test":
        assert split_of(text, val, test + more) == "test"


@given(st.text())
def test_hash_is_in_the_unit_interval_and_independent_between_purposes(text: str) -> None:
    """The sample for the tokenizer must not be correlated with the split."""
    assert 0 <= unit_hash(text, "split") < 1
    assert unit_hash(text, "split") != unit_hash(text, "sample")


def test_split_is_the_same_in_another_process() -> None:
    """Python's own hash differs between processes; the split must not."""
    texts = [f"text {i} é" for i in range(50)]
    program = (
        "from ryzen_llm.data.splits import split_of\n"
        "print([split_of(f'text {i} \\u00e9', 0.3, 0.3) for i in range(50)])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str([split_of(text, 0.3, 0.3) for text in texts])
