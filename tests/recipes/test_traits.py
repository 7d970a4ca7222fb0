"""What users' folders are like × the recipes that read them: right, or a clear error.

``python -m pytest -m slow tests/recipes/test_traits.py`` writes the table in
``recipes/results/traits`` with ``WRITE_TRAITS=1`` in the environment; without it, it compares.
"""

import csv
import json
import os

import pytest
from children import Child, join
from helpers import REPOSITORY, record, run_without_figures
from traits import RECIPES, TRAITS

import hf_dash

TABLE = REPOSITORY / "recipes" / "results" / "traits" / "traits.csv"

SCRIPTS = {
    "continual": "continual_rounds.py",
    "retrain": "retrain_with_trainer.py",
    "promote": "promote.py",
}

TRAIN = {
    "continual": [
        *("--output_dir", "run", "--num_rounds", "1", "--starts", "warm", "--max_epochs", "1"),
        *("--train_batch_size", "4", "--disable_tqdm"),
    ],
    "retrain": [
        *("--output_dir", "run", "--model_name_or_path", "parent", "--num_train_epochs", "1"),
        *("--per_device_train_batch_size", "4", "--save_strategy", "no", "--report_to", "none"),
        *("--disable_tqdm", "true", "--start", "warm"),
    ],
    "promote": ["--output_dir", "run", "--challenger", "rounds/001/warm_seed0"],
}


def prepare(trait, recipe, folder):
    """Write the images, the parent and the run that a recipe needs; return its flags."""
    held_out = trait.held_out or trait.build
    name = trait.build(folder / "in", 0)
    other = name if trait.held_out is trait.build else held_out(folder / "held", 300)
    model = hf_dash.create_model("test_resnet", label_names=list(trait.parent), image_size=32)
    if recipe == "retrain":
        hf_dash.save_model(model, folder / "parent")
    if recipe == "promote":
        history = hf_dash.History(folder / "run" / "history.jsonl", {})
        history.path.parent.mkdir()
        history.append(record(weights_sha256=None))
        hf_dash.save_model(model, folder / "run" / history.records[0].folder)
    source = ["--dataset_name", name]
    if other != name:
        source += ["--test_dataset_name", other]
    return [*TRAIN[recipe], *source, *trait.flags]


def wanted(trait, recipe):
    """Return the number of images that is right, or the text of the error that is."""
    if recipe in trait.own:
        return trait.own[recipe]
    return trait.says if trait.count is None else trait.count


def found(trait, recipe, folder, done):
    """Say what a recipe has done: ``"right"``, ``"clear error"``, or what went wrong."""
    right = wanted(trait, recipe)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if isinstance(right, str):
        clear = done.returncode and "Error: " in last and right in last
        return "clear error" if clear else f"rc {done.returncode}: {last}"
    if done.returncode:
        return f"rc {done.returncode}: {last}"
    history = hf_dash.read_history(folder / "run" / "history.jsonl")
    if recipe == "promote":
        count = history.promotions[-1].num_held_out
        return "right" if count == right else f"{count} images"
    count = history.records[-1].num_total
    place = folder / "run" / ("model" if recipe == "continual" else "")
    classes = json.loads((place / "config.json").read_text(encoding="utf-8"))["label_names"]
    expected = sorted({*trait.classes, *(trait.parent if recipe == "retrain" else ())})
    good = count == right and sorted(classes) == expected
    return "right" if good else f"{count} images, classes {classes}"


def try_all(trait, folder):
    """Let every recipe read what has a trait, side by side."""
    places = {recipe: folder / recipe for recipe in RECIPES}
    children = []
    for recipe, place in places.items():
        place.mkdir()
        flags = prepare(trait, recipe, place)
        script = REPOSITORY / "recipes" / SCRIPTS[recipe]
        cache = {"HF_DATASETS_CACHE": str(folder / "cache")}
        children.append(Child(run_without_figures, script, flags, folder=place, **cache))
    results = [join([child])[0] for child in children]
    return [
        found(trait, recipe, place, done)
        for (recipe, place), done in zip(places.items(), results, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_trait_is_read_right_or_refused_clearly(tmp_path):
    rows = []
    for number, trait in enumerate(TRAITS):
        (tmp_path / str(number)).mkdir()
        rows.append([trait.name, *try_all(trait, tmp_path / str(number))])
    if os.environ.get("WRITE_TRAITS"):
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([["trait", *RECIPES], *rows])
    wrong = [row for row in rows if not set(row[1:]) <= {"right", "clear error"}]
    assert not wrong
    assert rows == committed()


def committed():
    with TABLE.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["trait", *RECIPES]
    return rows


def test_the_table_is_of_these_traits():
    assert [row[0] for row in committed()] == [trait.name for trait in TRAITS]
    assert len(TRAITS) >= 60
    assert len({trait.name for trait in TRAITS}) == len(TRAITS)
    for trait, row in zip(TRAITS, committed(), strict=True):
        for recipe, cell in zip(RECIPES, row[1:], strict=True):
            is_error = isinstance(wanted(trait, recipe), str)
            assert cell == ("clear error" if is_error else "right"), (trait.name, recipe)
