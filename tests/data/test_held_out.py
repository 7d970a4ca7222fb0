from dataclasses import replace

import pytest
from helpers import heard, png, write_parquet
from image_files import class_folders, encoded, photo

from hf_dash import DataConfig
from hf_dash.data.arrivals import load_arrival
from hf_dash.data.held_out import check_overlap, drop_repeated, hold_out


def arrival_of(*paths, **settings):
    config = DataConfig(arrive_by="files", **settings)
    return load_arrival(paths, config, root=paths[0].parent)


def names_of(arrival):
    return {arrival.names.name(example_id) for example_id in arrival.survey.example_ids.tolist()}


def test_an_image_that_goes_or_comes_moves_no_other(tmp_path):
    folder = class_folders(tmp_path / "monday", count=100)
    train, held_out = (names_of(part) for part in hold_out(arrival_of(folder), 0.25))
    assert train | held_out == {
        f"monday/{name}/{name[0].replace('c', 'a').replace('d', 'b')}_{number:03d}.png"
        for name in ("cat", "dog")
        for number in range(100)
    }
    # 50 are expected; three standard deviations of a binomial are 18.
    assert 32 <= len(held_out) <= 68
    (folder / "cat" / "a_003.png").unlink()
    photo(0, 500).save(folder / "cat" / "a_0021.png")
    later_train, later_held_out = (names_of(part) for part in hold_out(arrival_of(folder), 0.25))
    assert not held_out & later_train
    assert not train & later_held_out


def test_the_same_image_twice_is_on_one_side(tmp_path):
    folder = class_folders(tmp_path / "a", count=20)
    for path in sorted(folder.glob("*/*.png")):
        path.with_name(f"copy_of_{path.name}").write_bytes(path.read_bytes())
    train, held_out = hold_out(arrival_of(folder), 0.5)
    assert not set(train.survey.content) & set(held_out.survey.content)
    assert len(train.survey.content) + len(held_out.survey.content) == 80


def test_a_share_that_leaves_nothing(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [png(1)], [0])
    content = int(arrival_of(path).survey.content[0]) / 2**64
    assert hold_out(arrival_of(path), content * 0.99)[1] is None
    with pytest.raises(ValueError, match=r"train_val_split .* holds out all 1 images"):
        hold_out(arrival_of(path), content + (1 - content) / 2)


@pytest.fixture
def overlapping(tmp_path):
    """Two arrivals and held-out images, two of which are among them, in other files."""
    first = write_parquet(tmp_path / "1.parquet", [png(n) for n in range(4)], [0, 1, 0, 1])
    second = write_parquet(tmp_path / "2.parquet", [png(n) for n in range(4, 8)], [0, 1, 0, 1])
    held = write_parquet(tmp_path / "h.parquet", [png(9), png(6), png(2)], [0, 0, 0])
    return [arrival_of(first), arrival_of(second)], arrival_of(held)


def test_held_out_images_among_those_to_train_on_are_counted_and_named(overlapping):
    arrivals, held_out = overlapping
    with pytest.raises(
        ValueError, match="2 of 3 held-out images are also training images"
    ) as raised:
        check_overlap(arrivals, held_out)
    assert "h.parquet:2 = 1.parquet:2" in str(raised.value)
    assert "h.parquet:1 = 2.parquet:2" in str(raised.value)
    with heard() as lines:
        assert check_overlap(arrivals, held_out, allow_overlap=True) == 2
    assert "2 of 3 held-out images" in lines[0]
    assert check_overlap(arrivals[:1], arrival_after(held_out, [2])) == 0


def arrival_after(arrival, example_ids):
    return arrival.without(frozenset(example_ids))


def test_another_file_of_the_same_pixels_is_found_where_asked(tmp_path):
    image = photo(0, 0)
    train = write_parquet(tmp_path / "t.parquet", [encoded(image, "PNG")], [0])
    held = write_parquet(tmp_path / "h.parquet", [encoded(image, "BMP")], [0])
    assert check_overlap([arrival_of(train)], arrival_of(held)) == 0
    by_pixels = {"compare_images_by": "pixels"}
    with pytest.raises(ValueError, match="1 of 1 held-out images"):
        check_overlap([arrival_of(train, **by_pixels)], arrival_of(held, **by_pixels))


def test_a_shard_that_comes_twice_is_counted_once_and_said(tmp_path):
    first = write_parquet(tmp_path / "1.parquet", [png(1), png(2)], [0, 1])
    copy = write_parquet(tmp_path / "2.parquet", [png(2), png(1)], [1, 0])  # in another order
    other = write_parquet(tmp_path / "3.parquet", [png(1), png(2)], [1, 0])  # other labels
    with heard() as lines:
        kept = drop_repeated([arrival_of(first), arrival_of(copy, other)])
    assert [arrival.num_examples for arrival in kept] == [2, 2]
    assert kept[1].files == ("3.parquet",)
    assert lines == ["2.parquet has the same images as 1.parquet: counted once"]
    again = drop_repeated([arrival_of(first), arrival_of(first)])
    assert [arrival.num_examples for arrival in again] == [2, 0]
    kept = drop_repeated([arrival_of(first), arrival_of(copy)], num_kept=2)
    assert [arrival.num_examples for arrival in kept] == [2, 2]  # as they are recorded


def test_an_arrival_has_to_be_read_first(tmp_path):
    path = write_parquet(tmp_path / "1.parquet", [png(1)], [0])
    unread = replace(arrival_of(path), survey=None)
    with pytest.raises(ValueError, match="arrival must have been read once"):
        hold_out(unread, 0.5)
