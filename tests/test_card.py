import re
import subprocess
import sys

import jinja2
import pytest
from huggingface_hub import ModelCard
from test_classifiers import tiny_vit
from test_history import record

import hf_dash
from hf_dash.card import card_metadata, render_card

SHRINK = {
    "config": {"alpha": 0.3, "lam": 0.25, "grouping": "kernel"},
    "num_batches": 20,
    "num_images": 2560,
    "seconds": 1.5,
    "mean_factor": 0.4321,
    "share_at_lam": 0.6,
    "tensors": [
        {
            "name": "conv.weight",
            "num_vectors": 24,
            "mean_factor": 0.5,
            "min_factor": 0.25,
            "max_factor": 1.0,
            "share_at_lam": 0.5,
        }
    ],
}


def info(**changes):
    fields = {
        "model_name": "test_resnet on digits",
        "records": [record("dash"), record("dash", 0, 2, accuracy=0.875, shrink=SHRINK)],
        "settings": {"learning_rate": 0.05},
        "dataset_name": "digits",
        "held_out_split": "test",
        "num_held_out": 360,
    }
    return hf_dash.CardInfo(**{**fields, **changes})


def test_the_metadata_is_valid_and_reads_back(small_model):
    card = render_card(small_model, info(dataset_name="user/images", base_model="user/parent"))
    data = ModelCard(str(card)).data
    assert data.library_name == "timm"
    assert data.pipeline_tag == "image-classification"
    assert data.datasets == ["user/images"]
    assert data.base_model == "user/parent"
    assert {"hf_dash", "dash", "warm-start", "timm", "transformers"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.875)
    assert (result.dataset_type, result.dataset_split, result.verified) == (
        "user/images",
        "test",
        False,
    )


def test_local_data_are_not_called_a_dataset_of_the_hub():
    assert card_metadata(info()).datasets is None
    assert "dash" not in card_metadata(info(records=[record("warm")])).tags


def test_the_card_says_what_was_recorded(small_model):
    text = str(render_card(small_model, info(parent="user/parent at 1234", figure="rounds.png")))
    for expected in (
        "# test_resnet on digits",
        "373,658 parameters, 10 classes",
        "**dash** start from user/parent at 1234",
        "α = 0.3, λ = 0.25",
        "20 minibatches,\n2560 images read in 1.50 s",
        "Mean factor 0.432",
        "| `conv.weight` |      24 | 0.500 | 0.250 | 1.000 | 50.0% |",
        "| learning_rate |  0.05 |",
        "Accuracy **87.50 %** on 360 held-out images",
        "![Accuracy and training steps over rounds](rounds.png)",
        "| a     |   40.00% |",
        "shin2024dash",
        hf_dash.__version__,
    ):
        assert expected in text, expected
    assert "{{" not in text.replace("{{DASH}}", "")


def test_a_card_without_a_shrink_says_so(small_model):
    text = str(render_card(small_model, info(records=[record("warm", 0, 2)])))
    assert "No weight was shrunk before this round." in text
    assert "direction-aware" not in text.split("## Limits")[0]


def test_an_undefined_template_variable_fails(small_model, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_dash.card.__file__", str(tmp_path / "card.py"))
    (tmp_path / "model_card_template.md").write_text("{{ nobody_gives_this }}")
    with pytest.raises(jinja2.UndefinedError, match="nobody_gives_this"):
        render_card(small_model, info())


def test_text_from_data_is_not_run_as_a_template(small_model):
    text = str(render_card(small_model, info(model_name="{{ 7 * 7 }}")))
    assert "# {{ 7 * 7 }}" in text


def test_names_from_data_cannot_break_the_metadata(small_model):
    name = 'odd: "name"\n---\nlicense: mit'
    data = ModelCard(str(render_card(small_model, info(model_name=name)))).data
    assert data.model_name == name
    assert data.license is None


def test_the_snippets_of_a_saved_folder_run(small_model, tmp_path):
    hf_dash.save_model(small_model, tmp_path)
    hf_dash.write_card(tmp_path, small_model, info())
    card = (tmp_path / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(snippets) == 2
    outputs = [
        subprocess.run(
            [sys.executable, "-c", snippet],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            check=True,
        ).stdout
        for snippet in snippets
    ]
    assert "'score'" in outputs[0]
    assert "tensor" in outputs[1]


def test_a_model_on_the_hub_is_loaded_from_there(small_model):
    text = str(render_card(small_model, info(hub_model_id="user/name")))
    assert 'model="user/name"' in text
    assert '"hf-hub:user/name"' in text


def test_a_grey_model_warns_of_the_pipeline():
    model = hf_dash.create_model(
        "test_resnet", label_names=["a"], image_size=32, model_args={"in_chans": 1}
    )
    assert "The pipeline converts images to RGB first" in str(render_card(model, info()))


def test_a_card_of_a_native_model_speaks_of_transformers_alone():
    card = str(render_card(tiny_vit(), info()))
    data = ModelCard(card).data
    assert data.library_name == "transformers"
    assert "timm" not in data.tags
    assert "An image classifier (vit, " in card
    assert 'Image.new("RGB", (16, 16))' in card
    assert "import timm" not in card
