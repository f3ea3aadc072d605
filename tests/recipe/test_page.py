"""The page of a run: what it says, and in a real browser (``make test-browser``) how it looks."""

import json
import random
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.chromium import Page
from support.jobs import train_job
from support.marks import thorough
from support.runs import HOSTILE, finished_run

from emloc_core import compress, merge, plan, polish, train
from emloc_core.cli import cli
from emloc_core.errors import EmlocError
from emloc_core.files.output import TIMING
from emloc_core.memory.ways import EXACT, ORDINARY
from emloc_core.recipe.page import write_page
from emloc_core.recipe.view import RunView
from emloc_core.settings import TrainSettings


def test_it_says_what_the_files_say(tmp_path):
    view = RunView.read(finished_run(tmp_path / "run"))
    assert [stage.name for stage in view.stages] == [
        "emulator", "adapter", "corrected", "polished", "full_lora", "full_lora_60", "evaluation",
    ]  # fmt: skip
    assert [candidate["chosen"] for candidate in view.candidates] == [False, False, True]
    assert view.seconds == 60 * sum(range(7))
    assert {(strip.tower, strip.label) for strip in view.errors} == {
        (tower, name) for tower in ("model.layers", "vision.blocks") for name in ("up_proj", "down_proj")
    }
    assert view.errors[1].values[1] is None
    base = view.scores[0]["cells"]
    assert base["nll"] == (1.5, pytest.approx(0.098), False)
    assert base["accuracy"][1] is None
    assert view.scores[1]["cells"]["accuracy"][2]
    assert view.verdict == "scale 0.85, the surest of 3 candidates: 1.000 ± 0.200 nats gained per row"
    assert view.facts == [
        ("base", "base-1b"), ("data", HOSTILE), ("emulator", "low-rank, ratio 0.6"), ("LoRA", "rank 8"),
        ("versions", "emloc 0.2.0, torch 2.13.0, device cpu"),
    ]  # fmt: skip
    tuned = {stage.name: stage for stage in view.stages if stage.losses}
    assert list(tuned) == ["adapter", "polished", "full_lora"]
    assert [line.name for line in tuned["adapter"].losses] == [
        "rows of the step", "held-out rows", "held-out rows, on the base",
    ]  # fmt: skip
    assert tuned["adapter"].losses[1].points[-1] == (20, 0.075)
    assert [bool(stage.margins) for stage in tuned.values()] == [False, True, False]


def test_the_command_writes_one_page_with_nothing_unescaped(tmp_path):
    run = finished_run(tmp_path / "run")
    result = CliRunner().invoke(cli, ["report", str(run), "-o", str(tmp_path / "page.html")])
    assert result.exception is None, result.exception
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert "&lt;script&gt;document.title" in page
    assert "2 GB → 600 MB" in page
    assert "/home/someone" not in page
    assert "Answers before and after" in page
    assert not re.search(r"(src|href)=.(?!#)", page)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_memory_is_planned_for_the_device_that_tuned(shallow_model, rows_file, tmp_path):
    run = tmp_path / "run"
    compress(
        shallow_model, str(rows_file), run / "emulator", kind="low-rank", calibration="base", samples=4, selection=2
    )
    train_job(run / "emulator", rows_file, run / "adapter", TrainSettings(steps=1, batch_size=1, bf16=False)).run()

    def planned() -> dict[str, int | None]:
        return {stage.name: stage.planned for stage in RunView.read(run).stages}

    on_cpu = planned()
    assert 0 < on_cpu["emulator"] < on_cpu["adapter"]
    timing = run / "adapter" / TIMING
    timing.write_text(json.dumps({**json.loads(timing.read_text()), "peak_gpu_bytes": 1}))
    assert planned()["adapter"] != on_cpu["adapter"]  # by the context of CUDA, and without the imports


