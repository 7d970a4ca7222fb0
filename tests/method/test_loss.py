"""Which loss is minimized where none is given, and where hf_dash asks instead of guessing."""

import pytest
import torch
import torch.nn.functional as F
from helpers import EveryLayer, random_pairs, same_state, state_of
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

import hf_dash
from hf_dash.method.loss import count_labels, default_loss, labels_checked

SMALL = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def vit(**options):
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SMALL, **options)).eval()


def mae():
    torch.manual_seed(0)
    decoder = {
        "decoder_hidden_size": 8,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
    }
    return ViTMAEForPreTraining(ViTMAEConfig(**SMALL, **decoder)).eval()


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Returns(nn.Module):
    """A bare model that returns what it is told to."""

    def __init__(self, make):
        super().__init__()
        self.head, self.make = nn.Linear(3 * 8 * 8, 4), make

    def forward(self, x):
        return self.make(self.head(x.flatten(1)))


def test_a_model_that_takes_labels_says_its_own_loss():
    model, labels = vit(num_labels=3), torch.tensor([0, 1, 2, 0, 1, 2])
    own = model(pixel_values=IMAGES, labels=labels).loss
    for batch in (
        {"pixel_values": IMAGES, "labels": labels},
        {"pixel_values": IMAGES, "label": labels},
        (IMAGES, labels),
    ):
        assert torch.equal(default_loss(model, batch), own)


@pytest.mark.parametrize("labels", [torch.tensor([3, 0, 1, 7, 4, 5]), torch.rand(6)])
def test_regression_is_the_models_own(labels):
    model = vit(num_labels=1)
    batch = {"pixel_values": IMAGES, "labels": labels.float()}
    expected = F.mse_loss(model(pixel_values=IMAGES).logits.squeeze(), labels.float())
    torch.testing.assert_close(default_loss(model, batch), expected)
    # Numbers of a regression are not classes that the model would have to have.
    integers = {"pixel_values": IMAGES, "labels": labels.ceil().long()}
    assert list(labels_checked([integers], model)) == [integers]


def test_a_model_without_labels_may_have_a_loss_too():
    model = mae()
    torch.manual_seed(5)
    expected = model(pixel_values=IMAGES).loss
    torch.manual_seed(5)
    assert torch.equal(default_loss(model, {"pixel_values": IMAGES}), expected)


def test_a_dict_of_labels_reaches_the_model():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(192, 2), nn.Linear(192, 3)

        def forward(self, images, labels):
            x = images.flatten(1)
            one = F.cross_entropy(self.body(x), labels["coarse"])
            return {"loss": one + F.cross_entropy(self.head(x), labels["fine"])}

    labels = {"coarse": torch.tensor([0, 1] * 3), "fine": torch.tensor([0, 1, 2] * 2)}
    model, batch = TwoHeads(), {"images": IMAGES, "labels": labels}
    assert torch.equal(default_loss(model, batch), model(**batch)["loss"])
    report = hf_dash.dash_shrink_(model, [batch, batch])
    assert (report.num_images, report.num_batches) == (12, 2)


def test_soft_labels_of_a_bare_model_are_probabilities():
    model = Returns(lambda logits: logits)
    shares = torch.rand(6, 4).softmax(1)
    expected = F.cross_entropy(model(IMAGES), shares)
    assert torch.equal(default_loss(model, (IMAGES, shares)), expected)


CLASSES = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize(
    ("make", "labels", "message"),
    [
        (lambda x: x[:, :1], torch.tensor([0, 1, 1, 0, 1, 0]), r"\(6, 1\), not two or more logits"),
        (lambda x: x[:, 0], CLASSES, r"\(6,\), not two or more"),
        (lambda x: {"logits": x}, CLASSES, "returned dict, not logits"),
        (lambda x: (x, x), CLASSES, "returned tuple, not logits"),
        (lambda x: x, torch.rand(6, 4), "torch.float32 .* neither one class per image"),
        (lambda x: x, torch.randint(0, 2, (6, 4)).float() * 0 + 1, "neither one class per image"),
        (lambda x: x, torch.rand(6), "neither one class per image"),
        (lambda x: x, torch.ones(6, dtype=torch.bool), "torch.bool"),
        (lambda x: x[:, :, None, None], CLASSES[:, None, None], "not two or more logits per image"),
        (lambda x: x, CLASSES[:, None], "neither one class per image"),
    ],
)
def test_a_bare_models_loss_is_asked_for_where_it_does_not_show(make, labels, message):
    model = Returns(make)
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as refused:
        hf_dash.dash_shrink_(model, [(IMAGES, labels)])
    assert "loss_fn=lambda model, batch: " in str(refused.value)
    assert same_state(before, state_of(model))


