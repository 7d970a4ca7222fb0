import unicodedata

import pytest
from helpers import heard

from hf_dash.data.names import canonical, check_shared, check_spelling, normalized, shown

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def test_a_name_is_the_same_however_it_was_typed():
    assert NFC != NFD
    assert normalized(NFD) == NFC
    assert normalized(" New York\n") == "New York"


@pytest.mark.parametrize(
    "pair", [("cat", "Cat"), ("new york", "newyork"), ("ﬁsh", "fish"), (NFC, NFD), ("ß", "SS")]
)
def test_names_that_look_alike_are_refused_and_both_named(pair):
    with pytest.raises(ValueError, match="labels must differ by more than case") as raised:
        check_spelling(["dog", *pair])
    assert all(ascii(name) in str(raised.value) for name in pair)


def test_other_names_may_be_close():
    check_spelling(["cat", "cats", "cat2", "cat", "Katze", "c a t s"[:1]])


def test_an_arrival_shares_a_class_with_its_parent():
    check_shared(["cat", "dog"], ["dog", "owl"], "monday", allow_disjoint=False)
    check_shared([], ["owl"], "monday", allow_disjoint=False)  # the first one
    with pytest.raises(ValueError, match=r"monday must share a class .* cat, dog, got owl"):
        check_shared(["cat", "dog"], ["owl"], "monday", allow_disjoint=False)
    with heard() as lines:
        check_shared(["cat", "dog"], ["owl"], "monday", allow_disjoint=True)
    assert "monday must share a class" in lines[0]


@pytest.mark.parametrize(
    ("known", "arriving", "hint"),
    [
        (["LABEL_0", "LABEL_1"], ["cat"], "classes have no names"),
        (["cat", "dog"], ["0", "1"], "integer labels need names"),
    ],
)
def test_the_usual_reasons_are_told(known, arriving, hint):
    with pytest.raises(ValueError, match=hint):
        check_shared(known, arriving, "monday", allow_disjoint=False)


def test_many_names_are_cut_short():
    assert shown(["a", "b"]) == "a, b"
    assert shown([str(n) for n in range(1000)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … (1,000 in all)"


def test_splits_go_by_several_names():
    found = [canonical(name) for name in ("training", "Valid", "dev", "evaluation", "gold", "cat")]
    assert found == ["train", "validation", "validation", "test", None, None]
