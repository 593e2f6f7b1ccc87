"""The order of the packages: what imports what, the picture of it in docs/how-it-works.md, and the size of things."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "sbpatch"
PAGE = ROOT / "docs" / "how-it-works.md"
SHARED = {
    "version",
    "errors",
    "interrupts",
    "bounds",
    "reading",
    "writing",
    "progress",
    "measure",
    "processes",
    "registration",
}  # small modules that any package may use
ORDER = ["version", "errors", "interrupts", "bounds", "reading", "writing", "progress", "measure", "processes"]
ORDER += ["attention", "data", "models", "sites", "plan", "generation", "calibration", "evaluation", "training"]
ORDER += ["study", "registration", "cli"]


def modules() -> dict[str, ast.Module]:
    """Every module by its dotted name below sbpatch; a package's own is its name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = list(path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(name: str, tree: ast.Module, known: dict[str, ast.Module]) -> set[str]:
    """Modules of sbpatch that a module imports anywhere, its own package's __init__ apart."""
    is_package = (SOURCE / Path(*name.split("."), "__init__.py")).exists()
    package = name.split(".") if is_package else name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            found.add(whole if whole in known else ".".join(base))
    return found - {name}


KNOWN = modules()
EDGES = {name: imports(name, tree, KNOWN) for name, tree in KNOWN.items() if name}


def test_no_module_imports_upwards() -> None:
    for name, targets in EDGES.items():
        for target in targets:
            here, there = (ORDER.index(x.split(".")[0]) for x in (name, target))
            assert there <= here, f"{name} imports {target}, which stands above it"


def test_no_module_imports_itself_by_way_of_others() -> None:
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for target in sorted(EDGES.get(name, ())):
                visit(target, [*path, name])
            done.add(name)

    for name in EDGES:
        visit(name, [])


def picture() -> str:
    """The packages from the lowest up; an arrow is an import, but those that a longer way of arrows says already."""
    direct: dict[str, set[str]] = {name: set() for name in ORDER if name not in SHARED}
    for name, targets in EDGES.items():
        here = name.split(".")[0]
        direct.setdefault(here, set()).update(x.split(".")[0] for x in targets)
    packages = [name for name in ORDER if name not in SHARED]
    below: dict[str, set[str]] = {}
    lines = []
    for here in packages:  # in order, so that what lies below is known
        near = {x for x in direct[here] if x in packages and x != here}
        further = set().union(*(below[x] for x in near)) if near else set()
        below[here] = near | further
        lines += [f"    {here} --> {x}" for x in packages if x in near - further]
    return "\n".join(["```mermaid", "graph BT", *lines, "```"])


def test_the_picture_in_the_docs_is_that_of_the_imports() -> None:
    assert picture() in PAGE.read_text(encoding="utf-8"), f"put this into {PAGE.name}:\n{picture()}"


def compiled(node: ast.FunctionDef) -> bool:
    """Whether Triton makes one kernel of it, which cannot be taken apart."""
    return any(ast.unparse(x) == "triton.jit" for x in node.decorator_list)


def test_functions_and_files_stay_short() -> None:
    """Of a function its statements: the flags of a command, each with its help, are no code, nor are docstrings."""
    for name, tree in KNOWN.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or compiled(node) or node.end_lineno is None:
                continue
            statements = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            length = node.end_lineno - statements[0].lineno + 1
            assert length <= 60, f"{name}.{node.name} has {length} lines"
    for path in SOURCE.rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 300, f"{path.relative_to(ROOT)} has {lines} lines"
