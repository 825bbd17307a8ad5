"""Memory of the CPU, and of the backward pass."""
import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ['keep_freed_memory', 'saved_bytes']

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, to use it again.

    glibc returns large blocks to the system as they are freed, and the system clears and maps them page by page when
    the next step asks for them again: about a tenth of the time of a training step on a CPU, the more the more memory
    the step has in use at once. The process then stays at the size of its largest step.

    Returns:
        Whether the C library can do so; only glibc can, elsewhere nothing changes.
    """
    if not sys.platform.startswith('linux'):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage counted once.

    Args:
        forward: Computes something with gradients.
    """
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(storage)  # so that no address is used twice
        # Nothing, since no backward pass follows: a graph that keeps its own outputs by a hook is never freed.

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):
        result = forward()
    del result
    return sum(storages.values())
