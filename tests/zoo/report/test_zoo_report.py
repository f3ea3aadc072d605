"""The content of a zoo report: JSON and text. test_browser.py looks at the page."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from support import zoos

from emloc_core.cli.zoo import report as command
from emloc_core.errors import EmlocError
from emloc_core.report.error_plot import band, sparkline, strips
from emloc_core.zoo.jobs.outcome import Outcome
from emloc_core.zoo.jobs.task import LOGS
from emloc_core.zoo.report.log_end import log_end, plain
from emloc_core.zoo.report.page import DATA, PAGE, write_report
from emloc_core.zoo.state.lock import driving
from emloc_core.zoo.state.store import Store


class Text(HTMLParser):
    """The text of a page, and its tags and attributes."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, text):
        self.text += text


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return zoos.all_states(tmp_path_factory.mktemp("zoos") / "everything")


@pytest.fixture(scope="module")
def content(zoo):
    return write_report(zoo, zoo)


@pytest.fixture
def reported_zoo(zoo, content):
    """The zoo with its report."""
    assert content["jobs"]
    return zoo


@pytest.fixture
def by_name(content):
    return {job["name"]: job for job in content["jobs"]}


def test_the_files_are_those_that_are_returned(zoo, content):
    assert json.loads((zoo / DATA).read_text(), parse_constant=pytest.fail) == content
    assert not list(zoo.glob(".*partial"))


def test_all_states_are_counted(content):
    assert content["summary"]["states"] == {"failed": 1, "interrupted": 1, "waiting": 2, "done": 4, "duplicate": 1}
    assert content["summary"]["jobs"] == len(content["jobs"]) == 9
    assert content["summary"]["base_bytes"] == 2_100_000_000
    assert content["summary"]["emulator_bytes"] == 1_428_000_000
    assert content["summary"]["seconds"] == 100 * 4 + 300 + 100


def test_a_running_job_is_running(tmp_path):
    store = Store(tmp_path, create=True)
    zoos.add(store, "one")
    with driving(tmp_path):
        store.start("one", 1, f"{LOGS}/one.1.log")
        assert write_report(tmp_path, tmp_path)["summary"]["states"] == {"running": 1}
        assert "mark running" in (tmp_path / PAGE).read_text()
    store.close()


def test_memory_says_whether_it_was_measured(by_name):
    assert by_name["tiny-alpaca-1B"]["memory"] == [
        {"of": "evaluating the base", "short": "base", "bytes": 1_940_000_000, "planned": False},
        {"of": "making the emulator", "short": "making", "bytes": 900_000_000, "planned": False},
        {"of": "LoRA on the emulator", "short": "tuning", "bytes": 2_360_000_000, "planned": False},
    ]
    assert [(peak["of"], peak["planned"]) for peak in by_name["waits"]["memory"]] == [
        ("inference on the base", True),
        ("LoRA on the emulator", True),
    ]


def test_the_kind_and_the_losses_are_told(reported_zoo, content):
    job = next(job for job in content["jobs"] if job["losses"])
    assert (job["kind"], job["losses"]) == ("low-rank", {"tuning": 0.41, "base": 0.38})
    text = " ".join(Text((reported_zoo / PAGE).read_text()).text.split())
    assert "tuning 0.41" in text
    assert "base 0.38" in text


def test_planned_weights_are_said_to_be(reported_zoo):
    assert len(re.findall(r"<small>planned</small>\s*</td>", (reported_zoo / PAGE).read_text())) == 1


def test_a_gpus_peak_goes_before_the_processs(tmp_path):
    store = Store(tmp_path, create=True)
    result = zoos.result(complete=False)
    result["stages"]["emulator"]["peak_gpu_bytes"] = 123
    zoos.run(store, zoos.add(store, "one"), Outcome(None, result=result))
    store.close()
    assert write_report(tmp_path, tmp_path)["jobs"][0]["memory"][0]["bytes"] == 123


