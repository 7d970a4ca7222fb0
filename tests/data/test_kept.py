import pytest
import torch
from helpers import heard

from hf_dash.data.kept import KeptExamples, open_kept

SHAPE = (1, 1, 3)


def image(number, dtype):
    return torch.tensor([[[0, 1, number]]]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_images_and_labels_come_back(dtype):
    kept = KeptExamples(4, SHAPE, dtype)
    for place in (3, 1):
        kept.write(place, image(place, dtype), 10 * place - 20)
    pixels, labels, missing = kept.read([3, 0, 1])
    assert missing == [1]
    assert torch.equal(pixels[[0, 2]], torch.stack([image(3, dtype), image(1, dtype)]))
    assert labels[[0, 2]].tolist() == [10, -10]
    assert kept.read([1])[1].tolist() == [-10]
    assert (kept.hold([1, 3]), kept.hold([3, 2]), kept.hold([])) == (True, False, True)


def test_one_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"pixels must have shape \(1, 1, 3\).*got \(1, 1, 2\)"):
        KeptExamples(4, SHAPE, torch.uint8).write(0, torch.zeros(1, 1, 2).byte(), 0)


def test_where_nothing_can_be_kept_it_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HF_DASH_CACHE", str(tmp_path / "file"))
    with heard() as lines:
        assert open_kept(2, image(0, torch.uint8), 1) is None
    assert len(lines) == 1
    assert "decoded images cannot be kept" in lines[0]
