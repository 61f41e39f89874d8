"""What the parser of the command line says comes out as one line that names the key and what it expects."""

from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jsonargparse import ArgumentError, ArgumentParser

from ryzen_llm.pipeline.config_errors import explain

KEYS = ["batch_size", "data.context", "data.source", "mode", "rate"]


def message(arguments: list[str]) -> str:
    """What jsonargparse itself says."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--data.context", type=int)
    parser.add_argument("--rate", type=float | None)
    parser.add_argument("--mode", type=Literal["fast", "slow"])
    parser.add_argument("--config", action="config")
    with pytest.raises(ArgumentError) as caught:
        parser.parse_args(arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--batch_size", "big"], "batch_size is big, expected a whole number"),
        (["--data.context", "[1, 2]"], "data.context is [1, 2], expected a whole number"),
        (["--rate", "quick"], "rate is quick, expected a number or null"),
        (["--mode", "warp"], "mode is warp, expected one of 'fast', 'slow'"),
        (["--batch_sise", "3"], "unknown key batch_sise: did you mean batch_size? --help lists all of them"),
        (["--batch_sise=3"], "unknown key batch_sise: did you mean batch_size? --help lists all of them"),
        (
            ["--config", '{"data": {"contxt": 3}}'],
            "unknown key data.contxt: did you mean data.context? --help lists all of them",
        ),
        (["--zzz", "3"], "unknown key zzz: --help lists all of them"),
    ],
)
def test_what_is_wrong_and_what_was_expected(arguments: list[str], expected: str) -> None:
    assert expected in explain(message(arguments), KEYS)


@given(st.text())
@example("unrecognized arguments: ")
@example('Parser key "x": Got value:')
def test_any_message_is_one_line(text: str) -> None:
    assert len(explain(text, KEYS).splitlines()) <= 1


def test_an_unforeseen_message_is_kept() -> None:
    assert explain("something\n  else  went wrong", KEYS) == "something else went wrong"