def test_a_model_that_returns_no_loss_is_asked_for_one():
    model = vit(num_labels=3)
    with pytest.raises(ValueError, match=r"returned no loss, .*'logits'.* loss_fn"):
        default_loss(model, {"pixel_values": IMAGES})


def test_a_loss_function_takes_batches_of_any_form():
    model = EveryLayer()
    pairs = random_pairs(3)
    batches = [(images, labels, torch.arange(8), {"note": "x"}) for images, labels in pairs]
    report = hf_dash.dash_shrink_(model, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert report.num_images == 24
    other = EveryLayer()
    targets = [{"images": images, "targets": labels} for images, labels in pairs]
    loss_fn = lambda m, b: F.cross_entropy(m(b["images"]), b["targets"])  # noqa: E731
    assert hf_dash.dash_shrink_(other, targets, loss_fn).num_images == 24


def test_ignored_labels_pass_the_check_and_do_not_count():
    labels = torch.tensor([0, -100, 2, 1, -100, 3])
    assert count_labels((IMAGES, labels)) == 4
    assert count_labels({"pixel_values": IMAGES, "labels": labels}) == 4
    assert count_labels((IMAGES, torch.rand(6, 4))) == 6
    assert count_labels({"pixel_values": IMAGES}) == 6
    model = Returns(lambda logits: logits)
    model.num_classes = 4
    assert len(list(labels_checked([(IMAGES, labels)], model))) == 1
    with pytest.raises(ValueError, match="labels must lie in 0 … 3"):
        list(labels_checked([(IMAGES, labels + 1)], model))
    # Classes of pixels, and of several labels per image, are numbered otherwise.
    assert list(labels_checked([(IMAGES, torch.full((6, 2, 2), 255))], model))


def test_pieces_weigh_by_the_labels_that_count():
    labels = torch.tensor([0, -100, 2, 1, -100, 3])
    whole, cut = Returns(lambda logits: logits), Returns(lambda logits: logits)
    cut.load_state_dict(whole.state_dict())
    hf_dash.dash_shrink_(whole, [(IMAGES, labels)])
    hf_dash.dash_shrink_(cut, [(IMAGES, labels)], micro_batch_size=1)
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def weighted(model, batch):
    weight = torch.tensor([1.0, 10.0, 1.0, 0.1])
    return F.cross_entropy(model(batch[0]), batch[1], weight=weight)


def contrastive(model, batch):
    features = F.normalize(model(batch[0]))
    return F.cross_entropy(features @ features.mT, torch.arange(len(features)))


@pytest.mark.parametrize("loss_fn", [weighted, contrastive])
def test_a_loss_that_pieces_do_not_make_up_is_refused(loss_fn):
    model = Returns(lambda logits: logits)
    before = state_of(model)
    with pytest.raises(ValueError, match="micro_batch_size=2 would change the result"):
        hf_dash.dash_shrink_(model, [(IMAGES, CLASSES)], loss_fn, micro_batch_size=2)
    assert same_state(before, state_of(model))
    hf_dash.dash_shrink_(model, [(IMAGES, CLASSES)], loss_fn)


# peft reads it under its older name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_takes_the_labels_its_model_takes():
    peft = pytest.importorskip("peft", reason="peft is no dependency: tested where it is there")
    torch.manual_seed(0)
    model = vit(num_labels=3)
    batch = {"pixel_values": IMAGES, "labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    own = model(**batch).loss
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    torch.testing.assert_close(default_loss(wrapped, batch), own)
