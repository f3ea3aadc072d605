"""A short part of the campaign against zoos: real jobs on this machine, killed at random moments."""

import pytest
from chaos.results import Verdict
from chaos.zoo import campaign


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_made_twice(tmp_path):
    results = campaign(tmp_path, seconds=0, jobs=1, ray=False)
    assert results
    assert {result.verdict: result.why for result in results} == {Verdict.RESUMED: ""}
