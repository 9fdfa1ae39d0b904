"""Cards: the TOML form of the dataclasses in `config`, read strictly.

A card holds data, never code: no includes, no expressions, no class names. The schema is closed:
unknown, missing and mistyped keys are refused, all at once, with file and key. `load` and `dump`
round-trip.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from gshard_moe import config, hardware

Kind = Literal["models", "shardings", "chips"]
_PACKAGE = pathlib.Path(__file__).parent
# The wheel carries the cards inside the package, a checkout beside it; chips are always inside.
_FOLDERS = (_PACKAGE / "_cards", _PACKAGE.parent, _PACKAGE / "hardware")
# What a model's [moe] table takes from the model instead of saying it again.
_INHERITED_BY_MOE = ("model_dim", "bias")
# The keys of [layout] that are not roles.
_LAYOUT_KEYS = ("gather", "optimizer", "user")


class CardError(ValueError):
    """Reports every fault of a card at once, a line each, with the file and the key.

    Attributes:
      partial: the config as far as it could be read, for those who look for further faults.
    """

    def __init__(self, message: str, *, partial: Any = None):
        """Takes the whole message."""
        self.partial = partial
        super().__init__(message)


def names(kind: Kind) -> list[str]:
    """Returns the names of the cards that come with the library, sorted."""
    return sorted(path.stem for path in _folder(kind).glob("*.toml"))


def path_of(kind: Kind, name_or_path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the file of a card: an argument that ends in `.toml` is a path, else a name.

    Raises:
      CardError: if there is no such card; the message lists those that there are.
    """
    name = os.fspath(name_or_path)
    if name.endswith(".toml"):
        # Unlike a Path's, this answers no to whatever cannot be a file, however long or odd.
        there = os.path.isfile(name)
        path = pathlib.Path(name)
        hint = "an argument that ends in .toml is a path, anything else a name"
    else:
        there = name in names(kind)
        path = _folder(kind) / f"{name}.toml"
        hint = f"the {kind} are {', '.join(names(kind))}; a path must end in .toml"
    if not there:
        raise CardError(f"{kind}: a card must exist; got {config.shown(name)}; {hint}")
    return path


def load_model(name_or_path: str | os.PathLike[str]) -> config.ModelConfig:
    """Reads a model card.

    Raises:
      CardError: with every fault of the file.
    """
    path = path_of("models", name_or_path)
    return parse_model(_read(path), source=_shown(path))


def load_sharding(name_or_path: str | os.PathLike[str]) -> config.ShardingConfig:
    """Reads a sharding card; what its layouts mean is checked by `layout.Layout`.

    Raises:
      CardError: with every fault of the file.
    """
    path = path_of("shardings", name_or_path)
    return parse_sharding(_read(path), source=_shown(path))


def load_chip(name_or_path: str | os.PathLike[str]) -> hardware.Chip:
    """Reads what a chip can do.

    Raises:
      CardError: with every fault of the file.
    """
    path = path_of("chips", name_or_path)
    source = _shown(path)
    try:
        return _read_table(hardware.Chip, _toml(_read(path), source))
    except config.ConfigError as error:
        raise _card_error(source, error.faults, error.partial) from None


def gpu_target(name: str) -> str:
    """Returns what XLA is told of a GPU that is not there: a GpuTargetConfigProto, as text.

    Raises:
      CardError: if there is none of that name.
    """
    folder = _PACKAGE / "hardware" / "gpu_targets"
    path = folder / f"{name}.txtpb"
    there = sorted(path.stem for path in folder.glob("*.txtpb"))
    if name not in there:
        known = ", ".join(there)
        raise CardError(f"gpu_targets: must have the GPU; got {config.shown(name)}; has {known}")
    return _read(path)


def source_of(kind: Kind, name_or_path: str | os.PathLike[str]) -> str:
    """Returns the card's file as messages name it: `shardings/expert.toml`."""
    return _shown(path_of(kind, name_or_path))


def parse_model(text: str, *, source: str) -> config.ModelConfig:
    """Reads the text of a model card; `source` names it in messages."""
    table = _toml(text, source)
    faults, no_preset = [], []
    moe = table.get("moe")
    if isinstance(moe, dict):
        written = [key for key in _INHERITED_BY_MOE if key in moe]
        message = "must not be written: it is the model's own; remove it"
        faults = [(f"moe.{key}", message) for key in written]
        moe, no_preset = _with_preset(moe)
        faults += no_preset
        table["moe"] = moe | {key: table.get(key) for key in _INHERITED_BY_MOE}
    try:
        model = _read_table(config.ModelConfig, table)
    except config.ConfigError as error:
        # What is wrong with an inherited value was said of the model's own.
        said = {f"moe.{key}" for key in _INHERITED_BY_MOE}
        if no_preset:  # what it does not fill in is no other fault than that
            missing = {key for key, message in error.faults if "is missing" in message}
            said |= {key for key in missing if key.startswith("moe.")}
        faults += [fault for fault in error.faults if fault[0] not in said]
        raise _card_error(source, faults, error.partial) from None
    if faults:
        raise _card_error(source, faults, model)
    return model


