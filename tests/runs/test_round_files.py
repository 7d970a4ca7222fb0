from dataclasses import replace

import pytest
import torch
from helpers import SHRINK, record

from hf_dash.history import Promotion, write_history
from hf_dash.runs.round_files import (
    check_files,
    check_finite,
    check_replaceable,
    checksums_of,
    recorded_shrink,
    size_of,
)
from hf_dash.utils.files import sha256_of


@pytest.fixture
def folder(tmp_path):
    for name in ("model.safetensors", "config.json", "optimizer.safetensors", "mine.txt"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_what_the_next_round_may_load_has_a_checksum(folder):
    sums = checksums_of(folder)
    assert set(sums) == {"model.safetensors", "config.json", "optimizer.safetensors"}
    assert all(value == sha256_of(folder / name) for name, value in sums.items())


def test_files_are_those_recorded(folder):
    sums = checksums_of(folder)
    own = record(weights_sha256=sums["model.safetensors"], file_sha256=sums)
    check_files(folder, own)
    (folder / "optimizer.safetensors").unlink()
    check_files(folder, own, exported=True)
    with pytest.raises(ValueError, match=r"optimizer\.safetensors is gone"):
        check_files(folder, own)
    (folder / "config.json").write_text("other")
    with pytest.raises(ValueError, match=r"config\.json is not what .* its checksum differs"):
        check_files(folder, own, exported=True)
    # An older record knows its weights alone, or not even them.
    check_files(folder, replace(own, file_sha256=None))
    check_files(folder, replace(own, file_sha256=None, weights_sha256=None))
    with pytest.raises(ValueError, match=r"model\.safetensors is not what"):
        check_files(folder, record(weights_sha256="0" * 64))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_finite_numbers_are_weights(value, dtype):
    state = {"a": torch.ones(3), "steps": torch.tensor(7), "b": torch.ones(2, 2, dtype=dtype)}
    check_finite(state)
    state["b"][1, 1] = value
    with pytest.raises(FloatingPointError, match="weights are not finite, 'b' for one"):
        check_finite(state)


def test_sizes_are_in_bytes():
    assert size_of([torch.zeros(3, 5), torch.zeros(2, dtype=torch.bfloat16)]) == 64


def test_a_local_base_goes_on_record_by_its_name(tmp_path):
    shrink = {**SHRINK, "config": {**SHRINK["config"], "base": str(tmp_path / "checkpoint")}}
    assert recorded_shrink(shrink) == {
        **shrink,
        "config": {**shrink["config"], "base": "checkpoint"},
    }
    shrink["config"]["base"] = "user/name@main"
    assert recorded_shrink(shrink) == shrink


def test_a_folder_is_replaced_only_where_nothing_recorded_is_lost(tmp_path):
    records = [record(round_index=index) for index in (1, 2, 3)]
    check_replaceable(tmp_path / "nowhere", records)
    check_replaceable(tmp_path, records)
    write_history(tmp_path / "history.json", {}, records[:2])
    check_replaceable(tmp_path, records)
    check_replaceable(tmp_path, records[:2])
    for others in ([], records[:1], [records[0], replace(records[1], accuracy=0.6)]):
        with pytest.raises(ValueError, match="holds another history, with round 2 of 'warm'"):
            check_replaceable(tmp_path, others)
    promotion = Promotion("promote", records[0].folder, None, "", "")
    write_history(tmp_path / "history.json", {}, records[:2], [promotion])
    with pytest.raises(ValueError, match="holds another history, with promotions"):
        check_replaceable(tmp_path, records)
    (tmp_path / "history.json").write_text("{")
    with pytest.raises(ValueError, match=r"history\.json is not a whole hf_dash history"):
        check_replaceable(tmp_path, records)
    (tmp_path / "history.json").unlink()
    (tmp_path / "history.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"history\.json"):
        check_replaceable(tmp_path, records)
    (tmp_path / "rounds").mkdir()
    with pytest.raises(ValueError, match="is the folder of a run"):
        check_replaceable(tmp_path, records)
