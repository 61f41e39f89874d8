"""Conversations as text, by the model's own chat template: a program from a stranger, run in a sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import wraps
from string import Formatter
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_format
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ryzen_llm.data import Tokenizer
from ryzen_llm.errors import InputError

_MOST = 10_000
"""The largest number that is multiplied, raised to a power (of 16 KB at most), or a width or a count."""
_WIDE = ("center", "expandtabs", "generate_lorem_ipsum", "ljust", "rjust", "to_bytes", "zfill")
"""What takes a width or a count: methods, and Jinja's function `lipsum`."""
_WIDE_FILTERS = ("batch", "center", "indent", "round", "slice", "tojson")


class _Generation(Extension):
    """`{% generation %}`, which marks for training what the assistant said, and changes no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        """What is inside, with variables of its own as in transformers."""
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no large number repeats or pads a text either."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.filters |= {"tojson": _to_json, "format": _format}
        self.filters |= {name: _narrow(self.filters[name]) for name in _WIDE_FILTERS}
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse to repeat a text or list, large numbers, and wide formats."""
        if operator == "%":
            if isinstance(left, str | bytes):
                _check_format(str(left))
        elif not all(isinstance(x, int | float) and abs(x) <= _MOST for x in (left, right)):
            _refuse(f"{operator} is for numbers up to {_MOST} here")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Refuse large widths and counts."""
        if getattr(function, "__name__", None) in _WIDE:
            _check_numbers(*args, *kwargs.values())
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Refuse wide formats, and widths that are arguments."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            for _, _, form, _ in Formatter().parse(value.__self__):
                if re.search(r"\d{5}|{", form or ""):
                    _refuse("a format is too wide")
        return wrapped


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """The text of a conversation; with `add_generation_prompt` it ends where the model takes its turn.

    `messages` are `{"role": "user" | "assistant" | "system", "content": text}`. Encode the text with
    `Tokenizer.encode_rendered`. Raises InputError where the tokenizer has no template, or the template fails
    or refuses the messages.
    """
    special = tokenizer.special
    if special.chat_template is None:
        raise InputError("the model has no chat template: give it a text to continue instead")
    try:
        template = _Sandbox().from_string(special.chat_template)
        return template.render(
            special.others,
            messages=list(messages),
            bos_token=special.bos or "",
            eos_token=special.eos or "",
            tools=None,  # which is not undefined, as in transformers
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a program can raise any, MemoryError among them
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"the model's chat template failed: {reason}") from error


def _refuse(message: str) -> NoReturn:
    """What templates call for messages that the model was not trained on."""
    raise jinja2.TemplateRuntimeError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers; Jinja's own escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _format(text: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(str(text))
    return do_format(text, *args, **kwargs)


def _narrow(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, for small numbers only besides what it filters."""

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(*args[1:], *kwargs.values())
        return function(*args, **kwargs)

    return checked


def _check_numbers(*values: Any) -> None:
    if any(isinstance(value, int) and abs(value) > _MOST for value in values):
        _refuse(f"a width or count is more than {_MOST}")


def _check_format(text: str) -> None:
    """Refuse `%` formats with a number of five digits, and with `*`, a width that is an argument."""
    if re.search(r"\d{5}|%[-+ #0\d.]*\*", text):
        _refuse("a format is too wide")
