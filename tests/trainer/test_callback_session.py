"""DashCallback over a session: several trainings, resumes, bound to its Trainer, by hand."""

import json
import os

import pytest
import torch
from helpers import DeepSpeedEngine, Spy, heard, make_trainer, same_state, state_of, trained
from torch.utils.data import IterableDataset, WeightedRandomSampler, default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

import hf_dash
from hf_dash.method.dash import dash_shrink_

# Two steps each.
EPOCHS = {
    "max_steps": -1,
    "num_train_epochs": 4,
    "logging_steps": 4,
    "per_device_train_batch_size": 32,
}


class Recorder(TrainerCallback):
    """A tracker: what it was given at which step."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, dict(logs)))


def make_args(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            **options,
        },
    )


def shrunk_by(model, batches, loss_fn):
    dash_shrink_(model, batches, loss_fn)
    return state_of(model)


def own_trainer(tmp_path, round_, spy, **options):
    """Return a Trainer with the callback bound to it, and batches the callback will read."""
    spy.batches = list(
        hf_dash.data.gradient_batches(round_, hf_dash.DashConfig(gradient_batch_size=16))
    )
    spy.batches = [batch for batch in spy.batches if len(batch["labels"]) == 16]
    trainer = make_trainer(tmp_path, round_, [spy], **options)
    spy.bind(trainer)
    return trainer


def test_label_smoothing_is_honoured_once_bound(tmp_path, two_rounds):
    spy = Spy()
    trainer = own_trainer(tmp_path, two_rounds[0], spy, label_smoothing_factor=0.4)
    trainer.train()

    def smoothed(model, batch):
        logits = model(pixel_values=batch["pixel_values"]).logits
        return torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.4)

    model = make_trainer(tmp_path, two_rounds[0]).model
    expected = shrunk_by(model, spy.batches, smoothed)
    for name, weight in spy.after.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)
    plain = make_trainer(tmp_path, two_rounds[0]).model
    assert not same_state(shrunk_by(plain, spy.batches, None), spy.after)


def test_unbound_the_user_is_told_that_the_loss_is_not_smoothed(tmp_path, two_rounds):
    with heard() as messages:
        trained(tmp_path, two_rounds[0], [Spy()], label_smoothing_factor=0.4, max_steps=1)
    assert sum("bind(trainer)" in message for message in messages) == 1


def test_compute_loss_func_and_a_subclass_are_honoured(tmp_path, two_rounds):
    asked = []

    def squares(outputs, labels, num_items_in_batch=None):
        asked.append(int(num_items_in_batch))
        return outputs.logits.square().sum() / num_items_in_batch

    class Squares(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = outputs.logits.square().sum() / len(inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    found = []
    for kind, given in [(Trainer, {"compute_loss_func": squares}), (Squares, {})]:
        spy = Spy()
        plain = own_trainer(tmp_path, two_rounds[0], spy, max_steps=1)
        trainer = kind(plain.model, plain.args, train_dataset=plain.train_dataset, **given)
        trainer.add_callback(spy.bind(trainer))
        trainer.train()
        found.append(spy.after)
    assert set(asked[:3]) == {16}
    assert same_state(*found)

    def by_hand(model, batch):
        return model(pixel_values=batch["pixel_values"]).logits.square().sum(1).mean()

    expected = shrunk_by(make_trainer(tmp_path, two_rounds[0]).model, spy.batches, by_hand)
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


def test_bound_without_a_loss_of_its_own_it_does_the_same_as_unbound(tmp_path, two_rounds):
    unbound, bound = Spy(), Spy()
    trained(tmp_path, two_rounds[0], [unbound], max_steps=1)
    trainer = make_trainer(tmp_path, two_rounds[0], [], max_steps=1)
    trainer.add_callback(bound)
    assert bound.bind(trainer) is bound
    trainer.train()
    assert same_state(unbound.after, bound.after)


def test_a_loss_function_wins_over_the_trainers(tmp_path, two_rounds):
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return model(**batch).loss

    trainer = make_trainer(tmp_path, two_rounds[0], max_steps=1)
    callback = hf_dash.DashCallback(trainer=trainer, loss_fn=loss_fn, num_batches=2)
    trainer.add_callback(callback)
    trainer.train()
    assert len(calls) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
        {"include_num_input_tokens_seen": "all", "bf16": True},
    ],
)
def test_bound_and_with_lam_one_the_trainer_notices_nothing(tmp_path, two_rounds, options):
    class States(TrainerCallback):
        def __init__(self, trainer):
            self.trainer = trainer

        def on_train_begin(self, args, state, control, **kwargs):
            gradients, own = self.trainer.accelerator.gradient_state, self.trainer
            self.seen = (
                state.num_input_tokens_seen,
                gradients.sync_gradients,
                gradients.in_dataloader,
                len(gradients.dataloader_references),
                float(own._tr_loss),
                own._total_loss_scalar,
                torch.random.get_rng_state().tolist(),
            )

    plain, _ = trained(tmp_path, two_rounds[0], **options)
    trainer = make_trainer(tmp_path, two_rounds[0], **options)
    before, after = States(trainer), States(trainer)
    for callback in (before, hf_dash.DashCallback(lam=1.0, trainer=trainer), after):
        trainer.add_callback(callback)
    with pytest.warns(hf_dash.method.NoEffectWarning):
        trainer.train()
    assert before.seen == after.seen
    assert same_state(plain, state_of(trainer.model))


def test_only_the_trainer_that_trains_may_be_bound(tmp_path, two_rounds):
    with pytest.raises(TypeError, match="trainer must be a transformers Trainer, got str"):
        hf_dash.DashCallback(trainer="trainer")
    callback = hf_dash.DashCallback(trainer=make_trainer(tmp_path, two_rounds[0]))
    other = make_trainer(tmp_path, two_rounds[0], [callback])
    before = state_of(other.model)
    with pytest.raises(ValueError, match="bound to another Trainer"):
        other.train()
    assert same_state(before, state_of(other.model))


def test_a_gradient_dataset_is_read_instead(tmp_path, two_rounds):
    examples = two_rounds[1].examples
    spy = Spy(gradient_dataset=examples, num_batches=2)
    trained(tmp_path, two_rounds[0], [spy], max_steps=1)
    rows = [examples[i] for i in range(len(examples) - 32, len(examples))]
    batches = [
        {
            "pixel_values": torch.stack([row["pixel_values"] for row in part]),
            "labels": torch.tensor([int(row["labels"]) for row in part]),
        }
        for part in (rows[:16], rows[16:])
    ]
    expected = shrunk_by(make_trainer(tmp_path, two_rounds[0]).model, batches, None)
    assert same_state(expected, spy.after)


class Stream(IterableDataset):
    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return (self.examples[index] for index in range(len(self.examples)))


def test_a_gradient_stream_serves_a_training_stream(tmp_path, two_rounds):
    callback = hf_dash.DashCallback(gradient_dataset=Stream(two_rounds[1].examples), num_batches=3)
    round_ = type("Streamed", (), {"examples": Stream(two_rounds[0].examples)})
    trained(tmp_path, round_, [callback], max_steps=2)
    assert callback.report.num_images == 48


def test_one_source_of_batches_is_enough(two_rounds):
    with pytest.raises(ValueError, match="one of batches and gradient_dataset"):
        hf_dash.DashCallback(batches=[], gradient_dataset=two_rounds[0].examples)


@pytest.mark.parametrize(("every", "steps"), [(1, [2, 4, 6]), (2, [4]), (4, [])])
def test_it_shrinks_at_the_beginning_of_epochs(tmp_path, two_rounds, every, steps):
    callback = hf_dash.DashCallback(when="epoch", every_n_epochs=every)
    _, trainer = trained(tmp_path, two_rounds[0], [callback], **EPOCHS)
    assert callback.shrunk_at == steps
    assert trainer.state.global_step == 8


def test_by_epochs_and_with_lam_one_training_is_bit_identical(tmp_path, two_rounds):
    plain, _ = trained(tmp_path, two_rounds[0], **EPOCHS)
    callback = hf_dash.DashCallback(lam=1.0, when="epoch", reset_optimizer=False)
    with pytest.warns(hf_dash.method.NoEffectWarning):
        same, _ = trained(tmp_path, two_rounds[0], [callback], **EPOCHS)
    assert len(callback.shrunk_at) == 3
    assert same_state(plain, same)


@pytest.mark.parametrize("step", [3, 4])
def test_a_resumed_run_shrinks_at_the_epochs_the_whole_run_did(tmp_path, two_rounds, step):
    options = {**EPOCHS, "save_strategy": "steps", "save_steps": 1}
    make = lambda: hf_dash.DashCallback(when="epoch", every_n_epochs=2)  # noqa: E731
    whole, _ = trained(tmp_path, two_rounds[0], [make()], **options)
    callback = make()
    trainer = make_trainer(tmp_path, two_rounds[0], [callback], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    # The checkpoint at step 4 was saved before the shrink that opens the next epoch.
    assert callback.shrunk_at == [4]
    assert same_state(whole, state_of(trainer.model))


def test_a_stream_has_no_epochs_to_count(tmp_path, two_rounds):
    round_ = type("Streamed", (), {"examples": Stream(two_rounds[0].examples)})
    trainer = make_trainer(tmp_path, round_, [hf_dash.DashCallback(when="epoch")])
    with pytest.raises(ValueError, match="needs training data with a length"):
        trainer.train()


@pytest.mark.parametrize("bound", [True, False])
def test_by_hand_it_shrinks_only_when_asked(tmp_path, two_rounds, bound):
    callback = hf_dash.DashCallback(when="manual")

    class AtStepTwo(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                callback.shrink_()

    trainer = make_trainer(tmp_path, two_rounds[0], [callback, AtStepTwo()])
    if bound:
        callback.bind(trainer)
    trainer.train()
    assert callback.shrunk_at == [2]
    assert callback.report.num_images == 48


def test_by_hand_outside_of_training(tmp_path, two_rounds):
    trainer = make_trainer(tmp_path, two_rounds[0])
    callback = hf_dash.DashCallback(when="manual")
    with pytest.raises(ValueError, match="shrink_ needs model and batches"):
        callback.shrink_()
    before = state_of(trainer.model)
    rng = torch.random.get_rng_state()
    report = callback.bind(trainer).shrink_()
    assert report is callback.report
    assert torch.equal(rng, torch.random.get_rng_state())
    assert not same_state(before, state_of(trainer.model))
    batches = list(hf_dash.data.gradient_batches(two_rounds[0], hf_dash.DashConfig()))
    alone = hf_dash.DashCallback().shrink_(trainer.model, batches)
    assert alone.num_images == 60


def test_every_training_is_a_round(tmp_path, two_rounds):
    spy = Spy()
    trainer = make_trainer(tmp_path, two_rounds[0], [spy])
    trainer.train()
    first = spy.report
    trainer.train_dataset = two_rounds[1].examples
    trainer.train()
    assert spy.report is not first
    assert spy.shrunk_at == [0]
    assert not same_state(spy.before, spy.after)
    assert not torch.equal(torch.tensor(first.mean_factor), torch.tensor(spy.report.mean_factor))


class Crash(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise KeyboardInterrupt


def test_a_crash_before_the_first_checkpoint_shrinks_once_all_the_same(tmp_path, two_rounds):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole, _ = trained(tmp_path / "whole", two_rounds[0], [Spy()], **options)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "again", two_rounds[0], [Spy(), Crash()], **options)
    trainer = make_trainer(tmp_path / "again", two_rounds[0], [Spy()], **options)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer.train(resume_from_checkpoint=True)
    spy = Spy()
    again, _ = trained(tmp_path / "again", two_rounds[0], [spy], **options)
    assert spy.shrunk_at == [0]
    assert same_state(whole, again)


def test_training_that_starts_over_with_smaller_batches_shrinks_once(tmp_path, two_rounds):
    class OutOfMemory(TrainerCallback):
        failed = False

        def on_step_begin(self, args, state, control, **kwargs):
            if not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory.")

    spies = []

    class Counting(hf_dash.DashCallback):
        def _shrink(self, *arguments, **kwargs):
            spies.append(1)
            return super()._shrink(*arguments, **kwargs)

    memory = OutOfMemory()
    trained(tmp_path, two_rounds[0], [Counting(), memory], auto_find_batch_size=True)
    assert memory.failed
    assert len(spies) == 1


def test_a_checkpoint_keeps_when_weights_were_shrunk(tmp_path, two_rounds):
    options = {"save_strategy": "steps", "save_steps": 2}
    callback = hf_dash.DashCallback(0.5, reset_optimizer=False)
    assert isinstance(callback, ExportableState)
    trained(tmp_path, two_rounds[0], [callback], **options)
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    kept = saved["stateful_callbacks"]["DashCallback"]
    assert kept["attributes"]["shrunk_at"] == [0]
    restored = hf_dash.DashCallback.from_state(kept)
    assert restored.config == callback.config
    assert restored.reset_optimizer is False
    resumed = hf_dash.DashCallback(0.5)
    trainer = make_trainer(tmp_path, two_rounds[0], [resumed], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.shrunk_at == [0]
    assert resumed.report is None


def test_what_a_checkpoint_cannot_hold_is_missed_before_a_shrink(tmp_path, two_rounds):
    options = {
        **EPOCHS,
        "save_strategy": "steps",
        "save_steps": 3,
        "restore_callback_states_from_checkpoint": True,
    }
    batches = list(hf_dash.data.gradient_batches(two_rounds[0], hf_dash.DashConfig()))
    make = lambda: hf_dash.DashCallback(when="epoch", every_n_epochs=2, batches=batches)  # noqa: E731
    trained(tmp_path, two_rounds[0], [make()], **options)
    trainer = make_trainer(tmp_path, two_rounds[0], [make()], **options)
    with pytest.raises(ValueError, match=r"cannot hold \['batches'\]"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_it_may_join_a_run_that_began_without_it(tmp_path, two_rounds):
    options = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, two_rounds[0], **options)
    callback = hf_dash.DashCallback()
    trainer = make_trainer(tmp_path, two_rounds[0], [callback], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.shrunk_at == []


def test_two_callbacks_are_refused(tmp_path, two_rounds):
    two = [hf_dash.DashCallback(), Spy()]
    with pytest.raises(ValueError, match=r"one DashCallback, got 2.*remove_callback"):
        make_trainer(tmp_path, two_rounds[0], two)
    trainer = make_trainer(tmp_path, two_rounds[0], two[:1])
    before = state_of(trainer.model)
    trainer.add_callback(two[1])
    with pytest.raises(ValueError, match="one DashCallback, got 2"):
        trainer.train()
    assert same_state(before, state_of(trainer.model))


def test_bound_its_numbers_reach_every_tracker_with_the_first_log(tmp_path, two_rounds):
    class ReadsTheLoss(TrainerCallback):
        """A user's own, which knows the Trainer's logs alone."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            assert "loss" in logs or "train_loss" in logs

    tracker = Recorder()
    trainer = make_trainer(tmp_path, two_rounds[0], [tracker, ReadsTheLoss()])
    callback = hf_dash.DashCallback(trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    step, logged = tracker.logged[0]
    assert step == 2
    assert logged.items() >= callback.report.summary().items()
    assert {"loss", "dash/mean_factor/layer1", "dash/share_at_lam/fc"} <= logged.keys()
    assert not any("dash/mean_factor" in logs for _, logs in tracker.logged[1:])
    assert sum("dash/mean_factor" in entry for entry in trainer.state.log_history) == 1
    assert "loss" in trainer.state.log_history[0]


class Ema(TrainerCallback):
    """Keeps a copy of the weights that training begins from."""

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        self.copy = state_of(model)


def test_bound_it_comes_before_others_that_copy_weights(tmp_path, two_rounds):
    ema, spy = Ema(), Spy()
    trainer = make_trainer(tmp_path, two_rounds[0], [ema], max_steps=1)
    trainer.add_callback(spy.bind(trainer))
    for _ in range(2):
        trainer.train()
        assert same_state(ema.copy, spy.after)
        assert not same_state(spy.before, spy.after)
    trainer.remove_callback(Spy)
    trainer.train()


def test_what_the_trainer_does_to_its_inputs_the_shrink_sees(tmp_path, two_rounds):
    class Scaled(Trainer):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            return {**inputs, "pixel_values": inputs["pixel_values"] / 255}

    spy = Spy()
    plain = own_trainer(tmp_path, two_rounds[0], spy, max_steps=1)
    trainer = Scaled(plain.model, plain.args, train_dataset=plain.train_dataset)
    trainer.add_callback(spy.bind(trainer))
    trainer.train()
    scaled = [{**b, "pixel_values": b["pixel_values"] / 255} for b in spy.batches]
    expected = shrunk_by(make_trainer(tmp_path, two_rounds[0]).model, scaled, None)
    assert same_state(expected, spy.after)


def test_an_overridden_training_step_is_named_once(tmp_path, two_rounds):
    class Mixup(Trainer):
        def training_step(self, *arguments, **options):
            return super().training_step(*arguments, **options)

    plain = make_trainer(tmp_path, two_rounds[0], max_steps=1)
    trainer = Mixup(plain.model, plain.args, train_dataset=plain.train_dataset)
    trainer.add_callback(hf_dash.DashCallback().bind(trainer))
    with heard() as messages:
        trainer.train()
        trainer.train()
    assert sum("Mixup overrides training_step" in message for message in messages) == 1


class Weighted(Trainer):
    """Draws from the first ten rows alone."""

    def _get_train_sampler(self, *arguments):
        weights = [1.0] * 10 + [0.0] * (len(self.train_dataset) - 10)
        return WeightedRandomSampler(weights, 32)


@pytest.mark.parametrize("bound", [True, False])
def test_the_trainers_own_sampler_is_honored(tmp_path, two_rounds, bound):
    read = []

    class Reading(torch.utils.data.Dataset):
        def __len__(self):
            return len(two_rounds[0].examples)

        def __getitem__(self, index):
            read.append(index)
            return two_rounds[0].examples[index]

    plain = make_trainer(tmp_path, two_rounds[0], max_steps=1)
    trainer = Weighted(plain.model, plain.args, train_dataset=Reading(), callbacks=[Stop()])
    callback = hf_dash.DashCallback(trainer=trainer if bound else None)
    trainer.add_callback(callback)
    with pytest.raises(InterruptedError):
        trainer.train()
    assert callback.report.num_images == len(read) == 32
    assert set(read) <= set(range(10))


@pytest.mark.parametrize("bound", [True, False])
def test_the_trainers_workers_decode(tmp_path, two_rounds, bound):
    class ByWorker(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            (tmp_path / f"{index} by {os.getpid()}").touch()
            return two_rounds[0].examples[index]

    plain = make_trainer(tmp_path, two_rounds[0], max_steps=1, dataloader_num_workers=2)
    trainer = Trainer(plain.model, plain.args, train_dataset=ByWorker(), callbacks=[Stop()])
    trainer.add_callback(hf_dash.DashCallback(trainer=trainer if bound else None))
    with pytest.raises(InterruptedError):
        trainer.train()
    read = [path.name.split(" by ") for path in tmp_path.glob("* by *")]
    assert sorted(int(index) for index, _ in read) == list(range(32))
    workers = {process for _, process in read}
    assert len(workers) == 2
    assert str(os.getpid()) not in workers


def test_labels_of_another_name_and_form_are_the_trainers_affair(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            images, targets, _ = inputs
            return torch.nn.functional.cross_entropy(model(images), targets["class"])

    rows = [(torch.randn(12), {"class": i % 3}, i) for i in range(24)]
    args = make_args(tmp_path, max_steps=1, per_device_train_batch_size=8)
    model = torch.nn.Linear(12, 3)
    trainer = Own(model, args, train_dataset=rows, data_collator=default_collate)
    spy = Spy(trainer=trainer)
    trainer.add_callback(spy)
    trainer.train()
    assert spy.report.num_images == 24
    assert not same_state(spy.before, spy.after)


def test_memory_that_ends_in_the_pass_makes_its_batches_smaller(tmp_path, two_rounds):
    sizes = []

    class Small(Trainer):
        def compute_loss(self, model, inputs, *arguments, **options):
            if len(inputs["labels"]) > 8:
                raise RuntimeError("CUDA out of memory.")
            if not model.training:
                sizes.append(len(inputs["labels"]))
            return super().compute_loss(model, inputs, *arguments, **options)

    plain = make_trainer(tmp_path, two_rounds[0], auto_find_batch_size=True, max_steps=1)
    trainer = Small(plain.model, plain.args, train_dataset=plain.train_dataset)
    callback = hf_dash.DashCallback().bind(trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.global_step == 1
    assert set(sizes) == {trainer.state.train_batch_size}
    assert callback.shrunk_at == [0]


def test_after_ctrl_c_the_next_training_shrinks(tmp_path, two_rounds):
    spy = Spy()
    trainer = make_trainer(tmp_path, two_rounds[0], [spy, Crash()], auto_find_batch_size=True)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Crash)
    first = spy.report
    trainer.train()
    assert spy.report is not first
    assert not same_state(spy.before, spy.after)


def test_the_card_of_a_pushed_model_says_dash(tmp_path, two_rounds):
    _, trainer = trained(tmp_path, two_rounds[0], [hf_dash.DashCallback()], max_steps=1)
    assert {"hf_dash", "dash"} <= set(trainer.model.model_tags)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"when": "never"}, ValueError),
        ({"every_n_epochs": 0}, ValueError),
        ({"every_n_epochs": 1.5}, TypeError),
    ],
)
def test_a_schedule_that_says_nothing_is_refused(options, error):
    with pytest.raises(error, match=next(iter(options))):
        hf_dash.DashCallback(**options)


