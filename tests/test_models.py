import json

import pytest
import timm
import torch
from helpers import heard, same_state, state_of, tiny_processor, tiny_vit
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPImageProcessor,
    pipeline,
)

import hf_dash
from hf_dash.models import architecture_of, fresh_state, is_timm, model_labels

NAMES = ["ant", "bee", "cat"]


def make(architecture="test_resnet", **options):
    return hf_dash.create_model(architecture, label_names=NAMES, **{"image_size": 32, **options})


@pytest.mark.parametrize("architecture", ["test_resnet", "test_convnext", "test_vit"])
def test_layers_have_timms_own_initialization(architecture):
    model = make(architecture, seed=3)
    options = {"img_size": 32} if architecture == "test_vit" else {}
    torch.manual_seed(3)
    expected = timm.create_model(architecture, num_classes=3, **options).state_dict()
    found = model.timm_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_convolution_has_the_spread_timm_gives_it():
    """Kaiming normal over the fan-out, √(2 / (32 · 9)); transformers would make it 0.02."""
    weight = make().timm_model.layer1[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.1)


def test_seeds_decide_and_the_global_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, second, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(torch.rand(1), expected)
    weight = lambda m: m.timm_model.fc.weight  # noqa: E731
    assert torch.equal(weight(first), weight(second))
    assert not torch.equal(weight(first), weight(other))
    assert torch.equal(fresh_state(first, 2)["fc.weight"], weight(other))


def test_names_channels_and_size_are_in_the_config():
    model = make(model_args={"in_chans": 1})
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id["cat"] == 2
    assert model.config.pretrained_cfg["input_size"] == [1, 32, 32]
    assert model(torch.zeros(2, 1, 32, 32)).logits.shape == (2, 3)
    image = Image.new("L", (20, 20), 255)
    pixels = hf_dash.models.image_transform(model)(image)
    assert pixels.shape == (1, 32, 32)
    assert pixels.max().item() == pytest.approx(1.0)  # (1 − 0.5) / 0.5


def test_the_architectures_own_size_is_the_default():
    assert make(image_size=None).config.pretrained_cfg["input_size"] == [3, 160, 160]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "resnet19"}, "architecture 'resnet19' is not known to timm; .*resnet"),
        ({"model_args": {"num_classes": 4}}, "model_args must not hold num_classes"),
    ],
)
def test_bad_models_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_bad_label_names_are_refused(names):
    with pytest.raises(ValueError, match="label_names must be different and at least one"):
        hf_dash.create_model("test_resnet", label_names=names)


def test_an_image_of_another_mode_is_refused():
    transform = hf_dash.models.image_transform(make())
    with pytest.raises(ValueError, match=r"image mode is 'L', but the model takes 3 channels"):
        transform(Image.new("L", (32, 32)))


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_a_saved_folder_loads_everywhere_with_identical_logits(architecture, tmp_path):
    model = make(architecture).eval()
    with torch.no_grad():
        for buffer in model.buffers():  # batch norm statistics must travel too
            buffer.add_(1)
    hf_dash.save_model(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    noise = torch.randint(0, 256, (40, 40, 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.to(torch.uint8).numpy())
    pixels = hf_dash.models.image_transform(model)(image)[None]

    with torch.no_grad():
        logits = model(pixels).logits
        auto = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(auto(pixels).logits, logits)
        again = hf_dash.load_model(str(tmp_path))
        assert torch.equal(again(hf_dash.models.image_transform(again)(image)[None]).logits, logits)
        plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(plain(pixels), logits)
        transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=plain))
        assert torch.equal(transform(image)[None], pixels)
    assert again.config.id2label == dict(enumerate(NAMES))

    classified = pipeline("image-classification", model=str(tmp_path))(image)
    scores = logits.softmax(dim=-1)[0]
    assert classified[0]["label"] == NAMES[scores.argmax()]
    assert classified[0]["score"] == pytest.approx(scores.max().item())


