"""Cards: the TOML form of the dataclasses in `config`, read strictly.

A card holds data, never code: no includes, no expressions, no class names. The schema is closed:
unknown, missing and mistyped keys are refused, all at once, with file and key. `load` and `dump`
round-trip.
"""

import dataclasses
import json
import pathlib
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from gshard_moe import config

Kind = Literal["models", "shardings"]
_PACKAGE = pathlib.Path(__file__).parent
# The wheel carries the cards inside the package; a checkout has them beside it.
_FOLDERS = (_PACKAGE / "_cards", _PACKAGE.parent)
# What a model's [moe] table takes from the model instead of saying it again.
_INHERITED_BY_MOE = ("model_dim", "bias")
# The keys of [layout] that are not roles.
_LAYOUT_KEYS = ("gather", "optimizer", "user")


class CardError(ValueError):
    """Reports every fault of a card at once, a line each, with the file and the key."""


def names(kind: Kind) -> list[str]:
    """Returns the names of the cards that come with the library, sorted."""
    return sorted(path.stem for path in _folder(kind).glob("*.toml"))


def path_of(kind: Kind, name_or_path: str) -> pathlib.Path:
    """Returns the file of a card: an argument that ends in `.toml` is a path, else a name.

    Raises:
      CardError: if there is no such card; the message lists those that there are.
    """
    if name_or_path.endswith(".toml"):
        path = pathlib.Path(name_or_path)
        hint = "an argument that ends in .toml is a path, anything else a name"
    else:
        path = _folder(kind) / f"{name_or_path}.toml"
        hint = f"the {kind} are {', '.join(names(kind))}; a path must end in .toml"
    if not path.is_file():
        raise CardError(f"{kind}: a card must exist; got {name_or_path!r}; {hint}")
    return path


def load_model(name_or_path: str) -> config.ModelConfig:
    """Reads a model card.

    Raises:
      CardError: with every fault of the file.
    """
    path = path_of("models", name_or_path)
    return parse_model(_read(path), source=_shown(path))


def load_sharding(name_or_path: str) -> config.ShardingConfig:
    """Reads a sharding card; what its layouts mean is checked by `layout.Layout`.

    Raises:
      CardError: with every fault of the file.
    """
    path = path_of("shardings", name_or_path)
    return parse_sharding(_read(path), source=_shown(path))


def source_of(kind: Kind, name_or_path: str) -> str:
    """Returns the card's file as messages name it: `shardings/expert.toml`."""
    return _shown(path_of(kind, name_or_path))


def parse_model(text: str, *, source: str) -> config.ModelConfig:
    """Reads the text of a model card; `source` names it in messages."""
    table = _toml(text, source)
    faults: list[tuple[str, str]] = []
    moe = table.get("moe")
    if isinstance(moe, dict):
        faults += [
            (f"moe.{key}", "must not be written: it is the model's own; remove it")
            for key in _INHERITED_BY_MOE
            if key in moe
        ]
        table["moe"] = moe | {key: table[key] for key in _INHERITED_BY_MOE if key in table}
    return _build(config.ModelConfig, table, source, faults)


def parse_sharding(text: str, *, source: str) -> config.ShardingConfig:
    """Reads the text of a sharding card; `source` names it in messages."""
    table = _toml(text, source)
    layout = table.get("layout")
    if isinstance(layout, dict):
        roles = {key: value for key, value in layout.items() if key not in _LAYOUT_KEYS}
        rest = {key: value for key, value in layout.items() if key in _LAYOUT_KEYS}
        table["layout"] = rest | {"roles": roles}
    return _build(config.ShardingConfig, table, source, [])


def dump(card: config.ModelConfig | config.ShardingConfig) -> str:
    """Returns the TOML text of a card; reading it back gives an equal card."""
    table = dataclasses.asdict(card)
    if isinstance(card, config.ModelConfig):
        if card.moe is None:
            del table["moe"]
        else:
            for key in _INHERITED_BY_MOE:
                del table["moe"][key]
    else:
        layout = table["layout"]
        table["layout"] = layout.pop("roles") | layout
    return "\n".join(_lines(table, prefix="")).strip() + "\n"


