"""The order of the rooms, and what a room must not know, read from the source by `ast`.

Each rule is a function from a package's folder to its faults, a line each. It runs on the package,
where it must find none, and on a bad example, where it must find one: a rule cannot fall asleep.
"""

import ast
import pathlib
from collections.abc import Callable, Iterator

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_PACKAGE = _ROOT / "gshard_moe"

# A room may import only rooms before it (ARCHITECTURE.md). A room is a file or a folder.
ROOMS = (
    "config hardware cards layout losses routing dispatch experts placement exchange nn pipeline "
    "timeline aot planner train hf linen cli"
).split()
JAX_FREE = {"config", "hardware", "cards"}
# `aot` reads what the compiler dumps.
TOUCH_FILES = {"cards", "aot", "train", "hf", "cli"}
# A profile is a folder that the profiler wrote.
TOUCHING = {"timeline/profile.py"}

# Importing any of these imports JAX.
_JAX_FAMILY = {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "tokamax", "haiku", "equinox"}
_PRIVATE_OF = _JAX_FAMILY | {"grain"}
_FILE_MODULES = {"pathlib", "shutil", "tempfile", "glob", "tomllib"}
_FILE_CALLS = set(
    "open Path read_text write_text read_bytes write_bytes savefig savez tofile fromfile".split()
)
_MAX_LINES = 700
_VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}

# A card's name in the code that is no question after a card, by (file, name). An entry that is not
# needed any more is a fault too.
CARD_NAMES_ALLOWED: dict[tuple[str, str], str] = {
    (
        "config/presets.py",
        "deepseek_v3",
    ): "a preset, which is named after its source as the card is",
    ("exchange/__init__.py", "two_level"): "the member, after which the card that asks is named",
    ("cli/sample.py", "single"): "the default of --sharding: a laptop samples on one device",
}


def _files(package: pathlib.Path) -> Iterator[tuple[str, pathlib.Path, ast.Module]]:
    """Yields the room of each file, the file, and its tree."""
    for path in sorted(package.rglob("*.py")):
        yield (
            path.relative_to(package).parts[0].removesuffix(".py"),
            path,
            ast.parse(path.read_text(encoding="utf-8"), str(path)),
        )


def _imports(tree: ast.Module, path: pathlib.Path, package: pathlib.Path) -> Iterator[str]:
    """Yields what a file imports at any depth, in dots: `from jax import numpy` is `jax.numpy`."""
    inside = [package.name, *path.relative_to(package).parts[:-1]]
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                parts = inside[: len(inside) - node.level + 1] if node.level else []
                start = ".".join(parts + ([node.module] if node.module else []))
                yield from (f"{start}.{alias.name}" for alias in node.names)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if _called(node) in (
                "import_module",
                "__import__",
            ):
                yield name


def _called(call: ast.Call) -> str:
    """Returns the last name of what is called: `open` for `open()` and for `path.open()`."""
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def rooms_in_order(package: pathlib.Path) -> list[str]:
    """A room imports only rooms before it, and never the names that `__init__` re-exports."""
    faults = []
    for room, path, tree in _files(package):
        if room.startswith("__"):  # __init__ and __main__ may import all
            continue
        if room not in ROOMS:
            faults.append(f"{path}: {room} must be one of the rooms {ROOMS}")
            continue
        before = ROOMS[: ROOMS.index(room) + 1]
        for name in _imports(tree, path, package):
            top, _, rest = name.partition(".")
            if top == package.name and rest.split(".")[0] not in before:
                faults.append(f"{path}: {room} may import only {before}; got {name}")
    return faults


def jax_free(package: pathlib.Path) -> list[str]:
    """The rooms that hold plain data do not import JAX, at the top or inside a function."""
    return [
        f"{path}: {room} must not import {name}"
        for room, path, tree in _files(package)
        if room in JAX_FREE
        for name in _imports(tree, path, package)
        if name.split(".")[0] in _JAX_FAMILY
    ]


def nothing_private(package: pathlib.Path) -> list[str]:
    """Nothing uses a private module or name of the libraries below, imported or by attribute."""
    faults = []
    for _, path, tree in _files(package):
        names = list(_imports(tree, path, package))
        names += [
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and _is_private(node.attr)
        ]
        aliases = _aliases(tree)
        for name in names:
            top, *rest = name.split(".")
            if aliases.get(top, top) in _PRIVATE_OF and any(_is_private(part) for part in rest):
                faults.append(f"{path}: {name} is private")
    return faults


