"""The wheel as pip would install it."""

import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY
from transformers import Trainer, TrainingArguments

import hf_dash

CHECK = """
import importlib.resources, pathlib, hf_dash, hf_dash.report.card
where = pathlib.Path(hf_dash.__file__).parent
assert where.parent == pathlib.Path({target!r}), where
text = importlib.resources.files("hf_dash").joinpath("model_card_template.md").read_text()
assert text.startswith("---")
assert (where / "py.typed").exists()
assert (where / "data" / "fashion_mnist.LICENSE").exists()
assert len(hf_dash.load_images("fashion_mnist")) == 1200
hf_dash.report.card._template()
print(hf_dash.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(REPOSITORY)], check=True, capture_output=True)
    (path,) = folder.glob("hf_dash-*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_installs_elsewhere_and_carries_the_template(wheel, tmp_path):
    target = tmp_path / "target"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile"]
    install += ["--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # -P and another folder: nothing of the checkout may be found instead.
    done = subprocess.run(
        [sys.executable, "-c", CHECK.format(target=str(target))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hf_dash.__version__


@pytest.mark.slow
def test_the_wheel_is_named_by_the_one_version(wheel):
    assert wheel.name == f"hf_dash-{hf_dash.__version__}-py3-none-any.whl"


def test_floors_are_declared_for_every_library():
    metadata = importlib.metadata.metadata("hf_dash")
    core = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    declared = {requirement.split(">=")[0] for requirement in core}
    assert {"torch", "transformers", "datasets", "accelerate", "timm", "evaluate"} <= declared
    assert all(">=" in requirement for requirement in core)
    assert metadata["Requires-Python"] == ">=3.10"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What ``import hf_dash`` writes, and then ``from hf_dash import dash_shrink_`` loads."""
    code = (
        "import os, random, sys, torch; a = torch.get_rng_state(); r = random.getstate();"
        "import hf_dash; assert torch.equal(a, torch.get_rng_state()) and r == random.getstate();"
        "print(os.listdir('.')); from hf_dash import dash_shrink_; print(*sys.modules)"
    )
    folder = tmp_path_factory.mktemp("imported")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_importing_the_package_has_no_side_effects(imported):
    assert imported[0] == "[]"
    assert Path(hf_dash.__file__).parent.name == "hf_dash"


@pytest.fixture(scope="module")
def loaded_with_the_shrink(imported):
    """The modules that ``from hf_dash import dash_shrink_`` loads."""
    return imported[1].split()


@pytest.mark.parametrize(
    "heavy", ["datasets", "evaluate", "matplotlib", "timm", "torchvision", "transformers.trainer"]
)
def test_the_shrink_alone_does_not_load(loaded_with_the_shrink, heavy):
    assert "hf_dash.method.dash" in loaded_with_the_shrink
    assert heavy not in loaded_with_the_shrink


MOVED = {
    "StreamLoader": "hf_dash.data.StreamLoader",
    "paired_table": "hf_dash.report.paired_table",
    "grow_head": "hf_dash.models.grow_head",
    "new_arrivals": "hf_dash.data.arrivals.new_arrivals",
}


@pytest.mark.parametrize("name", MOVED)
def test_a_name_that_moved_is_found_by_its_error(name):
    place, _, attribute = MOVED[name].rpartition(".")
    assert hasattr(importlib.import_module(place), attribute)
    with pytest.raises(AttributeError, match=rf"'{name}'.* {MOVED[name]}$"):
        getattr(hf_dash, name)
    with pytest.raises(ImportError, match=rf"'{name}'.* {MOVED[name]}$"):
        exec(f"from hf_dash import {name}")
    assert not hasattr(hf_dash, name)


@pytest.mark.parametrize("name", ["nonsense", "_shrink", "import"])
def test_a_name_that_never_was_is_an_attribute_error(name):
    assert not hasattr(hf_dash, name)
    with pytest.raises(AttributeError, match=f"{name}$"):
        getattr(hf_dash, name)


def code_blocks(page, language, heading):
    """The code blocks of one language in a section of a page."""
    section = (REPOSITORY / page).read_text().split(f"\n## {heading}\n")[1]
    return re.findall(rf"```{language}\n(.*?)```", section.split("\n## ")[0], re.DOTALL)


def test_the_readmes_trainer_lines_run(two_rounds, small_model, tmp_path):
    plain, based = code_blocks("README.md", "diff", "In your Trainer script")
    hf_dash.save_model(small_model, tmp_path / "checkpoint")
    for diff in (
        plain,
        based.replace("google/vit-base-patch16-224-in21k", f"{tmp_path}/checkpoint"),
    ):
        added = [line[1:].strip() for line in diff.splitlines() if line.startswith("+")]
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        model = hf_dash.create_model(
            "test_resnet",
            label_names=hf_dash.data.label_names(two_rounds[0].new.dataset),
            image_size=32,
            seed=1,
        )
        trainer = Trainer(model, args, train_dataset=two_rounds[0].examples)
        exec("\n".join(added), {"trainer": trainer, "DashCallback": hf_dash.DashCallback})
        trainer.train()
        report = json.loads((tmp_path / "dash_report.json").read_text())
        assert report["mean_factor"] < 1


def test_the_readmes_own_loop_runs(two_rounds, small_model, capsys):
    (example,) = code_blocks("README.md", "python", "In your own loop")
    batches = hf_dash.data.gradient_batches(two_rounds[0], hf_dash.DashConfig())
    exec(example, {"model": small_model, "batches": batches})
    (printed,) = code_blocks("README.md", "text", "In your own loop")
    words = [
        re.sub(r"[\d.%]+", "#", text.splitlines()[0]) for text in (printed, capsys.readouterr().out)
    ]
    assert words[0] == words[1]


def test_the_map_lists_every_setting_and_option():
    page = (REPOSITORY / "hf_dash" / "README.md").read_text()
    settings = page.split("| setting ")[1].split("\n\n")[0]
    for setting in dataclasses.fields(hf_dash.DashConfig):
        assert f"`{setting.name}`" in settings, setting.name
    options = page.split("| option ")[1].split("\n\n")[0]
    for name in inspect.signature(hf_dash.DashCallback).parameters:
        if name not in ("config", "settings"):
            assert f"`{name}`" in settings + options, name


def test_the_map_names_only_what_is_there():
    page = (REPOSITORY / "hf_dash" / "README.md").read_text()
    tour = page.split("## A tour of the rest")[1].split("\n## ")[0]
    for name in re.findall(r"`([\w.]+)`", tour.split("| --- |")[1]):
        assert operator.attrgetter(name)(hf_dash) is not None, name
