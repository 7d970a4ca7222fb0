import mmap

import pytest
import torch

from hf_dash.utils import memory
from hf_dash.utils.memory import KEPT, LARGE, empty_tensor


@pytest.fixture(autouse=True)
def free(monkeypatch):
    monkeypatch.setattr(memory, "_free", {})
    return memory._free


@pytest.mark.parametrize("count", [1, LARGE // 4 - 1, LARGE // 4, LARGE])
def test_a_tensor_holds_what_is_written(count):
    ones = empty_tensor((count,), torch.float32).fill_(1)
    others = empty_tensor((count,), torch.float32).fill_(2)
    assert (ones.shape, ones.dtype) == ((count,), torch.float32)
    assert ones.sum().item() == count
    assert others.sum().item() == 2 * count


def test_memory_is_used_again_when_the_last_view_is_gone():
    first = empty_tensor((LARGE, 2), torch.uint8).fill_(1)
    place, view = first.data_ptr(), first[7:8]
    del first
    second = empty_tensor((LARGE, 2), torch.uint8).fill_(2)
    assert second.data_ptr() != place
    assert view.tolist() == [[1, 1]]
    del view
    smaller = empty_tensor((LARGE // 2 - 1, 1), torch.float32)
    assert smaller.data_ptr() == place


def test_what_is_kept_is_bounded(free):
    held = [empty_tensor((KEPT // 2,), torch.uint8) for _ in range(3)]
    assert not any(free.values())
    del held
    assert [(size, len(memories)) for size, memories in free.items()] == [(KEPT // 2, 2)]


def test_a_system_without_large_pages_will_do(monkeypatch):
    class Refused(mmap.mmap):
        def madvise(self, *arguments):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refused)
    assert empty_tensor((LARGE, 2), torch.uint8).fill_(3)[-1].tolist() == [3, 3]
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert empty_tensor((LARGE, 3), torch.uint8).fill_(3)[-1].tolist() == [3, 3, 3]
