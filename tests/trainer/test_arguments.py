import shutil

import pytest
from datasets import Image
from helpers import tiny_processor, tiny_vit
from transformers import HfArgumentParser, TrainingArguments

import hf_dash
from hf_dash.trainer import DataTrainingArguments, ModelArguments, StartArguments

# The fields of transformers' run_image_classification.py that mean the same here.
SCRIPT_FLAGS = {
    "--dataset_name",
    "--dataset_config_name",
    "--train_dir",
    "--validation_dir",
    "--train_val_split",
    "--max_train_samples",
    "--max_eval_samples",
    "--image_column_name",
    "--label_column_name",
    "--model_name_or_path",
    "--cache_dir",
    "--model_revision",
    "--image_processor_name",
    "--ignore_mismatched_sizes",
    "--token",
    "--trust_remote_code",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, digits):
    """Digits of two classes as folders of images: 12 to train on, 8 held out."""
    root = tmp_path_factory.mktemp("images")
    rows = [i for i, label in enumerate(digits["label"]) if label in (3, 7)][:20]
    for number, row in enumerate(rows):
        example = digits[row]
        folder = root / ("train" if number < 12 else "held_out") / str(example["label"])
        folder.mkdir(parents=True, exist_ok=True)
        example["image"].save(folder / f"{number}.png")
    return root


def test_the_flags_are_those_of_transformers_script():
    parser = HfArgumentParser(
        (ModelArguments, DataTrainingArguments, hf_dash.DashConfig, TrainingArguments)
    )
    known = {option for action in parser._actions for option in action.option_strings}
    assert known >= SCRIPT_FLAGS


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_are_train_and_held_out_images(folders, streaming):
    loaded = DataTrainingArguments(
        train_dir=str(folders / "train"),
        validation_dir=str(folders / "held_out"),
        streaming=streaming,
    ).load()
    (train,) = loaded.arrivals
    assert [len(list(train.dataset)), len(loaded.held_out_images)] == [12, 8]
    assert loaded.label_names() == ("3", "7")
    assert loaded.held_out_split == "validation"


def stored(dataset):
    encoded = dataset.cast_column("image", Image(decode=False))
    return [row["image"]["bytes"] for row in encoded]


def test_a_share_of_every_arrival_is_held_out_and_stays_so(folders, digits, tmp_path):
    for name, rows in (("monday", range(40)), ("tuesday", range(40, 100))):
        digits.select(rows).to_parquet(tmp_path / f"{name}.parquet")
    monday, tuesday = (str(tmp_path / f"{name}.parquet") for name in ("monday", "tuesday"))
    first = DataTrainingArguments(dataset_name=monday, train_val_split=0.25).load()
    second = DataTrainingArguments(
        dataset_name=tuesday, seen_dataset_names=[monday], train_val_split=0.25
    ).load()
    trained = [{*stored(part.dataset)} for part in (*first.arrivals, *second.arrivals)]
    earlier, later = ({*stored(part.held_out_images)} for part in (first, second))
    assert earlier < later
    assert trained[0] == trained[1]
    assert not later & (trained[1] | trained[2])
    # Every image is in one of the parts; a quarter is held out, give or take three deviations.
    assert len(trained[1]) + len(trained[2]) + len(later) == 100
    assert 12 <= len(later) <= 38
    assert second.held_out_split == "25% of train"


def test_a_stream_cannot_be_cut(folders):
    with pytest.raises(ValueError, match="streaming needs held-out images"):
        DataTrainingArguments(train_dir=str(folders / "train"), streaming=True).load()


def test_the_datasets_own_split_is_held_out(folders, tmp_path):
    assert len(DataTrainingArguments(dataset_name="digits").load().held_out_images) == 360
    for target, source in (("train", "train"), ("validation", "held_out")):
        shutil.copytree(folders / source, tmp_path / "both" / target)
    loaded = DataTrainingArguments(dataset_name=str(tmp_path / "both")).load()
    assert (len(loaded.arrivals[0].dataset), len(loaded.held_out_images)) == (12, 8)
    assert loaded.held_out_split == "validation"
    with pytest.raises(ValueError, match="test_split must differ from train_split, got 'test'"):
        DataTrainingArguments(dataset_name="digits", train_split="test").load()


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_are_limited_without_losing_classes(streaming):
    loaded = DataTrainingArguments(
        dataset_name="digits", max_train_samples=60, max_eval_samples=30, streaming=streaming
    ).load()
    train = list(loaded.arrivals[0].dataset)
    assert [len(train), len(loaded.held_out_images)] == [60, 30]
    assert len({example["label"] for example in train}) == 10
    assert [e["label"] for e in loaded.arrivals[0].dataset] == [e["label"] for e in train]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either dataset_name or train_dir must be given"),
        ({"dataset_name": "digits", "train_dir": "x"}, "either dataset_name or train_dir"),
        ({"dataset_name": "digits", "train_val_split": 1.0}, r"train_val_split must be in \(0, 1"),
        ({"dataset_name": "digits", "max_train_samples": 0}, "max_train_samples must be at least"),
    ],
)
def test_bad_data_arguments_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataTrainingArguments(**fields)


def test_no_code_of_a_repository_is_run():
    with pytest.raises(ValueError, match="trust_remote_code must be False"):
        ModelArguments("user/model", trust_remote_code=True)


def test_the_revision_has_two_names():
    for flag in ("--model_revision", "--revision"):
        flags = ["--model_name_or_path", "user/model", flag, "round-002"]
        (source,) = HfArgumentParser(ModelArguments).parse_args_into_dataclasses(flags)
        assert source.model_revision == "round-002"


def test_the_record_of_a_model_holds_no_secret():
    source = ModelArguments("user/model", token="hf_secret", cache_dir="/somewhere")
    assert source.settings["model_name_or_path"] == "user/model"
    assert not {"hf_secret", "/somewhere"} & set(source.settings.values())


def test_a_native_model_comes_with_its_processor(tmp_path, small_model):
    hf_dash.save_model(tiny_vit(("cat",)), tmp_path, tiny_processor())
    source = ModelArguments(str(tmp_path))
    model = source.load_model(["cat"])
    assert source.load_image_processor(model).size == {"height": 16, "width": 16}
    assert source.load_image_processor(small_model) is None


def test_a_recommendation_that_nothing_follows_is_refused():
    with pytest.raises(
        ValueError, match="start must be 'auto' with recommendation 'x', got 'dash'"
    ):
        StartArguments(recommendation="x")
    assert StartArguments("auto", "x").recommendation == "x"
