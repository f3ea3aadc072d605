"""A file of jobs: whatever a job asks for and cannot have is reported, not ignored."""

import pytest

from emloc_core.errors import EmlocError
from emloc_core.zoo.jobs.sources import Defaults, resolve


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ("train = { steps = 3 }", "train"),
        ("train = true\nmerge = true", "train, merge"),
        ("correct = { clamp = 1 }\neval = { tasks = ['own'] }", "correct, eval"),
        ("data = 'org/rows'\ntrain = false\nmerge = true", "merge"),
    ],
)
def test_a_job_that_is_not_trained_asks_for_no_training(tmp_path, settings, named):
    file = tmp_path / "jobs.toml"
    file.write_text(f"[[job]]\nmodel = 'a/b'\n{settings}\n")
    with pytest.raises(EmlocError, match=f"job.0: {named}: only a job with its own data"):
        resolve([str(file)], Defaults(data="org/rows"))


@pytest.mark.parametrize("settings", ["", "train = false", "merge = false", "data = 'org/rows'\nmerge = true"])
def test_what_is_not_asked_for_is_no_error(tmp_path, settings):
    file = tmp_path / "jobs.toml"
    file.write_text(f"[[job]]\nmodel = 'a/b'\n{settings}\n")
    (job,) = resolve([str(file)], Defaults(data="org/rows"))
    assert bool(job.train) == job.merge == ("data" in settings)
