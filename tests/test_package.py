"""The built wheel and the editable install find the extension and conf/ when used from another folder."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import hecate
from hecate.carried import main as path_of_carried_file
from hecate.clone import installed_package
from tests.docs.pages import PAGES, links
from tests.faults.jobs import TINY

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
LAUNCHERS = ("launch/torchrun.sh", "launch/multinode.sh", "launch/slurm.sbatch")
TRAIN = "import runpy; runpy.run_module('hecate.train', run_name='__main__', alter_sys=True)"


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
    assert {"hecate/report/page.html", "hecate/report/page.js"} <= names
    assert not [n for n in names if "__pycache__" in n or n.startswith("tests")]


def test_wheel_holds_the_scripts_that_start_training(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        scripts = {f.filename: f for f in files.infolist() if f.filename.startswith("hecate/launch/")}
    assert set(scripts) == {f"hecate/{path}" for path in LAUNCHERS}
    for path in LAUNCHERS:
        mode = scripts[f"hecate/{path}"].external_attr >> 16
        assert mode & 0o111 == (ROOT / path).stat().st_mode & 0o111, path


def test_paths_of_carried_files_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in LAUNCHERS:
        monkeypatch.setattr(sys, "argv", ["hecate-path", path])
        path_of_carried_file()
        assert capsys.readouterr().out == f"{ROOT / path}\n"
    monkeypatch.setattr(sys, "argv", ["hecate-path", "launch/none.sh"])
    with pytest.raises(SystemExit, match="2"):
        path_of_carried_file()
    assert "no launch/none.sh in" in capsys.readouterr().err


def test_sdist_holds_what_the_pages_link_to(tmp_path: Path) -> None:
    python("-c", f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})", cwd=ROOT)
    (sdist,) = tmp_path.glob("hecate_moe-*.tar.gz")
    with tarfile.open(sdist) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    for page in PAGES:
        named = {(page.parent / path).resolve().relative_to(ROOT).as_posix() for path, _ in links(page) if path}
        assert {path for path in named if (ROOT / path).is_file()} <= names, page
    assert {
        "Makefile",
        "noxfile.py",
        "mkdocs.yml",
        "tests/test_package.py",
        "benchmarks/results/end_to_end.json",
    } <= names


def test_wheel_has_the_name_the_version_and_the_commands(wheel: Path) -> None:
    assert wheel.name.startswith(f"hecate_moe-{hecate.__version__}-")
    with zipfile.ZipFile(wheel) as files:
        (name,) = (n for n in files.namelist() if n.endswith("entry_points.txt"))
        commands = re.findall(r"^(\S+) = (\S+):(\S+)$", files.read(name).decode(), re.MULTILINE)
    assert {command for command, _, _ in commands} == {"hecate-advise", "hecate-path", "hecate-report", "hecate-train"}
    for _, module, function in commands:
        assert callable(getattr(importlib.import_module(module), function))


def test_files_of_a_release_name_the_version() -> None:
    assert f"\nversion: {hecate.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {hecate.__version__} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel is installed."""
    target = tmp_path_factory.mktemp("site")
    python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "-t", str(target), str(wheel), cwd=target)
    return target


def with_installed(target: Path, code: str, cwd: Path, *arguments: str) -> str:
    """Run `code` with `arguments` in `cwd`, which is searched first, then the wheel, then its dependencies."""
    import torch

    # -S disables this environment's editable install.
    packages = Path(torch.__file__).parents[1]
    paths = f"import sys; sys.path[1:1] = [{str(target)!r}]; sys.path.append({str(packages)!r})\n"
    return python("-S", "-c", paths + code, *arguments, cwd=cwd)


def test_wheel_works_from_elsewhere(installed: Path, tmp_path: Path) -> None:
    package, native, conf = with_installed(installed, PROBE, tmp_path).split()
    assert Path(package) == installed / "hecate" / "__init__.py"
    assert Path(native).parent == installed / "hecate"
    assert Path(conf) == installed / "hecate" / "conf"
    (tmp_path / "text.txt").write_text("What a wheel learns. " * 99)
    with_installed(installed, TRAIN, tmp_path, *TINY, "steps=2", "data.path=text.txt")
    assert (tmp_path / "runs" / "default" / "summary.json").exists()


def test_wheel_works_inside_a_clone(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "hecate", tmp_path / "hecate", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    code = PROBE + "import hecate.api; print(hecate.api.__file__)"
    package, native, conf, api = with_installed(installed, code, tmp_path).split()
    assert Path(package) == tmp_path / "hecate" / "__init__.py"
    assert Path(native).parent == Path(api).parent == installed / "hecate"
    assert Path(conf) == installed / "hecate" / "conf"


@pytest.mark.parametrize(("version", "rule"), [("9.9.9", "is 9.9.9; they must be equal"), (None, "is not installed")])
def test_clone_does_not_mix_with_another_version(
    version: str | None, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    information = tmp_path / "hecate_moe-9.9.9.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: hecate-moe\nVersion: {version}\n")
    (tmp_path / "hecate").mkdir()
    (tmp_path / "hecate" / "__init__.py").touch()

    def distribution(name: str) -> metadata.Distribution:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return metadata.PathDistribution(information)

    monkeypatch.setattr(metadata, "distribution", distribution)
    with pytest.raises(ImportError, match=f"has no built extension.*{rule}"):
        installed_package(hecate.__version__)
    if version is not None:
        with pytest.warns(RuntimeWarning, match="has no built extension"):
            assert installed_package(version) == str(tmp_path / "hecate")


def test_one_list_of_python_versions() -> None:
    text, sessions = (ROOT / "pyproject.toml").read_text(), (ROOT / "noxfile.py").read_text()
    classified = re.findall(r"Python :: (3\.\d+)", text)
    assert f'requires-python = ">={classified[0]}"' in text
    assert [f"cp{version.replace('.', '')}-*" for version in classified] == re.findall(r'"(cp3\d+-\*)"', text)
    assert f"PYTHON = ({', '.join(f'{version!r}' for version in classified)})".replace("'", '"') in sessions


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


IMPORTED_AS = {
    "hydra-core": "hydra",
    "tensorboard": "torch.utils.tensorboard",
    "cupy-cuda12x": "cupy",
    "cupy-cuda13x": "cupy",
}


def test_every_extra_is_imported_somewhere() -> None:
    text = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    source = "\n".join(path.read_text() for path in (ROOT / "hecate").rglob("*.py"))
    required = [
        re.match(r"[\w-]+", requirement)[0]  # type: ignore[index]
        for extra, line in re.findall(r"^(\w+) = \[(.*)\]", text, re.MULTILINE)
        for requirement in re.findall(r'"([^"]+)"', line)
        if extra not in ("dev", "docs")
    ]
    assert len(required) > 8
    for name in required:
        assert re.search(rf"^\s*(import|from) {IMPORTED_AS.get(name, name)}\b", source, re.MULTILINE), name