def _folder(kind: Kind) -> pathlib.Path:
    for folder in _FOLDERS:
        if (folder / kind).is_dir():
            return folder / kind
    raise CardError(f"{kind}: the folder of the cards is missing; looked in {_FOLDERS}")


def _shown(path: pathlib.Path) -> str:
    """Names a card by its folder and file: enough to find it, the same on every machine."""
    return "/".join(path.parts[-2:])


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CardError(f"{_shown(path)}: must be UTF-8 text; {error}") from error
    except OSError as error:
        raise CardError(f"{_shown(path)}: must be readable; {error.strerror}") from error


def _toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CardError(f"{source}: must be TOML; {error}") from error


def _build[T](cls: type[T], table: dict[str, Any], source: str, faults: list) -> T:
    """Makes a dataclass of a table, or raises one error with every fault."""
    value = _dataclass(cls, table, "", faults)
    if faults:
        lines = (f"{source}: {key}: {message}" for key, message in faults)
        raise CardError("\n".join(dict.fromkeys(lines)))
    assert value is not None
    return value


def _dataclass[T](cls: type[T], table: dict[str, Any], prefix: str, faults: list) -> T | None:
    """Reads one table; appends its faults and returns None where it has any."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    before = len(faults)
    for key in table:
        if key not in fields:
            known = ", ".join(fields)
            faults.append((prefix + key, f"is an unknown key; the keys are {known}"))
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _value(hints[name], table[name], prefix + name, faults)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            faults.append((prefix + name, f"is missing; add {name} = {_spelled(hints[name])}"))
    if len(faults) > before:
        return None
    try:
        return cls(**values)
    except config.ConfigError as error:
        faults += [(prefix + key, message) for key, message in error.faults]
        return None


def _value(hint: Any, value: Any, key: str, faults: list) -> Any:
    """Reads one value by its type hint; appends a fault where it does not fit."""
    if isinstance(hint, types.UnionType):  # only `X | None`; TOML has no null
        (hint,) = (arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _dataclass(typing.cast(type, hint), value, f"{key}.", faults)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list) and all(type(v) is args[0] for v in value):
        return tuple(value)
    if origin is Mapping and isinstance(value, dict):
        wrong = [name for name, item in value.items() if type(item) is not args[1]]
        faults += [
            (f"{key}.{name}", f"must be {_spelled(args[1])}; got {json.dumps(value[name])}")
            for name in wrong
        ]
        return dict(value)
    if origin is Literal and type(value) is str and value in args:
        return value
    if hint is float and type(value) in (int, float):
        return float(value)
    if origin is None and type(value) is hint:
        return value
    faults.append((key, f"must be {_spelled(hint)}; got {json.dumps(value, default=str)}"))
    return None


def _spelled(hint: Any) -> str:
    """Says in words what a value must be."""
    if isinstance(hint, types.UnionType):
        return _spelled(typing.get_args(hint)[0])
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(json.dumps(arg) for arg in args)
    if origin is tuple:
        return f"a list, each {_spelled(args[0])}"
    if origin is Mapping or dataclasses.is_dataclass(hint):
        return "a table"
    return {int: "an integer", float: "a number", bool: "true | false", str: "a string"}[hint]


def _lines(table: Mapping[str, Any], prefix: str) -> list[str]:
    """Spells a table as TOML: plain values first, then its tables."""
    lines = []
    for key, value in table.items():
        if not isinstance(value, Mapping):
            lines.append(f"{key} = {_literal(value)}")
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            lines += ["", f"[{prefix}{key}]", *_lines(value, f"{prefix}{key}.")]
    return lines


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_literal(item) for item in value)}]"
    # JSON's strings, booleans, integers and floats are TOML's, but for a bare exponent like 1e-06.
    return json.dumps(value)
