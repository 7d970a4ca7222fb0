import json
import logging

import pytest
import torch
from helpers import Spy, heard, make_trainer, same_state, state_of, trained
from transformers import TrainerControl, TrainerState

import hf_dash


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"num_train_epochs": 1}]
)
def test_with_lam_one_training_is_bit_identical(tmp_path, two_rounds, options):
    plain, _ = trained(tmp_path / "plain", two_rounds[0], **options)
    callback = hf_dash.DashCallback(lam=1.0)
    with pytest.warns(hf_dash.method.NoEffectWarning):
        same, _ = trained(tmp_path / "dash", two_rounds[0], [callback], **options)
    assert callback.report.num_batches == 3
    assert same_state(plain, same)


def test_without_arguments_it_shrinks_before_training(tmp_path, two_rounds):
    spy = Spy()
    plain, _ = trained(tmp_path / "plain", two_rounds[0])
    final, _ = trained(tmp_path / "dash", two_rounds[0], [spy])
    assert not same_state(spy.before, spy.after)
    assert not same_state(plain, final)
    assert spy.report.num_images == 48
    shrunk = {tensor.name for tensor in spy.report.tensors}
    changed = {k for k in spy.before if not torch.equal(spy.before[k], spy.after[k])}
    assert changed <= shrunk


def test_it_does_what_dash_shrink_does_with_the_same_batches(tmp_path, two_rounds):
    batches = list(hf_dash.data.gradient_batches(two_rounds[0], hf_dash.DashConfig()))
    spy = Spy(0.5, 0.2, batches=batches, grouping="filter")
    trained(tmp_path, two_rounds[0], [spy])
    model = make_trainer(tmp_path, two_rounds[0]).model
    hf_dash.dash_shrink_(model, batches, alpha=0.5, lam=0.2, grouping="filter")
    assert same_state(state_of(model), spy.after)


def test_the_fill_variant_draws_by_the_seed_of_the_training(tmp_path, two_rounds):
    batches = list(hf_dash.data.gradient_batches(two_rounds[0], hf_dash.DashConfig()))
    spy = Spy(variant="fill", batches=batches)
    trained(tmp_path, two_rounds[0], [spy], seed=5)
    model = make_trainer(tmp_path, two_rounds[0]).model
    hf_dash.dash_shrink_(model, batches, variant="fill", seed=5)
    assert same_state(state_of(model), spy.after)


def test_a_loss_function_is_used(tmp_path, two_rounds):
    calls = []

    def loss_fn(model, batch):
        calls.append(batch["labels"].shape)
        return model(**batch).loss

    trained(tmp_path, two_rounds[0], [hf_dash.DashCallback(loss_fn=loss_fn, num_batches=2)])
    assert calls == [(16,), (16,)]


def test_it_never_shrinks_on_resume(tmp_path, two_rounds):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole, _ = trained(tmp_path, two_rounds[0], [Spy()], **options)
    spy = Spy()
    trainer = make_trainer(tmp_path, two_rounds[0], [spy], **options)
    with heard(logging.WARNING) as messages:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert messages == ["DASH: training resumes at step 2: no shrink"]
    assert spy.report is None
    assert same_state(spy.before, spy.after)
    assert same_state(whole, state_of(trainer.model))


@pytest.mark.parametrize("reset", [True, False])
def test_optimizer_state_is_forgotten_unless_kept(tmp_path, two_rounds, reset):
    kept = []

    class Momentum(Spy):
        def on_train_begin(self, *arguments, optimizer, **kwargs):
            super().on_train_begin(*arguments, optimizer=optimizer, **kwargs)
            kept.append(bool(optimizer.state))

    trainer = make_trainer(tmp_path, two_rounds[0], [Momentum(reset_optimizer=reset)])
    trainer.train()
    trainer.train()  # the same optimizer, full of the first training's state
    assert kept == [False, not reset]


def test_the_report_is_logged_and_written(tmp_path, two_rounds):
    callback = hf_dash.DashCallback()
    _, trainer = trained(tmp_path, two_rounds[0], [callback])
    history = trainer.state.log_history
    assert history[0].items() >= callback.report.summary().items()
    assert history[0]["dash/num_images"] == 48
    # The entry is the Trainer's own, of its first log.
    assert (history[0]["step"], "loss" in history[0]) == (2, True)
    written = json.loads((tmp_path / "dash_report.json").read_text())
    assert written == callback.report.to_dict()


def test_the_first_log_of_the_trainer_shows_the_summary_once(tmp_path, two_rounds, capsys):
    trained(tmp_path, two_rounds[0], [hf_dash.DashCallback()])
    lines = [line for line in capsys.readouterr().out.splitlines() if "dash/mean_factor" in line]
    assert len(lines) == 1
    assert "'loss'" in lines[0]


def test_a_summary_line_is_logged_at_info(tmp_path, two_rounds):
    with heard() as messages:
        trained(tmp_path, two_rounds[0], [hf_dash.DashCallback()])
    assert any(message.startswith("DASH shrank") for message in messages)


def test_a_failure_comes_before_anything_changes(tmp_path, two_rounds):
    def broken(model, batch):
        return model(**batch).loss * float("nan")

    trainer = make_trainer(tmp_path, two_rounds[0], [hf_dash.DashCallback(loss_fn=broken)])
    before = state_of(trainer.model)
    with pytest.raises(FloatingPointError, match="the loss of minibatch 0"):
        trainer.train()
    assert same_state(before, state_of(trainer.model))
    assert not (tmp_path / "dash_report.json").exists()


@pytest.mark.parametrize(("option", "value"), [("alpha", 0), ("lam", 2), ("num_batches", 0)])
def test_bad_settings_are_refused_when_the_callback_is_made(option, value):
    with pytest.raises(ValueError, match=option):
        hf_dash.DashCallback(**{option: value})


def test_settings_are_given_one_by_one_or_at_once():
    config = hf_dash.DashConfig(alpha=0.5, lam=0.1)
    assert hf_dash.DashCallback(0.5, 0.1).config == config
    assert hf_dash.DashCallback(config=config).config == config
    filtered = hf_dash.DashCallback(config=config, grouping="filter").config
    assert filtered == hf_dash.DashConfig(0.5, 0.1, grouping="filter")
    with pytest.raises(ValueError, match=r"one of config and \{'alpha': 0.2\}"):
        hf_dash.DashCallback(0.2, config=config)
    with pytest.raises(TypeError, match=r"DashCallback\(\) got unknown settings \['gama'\]"):
        hf_dash.DashCallback(gama=0.2)


def test_logging_before_any_shrink_adds_nothing():
    logs = {"loss": 1.0}
    callback = hf_dash.DashCallback()
    callback.on_log(None, TrainerState(), TrainerControl(), logs=logs)
    assert logs == {"loss": 1.0}
