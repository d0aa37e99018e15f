"""What the house looks like, from the syntax trees alone: rooms, arrows, floors, circles, sizes, repeated lines.

    python bench/house.py
    python bench/house.py --before ../other --out bench/results/house.md

Nothing of the package is imported, so that any checkout can be read: ``--root`` (default: this one) and ``--before``,
which stands beside it. Definitions:

room
    A module or a folder directly in ``src/pocketrec``; the folder is one room. ``__init__`` and ``cli`` are doors and
    count as rooms.
arrow
    A pair of rooms of which one imports the other, in function bodies too, in ``TYPE_CHECKING`` blocks not. Importing a
    name from the package itself, which loads it late, leads to the module that has it.
floors
    Rooms on the longest way along arrows, a circle taken as one; for modules likewise.
circle
    A set of rooms, or of modules, each of which reaches all others. A package and its ``__init__`` are one module name.
upward
    Arrows against the longest ``layers`` contract of import-linter in ``pyproject.toml``.
lines of code
    Lines of all ``.py`` files under ``src`` that are not blank and in no docstring (those of comments, a few, count).
distinct lines
    Distinct stripped lines over all lines that are not blank, over the plug-in files of a folder together, ``__init__``
    left out.
settings
    Fields of the dataclasses that have a class attribute ``name``, inherited ones included, over all plug-in files. A
    setting that is a dataclass itself, like a training, counts as one; a row of its own adds the names of its fields.
"""

from __future__ import annotations

import argparse
import ast
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PACKAGE = "pocketrec"
SHOWN = 5
"""Names that a list of the longest holds."""

Graph = Mapping[str, set[str]]


@dataclass(frozen=True)
class Function:
    """A function or a class, and its lines."""

    name: str
    lines: int


