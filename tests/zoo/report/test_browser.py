"""The report's page, looked at in a real browser: run by `make test-browser`, which needs Chromium."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import zoos
from support.chromium import Page

from emloc_core.zoo.jobs.outcome import Outcome
from emloc_core.zoo.report.page import PAGE, write_report
from emloc_core.zoo.state.store import Store

pytestmark = pytest.mark.browser

WIDTHS = (390, 1280)
#: Elements that are wider than the window, by what they are; a box that scrolls for itself may hold wider things.
OVERFLOWING = """
[...document.body.querySelectorAll('*')].filter(each => !each.closest('pre, .scroll, .symbols')
  && each.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map(each => each.outerHTML.slice(0, 100))
"""
#: Elements whose text does not fit in them and cannot be scrolled to.
CLIPPED = """
[...document.body.querySelectorAll('*')].filter(each => {
  const style = getComputedStyle(each);
  return each.checkVisibility() && each.textContent.trim() && style.overflowX !== 'visible'
    && style.overflowX !== 'auto' && each.scrollWidth > each.clientWidth + 1;
}).map(each => each.outerHTML.slice(0, 100))
"""
PLOTS = """
[...document.querySelectorAll('svg.plot')].filter(each => each.checkVisibility()).map(each => {
  const box = each.getBoundingClientRect();
  const drawn = [...each.querySelectorAll('path')].reduce((most, path) => Math.max(most, path.getTotalLength()), 0);
  return [box.width, box.height, drawn];
})
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("chromium") / "profile")
    yield page
    page.close()


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a zoo with all states, hostile strings among them."""
    zoo = zoos.all_states(tmp_path_factory.mktemp("zoos") / "everything")
    write_report(zoo, zoo)
    return zoo / PAGE


def look(page: Page, file: Path, width: int, dark: bool = False) -> None:
    """Open the file, and see that it is in order: nothing complains, leaves the page or sticks out of it."""
    page.complaints.clear()
    page.requests.clear()
    page.open(file, width, dark=dark)
    assert page.value("document.compatMode") == "CSS1Compat"
    assert page.value("innerWidth") == width
    assert page.value("document.documentElement.scrollWidth") == width
    assert page.value(OVERFLOWING) == []
    assert page.value(CLIPPED) == []
    assert page.complaints == []
    assert page.requests == [file.resolve().as_uri()]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_in_order(page, everything, width, dark, tmp_path):
    look(page, everything, width, dark)
    plots = page.value(PLOTS)
    assert len(plots) > 30
    for across, up, drawn in plots:
        assert across > 60
        assert up > 20
        assert drawn > 10
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000
    background = page.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.removeprefix("rgb(").rstrip(")").split(","))) < 384) == dark


@pytest.mark.parametrize("width", WIDTHS)
def test_failures_are_seen_with_cause_and_log(page, everything, width):
    look(page, everything, width)
    text = page.value("document.querySelector('details.failed').innerText")
    assert "bad input" in text
    assert "model-00002.safetensors ends too early." in text
    assert zoos.HOSTILE in text
    assert page.value("document.querySelector('details.failed pre').clientHeight") > 60
    states = page.value("[...document.querySelectorAll('td.state')].map(each => each.innerText.split('\\n')[0])")
    assert states == ["failed", "interrupted", "waiting", "waiting", "done", "done", "done", "done", "duplicate"]


def test_the_end_of_a_long_log_is_seen_first(page, tmp_path):
    store = Store(tmp_path, create=True)
    log = "\n".join(f"line {number}" for number in range(1, 101)).encode()
    zoos.run(store, zoos.add(store, "long"), Outcome("crash", "It broke."), log=log)
    store.close()
    write_report(tmp_path, tmp_path)
    look(page, tmp_path / PAGE, 1280)
    script = """(() => {
      const box = document.querySelector('pre').getBoundingClientRect();
      const text = document.querySelector('pre').firstChild, range = document.createRange();
      return [text.data.indexOf('line 61'), text.data.indexOf('line 100')].map(at => {
        range.setStart(text, at);
        range.setEnd(text, at + 4);
        const line = range.getBoundingClientRect();
        return line.top >= box.top && line.bottom <= box.bottom;
      });
    })()"""
    assert page.value(script) == [False, True]


def test_nothing_hostile_runs_or_becomes_a_part_of_the_page(page, everything):
    look(page, everything, 1280)
    assert page.value("document.title") == "everything · zoo report"
    assert page.value("document.querySelectorAll('script').length") == 0
    assert page.value("document.querySelectorAll('img').length") == 0


def test_the_policy_forbids_what_escaping_let_through(page, everything, tmp_path):
    """The second line of defence: were a name not escaped, the browser would still run and load nothing."""
    text = everything.read_text(encoding="utf-8")
    hole = "<script>document.title = 'broken in'</script><img src='http://127.0.0.1:9/x.png'></main>"
    (tmp_path / "hole.html").write_text(text.replace("</main>", hole), encoding="utf-8")
    page.complaints.clear()
    page.requests.clear()
    page.open(tmp_path / "hole.html", 1280)
    assert page.value("document.title") == "everything · zoo report"
    assert len([complaint for complaint in page.complaints if "Content Security Policy" in complaint]) == 2


def test_a_link_opens_the_job(page, tmp_path):
    zoo = zoos.many(tmp_path / "zoo", 20)
    write_report(zoo, zoo)
    look(page, zoo / PAGE, 390)
    assert page.value("document.querySelectorAll('details[open]').length") == 0
    page.value("document.querySelector('.overview a').click()")
    page.wait("document.querySelector('details[open]')")
    assert page.value("document.querySelector('details[open] .name').innerText") == "model-0"


@pytest.mark.parametrize("width", WIDTHS)
def test_an_empty_zoo(page, tmp_path, width):
    Store(tmp_path, create=True).close()
    write_report(tmp_path, tmp_path)
    look(page, tmp_path / PAGE, width)
    assert "no jobs in this zoo yet" in page.value("document.body.innerText")


@pytest.mark.parametrize("width", WIDTHS)
def test_two_hundred_models(page, tmp_path, width):
    zoo = zoos.many(tmp_path / "zoo", 200)
    write_report(zoo, zoo)
    look(page, zoo / PAGE, width)
    assert page.value("document.querySelectorAll('.overview tbody tr').length") == 200
    assert len(page.value(PLOTS)) == 200
    page.value("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.value(OVERFLOWING) == []
    assert len(page.value(PLOTS)) == 200 * (1 + 2 * 7)
