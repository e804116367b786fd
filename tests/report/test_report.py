"""What the report says, and what it may not do."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aipo.errors import UserError
from aipo.report import groups
from aipo.report.advice import RULES, Advice, advise, loops_in, script
from aipo.report.curves import panels
from aipo.report.evaluation_report import evaluation_report
from aipo.report.load import load_run, read_rollouts
from aipo.report.page import visible
from aipo.report.run_report import differences, report
from aipo.report.selected import density, describe, peaks, places, run_lengths, words
from aipo.report.verdict import judge
from tests.report.folders import HOSTILE, make_evaluation, make_run, rollout

LIMIT = 5_000_000  # bytes


class Elements(HTMLParser):
    """Tags of a page, and the text of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def data_of(page: str) -> dict[str, Any]:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first")


def test_the_verdict_pairs_the_questions(run: Path) -> None:
    verdict = judge(load_run(run))
    assert (len(verdict.gained), len(verdict.lost)) == (30, 0)  # 20 of 100 questions are right before, 50 after
    assert verdict.difference is not None
    assert verdict.difference.value == pytest.approx(0.3)
    assert verdict.tone == "good"
    assert verdict.words.startswith("It learned: +30.0 points")
    assert verdict.otf == pytest.approx(0.3)
    assert verdict.cost_share == pytest.approx(0.15)
    assert verdict.tokens == 12_000
    assert [name for name, _ in verdict.phases] == ["rollout", "forward", "backward", "optimizer"]


def test_a_run_that_got_worse_or_has_no_validation(tmp_path: Path) -> None:
    worse = judge(load_run(make_run(tmp_path / "worse", change=-0.15)))
    assert (worse.tone, len(worse.gained), len(worse.lost)) == ("bad", 0, 15)
    (worse_folder := tmp_path / "worse").joinpath("held_out.jsonl").unlink()
    assert judge(load_run(worse_folder)).words == "No change shown: -15.0 points, the intervals overlap."
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    assert judge(load_run(bare)).words.startswith("Not known")
    assert "<h2>Curves" in report([bare]).read_text()


# what goes wrong -> metrics of a step, given which share of the run is done
SICK: dict[str, Callable[[float], dict[str, float]]] = {
    "Entropy collapse": lambda done: {"policy/entropy": 1.0 - 0.95 * done},
    "Length collapse": lambda done: {"rollout/length_mean": 20 - 15 * done},
    "Length growth": lambda done: {"rollout/length_mean": 20 + 40 * done},
    "Collapse of a bucket": lambda done: {"curriculum/questions_hard": 100 - 95 * done},
    "Reward without correctness": lambda done: {
        "reward/mean": 0.2 + done,
        "reward/correct": 0.2,
        "reward/format": done,
    },
    "Truncation": lambda done: {"rollout/truncated": done},
    "Engine against trainer": lambda done: {"mismatch/gap": 0.2 * done},
    "Groups without signal": lambda done: {"rollout/used": 0.6 - 0.5 * done},
    "OTF far from its target": lambda done: {"mask/otf": 0.7},
    "κ stuck": lambda done: {"mask/kappa": 0.3},
    "Verifier": lambda done: {"reward/timed_out": 0.004, "reward/killed": 0.004},
    "Skipped steps": lambda done: {"loss/skipped_steps": float(done == 0.5)},
}


def found_in(run: Path) -> dict[str, Advice]:
    return {advice.title: advice for advice in advise(load_run(run)) if advice.wrong}


