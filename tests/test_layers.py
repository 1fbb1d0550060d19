"""Checks the import rules: a folder imports only those before it, there are no cycles, and planning needs no process
group.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hecate"
# In order: a name imports only names on lines before its own.
ORDER = (
    "clone",
    "placement",
    "cost",
    "config",
    "carried",
    "text",
    "names",
    "private_torch",
    "labels",
    "errors",
    "ops",
    "experts",
    "loads",
    "planning",
    "policies",
    "ranks",
    "collectives",
    "adapters",
    "values",
    "runtime",
    "checkpoint",
    "pretrained",
    "models",
    "state",
    "api",
    "ema",
    "verify",
    "sim",
    "advise",
    "report",
    "integrations",
    "train",
    "examples",
)
WITHOUT_PROCESS_GROUP = (
    "placement",
    "cost",
    "config",
    "loads",
    "planning",
    "policies",
    "collectives.moves",
    "collectives.route",
    "sim.cluster",
    "sim.conf",
    "sim.memory",
    "sim.model",
    "sim.network",
    "sim.plans",
    "sim.run",
    "sim.settings",
    "sim.step",
    "advise",
)
NEED_DEEPSPEED = ("integrations.deepspeed", "runtime.dense.zero", "runtime.dense.zero_state")
NATIVE = "_native"  # the C++ extension imports nothing


def modules() -> dict[str, Path]:
    """Module name without `hecate.` -> file; the package itself has the empty name."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Absolute names that module `name` imports, also inside functions; `from a import b` may be module a.b."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"hecate.{name}: relative import on line {node.lineno}"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                own = full.removeprefix("hecate.")
                yield full if own in MODULES or node.module in ("torch", "hecate") else node.module


def own_imports(name: str) -> set[str]:
    return {i.removeprefix("hecate.") for i in imports(name) if i.startswith("hecate.")}


def reachable(start: str) -> dict[str, str]:
    """Every module of hecate that `start` imports, directly or indirectly -> the module that imports it."""
    found, todo = {start: ""}, [start]
    while todo:
        name = todo.pop()
        for other in own_imports(name) & MODULES.keys() - found.keys():
            found[other] = name
            todo.append(other)
    return found


def folder(name: str) -> str:
    return name.split(".")[0]


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def test_every_module_has_its_place_in_the_order() -> None:
    assert {folder(name) for name in MODULES} - {""} == set(ORDER)


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_only_what_stands_above(name: str) -> None:
    above = {*ORDER[: ORDER.index(folder(name)) + 1], NATIVE}
    for other in own_imports(name):
        assert folder(other) in above, f"hecate.{name} imports hecate.{other}, which stands below it"


Graph = dict[str, set[str]]


def circles(graph: Graph) -> list[set[str]]:
    """Strongly connected components that contain a cycle."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        todo = list(graph[start])
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += graph[node]
        return found

    reach = {node: reached(node) for node in graph}
    together = {frozenset(n for n in reach[node] if node in reach[n]) for node in graph}
    return [set(nodes) for nodes in together if nodes]


def by_file() -> Graph:
    return {name: own_imports(name) & MODULES.keys() for name in MODULES}


def by_folder() -> Graph:
    """The import graph of a folder: its files, and each subfolder as one node."""

    def node(name: str) -> str:
        return ".".join(name.split(".")[:2])

    graph: Graph = {node(name): set() for name in MODULES}
    for name, others in by_file().items():
        graph[node(name)] |= {node(other) for other in others} - {node(name)}
    return graph


def test_circles_are_found() -> None:
    graph: Graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"d"}, "e": {"a"}}
    assert sorted(map(sorted, circles(graph))) == [["b", "c"], ["d"]]


@pytest.mark.parametrize("graph", [by_file, by_folder])
def test_nothing_imports_itself_in_a_circle(graph: Callable[[], Graph]) -> None:
    found = [" <-> ".join(sorted(nodes)) for nodes in circles(graph())]
    assert not found, f"hecate: {found} import each other"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "private_torch"])
def test_private_names_of_torch_are_in_one_file(name: str) -> None:
    for imported in imports(name):
        parts = imported.split(".")
        assert parts[0] != "torch" or not any(p.startswith("_") for p in parts[1:]), f"hecate.{name}: {imported}"
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            base: ast.expr = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            private = isinstance(base, ast.Name) and base.id in ("torch", "dist")
            assert not private, f"hecate.{name}, line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_tests_import_helpers_and_not_each_other(path: Path) -> None:
    assert not re.findall(r"^from tests(?:\.\w+)*(?:\.test_| import .*test_).*", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, WITHOUT_PROCESS_GROUP)])
def test_needs_no_process_group(name: str) -> None:
    for module, importer in reachable(name).items():
        assert not within(module, ("runtime",)), f"hecate.{name} reaches hecate.{module} through hecate.{importer}"
        for other in imports(module):
            assert not within(other, ("torch.distributed",)), f"hecate.{name} reaches {other} in hecate.{module}"


def test_importing_everything_touches_neither_cuda_nor_a_process_group() -> None:
    lacking = () if find_spec("deepspeed") else NEED_DEEPSPEED
    found = [name for name in MODULES if not name.endswith("__main__") and name not in lacking]
    names = ", ".join(f"hecate.{name}" if name else "hecate" for name in found)
    code = (
        f"import {names}, torch\n"
        "assert not torch.cuda.is_initialized(), 'CUDA'\n"
        "assert not torch.distributed.is_initialized(), 'process group'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
