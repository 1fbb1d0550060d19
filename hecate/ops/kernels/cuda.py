"""Compiles kernels on first use (NVRTC through CuPy, which caches them on disk); launches them on torch's stream."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hecate.ops.kernels.source import SOURCES, read

__all__ = ["launch", "missing"]

OPTIONS = ("-std=c++17",)
CAPABILITY = (8, 0)
"""Oldest compute capability that the kernels compile for."""
SHARED_BYTES = 48 * 1024
"""Shared memory of a block for which a kernel needs not ask."""


@lru_cache
def missing(device: torch.device) -> str | None:
    """What is missing to run the kernels on `device`, in one line; None: nothing."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there are none for device type {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"{device} has compute capability {found[0]}.{found[1]}, they need {CAPABILITY[0]}.{CAPABILITY[1]}"
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({_first_line(error)})"
    try:
        for source in SOURCES:
            _module(source, _index(device))
    except Exception as error:  # CuPy raises many types for a missing NVRTC, an old driver or a compiler's error
        return f"CuPy {cupy.__version__} cannot compile or load a kernel ({_first_line(error)})"
    return None


def launch(
    source: str,
    kernel: str,
    blocks: int,
    block: tuple[int, int],
    shared_bytes: int,
    words: NDArray[np.int64],
    device: torch.device,
) -> None:
    """Launch on the current stream of `device`; does not wait for it.

    Args:
        source: as in `hecate.ops.kernels.launch.Launch`, like the next four.
        kernel: see there.
        blocks: see there.
        block: see there.
        shared_bytes: see there.
        words: the argument struct.
        device: CUDA.
    """
    index = _index(device)
    by_value = words.view(np.dtype((np.void, words.nbytes)))  # an array with one element goes by value
    with torch.cuda.device(index), _stream(torch.cuda.current_stream(index).cuda_stream, index):
        function = _function(source, kernel, index)
        if shared_bytes > SHARED_BYTES:
            function.max_dynamic_shared_size_bytes = shared_bytes
        function((blocks, 1, 1), (*block, 1), (by_value,), shared_mem=shared_bytes)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@lru_cache
def _module(source: str, index: int) -> Any:
    """The compiled kernels of one file, loaded on one device."""
    import cupy

    with torch.cuda.device(index):
        module = cupy.RawModule(code=read(source), options=OPTIONS)
        module.compile()
    return module


@lru_cache
def _function(source: str, kernel: str, index: int) -> Any:
    return _module(source, index).get_function(kernel)


@lru_cache
def _stream(address: int, index: int) -> Any:
    import cupy

    return cupy.cuda.ExternalStream(address, index)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
