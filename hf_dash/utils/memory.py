"""Memory for large batches, in large pages.

Flow: a shape → a tensor whose values are not set, as ``torch.empty`` makes it.
Differs from it: the system gives a new tensor of more than 32 MB to a process page by page, at the
first write to each 4 KB, which costs three times what is computed on a batch of images. Linux gives
2 MB at a time to those who ask.
"""

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

# Bytes from which on it pays.
LARGE = 4 << 20


def empty_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor on the CPU whose values are not set.

    Example:
        >>> import torch
        >>> from hf_dash.utils.memory import empty_tensor
        >>> empty_tensor((64, 3, 224, 224), torch.float32).shape
        torch.Size([64, 3, 224, 224])
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(*shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without large pages
        return torch.empty(*shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)
