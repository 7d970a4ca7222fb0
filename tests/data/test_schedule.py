from dataclasses import replace

import pytest
import torch
from helpers import heard, png, write_parquet

from hf_dash import DataConfig
from hf_dash.data import Schedule, load_arrival

DATA = DataConfig(arrive_by="files")
OPEN = replace(DATA, allow_disjoint_classes=True)


@pytest.fixture
def arrival(tmp_path):
    """Makes arrivals of one image a class."""

    def make(*names, first=0):
        path = tmp_path / f"{'_'.join(names)}{first}.parquet"
        write_parquet(
            path, [png(first + n) for n in range(len(names))], list(range(len(names))), names
        )
        return load_arrival([path], DATA, root=tmp_path)

    return make


def test_classes_come_as_they_arrive(arrival):
    schedule = Schedule((arrival("dog", "cat"), arrival("eel", "cat", first=9)), (arrival("cat"),))
    assert schedule.label_names(1) == ("dog", "cat")
    assert schedule.label_names() == ("dog", "cat", "eel")
    rounds = schedule.rounds(lambda image: torch.zeros(1))
    assert [r.label_names for r in rounds] == [("dog", "cat"), ("dog", "cat", "eel")]
    assert rounds[1].class_counts() == [1, 2, 1]


def test_a_model_continues_with_classes_of_its_own(arrival):
    schedule = Schedule((arrival("eel", "cat"),), (arrival("dog", first=50),))
    continued = schedule.after(["cat", "dog"], DATA)
    assert continued.label_names() == ("cat", "dog", "eel")
    labels = continued.rounds(lambda image: torch.zeros(1))[0].new.labels
    assert labels == [2, 0]
    assert continued.held_out_examples(lambda image: torch.zeros(1)).labels == [1]


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (["owl", "emu"], "the new arrival .* must share a class with its parent"),
        (["LABEL_0", "LABEL_1"], "classes have no names"),
        (["Cat", "dog", "eel"], "got 'Cat' and 'cat'"),
    ],
)
def test_a_parent_that_does_not_fit_is_refused(arrival, known, message):
    schedule = Schedule((arrival("cat", "dog"),), (arrival("cat", first=50),))
    with pytest.raises(ValueError, match=message):
        schedule.after(known, DATA)
    if "Cat" not in message:
        assert schedule.after(known, OPEN).label_names() == (*known, "cat", "dog")


def test_held_out_images_share_a_class_with_the_others(arrival):
    schedule = Schedule((arrival("cat", "dog"),), (arrival("owl", first=50),))
    with pytest.raises(ValueError, match="the held-out images must share a class"):
        schedule.check_classes(DATA)
    with pytest.raises(ValueError, match="the held-out images must share a class"):
        schedule.after(["cat"], DATA)
    partly = Schedule((arrival("cat", "dog"),), (arrival("owl", "cat", first=50),))
    with heard() as lines:
        partly.check_classes(DATA)
    assert lines == ["no image to train on has the held-out classes owl"]


def test_nothing_wrong_is_said_nothing_about(arrival):
    schedule = Schedule(
        (arrival("cat", "dog"), arrival("dog", "eel", first=9)), (arrival("cat", first=50),)
    )
    with heard() as lines:
        schedule.check_classes(DATA)
        assert schedule.checked(DATA).overlap == 0
    assert lines == []
