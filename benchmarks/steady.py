"""Has a process spend the same time on the same work, whatever ran in it before.

Programs side by side in one process must not depend on what the others left behind, nor on the values that they happen
to compute with.
"""

from __future__ import annotations

import ctypes

import torch

__all__ = ["steady"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def steady() -> None:
    """Keep freed memory, and take numbers below 1e-38 for 0 in this thread. Both can be a tenth of a step on a CPU.

    glibc's malloc gives large blocks back to the kernel and maps new ones, whose pages the kernel clears at first use;
    which program has to pay for that is an accident of the heap. And products with numbers below 1e-38 take many times
    as long on CPUs (not on GPUs). Attention that has become sharp has such gradients, more in one run than in another.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    torch.set_flush_denormal(True)