def test_saving_again_replaces_the_files_and_leaves_others(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    hf_dash.save_model(make(seed=1), tmp_path)
    hf_dash.save_model(hf_dash.load_model(str(tmp_path)), tmp_path)
    other = make(seed=2)
    hf_dash.save_model(other, tmp_path)
    loaded = hf_dash.load_model(str(tmp_path))
    assert torch.equal(loaded.timm_model.fc.weight, other.timm_model.fc.weight)
    assert "num_classes" not in json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]


def test_only_models_of_transformers_are_saved(tmp_path):
    with pytest.raises(
        TypeError, match="model must be an image classifier of transformers, got Linear"
    ):
        hf_dash.save_model(torch.nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("architecture", ["test_resnet", "test_convnext", "test_vit"])
def test_a_head_grows_by_name(architecture):
    model = make(architecture, seed=1)
    with torch.no_grad():
        for tensor in model.timm_model.state_dict().values():
            tensor.add_(1)
    before = {name: t.clone() for name, t in model.timm_model.state_dict().items()}
    grown, rows = hf_dash.models.grow_head(model, ["dog", "eel"], seed=7)
    after = grown.timm_model.state_dict()
    fresh = fresh_state(grown, 7)
    assert list(grown.config.id2label.values()) == [*NAMES, "dog", "eel"]
    assert grown.config.label2id["eel"] == 4
    assert model.config.num_labels == 3
    for name, old in before.items():
        assert torch.equal(after[name][: len(old)] if name in rows else after[name], old), name
    assert len(rows) == 2  # the classifier's weight and bias
    for name, new in rows.items():
        assert torch.equal(after[name][3:], new)
        assert torch.equal(new, fresh[name][3:])
    assert grown.eval()(pixel_values=torch.zeros(1, 3, 32, 32)).logits.shape == (1, 5)


def test_a_grown_model_is_saved_and_loaded(tmp_path):
    grown, _ = hf_dash.models.grow_head(make(), ["dog"], seed=0)
    hf_dash.save_model(grown, tmp_path)
    loaded = hf_dash.load_model(str(tmp_path))
    assert list(loaded.config.id2label.values()) == [*NAMES, "dog"]


@pytest.mark.parametrize("names", [[], ["ant"], ["dog", "dog"]])
def test_a_head_grows_by_new_names_only(names):
    with pytest.raises(ValueError, match="new_names must be at least one, different and none of"):
        hf_dash.models.grow_head(make(), names, seed=0)


def test_black_is_what_the_transform_makes_of_black():
    for channels in (1, 3):
        model = hf_dash.create_model(
            "test_resnet",
            label_names=["a", "b"],
            image_size=32,
            model_args={"in_chans": channels},
        )
        black = Image.new("L" if channels == 1 else "RGB", (32, 32))
        pixels = hf_dash.models.image_transform(model)(black)
        expected = torch.tensor(hf_dash.models.black_pixel(model)).reshape(channels, 1, 1)
        torch.testing.assert_close(pixels, expected.expand(channels, 32, 32))
    model.config.pretrained_cfg = None
    with pytest.raises(ValueError, match="has no pretrained_cfg"):
        hf_dash.models.black_pixel(model)


@pytest.fixture
def vit_folder(tmp_path):
    hf_dash.save_model(tiny_vit(), tmp_path / "vit", tiny_processor())
    return str(tmp_path / "vit")


@pytest.fixture
def timm_folder(tmp_path):
    model = hf_dash.create_model("test_resnet", label_names=["cat", "dog"], image_size=32)
    hf_dash.save_model(model, tmp_path / "timm")
    return str(tmp_path / "timm")


def test_a_native_model_is_saved_with_its_processor(vit_folder):
    model, processor = tiny_vit(), AutoImageProcessor.from_pretrained(vit_folder)
    loaded = AutoModelForImageClassification.from_pretrained(vit_folder)
    assert same_state(state_of(model), state_of(loaded))
    assert processor.size == {"height": 16, "width": 16}
    assert (architecture_of(loaded), is_timm(loaded)) == ("vit", False)


def test_a_timm_wrapper_is_saved_in_timms_layout(timm_folder):
    import timm

    model = hf_dash.load_model(timm_folder).eval()
    plain = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).eval()
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(plain(image), model(image).logits)
    assert (architecture_of(model), is_timm(model)) == ("test_resnet", True)


