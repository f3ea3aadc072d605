"""Hostile inputs end in a sentence, or in an output that is whole."""

import pytest

from chaos.corpus import cases
from chaos.hostile import campaign
from chaos.results import FAILED


def defects(results):
    return [str(result) for result in results if result.verdict in FAILED]


def test_there_are_hundreds_of_different_ones():
    names = [(case.kind, case.name, case.command) for case in cases()]
    assert len(set(names)) == len(names) > 300


def test_a_part_of_the_corpus(tmp_path):
    results = list(campaign(tmp_path / "hostile", limit=20))
    assert len(results) == 20
    assert defects(results) == []


@pytest.mark.chaos
def test_all_of_the_corpus(tmp_path):
    assert defects(campaign(tmp_path / "hostile")) == []
