"""Where round 1 began: by its history, or only suspected."""

import dataclasses

import pytest
import torch
from helpers import record

import hf_dash
from hf_dash.history import write_history
from hf_dash.method.origin import find_origin
from hf_dash.utils.files import sha256_of


@pytest.fixture
def folder(tiny_timm, tmp_path):
    hf_dash.save_model(tiny_timm, tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


def loaded(folder, *records):
    write_history(folder / "history.json", {}, records)
    return find_origin(hf_dash.load_model(str(folder)))


def test_fresh_weights_are_known(folder):
    origin = loaded(folder, record(round_index=1), record(round_index=2))
    assert (origin.base, "fresh weights" in origin.reason) == ("zero", True)


def test_a_checkpoint_on_the_hub_is_known(folder):
    first = dataclasses.replace(record(round_index=1), parent="user/name@0123")
    assert loaded(folder, first, record(round_index=2)).base == "user/name@0123"


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_a_checkpoint_beside_the_model_is_known_by_its_checksum(folder, tiny_timm, where):
    place = (folder.parent if where == "beside" else folder) / "lite0"
    hf_dash.save_model(tiny_timm, place)
    first = dataclasses.replace(
        record(round_index=1),
        parent="lite0",
        parent_sha256=sha256_of(place / "model.safetensors"),
    )
    assert loaded(folder, first).base == str(place)
    other = dataclasses.replace(first, parent_sha256="0" * 64)
    origin = loaded(folder, other)
    assert (origin.base, "'lite0'" in origin.reason) == (None, True)


def test_a_history_that_begins_later_tells_nothing(folder):
    origin = loaded(folder, record(round_index=3))
    assert origin.base is None
    assert "does not go back to its first round" in origin.reason


def test_a_folder_without_a_history_tells_nothing(folder):
    origin = find_origin(hf_dash.load_model(str(folder)))
    assert origin.base is None
    assert str(folder) in origin.reason


def test_a_damaged_history_is_an_error(folder):
    model = hf_dash.load_model(str(folder))
    (folder / "history.json").write_text("{}")
    with pytest.raises(ValueError, match=r"history\.json is not a whole hf_dash history"):
        find_origin(model)


def test_a_model_made_here_is_not_suspected(tiny_timm):
    assert find_origin(tiny_timm) == hf_dash.method.Origin(None)
    assert find_origin(torch.nn.Linear(2, 2)).reason == ""


def test_weights_near_timms_own_checkpoint_are_suspected(tiny_timm, tmp_path, monkeypatch):
    hf_dash.save_model(tiny_timm, tmp_path)
    monkeypatch.setattr("hf_dash.method.origin._cached", lambda repo: tmp_path)
    tiny_timm.timm_model.pretrained_cfg = {"hf_hub_id": "timm/somewhere"}
    near = find_origin(tiny_timm.timm_model)
    assert (near.base, "timm/somewhere" in near.reason) == (None, True)
    with torch.no_grad():
        for parameter in tiny_timm.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    assert find_origin(tiny_timm.timm_model).reason == ""