def test_errors_that_are_no_numbers_are_counted_and_written_in_words(by_name):
    errors = by_name["not-a-number"]["errors"]
    assert errors["not_finite"] == 1
    assert errors["path"].startswith("model.layers.")
    assert 0 < errors["median"] < errors["worst"] < 1
    assert by_name["not-a-number"]["result"]["linears"][20]["relative_error"] == "NaN"


def test_a_failure_has_its_cause_and_the_end_of_its_log(by_name, zoo):
    failed = next(job for job in by_name.values() if job["state"] == "failed")
    assert failed["attempts"][-1]["cause"] == "bad input"
    assert failed["log_end"].endswith("model-00002.safetensors ends too early.")
    assert "model-00002.safetensors ends too early." in (zoo / PAGE).read_text()
    assert by_name["tiny-alpaca-1B"]["log_end"] is None


def test_the_page_asks_for_nothing_and_hostile_text_stays_text(reported_zoo):
    page = Text((reported_zoo / PAGE).read_text(encoding="utf-8"))
    assert zoos.HOSTILE in page.text
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "srcset", "action")]
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert "url(" not in page.text
    assert "@import" not in page.text


def test_control_characters_reach_no_file(reported_zoo):
    text = (reported_zoo / PAGE).read_text(encoding="utf-8")
    assert not {character for character in text if ord(character) < 32 and character != "\n"}
    assert "\u202e" not in text


def test_scores_are_in_both_files(reported_zoo, by_name):
    assert by_name["tiny-alpaca-1B"]["result"]["systems"]["base+corrected"]["nll"] == 0.18
    page = (reported_zoo / PAGE).read_text()
    assert '<td class="best">0.18</td>' in page
    assert "1.16 → 0.18" in page


def test_a_tower_that_stayed_dense_is_said_and_not_drawn(reported_zoo, by_name):
    page = (reported_zoo / PAGE).read_text()
    assert "<code>model.visual.blocks</code> stayed dense." in page
    assert "<h4>model.visual.blocks</h4>" not in page
    assert by_name["only-the-emulator"]["errors"]["median"] > 0


def test_stages_are_in_the_order_in_which_they_were_done(tmp_path):
    result = zoos.result()
    result["stages"] = dict(sorted(result["stages"].items()))  # as JSON keeps them
    store = Store(tmp_path, create=True)
    zoos.run(store, zoos.add(store, "one", train={}, eval={"tasks": ["own"]}), Outcome(None, result=result))
    store.close()
    write_report(tmp_path, tmp_path)
    page = (tmp_path / PAGE).read_text()
    stages = re.findall(r'<tr><th>(\w+)</th><td>[^<]*</td><td class="wide">', page)
    assert stages == ["emulator", "adapter", "corrected", "evaluation"]


def test_a_job_without_a_result_has_no_figures(tmp_path):
    store = Store(tmp_path, create=True)
    zoos.run(store, zoos.add(store, "one"), Outcome(None))
    store.close()
    content = write_report(tmp_path, tmp_path)
    assert content["jobs"][0]["errors"] == {"median": None, "worst": None, "path": None, "not_finite": 0}


def test_an_empty_zoo(tmp_path):
    Store(tmp_path, create=True).close()
    content = write_report(tmp_path, tmp_path / "elsewhere")
    assert content["jobs"] == []
    assert "no jobs in this zoo yet" in (tmp_path / "elsewhere" / PAGE).read_text()


def test_there_has_to_be_a_zoo(tmp_path):
    with pytest.raises(EmlocError, match="There is no zoo at"):
        write_report(tmp_path / "none", tmp_path)


def test_a_report_that_cannot_be_written(zoo, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EmlocError, match="cannot be written"):
        write_report(zoo, tmp_path / "file")


@pytest.mark.thorough
def test_two_hundred_models_are_less_than_three_megabytes(tmp_path):
    zoo = zoos.many(tmp_path, 200)
    write_report(zoo, zoo)
    assert (zoo / PAGE).stat().st_size < 3_000_000


