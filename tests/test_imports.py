"""Which module may import which: one way only, no circle, nothing private, no two of one name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Lower ones first: each imports itself and those before it.
PACKAGES = ("dsp_kernels", "dsprune")
# The rooms that a family of operators may have (design: reference, op, native, ...): the same in each.
ROOMS = {"__init__", "reference", "op", "native", "triton", "triton_kernels", "cuda"}

# What stands on the rest of ``dsprune``, which must not know of it.
UPPER = ("dsprune.cli", "dsprune.recipes", "dsprune.integrations")


class Import(NamedTuple):
    target: str  # a module of ours
    private: str | None  # what it takes from there that is not for others


def modules() -> dict[str, Path]:
    found = {}
    for base in (ROOT, ROOT / "python"):
        for package in PACKAGES:
            for path in sorted((base / package).rglob("*.py")):
                parts = path.relative_to(base).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All but what is there for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from nodes(node)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def origin(module: str, path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + (path.stem == "__init__")]
    return ".".join([*parts, *([node.module] if node.module else [])])


def imports(module: str, path: Path) -> list[Import]:
    found: list[Import] = []
    local: dict[str, str] = {}  # names of modules here
    everything = list(nodes(ast.parse(path.read_text(encoding="utf-8"))))
    for node in everything:
        if isinstance(node, ast.Import):
            found += [Import(alias.name, None) for alias in node.names if alias.name in MODULES]
        elif isinstance(node, ast.ImportFrom):
            base = origin(module, path, node)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                if whole in MODULES:
                    local[alias.asname or alias.name] = whole
                    found.append(Import(whole, None))
                elif base in MODULES:
                    found.append(Import(base, alias.name if is_private(alias.name) else None))
    for node in everything:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and is_private(node.attr):
            target = local.get(node.value.id)
            if target is not None:
                found.append(Import(target, node.attr))
    return found


GRAPH = {module: imports(module, path) for module, path in MODULES.items()}


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Sets of modules each of which reaches the others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for target in graph.get(left.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    left.append(target)
        return seen

    reach = {module: reached(module) for module in graph}
    return {
        frozenset(other for other in reach[module] if module in reach.get(other, ()))
        for module in graph
        if module in reach[module]
    }


def test_the_parts_of_this_test() -> None:
    assert {"dsp_kernels.conv.op", "dsprune.pack"} <= MODULES.keys()
    assert Import("dsp_kernels.geometry", None) in GRAPH["dsp_kernels.conv.op"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == {frozenset("bc"), frozenset("d")}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    accepted = PACKAGES[: PACKAGES.index(package) + 1]
    upward = [
        f"{module}: {target}"
        for module, found in GRAPH.items()
        for target, _ in found
        if module.split(".")[0] == package and target.split(".")[0] not in accepted
    ]
    assert not upward


def test_nothing_below_knows_what_stands_on_it() -> None:
    def upper(module: str) -> bool:
        return module.startswith(UPPER)

    assert not [
        f"{module}: {target}"
        for module, found in GRAPH.items()
        for target, _ in found
        if upper(target) and not upper(module) and module != "dsprune.__main__"
    ]


def test_no_circles() -> None:
    assert not circles({module: {target for target, _ in all_of} for module, all_of in GRAPH.items()})


def test_nothing_private_is_taken_from_another_module() -> None:
    assert not [
        f"{module}: {target}.{private}"
        for module, found in GRAPH.items()
        for target, private in found
        if private is not None
    ]


def test_no_two_modules_have_one_name() -> None:
    names = [path.stem for path in MODULES.values() if path.stem not in ROOMS]
    assert not {name for name in names if names.count(name) > 1}


# Beside the table of operators: what exported graphs are rewritten to before any pass sees them, and torch's
# own backward of a pooling and a convolution, called.
NAMES_OPERATORS = {
    "dsprune.operators",
    "dsprune.functional",
    "dsp_kernels.conv.reference",
    "dsp_kernels.tail",
}


def test_the_table_alone_names_operators() -> None:
    """Passes ask ``dsprune.operators``: an operator is one row there."""

    def names(path: Path) -> bool:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return any(isinstance(node, ast.Attribute) and node.attr == "aten" for node in ast.walk(tree))

    assert {module for module, path in MODULES.items() if names(path)} == NAMES_OPERATORS
