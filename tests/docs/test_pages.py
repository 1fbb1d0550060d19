"""The pages: links lead somewhere, commands and names exist, tables are complete, and the Python in them runs."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import hecate
from hecate.train.__main__ import check_keys
from tests.docs.pages import PAGES, ROOT, anchors, blocks, is_module, links, unresolved

DOCS = ROOT / "docs"
RUN = [(page, code) for page in PAGES if page.name != "README.md" for code in blocks(page, "python")]
COMPILED = [(page, code) for page in PAGES for code in blocks(page, "py")]
MADE_FROM = {
    "benchmarks.md": ROOT / "benchmarks" / "README.md",
    "changelog.md": ROOT / "CHANGELOG.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
}
"""Page of the site -> what docs/hooks.py makes it from."""


def number(pages: list[tuple[Path, str]]) -> list[str]:
    return [f"{page.stem}-{i}" for i, (page, _) in enumerate(pages)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        target = page.parent / path if path else page
        if page.parent == DOCS and path in MADE_FROM:
            target = MADE_FROM[path]
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(named) == sorted([page.name for page in DOCS.glob("*.md")] + list(MADE_FROM))


@pytest.mark.parametrize(("page", "code"), RUN, ids=number(RUN))
def test_python_runs(page: Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformers" in code:
        pytest.importorskip("transformers")
    run(code, tmp_path, monkeypatch)


def run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a page's code in one process, in a folder of its own, and return its names."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, "page", "exec"), names)
    if "engine" in names:
        names["engine"].close()
    return names


@pytest.mark.parametrize(("page", "code"), COMPILED, ids=number(COMPILED))
def test_names_in_fragments_exist(page: Path, code: str) -> None:
    assert list(unresolved(code)) == []


def test_names_that_do_not_exist_are_found() -> None:
    code = """
from hecate.ema import Average
engine.svae("x")
hecate.FSSDPConfig(polcy="ep")
torch.nn.Linaer(nothing)
from torch import distributed
distributed.init
"""
    average, *found = unresolved("import torch\n" + code)
    assert average.startswith("hecate.ema: cannot import name 'Average'")
    assert sorted(found) == [
        "distributed.init",
        "engine.svae",
        "hecate.FSSDPConfig(polcy=...)",
        "nothing",
        "torch.nn.Linaer",
    ]


def test_every_setting_is_on_its_page_with_its_default() -> None:
    table = (DOCS / "settings.md").read_text().partition("| field |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \|", table, flags=re.MULTILINE)
    defaults = {f.name: f.default for f in fields(hecate.FSSDPConfig)}
    stated = {name: value.strip() for name, value in rows if name in defaults}
    assert stated == {name: str(default) for name, default in defaults.items()}


def test_every_statistic_is_on_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(DOCS / "stats.md", "python")
    stats = run(code, tmp_path, monkeypatch)["stats"]
    cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", (DOCS / "stats.md").read_text(), flags=re.MULTILINE)
    stated = [name for cell in cells for name in re.findall(r"\w+", cell)]
    assert sorted(stated) == sorted([*stats, *stats["layers"][0]])


def test_every_public_name_is_documented() -> None:
    documented = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE)
    assert {f"hecate.{name}" for name in hecate.__all__} - {"hecate.__version__"} <= set(documented)
    for name in documented:
        module, _, member = name.rpartition(".")
        if not is_module(name):
            assert hasattr(importlib.import_module(module), member), name


def commands() -> list[list[str]]:
    """Words of every command line of every page, without settings of the environment before it."""
    lines = [
        line.split(" #")[0] for page in PAGES for block in blocks(page, "bash") for line in joined(block).splitlines()
    ]
    return [words[first(words) :] for line in lines if (words := shlex.split(line, comments=True))]


def joined(block: str) -> str:
    return block.replace("\\\n", " ")


def first(words: list[str]) -> int:
    return next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))


def test_commands_use_what_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for words in commands():
        if words[0] == "make":
            assert words[1] in targets, words
        if "-m" in words:
            assert is_module(words[words.index("-m") + 1]), words
        for word in (word.rstrip(")") for word in words):  # of $(...)
            if word.startswith(("launch/", "conf/", "benchmarks/", "tests/")):
                assert (ROOT / word).exists(), words
        check_keys(keys_of_the_trainer(words))


def keys_of_the_trainer(words: list[str]) -> list[str]:
    """The `key=value` of a command that starts the trainer."""
    given = [part for word in words for part in word.removeprefix("ARGS=").split() if "=" in part]
    starts = words[:2] == ["make", "train"] or words[0] in ("hecate-train", "sbatch") or "hecate.train" in words
    own_script = words[0] in ("launch/torchrun.sh", "launch/multinode.sh")
    return [part for part in given if not part.startswith("-")] if starts or own_script else []


def test_extras_exist() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^(\w+) = \[", text.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    rows = (DOCS / "install.md").read_text().partition("| extra |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", re.sub(r"\| [^|]*\|$", "", rows, flags=re.MULTILINE))) <= extras
    for words in commands():
        if words[:2] == ["pip", "install"]:
            named = re.findall(r"\[([\w,]+)\]", words[2])
            assert {extra for names in named for extra in names.split(",")} <= extras, words


def test_fences_say_what_they_are() -> None:
    for page in PAGES:
        for code in blocks(page, "py") + blocks(page, "python"):
            ast.parse(code)
        fences = re.findall(r"^```(.*)$", page.read_text(), flags=re.MULTILINE)
        assert set(fences[::2]) <= {"python", "py", "bash", "text", "yaml"}, page