def change(run: Path, to: Callable[[float], dict[str, float]]) -> None:
    """Other metrics in every step, given which share of the run is done."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    changed = [line | (to(line["step"] / 12) if line["step"] else {}) for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))


def test_advice_is_silent_on_a_sound_run(run: Path) -> None:
    sound = advise(load_run(run))
    assert len(sound) == len(RULES) == 13
    assert not [advice.title for advice in sound if advice.wrong]


@pytest.mark.parametrize("title", SICK)
def test_advice_names_what_went_wrong_and_shows_where(run: Path, tmp_path: Path, title: str) -> None:
    sick = shutil.copytree(run, tmp_path / "sick")
    change(sick, SICK[title])
    found = found_in(sick)
    assert set(found) == {title}
    assert found[title].panel in {panel["title"] for panel in panels([load_run(sick)])}
    if title == "Skipped steps":
        assert found[title].step == 6
        assert found[title].words.endswith("1 of 12 steps had an update skipped that was not finite: 6")


@pytest.mark.parametrize(
    ("title", "said"),
    [
        ("Repetition", " and so it goes on" * 40),
        ("Another language than the prompt's", "答案是二加二等于四 \\boxed{2}"),
    ],
)
def test_advice_reads_the_rollouts(tmp_path: Path, title: str, said: str) -> None:
    found = found_in(make_run(tmp_path / "sick", said=said))
    assert set(found) == {title}
    assert found[title].step == 12


def test_the_target_of_otf_is_that_of_the_rule(tmp_path: Path) -> None:
    keys = {"mask__rule": "top_fraction", "mask__fraction": "0.3"}
    assert not found_in(make_run(tmp_path / "met", **keys))
    missed = found_in(make_run(tmp_path / "missed", **keys | {"mask__fraction": "0.5"}))
    assert missed["OTF far from its target"].words.startswith("30.0 % → 30.0 % of the tokens, target 50 %")
    assert not found_in(make_run(tmp_path / "all", mask__rule="all"))
    coins = found_in(make_run(tmp_path / "coins", mask__rule="bernoulli", mask__fraction="0.8"))
    assert coins["OTF far from its target"].words.startswith("30.0 % → 30.0 % of the tokens, target 80 %")


@pytest.mark.parametrize(
    ("keys", "stalls", "stuck"),
    [
        ({"mask__kappa_schedule": "plateau"}, 0, False),
        ({"mask__kappa_schedule": "plateau"}, 1, True),
        ({"mask__kappa_schedule": "constant"}, 1, False),
        ({"mask__kappa_end": "0.3"}, 0, False),
        ({"mask__kappa_schedule": "linear"}, 0, True),
    ],
)
def test_kappa_is_stuck_only_where_it_should_move(
    tmp_path: Path, keys: dict[str, str], stalls: int, stuck: bool
) -> None:
    still = make_run(tmp_path / "still", **keys)
    change(still, lambda done: {"mask/kappa": 0.3, "curriculum/stalls": float(stalls)})
    assert ("κ stuck" in found_in(still)) == stuck


def test_every_curve_that_advice_points_to_is_there(run: Path) -> None:
    titles = {panel["title"] for panel in data_of(report([run]).read_text())["panels"]}
    assert {advice.panel for advice in advise(load_run(run)) if advice.panel} <= titles


def test_loops_and_languages() -> None:
    assert loops_in(list("abcdefgh") * 4)
    assert not loops_in(list("abcdefgh") * 3)
    assert not loops_in(["a"] * 10)
    assert loops_in(["a"] * 11)
    texts = ("What is it?", "Что это такое", "这是什么东西", "1 + 1")
    assert [script(text) for text in texts] == ["LATIN", "CYRILLIC", "CJK", None]


def test_what_was_selected_is_counted() -> None:
    rows = [rollout(["So", " we", " add"] * 4, 0, mask=[True, False, False, True, True, False] * 2) for _ in range(4)]
    assert words(rows) == {"most": [("So", 16, 16), ("we", 8, 16)], "least": [("add", 0, 16)]}
    assert places([rollout(["a"] * 20, 0, mask=[True] + [False] * 19)]) == [1.0] + [0.0] * 19
    assert run_lengths(rows)[:3] == [0.5, 0.5, 0.0]  # T · T T · T · T T ·


def test_statistics_of_a_recorded_run(run: Path) -> None:
    found = describe(load_run(run))
    assert found is not None
    assert found["steps"] == [1, 2, 11, 12]
    assert found["density"] is None  # so few tokens have an entropy
    ((bucket, shares),) = found["peaks"]["buckets"]  # all of its questions are easy
    assert bucket == "easy"
    assert [sum(part) for part in shares] == pytest.approx([1, 1], abs=1e-3)


def test_density_of_information_and_entropy() -> None:
    """Counted on a grid that ends with a quantile of each, and what lies beyond at its edge."""
    rows = [rollout(["a"] * 60, seed) for seed in range(4)]
    pairs = [(mi, h) for row in rows for mi, h in zip(row["mi"], row["entropy"]) if h is not None]
    found, spans = density(rows), [np.quantile(values, [0.005, 0.995]) for values in zip(*pairs)]
    assert found is not None
    counts = np.zeros((found["size"], found["size"]), int)  # entropy, mi
    for pair in pairs:
        cells = [int((value - low) / (high - low) * len(counts)) for value, (low, high) in zip(pair, spans)]
        x, y = (min(max(cell, 0), len(counts) - 1) for cell in cells)
        counts[y, x] += 1
    assert found["counts"] == counts.ravel().tolist()
    assert sum(found["counts"]) == found["pairs"] == len(pairs) > 50
    assert [found["mi"], found["entropy"]] == [pytest.approx(list(span)) for span in spans]
    assert found["correlation"] == pytest.approx(np.corrcoef(*zip(*pairs))[0, 1], abs=6e-4)
    assert density(rows[:1]) is None  # of too few


def test_peaks_are_counted_by_bucket(run: Path) -> None:
    spiky = [0.0] * 4 + [1.0] + [0.0] * 5
    rows = [
        rollout(["a"] * 20, 0, bucket=bucket, mi=spiky * count + [None] * (20 - 10 * count))
        for bucket, count in (("hard", 2), ("easy", 1), ("easy", 2), (None, 1))
    ]
    found = peaks(rows[:3], rows[3:], load_run(run))
    assert found == {
        "counts": ["1", "2"],
        "buckets": [("easy", [[0.5, 0.5], [0, 0]]), ("hard", [[0, 1], [0, 0]]), ("all questions", [[0, 0], [1, 0]])],
    }
    assert peaks([rollout(["a"], 0, mi=[None])], [], load_run(run)) is None


def test_one_file_that_asks_for_nothing_and_is_small(run: Path) -> None:
    page = report([run]).read_text()
    assert len(page.encode()) < LIMIT
    elements = Elements(page)
    assert "link" not in elements.tags
    assert "img" not in elements.tags
    assert not [value for name, value in elements.attributes if name == "src"]
    assert "default-src 'none'" in page
    assert len(data_of(page)["tokens"][0]["groups"]) == 24  # 12 steps, a group in the update and one that is not


@pytest.mark.slow
def test_nothing_that_a_model_writes_becomes_part_of_the_page(run: Path, tmp_path: Path) -> None:
    hostile = report([make_run(tmp_path / "hostile", texts=HOSTILE)]).read_text()
    tags = [Elements(page).tags for page in (report([run]).read_text(), hostile)]
    assert tags[1].count("script") == tags[0].count("script") == 2
    assert "img" not in tags[1]
    assert len(hostile.encode()) < LIMIT
    packed = data_of(hostile)["tokens"][0]
    said = {"".join(packed["vocabulary"][t] for t in r["tokens"]) for g in packed["groups"] for r in g["rollouts"]}
    assert said >= set(HOSTILE[:-1])  # unchanged; the last, of 200,000 characters, is cut
    assert max(map(len, said)) <= 4 * groups.LONGEST


def test_what_is_left_out_where_it_does_not_fit(run: Path) -> None:
    whole, part = (groups.collect(load_run(run), budget) for budget in (10**9, 6000))
    assert whole["steps_left_out"] == 0
    steps = {group["step"] for group in part["groups"]}
    assert {1, 12} <= steps
    assert part["steps_left_out"] == 12 - len(steps) > 0
    assert groups.ends([1, 2, 3, 4, 5], 3) == [1, 2, 5]
    assert groups.ends([1, 2, 3], 3) == [1, 2, 3]
    assert groups.order(list(range(1, 10)))[:3] == [9, 1, 5]
    assert sorted(groups.order(list(range(50)))) == list(range(50))
    assert groups.order([4]) == [4]


def test_the_best_is_the_step_of_the_best_checkpoint(run: Path) -> None:
    made = load_run(run)
    for line in made.metrics:  # better before than ever after; of equals the earlier
        if "validation/accuracy" in line:
            line["validation/accuracy"] = 0.9 if line["step"] == 0 else 0.5
    first = min(line["step"] for line in made.metrics if line["step"] and "validation/accuracy" in line)
    assert judge(made).best == (first, 0.5)


def test_without_recorded_groups_or_answers_the_rest_is_there(tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare")
    for path in [*(bare / "rollouts").glob("*.parquet"), bare / "held_out.jsonl"]:
        path.unlink()
    data = data_of(report([bare]).read_text())
    assert all(not part["groups"] for part in data["tokens"])
    assert data["panels"]


def test_several_runs_are_compared(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", optim__lr="1e-6", mask__rule="random")
    runs = [load_run(folder) for folder in (run, other)]
    keys = dict(differences(runs))
    assert set(keys) == {"optim.lr", "mask.rule"}
    assert keys["mask.rule"] == ["threshold", "random"]
    own = report([run]).read_text()
    assert report([run, other]) == run / "comparison.html"
    assert (run / "report.html").read_text() == own
    page = report([run, other], tmp_path / "both.html").read_text()
    assert page == (run / "comparison.html").read_text()
    assert "Where the configs differ" in page
    assert [each["name"] for each in data_of(page)["runs"]] == ["first", "other"]


def test_an_evaluation_has_its_page(tmp_path: Path) -> None:
    a, b = make_evaluation(tmp_path / "a", 0.3), make_evaluation(tmp_path / "b", 0.8, texts=HOSTILE)
    alone = evaluation_report([a]).read_text()
    marks = re.findall(r'<i class="(\w?)"></i>', alone.split('<table class="marks">')[1])
    assert len(marks) == 80
    assert set(marks) == {"r", "", "n"}
    (path := a / "report.html").write_text("its own")
    assert evaluation_report([a, b]) == a / "comparison.html"
    assert path.read_text() == "its own"
    both = (a / "comparison.html").read_text()
    assert "b is better" in both
    assert Elements(both).tags.count("script") == 2
    assert "img" not in Elements(both).tags
    with pytest.raises(UserError, match="two evaluations at most"):
        evaluation_report([a, b, a])


def test_what_cannot_be_reported_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        report([tmp_path])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no line yet"):
        report([tmp_path])
    (tmp_path / "step-000001.parquet").write_text("not parquet")
    with pytest.raises(UserError, match=r"step-000001\.parquet is damaged"):
        read_rollouts(tmp_path / "step-000001.parquet")
    monkeypatch.setattr(sys, "argv", ["aipo.report", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("aipo.report", run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_page_makes_its_folder_or_says_that_it_cannot(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path / "a", 0.3)
    assert evaluation_report([evaluation], tmp_path / "reports" / "new" / "a.html").is_file()
    for out in (evaluation / "sums.jsonl" / "a.html", evaluation):  # below a file; a folder
        with pytest.raises(UserError, match=f"^--out: {out} cannot be written .*: choose another place$"):
            evaluation_report([evaluation], out)


def test_visible_names_what_cannot_be_seen() -> None:
    assert visible("a\x00\u202eb\n") == "a⟨00⟩⟨202E⟩b⟨0A⟩"
    assert visible("👩‍👧 ﷽") == "👩‍👧 ﷽"
    assert visible("x" * 10, 4) == "xxxx …"
