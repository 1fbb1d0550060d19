"""The Python of the README runs, and its commands name keys, files and targets that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hecate.train.__main__ import check_keys

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=["usage", "plan"])
def test_python_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_commands_use_what_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    assert lines[0].split() == ["make", "train"]
    assert lines[1].split() == ["make", "test"]
    for line in lines:
        words = shlex.split(line)
        words = words[1:] if words and words[0].startswith("DEVICES=") else words
        if words[0] == "make":
            assert words[1] in targets
            words = [w for argument in words[2:] for w in argument.removeprefix("ARGS=").split()]
        check_keys([w for w in words if "=" in w])


def test_files_exist() -> None:
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