class House:
    """One checkout.

    Args:
        root: the folder that holds ``src/pocketrec``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = root / "src" / PACKAGE
        if not (self.source / "__init__.py").is_file():
            raise SystemExit(f"expected a checkout with src/{PACKAGE}, but got {root}")
        self.files = {_module(p.relative_to(self.source.parent)): p for p in sorted(self.source.rglob("*.py"))}
        self.texts = {module: path.read_text(encoding="utf-8") for module, path in self.files.items()}
        self.trees = {module: ast.parse(text) for module, text in self.texts.items()}

    @cached_property
    def imports(self) -> Graph:
        """Module -> modules that it imports."""
        return {module: self._imported(module) - {module} for module in self.files}

    def _imported(self, module: str) -> set[str]:
        found: set[str] = set()
        package = self.files[module].name == "__init__.py"
        for node in _reachable(self.trees[module]):
            if isinstance(node, ast.Import):
                found |= {known for alias in node.names if (known := self._known(alias.name))}
            elif isinstance(node, ast.ImportFrom):
                base = _base(module, package, node)
                found |= {known for alias in node.names if (known := self._known(f"{base}.{alias.name}"))}
        return found

    def _known(self, name: str) -> str | None:
        """The module that has the dotted name, or ``None`` outside the package; lazy public names by their home."""
        if name.split(".")[0] != PACKAGE:
            return None
        if name.rpartition(".")[0] == PACKAGE and name not in self.files:
            return self._homes.get(name.rpartition(".")[2], PACKAGE)
        while name not in self.files:
            name = name.rpartition(".")[0]
        return name

    @cached_property
    def _homes(self) -> dict[str, str]:
        """Public name -> module, as the package's stub says, or its ``TYPE_CHECKING`` block."""
        homes: dict[str, str] = {}
        stub = self.source / "__init__.pyi"
        tree = ast.parse(stub.read_text(encoding="utf-8")) if stub.is_file() else self.trees[PACKAGE]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in self.files:
                homes |= {alias.asname or alias.name: node.module for alias in node.names}
        return homes

    @cached_property
    def rooms(self) -> list[str]:
        """Rooms of the top level."""
        return sorted({_room(module) for module in self.files})

    @cached_property
    def arrows(self) -> Graph:
        """Room -> rooms that it imports."""
        found: dict[str, set[str]] = {room: set() for room in self.rooms}
        for module, imported in self.imports.items():
            found[_room(module)] |= {_room(other) for other in imported}
        return {room: others - {room} for room, others in found.items()}

    @cached_property
    def storeys(self) -> dict[str, int]:
        """Room -> storey, 0 on top, of the longest contract of layers; empty where that has a single one."""
        path = self.root / "pyproject.toml"
        document = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        contracts = document.get("tool", {}).get("importlinter", {}).get("contracts", [])
        layers = max((c["layers"] for c in contracts if c.get("type") == "layers"), key=len, default=[])
        names = [[part.strip(" ()") for part in layer.replace("|", ":").split(":")] for layer in layers]
        return {name: storey for storey, row in enumerate(names) for name in row} if len(names) > 1 else {}

    @cached_property
    def upward(self) -> list[str]:
        """Arrows from a storey to a higher one."""
        level = self.storeys
        pairs = ((a, b) for a, others in self.arrows.items() for b in sorted(others))
        return [f"{a} -> {b}" for a, b in pairs if a in level and b in level and level[a] > level[b]]

    def defined(self, kinds: tuple[type[ast.AST], ...]) -> list[Function]:
        """Functions or classes, longest first; lines from the ``def`` to the end, docstring included."""
        found = [
            Function(f"{module.removeprefix(PACKAGE + '.')}.{node.name}", (node.end_lineno or 0) - node.lineno + 1)
            for module, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, kinds) and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        ]
        return sorted(found, key=lambda f: (-f.lines, f.name))

    def long_files(self) -> list[Function]:
        """Files of Python and C++ by their lines, longest first."""
        paths = [p for p in self.source.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".inl")]
        found = [Function(p.relative_to(self.source).as_posix(), len(p.read_text().splitlines())) for p in paths]
        return sorted(found, key=lambda f: (-f.lines, f.name))

    @cached_property
    def code(self) -> int:
        """Lines of code."""
        return sum(code_lines(self.texts[module], self.trees[module]) for module in self.files)

    def plugins(self, axis: str) -> list[str]:
        """Modules of a folder of plug-ins."""
        return [m for m in self.files if m.startswith(f"{PACKAGE}.{axis}.")]

    def distinct(self, axis: str) -> tuple[int, int]:
        """Distinct and all lines of a folder of plug-ins."""
        texts = [self.texts[module] for module in self.plugins(axis)]
        lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
        return len(set(lines)), len(lines)

    def settings(self, axis: str) -> list[tuple[str, str]]:
        """Name and annotation of the settings of all plug-ins of an axis, one by one."""
        found: list[tuple[str, str]] = []
        for module in self.plugins(axis):
            named = [n for n in self.trees[module].body if isinstance(n, ast.ClassDef) and _is_plugin(n)]
            found += [pair for node in named for pair in _fields(node, self._classes)]
        return found

    @cached_property
    def _classes(self) -> dict[str, ast.ClassDef]:
        return {n.name: n for tree in self.trees.values() for n in tree.body if isinstance(n, ast.ClassDef)}

    def names(self, axis: str) -> tuple[int, int]:
        """Distinct names of settings; and with those of the dataclasses that settings consist of."""
        pairs = self.settings(axis)
        plain = {name for name, _ in pairs}
        nested = set(plain)
        for annotation in {annotation for _, annotation in pairs}:
            for node in ast.walk(ast.parse(annotation)):
                cls = self._classes.get(node.id) if isinstance(node, ast.Name) else None
                if cls is not None and any("dataclass" in ast.unparse(d) for d in cls.decorator_list):
                    nested |= {name for name, _ in _fields(cls, self._classes)}
        return len(plain), len(nested)


