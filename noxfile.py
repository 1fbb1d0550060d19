"""The oldest and the newest version of what Hecate builds on: `nox` runs the covering set of tests on each.

`nox -s transformers` takes the installed torch, `nox -s torch` the installed transformers. Each session layers the
other version over the environment that nox runs in: run it in that of `make setup`, which has the native extension.
A torch from PyPI brings its CUDA libraries (3 GB); the tests run on CPU with it all the same.

`nox -s python` builds and tests a wheel on all supported versions of Python, each in an environment of its own, and
`nox -s wheel` makes the sdist and the wheel of a release and uses them as a user does.
"""

from __future__ import annotations

import sys
import sysconfig
import tarfile
from collections.abc import Sequence
from pathlib import Path

import nox

COVERING = (
    "tests/adapters/test_transformers.py",
    "tests/adapters/test_transformers_bf16.py",
    "tests/adapters/test_works_under_dtypes.py",
    "tests/checkpoint/test_pretrained.py",
)
TRANSFORMERS = {
    "5.0.0": ("huggingface_hub<2", "tokenizers<=0.23.0"),
    "5.10.4": ("huggingface_hub<2", "tokenizers<=0.23.0"),
    "5.20.2": (),
    "5.24.0": (),
}
"""Version -> what of it must be older, too."""
COVERING_TORCH = (
    "tests/runtime/test_exactness.py",
    "tests/runtime/step",
    "tests/runtime/dense",
    "tests/values/test_finite.py",
    "tests/adapters/test_works_under_dtypes.py",
    "tests/adapters/test_transformers_bf16.py",
)
"""What depends on torch's FSDP2 and autograd: exact results, passes that raise, weights of several dtypes."""
TORCH = ("2.11.0", "2.12.1", "2.13.0", "2.14.1")
"""The oldest one supported, and the last of each minor version since."""

PYTHON = ("3.10", "3.11", "3.12", "3.13")
"""All that are supported."""
COVERING_PYTHON = (
    "tests/test_names.py",
    "tests/test_placement.py",
    "tests/planning/test_algorithms.py",
    "tests/planning/test_plan.py",
    "tests/loads",
    "tests/models/test_moe.py",
)
"""Fast tests of the native extension, dataclasses and typing, in one process."""
TRAIN = ("hecate-train", "devices=2", "device=cpu", "steps=3", "name=wheel", "validation.sequences=8")

nox.options.sessions = ["transformers"]


@nox.session
@nox.parametrize("version", list(TRANSFORMERS))
def transformers(session: nox.Session, version: str) -> None:
    """Versions of transformers."""
    run_with(session, COVERING, f"transformers=={version}", *TRANSFORMERS[version])


@nox.session
@nox.parametrize("version", TORCH)
def torch(session: nox.Session, version: str) -> None:
    """Versions of torch, with everything that they need."""
    run_with(session, COVERING_TORCH, f"torch=={version}", dependencies=True)


def run_with(session: nox.Session, tests: Sequence[str], *requirements: str, dependencies: bool = False) -> None:
    """Run `tests` with `requirements` in place of what is installed."""
    session.install(*([] if dependencies else ["--no-deps"]), *requirements)
    site = next(Path(session.virtualenv.location).glob("lib/python*/site-packages"))
    below = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (site / "below.pth").write_text(below)  # searched after what was just installed
    session.run("python", "-m", "pytest", *(session.posargs or tests))


@nox.session(python=PYTHON)
def python(session: nox.Session) -> None:
    """Versions of Python: build a wheel with each, train outside of the clone, and run fast tests on the wheel."""
    session.run("launch/install_torch.sh", env={"PYTHON": "python"}, external=True)
    session.install(".[train]", "pytest", "pytest-timeout", "hypothesis", "scipy")
    tests = _copy_of_the_tests(session)
    session.chdir(session.create_tmp())
    session.run(*TRAIN)
    session.chdir(tests)
    session.run("python", "-m", "pytest", *(session.posargs or COVERING_PYTHON))


@nox.session
def wheel(session: nox.Session) -> None:
    """The sdist, and the wheel made from it, in a fresh environment over the packages of the one that nox runs in."""
    work = Path(session.create_tmp()).resolve()
    _layer(session, *(path for path in sys.path if path.endswith("site-packages")))
    session.run("python", "-c", f"from scikit_build_core.build import build_sdist; build_sdist({str(work)!r})")
    (sdist,) = work.glob("*.tar.gz")
    build = ("--no-build-isolation", "--no-deps", "--no-index")
    session.run("python", "-m", "pip", "wheel", "-q", *build, "-w", str(work), str(sdist))
    session.run("python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", *map(str, work.glob("*.whl")))
    session.run("python", "-m", "pip", "check")
    with tarfile.open(sdist) as files:
        files.extractall(work)
    session.chdir(work)
    session.run(*TRAIN)
    session.run("hecate-advise", "--help")
    session.run("hecate-path", "launch/slurm.sbatch")
    session.chdir(work / sdist.name.removesuffix(".tar.gz"))  # a clone that is not built
    session.run("python", "-c", "import hecate._native, hecate.api; assert 'site-packages' in hecate.api.__file__")


def _copy_of_the_tests(session: nox.Session) -> Path:
    """A folder with what tests need of the clone, but without the package, so that they import the wheel."""
    folder = Path(session.create_tmp()).resolve() / "clone"
    folder.mkdir(exist_ok=True)
    for name in ("tests", "benchmarks", "docs", "conf", "launch", "pyproject.toml"):
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(Path(__file__).parent / name)
    return folder


def _layer(session: nox.Session, *folders: str) -> None:
    """Put `folders` behind the session's own packages, without running the hooks of editable installs in them."""
    site = next(Path(session.virtualenv.location).glob("lib/python*/site-packages"))
    (site / "below.pth").write_text("\n".join(folders) + "\n")
