from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aipo.errors import UserError
from aipo.evaluation.benchmarks import Benchmark
from aipo.evaluation.results import (
    Result,
    average,
    compare,
    comparison_rows,
    gains,
    intervention_rows,
    load_results,
    markdown,
    otf_of_run,
    print_comparison,
    result_rows,
    save_results,
    settings_differ,
    show,
    summarize,
)
from aipo.problems.datasets import Problem
from aipo.record.plots import draw_bars

TWO = Benchmark("two", [Problem("a", "?", r"\frac{1}{2}"), Problem("b", "?", "7")], "")


def row(id: str, sample: int, answer: str | None, correct: bool, **more: Any) -> dict[str, Any]:
    verdict = "correct" if correct else "no_answer" if answer is None else "wrong"
    gold = {"a": r"\frac{1}{2}", "b": "7"}[id]
    plain = {"gold": gold, "tokens": 10, "finish_reason": "stop", "verdict": verdict}
    return {"id": id, "sample": sample, "answer": answer, "correct": correct, **plain, **more}


ROWS = [
    row("a", 0, r"\dfrac{1}{2}", True),
    row("a", 1, "0.5", True, tokens=20),
    row("a", 2, "2", False, verdict="timed_out"),
    row("a", 3, "2", False, tokens=50, finish_reason="length"),
    row("b", 0, "7", True),
    row("b", 1, None, False),
    row("b", 2, "8", False, verdict="killed"),
    row("b", 3, "8 ", False),
]


def result(*marks: list[int]) -> Result:
    return summarize(
        Benchmark("x", [Problem(f"p{i}", "?", "1") for i in range(len(marks))], ""),
        [
            {
                "id": f"p{i}",
                "sample": s,
                "answer": "1" if mark else "2",
                "gold": "1",
                "correct": bool(mark),
                "verdict": "correct" if mark else "wrong",
                "tokens": 5,
                "finish_reason": "stop",
            }
            for i, group in enumerate(marks)
            for s, mark in enumerate(group)
        ],
        len(marks[0]),
    )


def test_numbers_of_a_benchmark_by_hand() -> None:
    r = summarize(TWO, ROWS, 4)
    assert (r.problems, r.samples) == (2, 4)
    assert r.accuracy == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert r.low <= r.accuracy <= r.high
    # pass@2: a misses with C(2,2)/C(4,2) = 1/6, b with C(3,2)/C(4,2) = 3/6
    assert r.pass_at == pytest.approx({"1": 0.375, "2": (5 / 6 + 3 / 6) / 2, "3": (1 + 3 / 4) / 2, "4": 1.0})
    # a: the two right answers are one, tied with 2 (twice); b: 8 wins over 7
    assert r.majority == pytest.approx((0.5 + 0) / 2)
    assert r.length == pytest.approx((10 + 20 + 10 + 50 + 4 * 10) / 8)
    assert (r.truncated, r.no_answer, r.timed_out, r.killed) == (1 / 8, 1 / 8, 1 / 8, 1 / 8)
    assert r.correct == {"a": [1, 1, 0, 0], "b": [1, 0, 0, 0]}


def test_fewer_samples_are_the_first_ones() -> None:
    r = summarize(TWO, ROWS, 1)
    assert (r.accuracy, r.majority, r.samples) == (1.0, 1.0, 1)
    assert list(r.pass_at) == ["1"]


def test_a_missing_completion_is_no_wrong_one() -> None:
    with pytest.raises(UserError, match=r"two: no completion of .*'b', 3"):
        summarize(TWO, ROWS[:-1], 4)


def test_table_file_and_back(tmp_path: Path) -> None:
    results = {"two": summarize(TWO, ROWS, 4), "one": result([1, 1, 1, 0])}
    nothing = [row | {"correct": False, "verdict": "wrong"} for row in ROWS]
    gained = gains(results, {"two": summarize(TWO, nothing, 4)}, 12.5)
    path = save_results(tmp_path, {"model": "m", "settings": {"seed": 0}}, results, gained)
    loaded = load_results(path)
    assert (loaded.model, loaded.settings, loaded.results) == ("m", {"seed": 0}, results)
    assert load_results(tmp_path).results == results  # the folder will do
    written = json.loads(path.read_text())
    assert written["average"] == pytest.approx((0.375 + 0.75) / 2) == average(results)
    assert written["gains"]["two"] == pytest.approx({"mag": 37.5, "otf": 12.5, "tes": 300.0})
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert "| avg@4 | 95 % | pass@1 | pass@2 | pass@4 | maj@4 |" in lines[0]
    assert lines[2].startswith("| two | 2 | 37.5 | [25.0, 50.0] | 37.5 | 66.7 | 100.0 | 25.0 |")
    assert lines[2].endswith("| +37.50 | 12.50 % | 300.0 |")
    assert lines[4].startswith("| average |  | 56.2 |")
    file = io.StringIO()
    show(*result_rows(results, gained), "a [title]", Console(file=file, width=200))
    for part in ("two", "37.5", "[25.0, 50.0]", "300.0"):
        assert part in file.getvalue()
    assert markdown(*result_rows(results)).count("\n") == 5


def test_gains_of_the_papers_figures() -> None:
    base, better = result([0] * 100), result([1] * 12 + [0] * 88)
    gained = gains({"x": better, "y": better}, {"x": base, "y": base}, 22.0)
    assert gained["average"].mag == pytest.approx(12.0)
    assert gained["x"].tes == pytest.approx(12.0 / 0.22)
    assert gains({"x": better}, {"x": base}, None)["x"].tes is None
    with pytest.raises(UserError, match="no problem in common"):
        gains({"x": better}, {"z": base}, 22.0)


