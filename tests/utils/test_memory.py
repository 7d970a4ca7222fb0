import mmap

import pytest
import torch

from hf_dash.utils.memory import LARGE, empty_tensor


@pytest.mark.parametrize("count", [1, LARGE // 4 - 1, LARGE // 4, LARGE])
def test_a_tensor_holds_what_is_written(count):
    ones = empty_tensor((count,), torch.float32).fill_(1)
    others = empty_tensor((count,), torch.float32).fill_(2)
    assert (ones.shape, ones.dtype) == ((count,), torch.float32)
    part = ones[-1:]
    del ones
    assert others.sum().item() == 2 * count
    assert part.item() == 1  # a view keeps the memory


def test_without_large_pages_it_is_torchs_own(monkeypatch):
    class Refused(mmap.mmap):
        def madvise(self, *arguments):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refused)
    assert empty_tensor((LARGE, 2), torch.uint8).zero_().shape == (LARGE, 2)