def _aliases(tree: ast.Module) -> dict[str, str]:
    """Maps each name that an import binds to the library that it comes from."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                bound[alias.asname or top] = top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                bound[alias.asname or alias.name] = node.module.split(".")[0]
    return bound


def _is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def files_untouched(package: pathlib.Path) -> list[str]:
    """Only some rooms read or write files."""
    faults = []
    for room, path, tree in _files(package):
        if room in TOUCH_FILES or path.relative_to(package).as_posix() in TOUCHING:
            continue
        for name in _imports(tree, path, package):
            if name.split(".")[0] in _FILE_MODULES:
                faults.append(f"{path}: {room} must not touch files; got {name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _called(node) in _FILE_CALLS:
                where = f"{path}:{node.lineno}"
                faults.append(f"{where}: {room} must not touch files; got {_called(node)}()")
    return faults


def no_card_by_name(package: pathlib.Path) -> list[str]:
    """No string in the code is a card's name: adding or renaming a card touches no Python."""
    cards = [*package.parent.glob("models/*.toml"), *package.parent.glob("shardings/*.toml")]
    # Cards are named after what they choose; such a word in the code is the choice.
    stems = {card.stem for card in cards} - _choices(package)
    allowed = set(CARD_NAMES_ALLOWED) if package == _PACKAGE else set()
    faults, met = [], set()
    for _, path, tree in _files(package):
        said = {id(node) for node in _declarations(tree)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or id(node) in said or node.value not in stems:
                continue
            key = (path.relative_to(package).as_posix(), node.value)
            met.add(key)
            if key not in allowed:
                faults.append(f"{path}:{node.lineno}: {node.value!r} is the name of a card")
    faults += [f"CARD_NAMES_ALLOWED: {key} is not in the code" for key in sorted(allowed - met)]
    return faults


def _choices(package: pathlib.Path) -> set[str]:
    """Returns the values that a key of a sharding card may have."""
    source = package / "config" / "sharding.py"
    if not source.exists():
        return set()
    said = _declarations(ast.parse(source.read_text(encoding="utf-8")))
    return {node.value for node in said if isinstance(node, ast.Constant)}


def _declarations(tree: ast.Module) -> Iterator[ast.AST]:
    """Yields the strings that name a choice (`Literal`) or a scope, which ask nothing."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Name(id="Literal") | ast.Attribute(attr="Literal")):
                yield from ast.walk(node.slice)
            case ast.Call() if _called(node) == "named_scope":
                yield from node.args


def small_and_named(package: pathlib.Path) -> list[str]:
    """No file is long, and every file's name says its idea; the tests and benchmarks too."""
    faults = []
    for folder in (package, package.parent / "tests", package.parent / "benchmarks"):
        for path in sorted(folder.rglob("*.py")):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > _MAX_LINES:
                faults.append(f"{path}: at most {_MAX_LINES} lines; got {lines}; split it")
            if path.stem in _VAGUE:
                faults.append(f"{path}: a file is named by its idea; got {path.name}")
    return faults


RULES = (
    rooms_in_order,
    jax_free,
    nothing_private,
    files_untouched,
    no_card_by_name,
    small_and_named,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Callable[[pathlib.Path], list[str]]):
    assert not (faults := rule(_PACKAGE)), "\n".join(faults)


def test_there_is_something_to_read():
    assert {"config", "cards", "layout", "nn"} <= {room for room, _, _ in _files(_PACKAGE)}
    assert list(_ROOT.glob("models/*.toml")) and list(_ROOT.glob("shardings/*.toml"))


_BAD = [
    (rooms_in_order, "layout.py", "from gshard_moe import routing"),
    (rooms_in_order, "layout.py", "def f():\n    import gshard_moe.routing.topk"),
    (rooms_in_order, "routing/topk.py", "from .. import nn"),
    (rooms_in_order, "routing/topk.py", "from ..nn import moe"),
    (rooms_in_order, "layout.py", "import importlib\nimportlib.import_module('gshard_moe.nn')"),
    (rooms_in_order, "layout.py", "from gshard_moe import MoE"),
    (rooms_in_order, "layout.py", "import gshard_moe"),
    (rooms_in_order, "attic.py", ""),
    (jax_free, "config.py", "def f():\n    import jax"),
    (jax_free, "cards/load.py", "from jax.sharding import Mesh"),
    (jax_free, "hardware.py", "from flax import nnx"),
    (nothing_private, "layout.py", "from jax._src import mesh"),
    (nothing_private, "layout.py", "from flax.nnx import _x"),
    (nothing_private, "layout.py", "import jax\njax._src.mesh.thread_resources"),
    (nothing_private, "layout.py", "from jax import numpy as jnp\njnp._x"),
    (files_untouched, "layout.py", "open('x')"),
    (files_untouched, "layout.py", "import os\nos.open('x', 0)"),
    (files_untouched, "layout.py", "import pathlib"),
    (files_untouched, "nn/moe.py", "def f(p):\n    return p.read_text()"),
    (no_card_by_name, "cli/main.py", "def f(name):\n    return name == 'tiny'"),
    (no_card_by_name, "cli/main.py", "TABLE = {'ep': 1}"),
    (small_and_named, "layout.py", "\n" * 701),
    (small_and_named, "nn/utils.py", ""),
]


@pytest.mark.parametrize(("rule", "file", "code"), _BAD)
def test_the_rule_finds_a_fault(
    rule: Callable[[pathlib.Path], list[str]], file: str, code: str, tmp_path: pathlib.Path
):
    faults = rule(_example(tmp_path, file, code))
    assert len(faults) == 1 and file in faults[0]


_GOOD = [
    ("layout.py", "import jax\nfrom gshard_moe import cards\nfrom gshard_moe.config import X"),
    (
        "routing/topk.py",
        "from gshard_moe.routing import choice\nfrom . import choice\nimport numpy",
    ),
    ("__init__.py", "from gshard_moe.cli import main\nfrom gshard_moe.config import X"),
    ("cli.py", "import pathlib\nopen('x')\njax.__version__\nself._jax"),
    ("nn/moe.py", "Kind = Literal['ep', 'tp']\nwith jax.named_scope('ep'):\n    'tinyest'"),
    ("nn/moe.py", "\n" * 700),
]


@pytest.mark.parametrize(("file", "code"), _GOOD)
def test_the_rules_let_good_code_be(file: str, code: str, tmp_path: pathlib.Path):
    package = _example(tmp_path, file, code)
    assert [rule(package) for rule in RULES] == [[]] * len(RULES)


def _example(folder: pathlib.Path, file: str, code: str) -> pathlib.Path:
    """Writes a repository of two cards and one file, and returns its package."""
    package = folder / _PACKAGE.name
    for path, text in (
        (folder / "models/tiny.toml", ""),
        (folder / "shardings/ep.toml", ""),
        (package / file, code),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package