def test_otf_of_a_run_is_by_tokens(tmp_path: Path) -> None:
    assert otf_of_run(tmp_path) is None
    lines: list[dict[str, float]] = [
        {"step": 0},
        {"mask/otf": 0.9, "rollout/tokens": 900},  # of a run that wrote the cost share under this name
        {"mask/otf": 0.1, "rollout/used_tokens": 100, "rollout/tokens": 900},
        {"mask/otf": 0.4, "rollout/used_tokens": 300, "rollout/tokens": 900},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert otf_of_run(tmp_path) == pytest.approx(32.5)


def test_comparison_pairs_problems(tmp_path: Path) -> None:
    a = {"x": result([0, 0], [1, 0], [0, 0], [0, 1], [0, 0], [0, 1]), "only a": result([1, 1])}
    b = {"x": result([1, 1], [1, 1], [1, 0], [1, 1], [0, 1], [1, 1]), "only b": result([1, 1])}
    (difference,) = compare(a, b).values()
    assert difference.problems == 6
    assert difference.value == pytest.approx((1 + 5 * 0.5) / 6)
    assert difference.real
    _, ((*_, verdict),) = comparison_rows({"x": difference})
    assert verdict == "b is better"
    _, ((*_, verdict),) = comparison_rows(compare(b, a))
    assert verdict == "a is better"
    _, ((*_, verdict),) = comparison_rows(compare(a, {"x": a["x"]}))
    assert verdict == "no difference shown"
    with pytest.raises(UserError, match="no problem in common"):
        compare(a, {"z": a["x"]})
    one = {"x": result([0])}, {"x": result([1])}
    _, ((*_, verdict),) = comparison_rows(compare(*one))
    assert verdict == "too few problems"
    with pytest.raises(UserError, match="x has other questions"):
        compare(a, {"x": replace(a["x"], fingerprint="other")})


def test_an_option_is_one_vote_whatever_its_letter() -> None:
    """Six of ten samples choose the right option, under other letters each time; four choose three others."""
    benchmark = Benchmark("choice", [Problem("q", "?", "A", "choice")], "")
    chosen = [0] * 6 + [1, 2, 3, 3]
    rows = [
        {
            "id": "q",
            "sample": s,
            "answer": "ABCD"[(option + s) % 4],
            "option": option,
            "gold": "ABCD"[s % 4],
            "correct": option == 0,
            "verdict": "correct" if option == 0 else "wrong",
            "tokens": 1,
            "finish_reason": "stop",
        }
        for s, option in enumerate(chosen)
    ]
    assert summarize(benchmark, rows, 10).majority == 1.0


def test_results_of_earlier_calls_stay(tmp_path: Path) -> None:
    content = {"model": "m", "settings": {}}
    save_results(tmp_path, content, {"x": result([1, 1], [0, 0]), "y": result([1, 0])})
    save_results(tmp_path, content, {"x": result([1], [0]), "z": result([0, 0])})  # fewer samples, and another
    loaded = load_results(tmp_path).results
    assert sorted(loaded) == ["x", "y", "z"]
    assert loaded["x"].samples == 2


@pytest.mark.parametrize("newer", [result([1], [0], [1]), result([0, 0], [0, 0])])
def test_results_on_more_problems_or_on_as_much_are_the_new_ones(tmp_path: Path, newer: Result) -> None:
    content = {"model": "m", "settings": {}}
    save_results(tmp_path, content, {"x": result([1, 1], [0, 0])})
    save_results(tmp_path, content, {"x": newer})
    assert load_results(tmp_path).results["x"] == newer


def test_comparison_pools_problems() -> None:
    a = {"x": result([0, 0], [1, 0]), "y": result([0, 0])}
    b = {"x": result([1, 1], [1, 0]), "y": result([0, 1])}
    found = compare(a, b)
    assert list(found) == ["x", "y", "all problems"]
    assert found["all problems"].problems == 3
    assert found["all problems"].value == pytest.approx((1 + 0 + 0.5) / 3)


def test_comparison_as_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, temperature in zip(folders, (0.6, 1.0)):
        folder.mkdir()
        settings = {"sampling": {"temperature": temperature}, "model": folder.name, "seed": 0}
        save_results(folder, {"model": folder.name, "settings": settings}, {"x": result(*[[0, 1], [1, 1]] * 3)})
    print_comparison(*folders)
    printed = capsys.readouterr().out
    assert "note: not the same setting, sampling.temperature: 0.6 and 1.0" in printed
    assert "no difference shown" in printed
    assert settings_differ({"model": "a", "s": {"t": 1}}, {"model": "b", "s": {"t": 1}}) == []


@pytest.mark.parametrize("content", ["nonsense", "[]", "{}", '{"model": "m", "settings": {}, "benchmarks": {"x": {}}}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"other\.json is no results\.json"):
        load_results(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_results(tmp_path / "missing.json")


def test_interventions_as_table_and_figure(tmp_path: Path) -> None:
    variants = {
        "baseline": {"x": result([0, 1], [1, 1]), "y": result([0, 0])},
        "drop": {"x": result([0, 0], [1, 1]), "y": result([0, 0])},
        "force": {"x": result([1, 1], [1, 1]), "y": result([0, 1])},
    }
    columns, cells = intervention_rows(variants)
    assert columns[:4] == ["benchmark", "baseline", "drop", "drop - baseline"]
    assert cells[0][:4] == ["x", "75.0", "50.0", "-25.0"]
    assert cells[0][5:7] == ["100.0", "+25.0"]
    assert [line[0] for line in cells] == ["x", "y", "all problems"]
    draw_bars(variants, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
