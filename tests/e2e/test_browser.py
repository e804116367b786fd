"""The page in a real browser: curve -> step -> group -> rollout -> map, at two widths, and a silent console."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aipo.report import groups
from aipo.report.evaluation_report import evaluation_report
from aipo.report.run_report import report
from tests.report.browser import Page, browser
from tests.report.folders import HOSTILE, make_evaluation, make_run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(autouse=True)
def quiet(page: Page) -> Iterator[None]:
    page.problems.clear()
    yield
    assert page.problems == []


def set_to(page: Page, control: str, value: str) -> None:
    events = "for (const name of ['input', 'change'])"
    page.run(f"find('{control}').value = {value}; {events} find('{control}').dispatchEvent(new Event(name))")


def walk_through(page: Page) -> None:
    """Press a curve, then walk the token view; the page must be open."""
    page.click("#panels .panel .u-over", x=0.98)
    shown = int(page.run("document.getElementById('step').value"))
    assert shown == max(page.run("[...new Set(data.tokens[view.run].groups.map((g) => g.step))]"))
    assert abs(page.run("document.getElementById('tokens').getBoundingClientRect().top")) < 200
    count = page.run("document.querySelectorAll('.rollout').length")
    assert count == page.run("group().rollouts.length") > 0
    page.click("#previous")
    before = page.run("view.place")
    page.key("ArrowRight")
    assert page.run("view.place") == before + 1
    page.key("ArrowLeft")
    assert page.run("view.place") == before
    page.key("ArrowDown")
    colours = {}
    for name in page.run("[...document.getElementById('maps').children].map((b) => b.dataset.map)"):
        page.click(f"#maps [data-map={name}]")
        assert page.run("view.map") == name
        colours[name] = page.run(
            "[...document.querySelectorAll('.text span')].map((s) => s.style.backgroundColor).join()"
        )
    assert len(set(colours.values())) > 1
    page.run("document.querySelector('.text span').scrollIntoView({block: 'center'})")
    page.hover(".text span")
    assert "token 1," in page.run("document.getElementById('tip').textContent")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_run(page: Page, tmp_path: Path, width: int, dark: bool) -> None:
    path = report([make_run(tmp_path / "run")])
    page.open(path, width=width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width  # nothing sticks out
    assert page.run("document.querySelectorAll('#panels canvas').length") == page.run("data.panels.length") > 8
    walk_through(page)
    set_to(page, "filter", "'dropped'")
    assert page.run("document.querySelector('.rollout').textContent").count("got the same verdict") == 1
    set_to(page, "filter", "'all'")
    set_to(page, "search", "'BOXED'")
    assert page.run("document.querySelectorAll('.rollout').length") == 2
    page.click("#only")
    assert page.run("document.querySelectorAll('.text span.gone').length") > 0
    set_to(page, "smoothing", "0.8")
    assert page.run("charts[0].chart.series.length") == 3  # the raw line stays, faintly
    low, high = page.run("[charts[0].chart.scales.x.min, charts[0].chart.scales.x.max]")
    page.run("charts[0].chart.setScale('x', {min: 3, max: 6})")
    assert page.run("charts[0].chart.scales.x.max - charts[0].chart.scales.x.min") < high - low
    assert page.picture(tmp_path / "page.png", whole=True).stat().st_size > 20_000


def test_two_runs_beside_each_other(page: Page, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", change=0.1)]
    page.open(report(runs, tmp_path / "both.html"))
    assert page.run("charts[0].chart.series.length") == 3
    page.click("#legend input")
    assert page.run("charts[0].chart.series.map((s) => s.show)") == [True, False, True]
    set_to(page, "run", "1")
    assert page.run("view.run") == 1


def test_hostile_completions_show_as_text_and_change_nothing(page: Page, tmp_path: Path) -> None:
    page.open(report([make_run(tmp_path / "hostile", texts=HOSTILE)]))
    elements = "document.querySelectorAll('script').length"
    assert page.run(elements) == 2
    groups = page.run("source().groups.length")
    for place in range(groups):
        page.run(f"show({place})")
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run(elements) == 2
    assert page.run("document.querySelectorAll('img, iframe, object, embed').length") == 0
    shown = []
    for place in range(1, len(HOSTILE) + 1):
        page.run(f"show({place})")
        shown.append(page.run("document.querySelector('.text').textContent"))
    names = ("script", "its end", "attribute", "template", "right to left", "control", "emoji", "comment", "long")
    said = dict(zip(names, zip(shown, HOSTILE), strict=True))
    for name in ("script", "its end", "attribute", "template", "emoji", "comment"):
        assert said[name][0] == said[name][1]
    assert said["right to left"][0] == "⟨202E⟩right to left⟨202C⟩ שלום עולם مرحبا"
    assert said["control"][0] == "a⟨00⟩b⟨07⟩c⟨1B⟩[31mred⟨7F⟩⟨2028⟩⟨2029⟩⟨FEFF⟩"
    assert said["long"][0].endswith("2000 more tokens")
    page.click(".rollout .text button")
    assert "46000 more tokens are in the run folder" in page.run("document.querySelector('.text').textContent")
    page.run("show(9)")
    assert page.run("document.querySelectorAll('.rollout .text span').length") <= 2 * 2000
    assert page.run("document.documentElement.scrollWidth") <= 1280


def test_a_run_at_the_scale_of_the_paper_stays_small(page: Page, tmp_path: Path) -> None:
    """500 steps, each with as many tokens as tracking.tokens_mb leaves to it: two rollouts of 12,000."""
    text = "".join(f"{n % 7919:04d}" for n in range(12_000))
    folder = make_run(tmp_path / "long", steps=500, texts=(text,))
    first = folder / "rollouts" / "step-000001.parquet"
    for step in range(2, 501):
        (path := first.with_name(f"step-{step:06d}.parquet")).unlink()
        path.hardlink_to(first)
    path = report([folder])
    assert path.stat().st_size < 5_000_000
    page.open(path)
    assert page.run("data.runs[0].series['reward/mean'][0].length") == 500
    page.click("#panels .panel .u-over", x=0.98)
    assert page.run("group().step") == 500
    assert page.run("stepsOf(0).length") >= groups.GROUPS // 2
    page.run("show(1)")
    assert page.run("document.querySelectorAll('.rollout').length") == 2
    shown, gap = page.run("[group().rollouts[0].tokens.length, group().rollouts[0].gap]")
    assert shown + gap[1] == 12_000
    page.run("document.querySelector('.text span:last-of-type').scrollIntoView({block: 'center'})")
    page.hover(".text span:last-of-type")
    assert "token 12000," in page.run("document.getElementById('tip').textContent")
    assert "in the run folder" in page.run("document.getElementById('left-out').textContent")


def test_on_paper(page: Page, tmp_path: Path) -> None:
    """Charts as wide as their panels, two beside each other, nothing to press, and what was folded is open."""
    page.open(report([make_run(tmp_path / "run")]), width=700)
    page.call("Emulation.setEmulatedMedia", media="print")
    widths = page.run(
        "[...document.querySelectorAll('#panels .chart')].map((each) => [each.clientWidth,"
        " each.querySelector('canvas').getBoundingClientRect().width])"
    )
    assert all(chart == pytest.approx(canvas, abs=1) for chart, canvas in widths)
    assert page.run("document.getElementById('panels').clientWidth") > 2 * widths[0][0]
    assert page.run("document.querySelector('.toolbar').offsetHeight") == 0
    assert page.run("document.querySelector('.advice .fine').checkVisibility({contentVisibilityAuto: true})")
    page.call("Emulation.setEmulatedMedia", media="")


def test_an_evaluation(page: Page, tmp_path: Path) -> None:
    folders = [make_evaluation(tmp_path / "a", 0.3), make_evaluation(tmp_path / "b", 0.8, texts=HOSTILE)]
    for width in (1280, 390):
        page.open(evaluation_report(folders), width=width)
        assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run("document.querySelectorAll('.marks tr').length") == 40
