import numpy as np
import pytest
import torch

from hf_dash.training import ClassAccuracy, evaluate_model, predict


def test_accuracy_overall_and_per_class_by_hand():
    metric = ClassAccuracy(keep_in_memory=True)
    result = metric.compute(predictions=[0, 0, 1, 2, 2], references=[0, 1, 1, 2, 0])
    assert result["accuracy"] == pytest.approx(3 / 5)
    assert result["per_class_accuracy"] == pytest.approx({0: 0.5, 1: 0.5, 2: 1.0})


def test_batches_may_be_added_one_by_one():
    metric = ClassAccuracy(keep_in_memory=True)
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute()["accuracy"] == pytest.approx(2 / 3)


def test_a_model_is_evaluated_in_evaluation_mode_and_left_in_its_own(
    two_rounds, small_model, accelerator
):
    small_model.train()
    examples = two_rounds[0].new
    result = evaluate_model(small_model, examples, accelerator, batch_size=7)
    assert small_model.training
    small_model.eval()
    right = [
        small_model(examples[i]["pixel_values"][None]).logits.argmax().item()
        == examples[i]["labels"]
        for i in range(len(examples))
    ]
    assert result["accuracy"] == pytest.approx(sum(right) / 60)
    assert result["num_examples"] == 60
    labels = torch.tensor([examples[i]["labels"] for i in range(60)])
    weighted = sum(a * (labels == c).sum().item() for c, a in result["per_class_accuracy"].items())
    assert weighted / 60 == pytest.approx(result["accuracy"])


def test_no_examples_are_refused(small_model, accelerator):
    with pytest.raises(ValueError, match="examples must hold at least one held-out example"):
        evaluate_model(small_model, [], accelerator)


def test_an_unknown_class_counts_as_wrong_and_has_no_entry():
    metric = ClassAccuracy(keep_in_memory=True)
    result = metric.compute(predictions=[0, 1, 1, 0], references=[0, 1, -1, -1])
    assert result["accuracy"] == pytest.approx(2 / 4)
    assert result["per_class_accuracy"] == {0: 1.0, 1: 1.0}
    # Not even a prediction of −1 is right about it.
    assert metric.compute(predictions=[-1], references=[-1]) == {
        "accuracy": 0.0,
        "per_class_accuracy": {},
    }


def test_predictions_come_in_the_order_of_the_examples(two_rounds, small_model, accelerator):
    examples = [two_rounds[0].new[i] for i in range(20)]
    examples[3] = {**examples[3], "labels": -1}
    small_model.eval()
    alone = [small_model(e["pixel_values"][None]).logits.argmax().item() for e in examples]
    small_model.train()
    predictions, references = predict(small_model, examples, accelerator, batch_size=6)
    assert small_model.training
    assert predictions.dtype == references.dtype == np.int64
    assert predictions.tolist() == alone
    assert references.tolist() == [example["labels"] for example in examples]
    result = evaluate_model(small_model, examples, accelerator)
    right = sum(p == e["labels"] for p, e in zip(alone, examples, strict=True))
    assert result["accuracy"] == pytest.approx(right / 20)
    assert result["num_examples"] == 20
    assert -1 not in result["per_class_accuracy"]