@pytest.mark.parametrize("folder", ["vit_folder", "timm_folder"])
def test_known_labels_in_any_order_change_nothing(folder, request):
    path = request.getfixturevalue(folder)
    model = hf_dash.load_model(path, ["dog", "cat"], ignore_mismatched_sizes=True)
    assert model_labels(model) == ["cat", "dog"]
    assert same_state(state_of(model), state_of(hf_dash.load_model(path)))


def test_new_labels_grow_a_timm_head(timm_folder):
    old = hf_dash.load_model(timm_folder).timm_model.fc.weight
    model = hf_dash.load_model(timm_folder, ["dog", "bird"])
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
    model = hf_dash.load_model(path, names, ignore_mismatched_sizes=True)
    assert model_labels(model) == expected
    assert model.config.label2id == {name: index for index, name in enumerate(expected)}
    size = 32 if is_timm(model) else 16
    assert model(torch.zeros(1, 3, size, size)).logits.shape == (1, len(expected))
    # Everything below the head is the parent's.
    before, after = state_of(hf_dash.load_model(path)), state_of(model)
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert all("classifier" in n or "fc" in n for n in changed)


def test_new_labels_need_a_fresh_head_in_a_native_model(vit_folder):
    with pytest.raises(ValueError, match=r"label_names has \['bird'\].*ignore_mismatched_sizes"):
        hf_dash.load_model(vit_folder, ["dog", "bird"])


def test_the_processor_is_the_transform_of_a_native_model():
    transform = hf_dash.models.image_transform(tiny_vit(), tiny_processor())
    # White is 255, scaled to 1, and mean and deviation of this processor are 0.5.
    pixels = transform(Image.new("RGB", (40, 20), "white"))
    torch.testing.assert_close(pixels, torch.ones(3, 16, 16))
    with pytest.raises(ValueError, match="image mode is 'L'"):
        transform(Image.new("L", (16, 16)))
    with pytest.raises(ValueError, match="image_processor must be given"):
        hf_dash.models.image_transform(tiny_vit())


def test_a_timm_wrapper_needs_no_processor(small_model):
    image = Image.new("RGB", (32, 32), "white")
    ours = hf_dash.models.image_transform(small_model)(image)
    assert torch.equal(ours, hf_dash.models.image_transform(small_model)(image))


def test_a_head_that_grows_is_announced(tmp_path):
    model = hf_dash.create_model("test_resnet", label_names=["cat", "dog"], image_size=32)
    hf_dash.save_model(model, tmp_path)
    with heard() as lines:
        hf_dash.load_model(str(tmp_path), ["cat", "owl", "fox"])
    assert lines == ["head grows 2 → 4: owl, fox"]
    with heard() as lines:
        hf_dash.load_model(str(tmp_path), ["owl", "fox"], ignore_mismatched_sizes=True)
    assert lines[0] == "fresh head of 2 classes: owl, fox"


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ({"size": {"shortest_edge": 16}}, False),
        ({"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 16}, True),
        ({"size": {"height": 16, "width": 16}}, True),
        ({"size": {"shortest_edge": 16}, "do_resize": False}, True),  # images are the user's
    ],
)
def test_a_processor_has_to_give_every_image_one_size(settings, fits):
    processor = CLIPImageProcessor(**{"do_center_crop": False, **settings})
    model = tiny_vit()
    if fits:
        transform = hf_dash.models.image_transform(model, processor)
        shape = transform(Image.new("RGB", (30, 20))).shape
        assert shape[0] == 3
    else:
        with pytest.raises(ValueError, match=r"CLIPImageProcessor.*'shortest_edge'.*crop"):
            hf_dash.models.image_transform(model, processor)
