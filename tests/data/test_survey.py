import hashlib

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from helpers import broken, png
from image_files import encoded, photo
from PIL import Image as PILImage

from hf_dash.data.columns import fingerprint
from hf_dash.data.shards import RowNames
from hf_dash.data.survey import drop_rows, survey_rows

BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])

NAMES = RowNames(("mon.parquet", "tue"), (0, 3), (None, ("cat/1.png", "cat/2.png")))


def rows(contents, labels=None, mode=None, streaming=False):
    count = len(contents)
    features = Features(
        {"image": Image(mode=mode), "label": ClassLabel(names=["cat", "dog"]), "example_id": None}
    )
    dataset = Dataset.from_dict(
        {
            "image": [{"bytes": content, "path": None} for content in contents],
            "label": labels or [0] * count,
        },
        features=Features({name: features[name] for name in ("image", "label")}),
    ).add_column("example_id", np.arange(count))
    return dataset.to_iterable_dataset() if streaming else dataset


@BOTH
def test_a_survey_tells_labels_and_equal_images(streaming):
    dataset = rows([png(1), png(2), png(1)], [0, 1, 1], streaming=streaming)
    survey = survey_rows(dataset, NAMES)
    assert survey.example_ids.tolist() == [0, 1, 2]
    assert survey.labels.tolist() == [0, 1, 1]
    assert survey.content[0] == survey.content[2] != survey.content[1]
    # A number of 64 bits: the first of the content's SHA-256.
    assert int(survey.content[1]) == int(hashlib.sha256(png(2)).hexdigest()[:16], 16)
    assert survey.modes == {"L": 0}
    assert survey.fingerprint(["cat", "dog"]) == fingerprint(dataset)


@BOTH
def test_corrupt_images_are_named_by_row_or_path(streaming):
    contents = [png(0), broken(1), png(2), b"no image", png(4)]
    dataset = rows(contents, streaming=streaming)
    with pytest.raises(ValueError, match=r"^mon\.parquet:1 is a corrupt image, one of 1 in mon"):
        survey_rows(dataset, NAMES)
    with pytest.raises(ValueError, match=r"^tue/cat/1\.png is a corrupt image, one of 1 in tue"):
        survey_rows(rows([*[png(0)] * 3, broken(1)], streaming=streaming), NAMES)
    survey = survey_rows(dataset, NAMES, on_bad_example="skip")
    assert sorted(survey.bad) == [1, 3]
    assert survey.good.example_ids.tolist() == [0, 2, 4]
    kept = drop_rows(dataset, frozenset(survey.bad))
    assert [row["example_id"] for row in kept] == [0, 2, 4]
    assert survey.good.fingerprint(["cat", "dog"]) == fingerprint(kept)


DEEP = {
    "16 bits": (PILImage.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)), "PNG"),
    "16 bits, TIFF": (PILImage.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)), "TIFF"),
    "32 bits": (PILImage.fromarray(np.full((4, 4), 70_000, dtype=np.int32)), "TIFF"),
    "floats": (PILImage.fromarray(np.full((4, 4), 0.5, dtype=np.float32)), "TIFF"),
}


@pytest.mark.parametrize("mode", [None, "RGB", "L"])
@pytest.mark.parametrize("kind", DEEP)
def test_images_of_more_than_8_bits_are_refused_by_name(kind, mode):
    image, form = DEEP[kind]
    dataset = rows([png(0), encoded(image, form)], mode=mode)
    with pytest.raises(ValueError, match=r"mon\.parquet:1 has more than 8 bits a pixel.*mode [IF]"):
        survey_rows(dataset, NAMES)
    assert list(survey_rows(dataset, NAMES, on_bad_example="skip").bad) == [1]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_taken(mode):
    content = encoded(photo(0, 0).convert(mode), "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    assert not survey_rows(rows([content], mode="RGB"), NAMES).bad
    assert survey_rows(rows([content], mode="RGB"), NAMES).modes == {"RGB": 0}


def test_images_can_be_told_apart_by_pixels():
    first = photo(0, 0)
    contents = [encoded(first, "PNG"), encoded(first, "BMP"), encoded(photo(0, 1), "PNG")]
    by_bytes = survey_rows(rows(contents), NAMES).content
    by_pixels = survey_rows(rows(contents), NAMES, by_pixels=True).content
    assert len(set(by_bytes.tolist())) == 3
    assert by_pixels[0] == by_pixels[1] != by_pixels[2]


def test_turned_images_are_compared_as_they_are_seen():
    image = photo(0, 0)
    exif = PILImage.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = image.transpose(PILImage.Transpose.ROTATE_90)
    contents = [encoded(image, "PNG"), encoded(turned, "PNG", exif=exif)]
    content = survey_rows(rows(contents), NAMES, by_pixels=True).content
    assert content[0] == content[1]


@BOTH
@pytest.mark.parametrize("label", [None, -1])
def test_an_image_without_a_label_is_named(streaming, label):
    dataset = rows([png(0), png(1)], [0, label], streaming=streaming)
    with pytest.raises(ValueError, match=rf"mon\.parquet:1 has no label .* got {label}"):
        survey_rows(dataset, NAMES, on_bad_example="skip")


def test_known_rows_are_not_decoded(monkeypatch):
    monkeypatch.setattr(PILImage, "open", None)
    survey = survey_rows(rows([png(0), broken(1)]), NAMES, known_bad=frozenset({1}))
    assert list(survey.bad) == [1]
    assert survey.modes == {}


def test_the_survey_of_some_rows_has_their_order():
    survey = survey_rows(rows([png(0), png(1), png(2)], [0, 1, 0]), NAMES)
    part = survey.of([2, 1])
    assert part.labels.tolist() == [0, 1]
    assert part.content.tolist() == [survey.content[2], survey.content[1]]


def test_no_rows_make_a_survey():
    survey = survey_rows(rows([]), NAMES)
    assert (len(survey.example_ids), survey.bad, survey.good.labels.tolist()) == (0, {}, [])
