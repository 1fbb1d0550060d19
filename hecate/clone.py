"""For a clone whose native extension is not built, in an environment that has the wheel.

Python started in a clone finds the clone's folder `hecate` first. Its files alone do not work, and with the installed
extension they could work differently from both. So all modules come from the installed package.
"""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path

__all__ = ["installed_package"]

BUILD = "run `make setup` in the clone, or start Python from another folder"


def installed_package(version: str) -> str:
    """Folder of the installed package, for a clone without a built extension; warns that it is used.

    Args:
        version: `__version__` of the clone.

    Raises:
        ImportError: nothing is installed but the clone itself, or another version.
    """
    clone = Path(__file__).resolve().parent
    try:
        distribution = metadata.distribution("hecate-moe")
    except metadata.PackageNotFoundError:
        raise ImportError(f"hecate: {clone} has no built extension, and hecate-moe is not installed; {BUILD}") from None
    package = Path(str(distribution.locate_file("hecate"))).resolve()
    if package == clone or not (package / "__init__.py").is_file():
        raise ImportError(f"hecate: {clone} has no built extension, nor has the installed hecate-moe its own; {BUILD}")
    if distribution.version != version:
        raise ImportError(
            f"hecate: {clone} has no built extension and is version {version}, the installed hecate-moe is "
            f"{distribution.version}; they must be equal. Or {BUILD}"
        )
    warnings.warn(f"hecate is imported from {package}, since {clone} has no built extension", RuntimeWarning, 3)
    return str(package)
