"""The wheel as pip would install it."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

import hf_dash

CHECK = """
import importlib.resources, pathlib, hf_dash, hf_dash.card
where = pathlib.Path(hf_dash.__file__).parent
assert where.parent == pathlib.Path({target!r}), where
text = importlib.resources.files("hf_dash").joinpath("model_card_template.md").read_text()
assert text.startswith("---")
assert (where / "py.typed").exists()
hf_dash.card._template()
print(hf_dash.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(REPOSITORY)], check=True, capture_output=True)
    (path,) = folder.glob("hf_dash-*.whl")
    return path


def test_the_wheel_installs_elsewhere_and_carries_the_template(wheel, tmp_path):
    target = tmp_path / "target"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
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


def test_the_wheel_is_named_by_the_one_version(wheel):
    assert wheel.name == f"hf_dash-{hf_dash.__version__}-py3-none-any.whl"


def test_floors_are_declared_for_every_library():
    metadata = importlib.metadata.metadata("hf_dash")
    core = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    declared = {requirement.split(">=")[0] for requirement in core}
    assert {"torch", "transformers", "datasets", "accelerate", "timm", "evaluate"} <= declared
    assert all(">=" in requirement for requirement in core)
    assert metadata["Requires-Python"] == ">=3.10"


def test_importing_the_package_has_no_side_effects(tmp_path):
    code = (
        "import os, random, torch; a = torch.get_rng_state(); r = random.getstate();"
        "import hf_dash; assert torch.equal(a, torch.get_rng_state()) and r == random.getstate();"
        "print(os.listdir('.'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert Path(hf_dash.__file__).parent.name == "hf_dash"
