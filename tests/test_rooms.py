"""Rooms of the package: allowed imports, the place of mergekit, and the sizes of folders and modules."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "squisher_mergekit"
FLOOR = {"errors", "_deprecated"}
# Each room with the rooms that it may use.
ARROWS = {
    "errors": set(),
    "_deprecated": set(),
    "tensors": FLOOR,
    "models": {"tensors", *FLOOR},
    "fisher": {"models", "tensors", *FLOOR},
    "optimizers": {"fisher", "models", "tensors", *FLOOR},
    "estimators": {"fisher", "models", "tensors", *FLOOR},
    "merging": {"optimizers", "estimators", "fisher", "models", "tensors", *FLOOR},
    "recipes": {"merging", "optimizers", "estimators", "fisher", "models", "tensors", *FLOOR},
    "applications": {"optimizers", "estimators", "fisher", "models", "tensors", *FLOOR},
    "training": {"applications", "optimizers", "estimators", "fisher", "models", "tensors", *FLOOR},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _nodes(tree: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    """Yield the import statements; without ``lazy``, only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if lazy:
                yield from _nodes(node, lazy)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not lazy:
            yield from (inner for part in node.orelse for inner in _nodes(ast.Module([part], []), lazy))
        else:
            yield from _nodes(node, lazy)


def _imports(path: Path, lazy: bool = True) -> set[str]:
    """Return the dotted names of the modules that a file imports."""
    found = set()
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8")), lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {_module(node.module, alias.name) for alias in node.names}
    return found


def _module(package: str, name: str) -> str:
    path = ROOT / package.replace(".", "/") / name
    return f"{package}.{name}" if path.is_dir() or path.with_suffix(".py").is_file() else package


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_a_room_imports_only_rooms_below_it(room):
    """No import goes upwards or sideways, not even inside a function."""
    strangers = {
        f"{_dotted(path)} imports {name}"
        for path in MODULES
        if _room(path) == room
        for name in _imports(path)
        if name.startswith("squisher_mergekit.") and name.split(".")[1] not in {room, *ARROWS[room]}
    }
    assert strangers == set()


def test_the_rooms_have_no_import_cycle():
    """The rooms have an order in which each uses only earlier ones."""
    placed: set[str] = set()
    while placed != set(ARROWS):
        ready = {room for room, below in ARROWS.items() if below <= placed} - placed
        assert ready
        placed |= ready


def test_mergekit_is_imported_in_one_folder():
    """Only ``merging/mergekit`` imports mergekit."""
    users = {_dotted(path.parent) for path in MODULES for name in _imports(path) if name.split(".")[0] == "mergekit"}
    assert users == {"squisher_mergekit.merging.mergekit"}


def test_the_equations_import_torch_alone():
    """``merging.equations`` imports torch and nothing else."""
    outside = {name.split(".")[0] for name in _imports(PACKAGE / "merging" / "equations.py")}
    assert outside <= {"__future__", "collections", "typing", "torch"}


def test_modules_have_no_import_cycle():
    """Every module can be imported first."""
    graph = {_dotted(path): {n for n in _imports(path, lazy=False) if n != _dotted(path)} for path in MODULES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for name in graph.get(module, set()) & graph.keys():
                # A package's __init__ re-exports its modules, which do not import it.
                visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES if path.parent.name != "cli"}))
def test_a_folder_has_few_files(folder):
    """A folder has at most 16 files, and ``optimizers`` and ``estimators`` have at most 12."""
    most = 12 if folder.name in ("optimizers", "estimators") else 16
    assert len(list(folder.glob("*.py"))) <= most


@pytest.mark.parametrize("path", MODULES, ids=_dotted)
def test_a_module_has_at_most_400_lines(path):
    """A module with more lines asks to be split."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_no_two_classes_share_a_name():
    """Two classes never share a name."""
    names: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(_dotted(path))
    assert {name: places for name, places in names.items() if len(places) > 1} == {}


def test_no_test_module_imports_another():
    """Helpers that tests share are in modules without tests."""
    users = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for name in _imports(path)
        if name.split(".")[-1].startswith("test_") and name.startswith("tests.")
    ]
    assert users == []


def test_test_modules_mirror_the_package():
    """Each ``tests/ROOM/test_NAME.py`` tests ``squisher_mergekit/ROOM/NAME.py``."""
    unmatched = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        inner = path.relative_to(ROOT / "tests")
        if len(inner.parts) > 1 and inner.parts[0] != "scripts":
            stem = inner.stem.removeprefix("test_")
            names = [module.stem for module in (PACKAGE / inner.parent).glob("*.py")]
            if not any(stem == name or stem.startswith(f"{name}_") for name in names):
                unmatched.append(str(inner))
    assert unmatched == []
