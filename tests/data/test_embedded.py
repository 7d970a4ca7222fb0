import os
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

import hf_dash
from hf_dash.data.embedded import EMBEDDED


def test_the_sample_is_whole_balanced_and_small():
    train, test = (hf_dash.load_images("fashion_mnist", split=s) for s in ("train", "test"))
    assert (len(train), len(test)) == (1200, 3800)
    names = ["tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker"]
    assert hf_dash.data.label_names(train) == [*names, "bag", "boot"]
    for part in (train, test):
        assert np.abs(np.bincount(part["label"]) / len(part) - 0.1).max() < 0.025
    folder = Path(hf_dash.data.embedded.__file__).parent
    assert (folder / "fashion_mnist.parquet").stat().st_size <= 2.5e6
    license_ = (folder / "fashion_mnist.LICENSE").read_text()
    assert "Copyright (c) 2017 Zalando SE" in license_
    assert "Permission is hereby granted" in license_


def test_its_images_differ_and_none_is_held_out_and_trained_on():
    stored = {
        split: [np.asarray(image).tobytes() for image in hf_dash.load_images(split=split)["image"]]
        for split in ("train", "test")
    }
    assert len(set(stored["train"] + stored["test"])) == 5000


@pytest.mark.parametrize("streaming", [False, True])
def test_its_images_are_decoded_to_the_mode_asked_for(streaming):
    path = Path(hf_dash.data.embedded.__file__).with_name("fashion_mnist.parquet")
    stored = pq.read_table(path)["image"][0]["bytes"].as_py()
    for asked, mode in ((None, "RGB"), ("L", "L")):
        images = hf_dash.load_images("fashion_mnist", image_mode=asked, streaming=streaming)
        image = next(iter(images))["image"]
        assert (image.size, image.mode) == ((28, 28), mode)
        assert (np.asarray(image.convert("L")) == np.asarray(PILImage.open(BytesIO(stored)))).all()


def test_it_is_the_default_and_writes_nothing():
    home = Path(os.environ["HF_HOME"])
    before = sorted(home.rglob("*"))
    config = hf_dash.DataConfig()
    assert config.load_train()["label"][:] == hf_dash.load_images("fashion_mnist")["label"][:]
    assert config.load_held_out().num_rows == 3800
    assert sorted(home.rglob("*")) == before


def test_the_digits_need_scikit_learn_and_the_sample_does_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert len(hf_dash.load_images("fashion_mnist")) == 1200
    with pytest.raises(ImportError, match=r"sklearn\.datasets"):
        hf_dash.load_images("digits")


def test_the_digits_are_real_whole_and_always_the_same(digits, digits_test):
    assert (len(digits), len(digits_test)) == (1437, 360)
    assert hf_dash.data.label_names(digits) == [str(digit) for digit in range(10)]
    image = digits[0]["image"]
    assert (image.size, image.mode) == (((32, 32), "RGB"))
    assert digits[:50]["label"] == hf_dash.load_images("digits")[:50]["label"]
    # Stratified: every digit makes about a tenth of either split.
    for part in (digits, digits_test):
        shares = np.bincount(part["label"]) / len(part)
        assert np.abs(shares - 0.1).max() < 0.005


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_unknown_split_is_refused(name):
    with pytest.raises(ValueError, match=f"split of {name} must be 'train' or 'test', got 'va'"):
        hf_dash.load_images(name, split="va")
