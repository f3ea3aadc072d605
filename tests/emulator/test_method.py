"""Defaults for settings that the user leaves open."""

import pytest
from emloc_llama import LLAMA
from emloc_qwen import QWEN_MOE
from pydantic import ValidationError
from support.jobs import compress_job
from support.models import save_tiny_model
from support.rows import example_rows, write_jsonl

from emloc_core.data.rows import load_rows
from emloc_core.emulator.method import usual_samples
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.workload import Workload
from emloc_core.settings import CompressSettings
from emloc_core.standins import NF4, FourBitLowRank, LowRank, Trellis


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a model of Linears alone, and one with experts."""
    directory = tmp_path_factory.mktemp("bases")
    families = {"dense": LLAMA, "experts": QWEN_MOE}
    return {name: save_tiny_model(family.tiny_configs[0], directory / name) for name, family in families.items()}


def made_with(base, rows_file, output, **chosen):
    settings = CompressSettings(samples=4, selection=2, **chosen)
    job = compress_job(base, rows_file, output, settings)
    recorded = job.output.request["settings"]  # what is recorded, so that other defaults are another request
    return recorded["calibration"], recorded["allocator"]


USUAL = {kind.name: (kind.calibrations[0], kind.allocator) for kind in (LowRank, NF4, FourBitLowRank, Trellis)}


@pytest.mark.parametrize("kind", USUAL)
def test_the_kind_decides(bases, rows_file, tmp_path, kind):
    assert made_with(bases["dense"], rows_file, tmp_path / "out", kind=kind) == USUAL[kind]


def test_experts_become_smaller_by_default(bases, rows_file, tmp_path):
    assert made_with(bases["experts"], rows_file, tmp_path / "out", kind="low-rank") == ("propagated", "uniform")
    assert made_with(bases["experts"], rows_file, tmp_path / "four", kind="nf4") == USUAL["nf4"]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"calibration": "base"}, ("base", "uniform")),
        ({"paper": True}, ("base", "uniform")),
        ({"calibration": "base", "allocator": "global"}, ("base", "global")),
        ({"kind": "low-rank", "allocator": "uniform"}, ("propagated", "uniform")),
        ({"kind": "trellis", "calibration": "base"}, ("base", "uniform")),
    ],
)
def test_what_the_user_says_holds(bases, rows_file, tmp_path, chosen, expected):
    assert made_with(bases["dense"], rows_file, tmp_path / "out", **chosen) == expected


@pytest.mark.parametrize(
    ("chosen", "kind"),
    [({}, "nf4"), ({"ratio": 0.3}, "low-rank"), ({"allocator": "global"}, "low-rank"), ({"paper": True}, "low-rank")],
)
def test_where_nothing_chooses_a_kind_it_is_the_best_or_that_of_a_ratio(bases, rows_file, tmp_path, chosen, kind):
    settings = CompressSettings(samples=4, selection=2, **chosen)
    rows = load_rows(str(rows_file))
    assert compress_job(bases["dense"], rows, tmp_path / "out", settings).format.name == kind
    assert MemoryModel(bases["dense"] / "config.json", Workload(batch_size=1, length=16), settings).format.name == kind


@pytest.mark.parametrize("other", [{"kind": "nf4"}, {"calibration": "propagated"}, {"allocator": "global"}])
def test_the_way_of_the_paper_is_not_mixed_with_another(other):
    with pytest.raises(ValidationError, match=rf"leave out {next(iter(other))} or paper"):
        CompressSettings(paper=True, **other)


@pytest.mark.parametrize(("rows", "expected"), [(None, 256), (2000, 256), (600, 150), (200, 64), (120, 40)])
def test_a_kind_that_takes_many_rows_leaves_most_of_them_for_tuning(rows, expected):
    assert usual_samples(FourBitLowRank(), rows) == expected
    assert usual_samples(LowRank(), rows) == usual_samples(NF4(), rows) == min(64, expected)


def test_copies_of_rows_are_not_counted(bases, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [*example_rows(), *example_rows(), *example_rows()])
    settings = CompressSettings(kind="low-rank-nf4")
    job = compress_job(bases["dense"], rows, tmp_path / "out", settings)
    assert len(job.rows.calibration) == job.settings.samples == 40  # a third of 120


@pytest.mark.parametrize(
    "chosen", [{}, {"kind": "low-rank", "calibration": "propagated"}, {"calibration": "base", "allocator": "global"}]
)
@pytest.mark.parametrize("base", ["dense", "experts"])
def test_a_plan_is_of_the_emulator_that_is_made(bases, rows_file, tmp_path, base, chosen):
    settings = CompressSettings(samples=4, selection=2, **chosen)
    job = compress_job(bases[base], rows_file, tmp_path / "out", settings)
    model = MemoryModel(bases[base] / "config.json", Workload(batch_size=1, length=16), settings)
    assert model.plan().ranks == job.plan.ranks
