"""Conversations as text, by the model's own chat template: a program from a stranger, run in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ryzen_llm.data import Tokenizer
from ryzen_llm.errors import InputError

_MOST_REPEATED = 10_000


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which `*` and `**` cannot fill the memory either."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse to repeat a text or list, and large numbers."""
        if not all(isinstance(x, int | float) and abs(x) <= _MOST_REPEATED for x in (left, right)):
            raise jinja2.TemplateRuntimeError(f"{operator} is for numbers up to {_MOST_REPEATED} here")
        return left * right if operator == "*" else float(left) ** right


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
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    # Jinja's own escapes for HTML.
    sandbox.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    sandbox.globals["raise_exception"] = _refuse
    sandbox.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return sandbox.from_string(special.chat_template).render(
            messages=list(messages),
            bos_token=special.bos or "",
            eos_token=special.eos or "",
            add_generation_prompt=add_generation_prompt,
        )
    except (
        jinja2.TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise InputError(f"the model's chat template failed: {' '.join(str(error).split())[:300]}") from error


def _refuse(message: str) -> NoReturn:
    """What templates call for messages that the model was not trained on."""
    raise jinja2.TemplateRuntimeError(message)
