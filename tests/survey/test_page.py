"""The page of the survey says what its results say."""

import pytest
from support.whole_run import CRASHED, REFUSED, RIGHT, WRONG

from survey.page import MISSING, OTHER, PAGE, outcome, page, results


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"outcome": RIGHT, "why": "", "ways": {"nf4": RIGHT}}, RIGHT),
        ({"outcome": REFUSED, "why": "", "ways": {"nf4": REFUSED, "low-rank": RIGHT}}, RIGHT),
        ({"outcome": REFUSED, "why": "", "ways": {"nf4": REFUSED}}, REFUSED),
        ({"outcome": WRONG, "why": "", "ways": {"nf4": WRONG, "low-rank": RIGHT}}, WRONG),
        ({"outcome": CRASHED, "why": "", "ways": {"nf4": CRASHED, "low-rank": RIGHT}}, CRASHED),
        ({"outcome": REFUSED, "why": "'bart' is an encoder-decoder; EMLoC tunes"}, OTHER),
        ({"outcome": REFUSED, "why": "The logits of a token depend on later ones, by 4e-02"}, OTHER),
        ({"outcome": REFUSED, "why": "The logits of a token depend on later ones", "type": "xlnet"}, REFUSED),
        ({"outcome": REFUSED, "why": "The logits of a token depend on later ones", "class": "image-text"}, REFUSED),
        ({"outcome": REFUSED, "why": "requires the timm library but it was not found in your environment"}, MISSING),
    ],
)
def test_an_outcome_is_that_of_all_ways(result, expected):
    assert outcome({"type": "bert", "class": "text", **result}) == expected


def test_the_page_is_written_from_the_results():
    by_type = results()
    assert len(by_type) > 250
    assert PAGE.read_text() == page(by_type.values())


def test_nothing_is_wrong_without_a_word():
    assert [name for name, result in results().items() if outcome(result) == WRONG] == []