def _with_preset(moe: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Fills in what `preset` says and the table does not; returns the faults of the name, too."""
    if "preset" not in moe:
        return moe, []
    written = {key: value for key, value in moe.items() if key != "preset"}
    try:
        return config.preset_fields(moe["preset"]) | written, []
    except config.ConfigError as error:
        return written, [(f"moe.{key}", message) for key, message in error.faults]


def parse_sharding(text: str, *, source: str) -> config.ShardingConfig:
    """Reads the text of a sharding card; `source` names it in messages."""
    table = _toml(text, source)
    layout = table.get("layout")
    if isinstance(layout, dict):
        roles = {key: value for key, value in layout.items() if key not in _LAYOUT_KEYS}
        rest = {key: value for key, value in layout.items() if key in _LAYOUT_KEYS}
        table["layout"] = rest | {"roles": roles}
    try:
        return _read_table(config.ShardingConfig, table)
    except config.ConfigError as error:
        faults = [(re.sub(r"^layout\.roles\.", "layout.", key), m) for key, m in error.faults]
        raise _card_error(source, faults, error.partial) from None


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
    return pathlib.PurePath(*path.parts[-2:]).as_posix()


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin with a byte order mark
    except UnicodeDecodeError as error:
        raise CardError(f"{_shown(path)}: must be UTF-8 text; {error}") from error
    except OSError as error:
        raise CardError(f"{_shown(path)}: must be readable; {error.strerror}") from error


def _toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise CardError(f"{source}: must be TOML; got lists or tables nested too deeply") from None
    except ValueError as error:  # tomllib's own, or of an integer with too many digits
        line = re.search(r"at line (\d+)", str(error))
        got = f"; got {config.shown(text.splitlines()[int(line[1]) - 1].strip())}" if line else ""
        raise CardError(f"{source}: must be TOML; {error}{got}") from error


def _card_error(source: str, faults: list[tuple[str, str]], partial: Any) -> CardError:
    lines = (f"{source}: {key}: {message}" for key, message in faults)
    return CardError("\n".join(dict.fromkeys(lines)), partial=partial)


def _read_table[T](cls: type[T], table: dict[str, Any]) -> T:
    """Makes a dataclass of a table.

    Raises:
      ConfigError: with every fault of the table and of those in it.
    """
    hints = config.hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    known = ", ".join(fields)
    faults = [
        (config.key_shown(key), f"is an unknown key; the keys are {known}")
        for key in table
        if key not in fields
    ]
    values = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _value(hints[name], table[name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            is_table = dataclasses.is_dataclass(hints[name])
            add = f"the table [{name}]" if is_table else f"{name} = {config.spelled(hints[name])}"
            values[name] = config.Unread([("", f"is missing; add {add}")])
    try:
        made = cls(**values)
    except config.ConfigError as error:
        raise config.ConfigError(faults + error.faults, partial=error.partial) from None
    if faults:
        raise config.ConfigError(faults, partial=made)
    return made


def _value(hint: Any, value: Any) -> Any:
    """Gives a TOML value the form of its field; whether it fits, the dataclass says."""
    given = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
    if isinstance(hint, types.UnionType) and len(given) == 1:  # `X | None`; TOML has no null
        (hint,) = given
    if isinstance(value, dict) and dataclasses.is_dataclass(hint):
        try:
            return _read_table(typing.cast(type, hint), value)
        except config.ConfigError as error:
            return config.Unread(error.faults, partial=error.partial)
    if isinstance(value, list) and typing.get_origin(hint) is tuple:
        return tuple(value)
    if type(value) is int and float in (hint, *typing.get_args(hint)):
        return float(value) if abs(value) < 2**1000 else math.inf
    return value


def _lines(table: Mapping[str, Any], prefix: str) -> list[str]:
    """Spells a table as TOML: plain values first, then its tables."""
    lines = []
    for key, value in table.items():
        if not isinstance(value, Mapping):
            lines.append(f"{config.key_shown(key)} = {_literal(value)}")
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            lines += ["", f"[{prefix}{key}]", *_lines(value, f"{prefix}{key}.")]
    return lines


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_literal(item) for item in value)}]"
    # JSON's strings, booleans, integers and floats are TOML's, but for this one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
