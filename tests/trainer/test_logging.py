import json

import pytest
import torch
from transformers import TrainerState

from hf_dash.method.config import DashConfig
from hf_dash.method.shrink import HISTOGRAM_BINS, ShrinkReport, TensorReport
from hf_dash.trainer.logging import (
    DeferredLog,
    block_summary,
    draw_histograms,
    report_blocks,
    tag_model,
    write_report,
)


def tensor(name, count=10, mean=0.5, share=0.5, bins=(6,)):
    histogram = [0] * HISTOGRAM_BINS
    for bin_ in bins:
        histogram[bin_] += count // len(bins)
    return TensorReport(name, count, mean, 0.3, 0.9, share, tuple(histogram))


def report_of(*tensors):
    return ShrinkReport(tensors, (), DashConfig(), 20, 320, 1.5)


@pytest.mark.parametrize(
    ("prefix", "names", "blocks"),
    [
        (
            "timm_model",
            ["timm_model.conv1.weight", "timm_model.layer1.0.conv2.weight", "timm_model.fc.bias"],
            ["conv1", "layer1", "fc"],
        ),
        (
            "vit",
            [
                "vit.embeddings.patch_embeddings.projection.weight",
                "vit.encoder.layer.0.attention.query.weight",
                "vit.encoder.layer.11.output.dense.weight",
                "classifier.weight",
            ],
            ["embeddings", "encoder.layer.0", "encoder.layer.11", "classifier"],
        ),
        (
            "timm_model",
            ["base_model.model.timm_model.blocks.3.attn.qkv.lora_A.default.weight"],
            ["blocks.3"],
        ),
        ("", ["weight"], ["weight"]),
    ],
)
def test_blocks_are_named_by_the_first_numbered_part(prefix, names, blocks):
    model = torch.nn.Identity()
    model.base_model_prefix = prefix
    assert list(report_blocks(report_of(*map(tensor, names)), model)) == blocks


def test_blocks_weigh_tensors_by_their_vectors():
    report = report_of(
        tensor("layer1.0.weight", 30, 0.4, 0.2), tensor("layer1.1.weight", 10, 0.8, 0.6)
    )
    assert block_summary(report) == pytest.approx(
        {"dash/mean_factor/layer1": 0.5, "dash/share_at_lam/layer1": 0.3}
    )


class Writer:
    def __init__(self):
        self.drawn = {}

    def add_histogram_raw(self, tag, **numbers):
        self.drawn[tag] = numbers


class Tracker:
    tb_writer = None


class TrainerDouble:
    def __init__(self):
        self.state = TrainerState(global_step=7)
        silent, drawing = Tracker(), Tracker()
        drawing.tb_writer = Writer()
        self.callback_handler = type("Handler", (), {"callbacks": [object(), silent, drawing]})
        self.writer = drawing.tb_writer


def test_numbers_wait_for_a_log_and_join_its_entry_of_the_history():
    deferred, state, logs = DeferredLog(), TrainerState(), {"loss": 1.0}
    deferred.log_later({"dash/seconds": 2.0})
    state.log_history.append({**logs, "step": 3})
    for _ in range(2):
        deferred.on_log(None, state, None, logs=logs)
    assert logs == {"loss": 1.0, "dash/seconds": 2.0}
    assert state.log_history == [{"loss": 1.0, "step": 3, "dash/seconds": 2.0}]


def test_histograms_go_to_tensorboard():
    report = report_of(tensor("conv.weight", 10, bins=(6, 19)), tensor("fc.weight", 4))
    trainer = TrainerDouble()
    draw_histograms(trainer, report, torch.nn.Identity())
    assert list(trainer.writer.drawn) == ["dash/factors", "dash/factors/conv", "dash/factors/fc"]
    drawn = trainer.writer.drawn["dash/factors"]
    assert (drawn["num"], drawn["global_step"]) == (14, 7)
    assert drawn["bucket_counts"][6] == 9
    assert drawn["bucket_counts"][19] == 5
    assert drawn["bucket_limits"][-1] == 1.0
    assert drawn["sum"] == pytest.approx(7.0)


def test_only_the_main_process_writes_the_file(tmp_path, monkeypatch):
    report = report_of(tensor("conv.weight"))
    args = type("Args", (), {"output_dir": str(tmp_path / "new")})
    write_report(report, args.output_dir, TrainerState(is_world_process_zero=False))
    with monkeypatch.context() as second:  # a process that the Trainer takes for the first
        second.setattr("hf_dash.trainer.logging.is_main_process", lambda: False)
        write_report(report, args.output_dir, TrainerState())
    assert not (tmp_path / "new").exists()
    write_report(report, args.output_dir, TrainerState())
    assert json.loads((tmp_path / "new" / "dash_report.json").read_text()) == report.to_dict()


def test_a_model_is_tagged_where_it_can_be(small_model):
    tag_model(torch.nn.Identity())
    tag_model(small_model)
    tag_model(small_model)
    assert small_model.model_tags == ["timm", "hf_dash", "dash"]
