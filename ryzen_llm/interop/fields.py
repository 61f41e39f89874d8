"""Reading what a stranger wrote down about a model: every value checked, none left unread."""

import reprlib
from collections.abc import Mapping
from typing import Any

from ryzen_llm.errors import InputError

REQUIRED: Any = object()
_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})


class Fields:
    """The keys of a `config.json` or of a GGUF file's metadata, taken one by one.

    What is left at the end is an option that nobody asked for, hence one that is not supported.

    Args:
        values: The keys and their values; it is copied.
        where: What they are read from, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = dict(values)
        self.where = where

    def is_null(self, name: str) -> bool:
        """Whether the key is there and says that there is none."""
        return name in self._values and self._values[name] is None

    def whole(self, name: str, default: Any = REQUIRED) -> Any:
        """A whole number of 32 bits; `default` where it is missing or null. Raises InputError for others."""
        value = self._take(name, default)
        if value is not default and (type(value) is not int or abs(value) >= 2**31):
            raise self._wrong(name, value, "a whole number below 2^31")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A finite number as a float; see `whole`."""
        value = self._take(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not abs(value) < 1e300:
            raise self._wrong(name, value, "a number")
        return float(value)

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        """A text; see `whole`."""
        value = self._take(name, default)
        if value is not default and not isinstance(value, str):
            raise self._wrong(name, value, "a text")
        return value

    def flag(self, name: str, default: Any = REQUIRED) -> Any:
        """True or false; see `whole`."""
        value = self._take(name, default)
        if value is not default and not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def items(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """A list of `kind`; see `whole`."""
        value = self._take(name, default)
        if value is not default and not (
            isinstance(value, list) and all(type(item) is kind for item in value)
        ):
            raise self._wrong(name, value, f"a list of {kind.__name__}")
        return value

    def group(self, name: str) -> "Fields | None":
        """The keys below `name`; None where it is missing or null."""
        value = self._take(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, value, "keys and values")
        return Fields(value, f"{self.where}: {name}")

    def only(self, name: str, *supported: Any) -> None:
        """Raise InputError unless the value is missing, null or one of `supported`."""
        value = self._values.pop(name, None)
        if value is not None and not any(type(value) is type(one) and value == one for one in supported):
            expected = " or ".join(map(repr, supported)) if supported else "it left out"
            raise InputError(
                f"{self.where}: {name} = {reprlib.repr(value)} is not supported, expected {expected}"
            )

    def ignore(self, *names: str) -> None:
        """Let keys be that say nothing about what the model computes."""
        for name in names:
            self._values.pop(name, None)

    def finish(self) -> None:
        """Raise InputError for a key that nobody took, unless its value switches it off."""
        for name, value in self._values.items():
            if value not in _OFF:
                raise InputError(
                    f"{self.where}: {reprlib.repr(name)} = {reprlib.repr(value)} is not a known option, so "
                    "the model might be read wrongly; take it out if it does not change what is computed"
                )

    def _take(self, name: str, default: Any) -> Any:
        value = self._values.pop(name, None)
        if value is not None:
            return value
        if default is REQUIRED:
            raise InputError(f"{self.where}: {name} is missing")
        return default

    def _wrong(self, name: str, value: Any, expected: str) -> InputError:
        return InputError(f"{self.where}: {name} is {reprlib.repr(value)}, expected {expected}")
