"""The built wheel and the editable install find the extension and conf/ when used from another folder."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = """
import hecate, hecate._native
from hecate.train.settings import conf_dir
from hecate.train.__main__ import check_keys
check_keys(["policy=ep", "model=bert_moe"])
print(hecate.__file__)
print(hecate._native.__file__)
print(conf_dir())
"""


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = f"--config-settings=build-dir={folder / 'build'}"
    python(
        *("-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"),
        *(build, "-w", str(folder), str(ROOT)),
        cwd=folder,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_configuration_and_kernels(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, packaged in (("conf", "hecate/conf"), ("csrc/cuda", "hecate/csrc/cuda")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                assert f"{packaged}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert not [n for n in names if "__pycache__" in n or n.startswith("tests")]


def test_wheel_works_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "-t", str(target), str(wheel), cwd=tmp_path)
    # -S disables this environment's editable install; dependencies are found by path, after the wheel.
    import torch

    packages = Path(torch.__file__).parents[1]
    code = f"import sys; sys.path[:0] = [{str(target)!r}]; sys.path.append({str(packages)!r})\n{PROBE}"
    package, native, conf = python("-S", "-c", code, cwd=tmp_path).split()
    assert Path(package) == target / "hecate" / "__init__.py"
    assert Path(native).parent == target / "hecate"
    assert Path(conf) == target / "hecate" / "conf"


def test_editable_install_works_from_elsewhere(tmp_path: Path) -> None:
    package, native, conf = python("-c", PROBE, cwd=tmp_path).split()
    assert Path(package) == ROOT / "hecate" / "__init__.py"
    assert Path(native).exists()
    assert Path(conf) == ROOT / "conf"


def test_exceptions_are_found_where_they_were_first() -> None:
    from hecate.runtime.finite import NonFiniteError as OldNonFiniteError  # type: ignore[import-not-found]
    from hecate.runtime.heartbeat import MissingRankError as OldMissingRankError  # type: ignore[import-not-found]

    from hecate.errors import MissingRankError, NonFiniteError

    assert (OldMissingRankError, OldNonFiniteError) == (MissingRankError, NonFiniteError)


def test_no_extra_brings_two_builds_of_cupy() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(r'^(\w+) = \[([^\]]*"cupy-[^\]]*)\]', text, re.MULTILINE)
    builds = {extra: re.findall(r'"(cupy[\w-]*)', required) for extra, required in extras}
    assert builds == {"cuda12": ["cupy-cuda12x"], "cuda13": ["cupy-cuda13x"]}
    assert text.count('"cupy-') == 2
