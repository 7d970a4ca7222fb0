"""Which checkpoint the callback shrinks towards: given, recorded, or none with a warning."""

import copy
import dataclasses
import json
import logging

import pytest
from helpers import Spy, make_trainer, record, same_state

import hf_dash
from hf_dash.history import write_history


@pytest.fixture
def warnings(caplog):
    """What the method's loggers say."""
    logger = logging.getLogger("hf_dash")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def shrunk(tmp_path, round_, model=None, callback=None, **options):
    callback = callback or Spy()
    trainer = make_trainer(tmp_path, round_, [callback], max_steps=1, **options)
    if model is not None:
        trainer.model = trainer.model_wrapped = model
    trainer.train()
    return callback


def loaded(folder, *records, seed=1):
    hf_dash.save_model(
        hf_dash.create_model(
            "test_resnet", label_names=[str(n) for n in range(10)], image_size=32, seed=seed
        ),
        folder,
    )
    if records:
        write_history(folder / "history.json", {}, records)
    return hf_dash.load_model(str(folder))


def test_a_given_state_dict_is_the_base(tmp_path, two_rounds):
    base = loaded(tmp_path / "base").state_dict()
    callback = Spy(base=base)
    trainer = make_trainer(
        tmp_path, two_rounds[0], [callback], max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    assert callback.report.config.base == f"a state dict of {len(base)} tensors"
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    (held,) = [one for name, one in state["stateful_callbacks"].items() if name == "Spy"]
    assert held["args"]["base"] is None
    assert "base" in held["attributes"]["_given"]


def test_the_recorded_checkpoint_is_the_base(tmp_path, two_rounds, warnings):
    loaded(tmp_path / "lite", seed=2)
    first = dataclasses.replace(record(round_index=1), parent="lite")
    model = loaded(tmp_path / "model", first)
    callback = shrunk(tmp_path / "out", two_rounds[0], model)
    assert callback.report.config.base == str(tmp_path / "lite")
    assert f"shrinks towards {tmp_path / 'lite'}" in warnings.text


def test_fresh_first_weights_need_no_base_and_no_warning(tmp_path, two_rounds, warnings):
    model = loaded(tmp_path / "model", record(round_index=1))
    callback = shrunk(tmp_path / "out", two_rounds[0], model)
    assert callback.report.config.base == "zero"
    assert "pretrained" not in warnings.text


def test_an_unknown_origin_warns_with_the_numbers_and_the_way_out(tmp_path, two_rounds, warnings):
    model = loaded(tmp_path / "model")
    model.timm_model.bn1.bias.data.fill_(0.1)  # as if trained
    callback = shrunk(tmp_path / "out", two_rounds[0], model)
    assert callback.report.config.base is None
    for word in ("45 %", "28 %", "base=", "base='zero'", str(tmp_path / "model")):
        assert word in warnings.text


def test_zero_is_an_answer(tmp_path, two_rounds, warnings):
    model = loaded(tmp_path / "model")
    callback = shrunk(tmp_path / "out", two_rounds[0], model, Spy(base="zero"))
    assert callback.report.config.base == "zero"
    assert "pretrained" not in warnings.text


def test_a_base_of_another_architecture_changes_nothing(tmp_path, two_rounds, tiny_timm):
    hf_dash.save_model(tiny_timm, tmp_path / "other")
    callback = Spy(base=str(tmp_path / "other"))
    trainer = make_trainer(tmp_path, two_rounds[0], [callback], max_steps=1)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match="of another architecture"):
        trainer.train()
    assert same_state(before, trainer.model.state_dict())