class Engined(Trainer):
    """A Trainer that ends its preparation as it does under DeepSpeed."""

    def _prepare_for_training(self, *arguments):
        prepared = super()._prepare_for_training(*arguments)
        self.args.deepspeed_plugin, self.model_wrapped = object(), DeepSpeedEngine(self.model)
        return prepared


class Stop(TrainerCallback):
    """Ends the training before its first step."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        raise InterruptedError


def engined_trainer(tmp_path, round_, spy):
    plain = make_trainer(tmp_path, round_)
    return Engined(
        plain.model, plain.args, train_dataset=plain.train_dataset, callbacks=[spy, Stop()]
    )


def test_under_deepspeed_a_bound_callback_tells_the_engine(tmp_path, two_rounds):
    spy, plain = Spy(), Spy()
    trainer = engined_trainer(tmp_path, two_rounds[0], spy)
    spy.bind(trainer)
    with pytest.raises(InterruptedError):
        trainer.train()
    assert not same_state(spy.before, spy.after)
    for copied, weight in zip(
        trainer.model_wrapped.copies, trainer.model.parameters(), strict=True
    ):
        assert torch.equal(copied, weight)
    trained(tmp_path, two_rounds[0], [plain], max_steps=1)
    assert same_state(plain.after, spy.after)


def test_under_deepspeed_an_unbound_callback_is_refused(tmp_path, two_rounds):
    trainer = engined_trainer(tmp_path, two_rounds[0], hf_dash.DashCallback())
    before = state_of(trainer.model)
    with pytest.raises(NotImplementedError, match=r"under DeepSpeed unless .*bind\(trainer\)"):
        trainer.train()
    assert same_state(before, state_of(trainer.model))
