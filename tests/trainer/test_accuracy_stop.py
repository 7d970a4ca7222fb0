from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput

import hf_dash


class Readable(nn.Module):
    """A linear classifier of 8 numbers into 4 classes, with the signature the Trainer looks for."""

    config = SimpleNamespace(problem_type=None)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 4)

    def forward(self, pixel_values, labels=None):
        logits = self.head(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def make_rows(count=30):
    """Return separable rows: the class is the place of the largest of the first four numbers."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 8, generator=generator)
    return [{"pixel_values": x, "labels": int(x[:4].argmax())} for x in images]


ROWS = make_rows()


def make_trainer(folder, callbacks=(), model=None, trainer_class=Trainer, rows=ROWS, **options):
    more = {key: options.pop(key) for key in ("compute_loss_func",) if key in options}
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "num_train_epochs": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        },
    )
    return trainer_class(
        model or Readable(),
        args,
        train_dataset=rows,
        eval_dataset=ROWS[:5],
        callbacks=list(callbacks),
        **more,
    )


def logged(trainer, key="train_accuracy"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def train_bound(folder, threshold=0.999, **options):
    trainer = make_trainer(folder, **options)
    stop = hf_dash.TrainAccuracyStop(threshold).bind(trainer)
    trainer.add_callback(stop)
    trainer.train()
    return trainer, stop


def train_unbound(folder, threshold=0.999, callbacks=(), **options):
    stop = hf_dash.TrainAccuracyStop(threshold)
    trainer = make_trainer(folder, [*callbacks, stop], **options)
    trainer.train()
    return trainer, stop


class Diary(Readable):
    """Keeps, for every forward pass in training, how many answers were right."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, pixel_values, labels=None):
        outputs = super().forward(pixel_values, labels)
        if self.training:
            for x, logits in zip(pixel_values.tolist(), outputs.logits.tolist(), strict=True):
                self.seen.append(x[:4].index(max(x[:4])) == logits.index(max(logits)))
        return outputs


BOTH = pytest.mark.parametrize("train", [train_bound, train_unbound])


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
        {"dataloader_num_workers": 1},
    ],
    ids=str,
)
def test_the_accuracy_is_that_of_the_epochs_forward_passes(tmp_path, train, options):
    model = Diary()
    trainer, stop = train(tmp_path, model=model, **options)
    assert len(model.seen) == 90
    expected = [sum(model.seen[begin : begin + 30]) / 30 for begin in (0, 30, 60)]
    assert logged(trainer) == pytest.approx(expected)
    assert stop.train_accuracy == pytest.approx(expected[-1])
    assert not model._forward_hooks


@BOTH
def test_it_stops_at_the_first_epoch_that_reaches_the_threshold(tmp_path, train):
    trainer, stop = train(tmp_path, threshold=0.9, num_train_epochs=100)
    *before, last = logged(trainer)
    assert last >= 0.9 > max(before)
    assert trainer.state.epoch == len(before) + 1 < 100
    assert stop.train_accuracy == last


@BOTH
def test_the_threshold_itself_is_enough(tmp_path, train):
    model = Readable()
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(4, 8))
        model.head.bias.zero_()
    trainer, stop = train(tmp_path, 1.0, model=model, learning_rate=0.0, num_train_epochs=9)
    assert stop.train_accuracy == 1.0
    assert trainer.state.epoch == 1


@BOTH
def test_training_is_bit_identical_to_training_without(tmp_path, train):
    plain = make_trainer(tmp_path, gradient_accumulation_steps=2)
    plain.train()
    trainer, _ = train(tmp_path, gradient_accumulation_steps=2)
    assert torch.equal(plain.model.head.weight, trainer.model.head.weight)
    assert logged(plain, "train_loss") == logged(trainer, "train_loss")


@BOTH
def test_the_gradient_pass_of_dash_does_not_count(tmp_path, train):
    plain, _ = train(tmp_path)
    with pytest.warns(hf_dash.method.NoEffectWarning):
        shrunk, _ = train(tmp_path, callbacks=[hf_dash.DashCallback(lam=1.0)])
    assert logged(plain) == logged(shrunk)


def weighted_loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels)