def test_the_command(zoo, tmp_path):
    result = CliRunner().invoke(command.command, [str(zoo), "-o", str(tmp_path)], catch_exceptions=False)
    assert result.output.startswith("9 jobs: 1 failed, 1 interrupted, 2 waiting, 4 done, 1 duplicate\n")
    assert {path.name for path in tmp_path.iterdir()} == {PAGE, DATA}
    result = CliRunner().invoke(command.command, [str(zoo), "-o", str(tmp_path), "--json"], catch_exceptions=False)
    assert json.loads(result.output)["zoo"] == "everything"


def test_kinds_that_end_alike_have_longer_labels():
    drawn = strips(dict.fromkeys(["l.0.mlp.down", "l.1.mlp.experts.down", "l.1.mlp.experts.up", "v.0.mlp.down"], 0.1))
    assert [strip.label for strip in drawn] == ["mlp.down", "experts.down", "up", "down"]


def test_strips_are_by_tower_and_kind_with_gaps():
    drawn = strips({
        "vision.blocks.0.attn.qkv": 0.1,
        "model.layers.0.mlp.down_proj": 0.2,
        "model.layers.2.mlp.down_proj": None,
        "model.layers.3.mlp.down_proj": math.nan,
        "model.layers.0.mlp.experts.0.up_proj": 0.1,
        "model.layers.0.mlp.experts.1.up_proj": 0.3,
        "projector": 0.4,
    })  # fmt: skip
    assert [(strip.tower, strip.kind, len(strip.values)) for strip in drawn] == [
        ("vision.blocks", "attn.qkv", 1),
        ("model.layers", "mlp.down_proj", 4),
        ("model.layers", "mlp.experts.*.up_proj", 4),
        ("", "projector", 1),
    ]
    assert drawn[1].values[:3] == [0.2, None, None]
    assert math.isnan(drawn[1].values[3])
    assert drawn[1].text == "mlp.down_proj, 4 blocks: 0.2 to 0.2, median 0.2; not a number in 1"
    assert drawn[2].values[0] == pytest.approx(0.2)


def test_a_line_has_gaps_dashes_and_marks():
    drawn = sparkline([0.0, 0.5, None, 1.0, math.nan], 1.0)
    assert 'class="line" d="M8 92l96-42M288 8h16"' in drawn
    assert 'class="nan" d="M392 0v100"' in drawn
    assert "<path" not in sparkline([None, None], 0)


def test_a_band_reaches_from_the_least_to_the_largest():
    drawn = band(strips({"l.0.a": 0.0, "l.0.b": 1.0, "l.1.a": 0.5, "l.1.b": 0.5}), 1.0)
    assert 'class="area" d="M8 8l384 42l0 0l-384 42"' in drawn
    assert 'class="line" d="M8 50l384 0"' in drawn


def test_the_end_of_a_log(tmp_path):
    (tmp_path / "log").write_bytes(zoos.LOG)
    lines = log_end(tmp_path, "log").split("\n")
    assert lines[0] == "100%"
    assert lines[1] == "\ufffd\ufffd\ufffd\ufffdbytes"
    assert lines[-1] == "emloc: error: model-00002.safetensors ends too early."
    (tmp_path / "long").write_text("".join(f"{number}\n" for number in range(100_000)))
    assert log_end(tmp_path, "long", 3) == "99997\n99998\n99999"
    (tmp_path / "wide").write_text("x" * 10_000)
    assert len(log_end(tmp_path, "wide")) < 600


@pytest.mark.parametrize("log", ["missing", "../secret", "/etc/passwd", "link"])
def test_a_log_is_read_within_the_zoo_alone(tmp_path, log):
    (tmp_path / "zoo").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "zoo" / "link").symlink_to(tmp_path / "secret")
    assert log_end(tmp_path / "zoo", log) is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b[1;31mred\x1b[0m", "red"), ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x07", "link"), ("a\rb", "b"),
     ("a\r\nb", "a\nb"),
     ("\x9b31m", "\ufffd31m"), ("\x1b", "\ufffd"), ("a\tb", "a   b"), ("\ud800", "\ufffd")],
)  # fmt: skip
def test_text_as_a_terminal_would_leave_it(text, shown):
    assert plain(text) == shown
