"""Dataclasses that cannot be made with a fault in them, and say all their faults at once."""

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple


class ConfigError(ValueError):
    """Reports every fault of a configuration at once.

    Attributes:
      faults: one `(key, message)` for each; a key is dotted (`moe.top_k`), so that `cards` can put
        the file before it.
      partial: the config that was refused, for those who look for further faults.
    """

    def __init__(self, faults: list[tuple[str, str]], *, partial: Any = None):
        """Spells the faults, a line each."""
        self.faults = faults
        self.partial = partial
        super().__init__("\n".join(f"{key}: {message}" for key, message in faults))


class Unread(NamedTuple):
    """Stands for a field that could not be read, so that the others are checked all the same.

    A config that is given one always refuses, with these faults beside its own.

    Attributes:
      faults: as in `ConfigError`, with keys relative to the field; "" is the field itself.
      partial: what could be read of it, if it is a config.
    """

    faults: list[tuple[str, str]]
    partial: Any = None


class Faults:
    """Collects the faults of a config.

    Each check names the fields that it is about, and is left out where one of them has a fault
    already: one mistake makes one message.
    """

    def __init__(self, config: object) -> None:
        """Checks that every field has its type, is finite and fits 32 bits."""
        self.found: list[tuple[str, str]] = []
        self._config = config
        self._faulty: set[str] = set()
        for name, hint in hints(type(config)).items():
            value = getattr(config, name)
            if isinstance(value, Unread):
                object.__setattr__(config, name, value.partial)  # for the checks that follow
                self._faulty |= {name} if value.partial is None else {f"{name}.*"}
                found = value.faults
            else:
                found = _misfits(hint, value)
            for key, message in found:
                self._add_faulty(f"{name}.{key}" if key else name, message)

    def require(
        self, key: str, fields: tuple[str, ...], holds: Callable[[], bool], message: str
    ) -> None:
        """Adds a fault under `key` unless it holds; the message ends with what the fields are."""
        about = {*fields, *(field.split(".")[0] for field in fields)}
        if self._faulty.isdisjoint(about) and not holds():
            self.found.append((key, f"{message}; got {', '.join(map(self._got, fields))}"))

    def positive(self, *names: str) -> None:
        """Adds a fault for each field that is not positive."""
        for name in names:
            if name not in self._faulty and self._value(name) <= 0:
                self._add_faulty(name, f"must be positive; got {self._got(name)}")

    def not_negative(self, *names: str) -> None:
        """Adds a fault for each field that is negative."""
        for name in names:
            if name not in self._faulty and self._value(name) < 0:
                self._add_faulty(name, f"must not be negative; got {self._got(name)}")

    @property
    def any(self) -> bool:
        """Whether there is a fault."""
        return bool(self.found or self._faulty)

    def _add_faulty(self, key: str, message: str) -> None:
        self.found.append((key, message))
        self._faulty.add(key)

    def _value(self, name: str) -> Any:
        return functools.reduce(getattr, name.split("."), self._config)

    def _got(self, name: str) -> str:
        return f"{name}={shown(self._value(name))}"


class Checked:
    """A config that cannot be made with a fault in it."""

    # jaxtyping's import hook, which our tests use, would refuse a wrong type before we can say
    # what it should have been.
    __no_type_check__ = True

    def __post_init__(self) -> None:
        """Checks every field, and then how the fields fit each other."""
        faults = Faults(self)
        self._check(faults)
        if faults.any:
            raise ConfigError(faults.found, partial=self)

    def _check(self, faults: Faults) -> None:
        """Adds what is wrong beside the fields' types."""


def hints(cls: type) -> dict[str, Any]:
    """Returns the type of every field of a config."""
    return {field.name: field.type for field in dataclasses.fields(cls)}


def spelled(hint: Any) -> str:
    """Says in words what a value of this type must be."""
    if typing.get_origin(hint) in _UNIONS:
        args = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
        return " | ".join(map(spelled, args))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(json.dumps(arg) for arg in args)
    if origin is tuple:
        return f"a list, each {spelled(args[0])}"
    words = {int: "an integer", float: "a number", bool: "true | false", str: "a string"}
    return words.get(hint, "a table")


def shown(value: object) -> str:
    """Spells a value for a message, as a card would, cut where it is long."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):  # an integer of more digits than Python prints
        text = "a value too long to print"
    return text if len(text) <= 120 else f"{text[:117]}..."


def key_shown(key: object) -> str:
    """Spells a key for a message and for a card: bare where TOML allows, else quoted."""
    if isinstance(key, str) and re.fullmatch("[A-Za-z0-9_-]+", key):
        return key
    return json.dumps(key, default=str, ensure_ascii=False).replace("\x7f", "\\u007f")


# `int | None` is of the one kind, `float | Literal["x"]` of the other.
_UNIONS = (types.UnionType, typing.Union)
# The largest size or count: shapes, steps and token ids are 32-bit integers on the devices.
_MAX_INTEGER = 2**31 - 1


def _misfits(hint: Any, value: object) -> list[tuple[str, str]]:
    """Returns what is wrong with the type of a field's value, as faults relative to the field."""
    if typing.get_origin(hint) is Mapping and isinstance(value, Mapping):
        item = typing.get_args(hint)[1]
        return [
            (key_shown(key), f"must be {spelled(item)}; got {shown(value[key])}")
            for key in value
            if not (_fits(str, key) and _fits(item, value[key]))
        ]
    if not _fits(hint, value):
        return [("", f"must be {spelled(hint)}; got {shown(value)}")]
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            return [("", f"must be finite; got {shown(number)}")]
        if isinstance(number, int) and abs(number) > _MAX_INTEGER:
            return [("", f"must fit 32 bits, at most {_MAX_INTEGER}; got {shown(number)}")]
    return []


def _fits(hint: Any, value: object) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return any(_fits(arg, value) for arg in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(args[0], item) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else origin or hint)
