"""The oldest and the newest version of what Hecate builds on: `nox` runs the covering set of tests on each.

`nox -s transformers` takes the installed torch, `nox -s torch` the installed transformers. Each session layers the
other version over the environment that nox runs in: run it in that of `make setup`, which has the native extension.
A torch from PyPI brings its CUDA libraries (3 GB); the tests run on CPU with it all the same.
"""

from __future__ import annotations

import sysconfig
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
