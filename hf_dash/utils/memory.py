"""Memory for large batches that is used again.

Flow: a shape → a tensor whose values are not set, as ``torch.empty`` makes it; when it and its
views are gone, the next one of about its size gets its memory.
Differs from ``torch.empty``: that gives the memory of a large tensor back to the system, which
clears it and hands it out again at the first write to every 4 KB. This takes three times as long as
to normalize a batch of images. New memory comes in pages of 2 MB, where Linux has them.
"""

import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

# Bytes from which on it pays, and that are kept for later, at most.
LARGE, KEPT = 4 << 20, 1 << 28

# Memory that no tensor uses, by its size.
_free: dict[int, list[mmap.mmap]] = {}


def empty_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor on the CPU whose values are not set.

    Example:
        >>> import torch
        >>> from hf_dash.utils.memory import empty_tensor
        >>> empty_tensor((64, 3, 224, 224), torch.float32).shape
        torch.Size([64, 3, 224, 224])
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < LARGE:
        return torch.empty(*shape, dtype=dtype)
    # An epoch's batches differ by one image: both sizes use the same memory.
    step = 1 << size.bit_length() - 4
    memory = _memory(-(-size // step) * step)
    array = np.frombuffer(memory, dtype=np.uint8, count=size)
    weakref.finalize(array, _give_back, memory).atexit = False
    return torch.from_numpy(array).view(dtype).view(*shape)


def _memory(size: int) -> mmap.mmap:
    with suppress(KeyError, IndexError):
        return _free[size].pop()
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _give_back(memory: mmap.mmap) -> None:
    if len(memory) + sum(size * len(free) for size, free in list(_free.items())) <= KEPT:
        _free.setdefault(len(memory), []).append(memory)