@pytest.mark.parametrize("exact", [*thorough(False), True])
def test_memory_is_planned_where_the_model_itself_is_tuned(shallow_model, rows_file, tmp_path, exact):
    run, shape = tmp_path / "run", {"batch_size": 2, "bf16": False}
    adapter = train(shallow_model, str(rows_file), run / "adapter", exact=exact, steps=1, **shape)
    polish(adapter, str(rows_file), run / "polished", steps=1, **shape)
    merge(adapter, run / "merged")
    planned = {stage.name: stage.planned for stage in RunView.read(run).stages}
    assert planned.keys() == {"adapter", "polished", "merged"}
    needs = plan(shallow_model, data=str(rows_file), memory="8GiB", device="cpu", **shape)
    lora, steps = (next(way.bytes for way in needs.decision.ways if way.name == name) for name in (ORDINARY, EXACT))
    assert planned["polished"] > steps  # which is planned one row at a time
    assert planned["adapter"] == (planned["polished"] if exact else lora)


def test_a_directory_without_a_run_is_refused(tmp_path):
    for directory, complaint in ((tmp_path, "holds no finished stage"), (tmp_path / "nothing", "is not a directory")):
        with pytest.raises(EmlocError, match=complaint):
            write_page(directory, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("file", ["adapter/emloc.json", "adapter/timing.json", "results.json", "answers.json"])
def test_a_file_of_something_else_is_named(tmp_path, file):
    (finished_run(tmp_path / "run") / file).write_text("[]")
    with pytest.raises(EmlocError, match=rf"{file} holds a list, not an object"):
        write_page(tmp_path / "run", tmp_path / "page.html")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document, by the keys that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def broken_files(run: Path) -> Iterator[tuple[str, Any]]:
    """Every JSON file of a run, with one value in it replaced by one of another type; and what was changed."""
    draw = random.Random(0)
    for file in sorted(run.rglob("*.json")):
        content = file.read_text()
        every = list(places(json.loads(content)))
        for path in draw.sample(every, min(4, len(every))):
            document = json.loads(content)
            *outer, last = path
            parent = reduce(lambda inner, key: inner[key], outer, document)
            parent[last] = next(other for other in draw.sample([7, "?", [1], {"?": 1}, None], 5)
                                if type(other) is not type(parent[last]))  # fmt: skip
            file.write_text(json.dumps(document))
            yield f"{file.relative_to(run)}: {path}", parent[last]
        file.write_text(content)


def test_a_damaged_file_gives_a_page_or_an_error(tmp_path):
    """Never a traceback: anyone may have written the files."""
    run, refused = finished_run(tmp_path / "run"), 0
    for what, value in broken_files(run):
        try:
            write_page(run, tmp_path / "page.html")
        except EmlocError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{what} = {value!r}") from error
    assert refused > 5


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("chromium") / "profile")
    yield page
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_in_order_in_a_browser(browser: Page, width: int, dark: bool, tmp_path: Path) -> None:
    file = write_page(finished_run(tmp_path / "run"), tmp_path / "page.html")
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(file, width, dark=dark)
    assert browser.value("document.title") == "run · run report"
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.complaints == []
    assert browser.requests == [file.resolve().as_uri()]
    plots = browser.value("""[...document.querySelectorAll('svg.plot')].map(each => {
      const box = each.getBoundingClientRect(), path = each.querySelector('path');
      return [box.width, box.height, path ? path.getTotalLength() : 0];
    })""")
    assert len(plots) == 4
    assert browser.value("document.querySelectorAll('svg.chart').length") == 3 + 1
    assert all(across > 100 and up > 50 and drawn > 10 for across, up, drawn in plots)
    background = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.removeprefix("rgb(").rstrip(")").split(","))) < 384) == dark
    assert browser.value("document.querySelector('.candidates tr.chosen').innerText").split() == [
        "0", "0.85", "1.3", "1", "±", "0.2", "32", "chosen",
    ]  # fmt: skip