class TakesLabelsOut(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


WITHOUT_LABELS = [
    {"label_smoothing_factor": 0.1},
    {"compute_loss_func": weighted_loss},
    {"trainer_class": TakesLabelsOut},
]


@pytest.mark.parametrize("options", WITHOUT_LABELS, ids=",".join)
def test_bound_it_sees_labels_that_never_reach_the_model(tmp_path, options):
    model = Diary()
    trainer, _ = train_bound(tmp_path, model=model, **options)
    expected = [sum(model.seen[begin : begin + 30]) / 30 for begin in (0, 30, 60)]
    assert logged(trainer) == pytest.approx(expected)


@pytest.mark.parametrize("options", WITHOUT_LABELS, ids=",".join)
def test_unbound_it_says_that_labels_do_not_reach_the_model(tmp_path, options):
    with pytest.raises(ValueError, match=r"labels.*TrainAccuracyStop\(\)\.bind\(trainer\)"):
        train_unbound(tmp_path, **options)


class NoLogits(Readable):
    def forward(self, pixel_values, labels=None):
        return {"loss": super().forward(pixel_values, labels).loss}


class Tokens(Readable):
    def forward(self, pixel_values, labels=None):
        outputs = super().forward(pixel_values, labels)
        return {"loss": outputs.loss, "logits": outputs.logits.unsqueeze(0)}


@BOTH
@pytest.mark.parametrize(
    ("model", "message"),
    [(NoLogits, r"needs outputs with logits.*\['loss'\]"), (Tokens, r"got \(1, 4, 4\) and \(4,\)")],
)
def test_outputs_that_cannot_be_judged_are_refused(tmp_path, train, model, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, model=model())


class SoftLabels(Readable):
    def forward(self, pixel_values, labels=None):
        logits = self.head(pixel_values)
        loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@BOTH
def test_of_class_probabilities_the_largest_counts(tmp_path, train):
    hard, _ = train(tmp_path, learning_rate=0.0)
    soft_rows = [
        {**row, "labels": [0.7 if i == row["labels"] else 0.1 for i in range(4)]} for row in ROWS
    ]
    soft, _ = train(tmp_path, model=SoftLabels(), rows=soft_rows, learning_rate=0.0)
    assert logged(soft) == logged(hard)


class OwnStep(Trainer):
    """A Trainer whose step uses the parts of the model, and neither loss nor forward."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = nn.functional.cross_entropy(model.head(inputs["pixel_values"]), inputs["labels"])
        loss.backward()
        return loss.detach()


@BOTH
def test_an_epoch_without_a_counted_image_is_refused(tmp_path, train):
    with pytest.raises(ValueError, match="saw no training forward pass"):
        train(tmp_path, trainer_class=OwnStep)


class Tracker(TrainerCallback):
    """What a tracker is given, in the place where the Trainer puts trackers: first."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_bound_it_reaches_the_trackers_beside_the_trainers_own_logs(tmp_path, strategy):
    tracker = Tracker()
    trainer, _ = train_bound(tmp_path, callbacks=[tracker], logging_strategy=strategy)
    found = [
        (entry["train_accuracy"], entry["epoch"])
        for entry in tracker.logs
        if "train_accuracy" in entry
    ]
    assert found == list(zip(logged(trainer), [1, 2, 3], strict=True))
    losses = [entry["loss"] for entry in tracker.logs if "loss" in entry]
    assert len(losses) == (3 if strategy == "epoch" else 0)


def test_unbound_it_is_printed_with_the_trainers_next_log(tmp_path, capsys):
    trainer, _ = train_unbound(tmp_path, logging_strategy="epoch")
    assert capsys.readouterr().out.count("train_accuracy") == 3
    assert len(logged(trainer)) == 3


@BOTH
def test_an_epoch_that_begins_in_its_middle_is_not_judged(tmp_path, train):
    options = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 2}
    whole, _ = train(tmp_path, **options)
    if train is train_bound:
        trainer = make_trainer(tmp_path, **options)
        trainer.add_callback(hf_dash.TrainAccuracyStop().bind(trainer))
    else:
        trainer = make_trainer(tmp_path, [hf_dash.TrainAccuracyStop()], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert logged(trainer) == logged(whole)[1:]


@BOTH
def test_several_trainings_count_each_for_itself(tmp_path, train):
    trainer, stop = train(tmp_path, threshold=0.9, num_train_epochs=100)
    trainer.train()
    assert trainer.state.epoch == 1
    assert stop.train_accuracy >= 0.9
    assert not trainer.model._forward_hooks


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ROWS)


@BOTH
def test_every_pass_over_a_stream_is_an_epoch(tmp_path, train):
    trainer, _ = train(tmp_path, rows=Stream(), max_steps=20, learning_rate=0.0)
    assert len(logged(trainer)) == 3  # 8 batches, 8, and the 4 that max_steps leaves
    assert logged(trainer)[0] == logged(trainer)[1]


@BOTH
def test_a_compiled_model_is_counted(tmp_path, train):
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    plain, _ = train(tmp_path)
    compiled, _ = train(tmp_path, **options)
    torch._dynamo.reset()
    assert logged(compiled) == pytest.approx(logged(plain))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_gradient_checkpointing_counts_no_image_twice(tmp_path, two_rounds, small_model):
    counted = []
    for checkpointing in (False, True):
        state = {name: tensor.clone() for name, tensor in small_model.state_dict().items()}
        stop = hf_dash.TrainAccuracyStop()
        trainer = make_trainer(
            tmp_path,
            [stop],
            model=small_model,
            rows=two_rounds[0].examples,
            num_train_epochs=1,
            per_device_train_batch_size=20,
            gradient_checkpointing=checkpointing,
        )
        trainer.train()
        small_model.load_state_dict(state)
        counted.append(stop.train_accuracy)
    assert counted[0] == counted[1]


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\], got"):
        hf_dash.TrainAccuracyStop(threshold)


@pytest.mark.parametrize("threshold", ["0.9", True, None])
def test_a_threshold_that_is_no_number_is_refused(threshold):
    with pytest.raises(TypeError, match=r"threshold must be a number in \(0, 1\], got"):
        hf_dash.TrainAccuracyStop(threshold)


def test_it_binds_to_one_trainer_once(tmp_path):
    trainer = make_trainer(tmp_path)
    stop = hf_dash.TrainAccuracyStop()
    assert stop.bind(trainer) is stop
    counted = trainer.compute_loss
    assert stop.bind(trainer) is stop
    assert trainer.compute_loss is counted
    with pytest.raises(ValueError, match="trainer must be the one this callback is bound to"):
        stop.bind(make_trainer(tmp_path))
    with pytest.raises(TypeError, match=r"trainer must be a transformers\.Trainer, got Linear"):
        hf_dash.TrainAccuracyStop().bind(nn.Linear(1, 1))
