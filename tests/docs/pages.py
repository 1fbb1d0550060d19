"""The Markdown of the repository: pages, code blocks, links, and what the code of a page may name."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import hecate

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / path for path in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
        *(ROOT / "docs").glob("*.md"),
    ]
)
STAND_INS = {
    *("model", "engine", "mesh", "config", "optimizer", "batches", "loss", "seen", "arguments", "data", "trainer"),
    *("make_model", "make_batch", "world_size", "copies", "shard", "grads", "hecate", "torch"),
}
"""Names that a fragment may use without saying where they come from."""


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks whose fence names exactly `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Names by which links refer to the headings of a page, on GitHub and on the site."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    documented = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)  # by mkdocstrings
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings} | set(documented)


def links(page: Path) -> list[tuple[str, str]]:
    """Path and anchor of every relative link and picture."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text)


def unresolved(code: str) -> Iterator[str]:
    """What a fragment names that does not exist: imports, attributes of modules and of an engine, arguments."""
    tree = ast.parse(code)
    known: dict[str, object] = {"hecate": hecate, "engine": hecate.FSSDP}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _import(node, known)
    bound = {*known, *STAND_INS, *dir(builtins), *_bound(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in bound:
            yield node.id
        elif isinstance(node, ast.Attribute) and _lacks(node, known):
            yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            yield from _unknown_arguments(node, known)


def _import(node: ast.Import | ast.ImportFrom, known: dict[str, object]) -> Iterator[str]:
    """Import what is installed; of a package that is not, nothing is known."""
    root = node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name
    try:
        exec(compile(ast.Module([node], []), "page", "exec"), known)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("hecate", "torch"):
            yield f"{root}: {error}"
        known.update(dict.fromkeys((a.asname or a.name for a in node.names), None))
    except ImportError as error:
        yield f"{root}: {error}"


def _bound(tree: ast.Module) -> set[str]:
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    named = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return stored | named | {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}


def _value(node: ast.expr, known: dict[str, object]) -> object | None:
    """What a chain of names stands for, if that is known."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (base := _value(node.value, known)) is not None:
        return getattr(base, node.attr, None)
    return None


def _lacks(node: ast.Attribute, known: dict[str, object]) -> bool:
    base = _value(node.value, known)
    if not isinstance(base, types.ModuleType | type):
        return False
    if isinstance(base, types.ModuleType) and base.__name__.startswith("hecate"):
        return not hasattr(base, node.attr) and not is_module(f"{base.__name__}.{node.attr}")
    return not hasattr(base, node.attr) and f"        {node.attr}: " not in (base.__doc__ or "")


def is_module(name: str) -> bool:
    """Whether there is such a module; it need not be importable without optional dependencies."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # a class in a module that is no package
        return False


def _unknown_arguments(node: ast.Call, known: dict[str, object]) -> Iterator[str]:
    called = _value(node.func, known)
    if not callable(called) or not getattr(called, "__module__", "").startswith("hecate"):
        return
    parameters = inspect.signature(called).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for keyword in node.keywords:
        if keyword.arg is not None and keyword.arg not in parameters:
            yield f"{ast.unparse(node.func)}({keyword.arg}=...)"
