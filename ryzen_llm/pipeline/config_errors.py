"""What jsonargparse says about a wrong key or value, in one line for people."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_KEY = re.compile(r'(?:Parser key|Key) "(?P<key>[^"]+)"')
_TYPE = re.compile(r"Expected (?:an? )?(?:<class '(?P<name>\w+)'>|typing\.Literal\[(?P<values>[^]]*)\])")
_GIVEN = re.compile(r"(?:Got|Given) value: (?P<value>.*?)(?: Errors:|$)")
_UNKNOWN = re.compile(
    r"unrecognized arguments: (?P<argument>\S+)|Group '(?P<group>\w+)' does not accept option '(?P<key>\w+)'"
    r"|Option '(?P<option>[^']+)' is not accepted"
)
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "tuple": "a list, as in [a,b]",
}


def explain(message: str, keys: Iterable[str]) -> str:
    """`message` in one line: the key, its value, what was expected; for an unknown key the nearest of `keys`.

    A message of another form is returned as it is, on one line.
    """
    message = " ".join(message.split())
    if unknown := _UNKNOWN.search(message):
        written = unknown["argument"] or unknown["option"] or f"{unknown['group']}.{unknown['key']}"
        key = written.lstrip("-").partition("=")[0]
        nearest = difflib.get_close_matches(key, keys, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        return f"unknown key {key}: {hint}--help lists all of them"
    key_found, given = _KEY.search(message), _GIVEN.search(message)
    expected = [
        _WORDS.get(found["name"], found["name"]) if found["name"] else f"one of {found['values']}"
        for found in _TYPE.finditer(message)
    ]
    if key_found and given and expected:
        return f"{key_found['key']} is {given['value']}, expected {' or '.join(dict.fromkeys(expected))}"
    return message