def _module(path: Path) -> str:
    """Dotted name of a file; a package has that of its folder."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    """The room of the top level that a module lies in."""
    return module.split(".")[1] if "." in module else "__init__"


def _base(module: str, package: bool, node: ast.ImportFrom) -> str:
    """The module that ``from ... import`` names, relative ones resolved."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")[: len(module.split(".")) - node.level + package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _reachable(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes outside ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from (other, *_reachable(other))
            continue
        yield node
        yield from _reachable(node)


def _is_plugin(node: ast.ClassDef) -> bool:
    """Whether a class names itself in the registry."""
    targets = [n.target for n in node.body if isinstance(n, ast.AnnAssign) and n.value is not None]
    return any(isinstance(target, ast.Name) and target.id == "name" for target in targets)


def _fields(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> Iterator[tuple[str, str]]:
    """Names and annotations of a dataclass's fields, those of its bases first."""
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes and base.id != node.name:
            yield from _fields(classes[base.id], classes)
    for n in node.body:
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name):
            annotation = ast.unparse(n.annotation)
            if "ClassVar" not in annotation:
                yield n.target.id, annotation


def code_lines(text: str, tree: ast.AST) -> int:
    """Lines that are not blank and in no docstring.

    Example:
        >>> text = "x = 1  # one"
        >>> code_lines(text, ast.parse(text))
        1
    """
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return sum(bool(line.strip()) for n, line in enumerate(text.splitlines(), 1) if n not in docstrings)


def circles(graph: Graph) -> list[list[str]]:
    """Strongly connected sets of more than one name, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            place = stack.index(name)
            if len(stack) > place + 1:
                found.append(sorted(stack[place:]))
            del stack[place:]

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return found


def longest_chain(graph: Graph) -> list[str]:
    """Names on the longest way, from the top; a circle counts once, by its first name."""
    leader = {name: circle[0] for circle in circles(graph) for name in circle}
    merged: dict[str, set[str]] = {}
    for name, others in graph.items():
        mine = leader.get(name, name)
        merged.setdefault(mine, set()).update({leader.get(o, o) for o in others} - {mine})
    chains: dict[str, list[str]] = {}

    def chain(name: str) -> list[str]:
        if name not in chains:
            below = max((chain(other) for other in sorted(merged[name])), key=len, default=[])
            chains[name] = [name, *below]
        return chains[name]

    return max((chain(name) for name in sorted(merged)), key=len)


def _share(pair: tuple[int, int]) -> str:
    return f"{pair[0]:,} / {pair[1]:,} = {pair[0] / max(1, pair[1]):.1%}"


def _names(rows: Iterable[Function]) -> str:
    return ", ".join(f"`{row.name}` {row.lines}" for row in list(rows)[:SHOWN])


def _above(rows: Iterable[Function], most: int) -> str:
    return str(sum(row.lines > most for row in rows))


def _circles(graph: Graph) -> str:
    found = circles(graph)
    return str(len(found)) + "".join(f"; {', '.join(circle)}" for circle in found)


def _modules(house: House) -> Graph:
    return {m.removeprefix(f"{PACKAGE}."): {o.removeprefix(f"{PACKAGE}.") for o in v} for m, v in house.imports.items()}


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
ROWS: Mapping[str, Callable[[House], str]] = {
    "modules": lambda h: str(len(h.files)),
    "rooms at the top level": lambda h: str(len(h.rooms)),
    "arrows between rooms": lambda h: str(sum(map(len, h.arrows.values()))),
    "floors of rooms": lambda h: str(len(longest_chain(h.arrows))),
    "longest way of rooms": lambda h: " > ".join(longest_chain(h.arrows)),
    "floors of modules": lambda h: str(len(longest_chain(h.imports))),
    "circles of rooms": lambda h: _circles(h.arrows),
    "circles of modules": lambda h: _circles(_modules(h)),
    "storeys of the contract": lambda h: str(len(set(h.storeys.values()))),
    "imports upward": lambda h: str(len(h.upward)) + "".join(f"; {arrow}" for arrow in h.upward),
    "lines of code in `src`": lambda h: f"{h.code:,}",
    "files above 500 lines": lambda h: _above(h.long_files(), 500),
    "method files above 250 lines": lambda h: _above([f for f in h.long_files() if f.name.startswith("methods/")], 250),
    "longest files": lambda h: _names(h.long_files()),
    "functions above 50 lines": lambda h: _above(h.defined(FUNCTIONS), 50),
    "longest functions": lambda h: _names(h.defined(FUNCTIONS)),
    "longest classes": lambda h: _names(h.defined((ast.ClassDef,))),
    "distinct lines, methods": lambda h: _share(h.distinct("methods")),
    "distinct lines, backbones": lambda h: _share(h.distinct("backbones")),
    "settings of methods": lambda h: str(len(h.settings("methods"))),
    "distinct names of settings": lambda h: str(h.names("methods")[0]),
    "the same, with the fields of settings that are dataclasses": lambda h: str(h.names("methods")[1]),
}


def report(houses: Mapping[str, House]) -> str:
    """The table, one column for each house, and the rooms of the last one with what they import."""
    lines = [
        "# The house",
        "",
        "By `python bench/house.py`, from the syntax trees; the script says how each is counted.",
        "",
    ]
    lines += ["| | " + " | ".join(houses) + " |", "| --- " + "| --- " * len(houses) + "|"]
    lines += [f"| {name} | " + " | ".join(count(h) for h in houses.values()) + " |" for name, count in ROWS.items()]
    house = list(houses.values())[-1]
    lines += ["", "## Rooms", "", "| room | imports |", "| --- | --- |"]
    lines += [f"| {room} | {', '.join(sorted(house.arrows[room])) or '-'} |" for room in house.rooms]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE, help="the checkout [default: this one]")
    parser.add_argument("--before", type=Path, help="a checkout to stand beside it")
    parser.add_argument("--out", type=Path, help="file to write, too")
    arguments = parser.parse_args()
    houses = {"before": House(arguments.before)} if arguments.before else {}
    houses["now"] = House(arguments.root)
    text = report(houses)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
