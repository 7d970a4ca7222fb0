import pytest
import torch
from conftest import same_state, state_of
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import hf_dash
from hf_dash.classifiers import architecture_of
from hf_dash.models import is_timm, model_labels


def tiny_vit(names=("cat", "dog")):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return ViTForImageClassification(config).eval()


def tiny_processor():
    return ViTImageProcessor(size={"height": 16, "width": 16})


@pytest.fixture
def vit_folder(tmp_path):
    hf_dash.save_classifier(tiny_vit(), tmp_path / "vit", tiny_processor())
    return str(tmp_path / "vit")


@pytest.fixture
def timm_folder(tmp_path):
    model = hf_dash.create_model("test_resnet", label_names=["cat", "dog"], image_size=32)
    hf_dash.save_classifier(model, tmp_path / "timm")
    return str(tmp_path / "timm")


def test_a_native_model_is_saved_with_its_processor(vit_folder):
    model, processor = tiny_vit(), AutoImageProcessor.from_pretrained(vit_folder)
    loaded = AutoModelForImageClassification.from_pretrained(vit_folder)
    assert same_state(state_of(model), state_of(loaded))
    assert processor.size == {"height": 16, "width": 16}
    assert (architecture_of(loaded), is_timm(loaded)) == ("vit", False)


def test_a_timm_wrapper_is_saved_in_timms_layout(timm_folder):
    import timm

    model = hf_dash.load_classifier(timm_folder).eval()
    plain = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).eval()
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(plain(image), model(image).logits)
    assert (architecture_of(model), is_timm(model)) == ("test_resnet", True)


@pytest.mark.parametrize("folder", ["vit_folder", "timm_folder"])
def test_known_labels_in_any_order_change_nothing(folder, request):
    path = request.getfixturevalue(folder)
    model = hf_dash.load_classifier(path, ["dog", "cat"], ignore_mismatched_sizes=True)
    assert model_labels(model) == ["cat", "dog"]
    assert same_state(state_of(model), state_of(hf_dash.load_classifier(path)))


def test_new_labels_grow_a_timm_head(timm_folder):
    old = hf_dash.load_classifier(timm_folder).timm_model.fc.weight
    model = hf_dash.load_classifier(timm_folder, ["dog", "bird"])
    assert model_labels(model) == ["cat", "dog", "bird"]
    assert torch.equal(model.timm_model.fc.weight[:2], old)


@pytest.mark.parametrize("folder", ["vit_folder", "timm_folder"])
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["dog", "bird"], ["cat", "dog", "bird"]),
        (["x", "y", "z"], ["x", "y", "z"]),
        (["x", "y"], ["x", "y"]),
    ],
)
def test_a_head_of_another_size_is_fresh_where_asked_for(folder, names, expected, request):
    path = request.getfixturevalue(folder)
    model = hf_dash.load_classifier(path, names, ignore_mismatched_sizes=True)
    assert model_labels(model) == expected
    assert model.config.label2id == {name: index for index, name in enumerate(expected)}
    size = 32 if is_timm(model) else 16
    assert model(torch.zeros(1, 3, size, size)).logits.shape == (1, len(expected))
    # Everything below the head is the parent's.
    before, after = state_of(hf_dash.load_classifier(path)), state_of(model)
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert all("classifier" in n or "fc" in n for n in changed)


def test_new_labels_need_a_fresh_head_in_a_native_model(vit_folder):
    with pytest.raises(ValueError, match=r"label_names has \['bird'\].*ignore_mismatched_sizes"):
        hf_dash.load_classifier(vit_folder, ["dog", "bird"])


def test_the_processor_is_the_transform_of_a_native_model():
    transform = hf_dash.classifier_transform(tiny_vit(), tiny_processor())
    # White is 255, scaled to 1, and mean and deviation of this processor are 0.5.
    pixels = transform(Image.new("RGB", (40, 20), "white"))
    torch.testing.assert_close(pixels, torch.ones(3, 16, 16))
    with pytest.raises(ValueError, match="image mode is 'L'"):
        transform(Image.new("L", (16, 16)))
    with pytest.raises(ValueError, match="image_processor must be given"):
        hf_dash.classifier_transform(tiny_vit())


def test_a_timm_wrapper_needs_no_processor(small_model):
    image = Image.new("RGB", (32, 32), "white")
    ours = hf_dash.classifier_transform(small_model)(image)
    assert torch.equal(ours, hf_dash.image_transform(small_model)(image))
