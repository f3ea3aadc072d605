"""Hostile inputs end in a sentence, or in an output that is whole."""

import sys

import pytest
from support.forkserver import warm_process

from chaos.corpus import cases
from chaos.hostile import campaign
from chaos.results import FAILED


def defects(results):
    return [str(result) for result in results if result.verdict in FAILED]


def test_there_are_hundreds_of_different_ones():
    names = [(case.kind, case.name, case.command) for case in cases()]
    assert len(set(names)) == len(names) > 300


def exit_as_warm():
    sys.exit(0 if "support.warm" in sys.modules else 1)


@pytest.mark.thorough
def test_a_fork_has_imported_what_the_commands_need():
    process = warm_process(exit_as_warm)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.thorough
def test_a_part_of_the_corpus(tmp_path):
    results = list(campaign(tmp_path / "hostile", limit=20))
    assert len(results) == 20
    assert defects(results) == []


@pytest.mark.chaos
def test_all_of_the_corpus(tmp_path):
    assert defects(campaign(tmp_path / "hostile")) == []
