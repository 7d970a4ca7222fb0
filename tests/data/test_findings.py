import hashlib

import numpy as np
import pytest
from helpers import broken, png
from image_files import encoded, photo

from hf_dash.data.findings import look_at


def stored(*contents):
    return [{"bytes": content, "path": None} for content in contents]


def test_a_look_finds_what_tells_images_apart_and_what_is_wrong_with_them():
    batches = [(stored(png(1), broken(2)), [3, None]), (stored(b"", png(1)), [0, -1])]
    found = look_at(iter(batches))
    assert len(found) == 4
    assert found.labels.tolist() == [3, -2, 0, -1]
    digests = [hashlib.sha256(content).digest() for content in (png(1), broken(2), b"", png(1))]
    assert [row.tobytes() for row in found.sha256] == digests
    assert found.content.tolist() == [int.from_bytes(digest[:8], "big") for digest in digests]
    assert found.modes.tolist() == [b"L", b"", b"", b"L"]
    assert {row: flaw.what for row, flaw in found.bad.items()} == dict.fromkeys(
        (1, 2), "is a corrupt image"
    )


def test_an_image_that_cannot_be_read_has_no_checksum(tmp_path):
    gone = {"bytes": None, "path": str(tmp_path / "gone.png")}
    found = look_at([([gone], [0])])
    assert not found.sha256.any()
    assert found.bad[0].detail.startswith("FileNotFoundError")


@pytest.mark.parametrize("mode", [None, "RGB"])
def test_modes_are_those_after_converting(mode):
    assert look_at([(stored(png(1)), [0])], mode=mode).modes.tolist() == [(mode or "L").encode()]


def test_pixels_tell_apart_what_was_stored_in_two_formats():
    image = photo(0, 0)
    batch = stored(encoded(image, "PNG"), encoded(image, "BMP"), encoded(photo(0, 1), "PNG"))
    found = look_at([(batch, [0, 0, 0])], by_pixels=True)
    assert found.content[0] == found.content[1] != found.content[2]
    assert len(np.unique(found.sha256, axis=0)) == 3


def test_no_rows_are_no_findings():
    found = look_at([])
    assert (found.sha256.shape, found.modes.shape, found.bad) == ((0, 32), (0,), {})
