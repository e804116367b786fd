"""From the command line to a report. More of it runs in tests/e2e/test_evaluate.py."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aipo.errors import UserError
from aipo.evaluation.benchmarking import make_job, run
from aipo.evaluation.benchmarks import load_benchmarks
from aipo.evaluation.options import parse
from aipo.evaluation.results import save_results, summarize
from aipo.problems.datasets import Problem
from tests.tiny import make_tiny


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "-5"], "--top-k must be at least -1, not -5"),
        (["--seed", "-1"], "--seed must lie between 0 and 4294967295, not -1"),
        (["--seed", "4294967296"], "--seed must lie between 0 and 4294967295"),
        (["--avg0"], "--avg must be at least 1, not 0"),
    ],
)
def test_numbers_out_of_range(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_every_option_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[argparse.ArgumentParser] = []
    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda p, argv: parsers.append(p) or parse_args(p, argv))
    parse([])
    assert [action.dest for action in parsers[0]._actions if not action.help] == []


def test_numbers_within_range() -> None:
    for top_k in (-1, 0, 20):  # as rollout.top_k
        assert parse(["--top-k", str(top_k), "--seed", "0"]).top_k == top_k


def test_vllm_on_a_gpu_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = tmp_path / "sums.jsonl"
    questions.write_text('{"question": "1 + 1", "answer": "2"}\n')
    arguments = ["--model", str(make_tiny(tmp_path / "model")), "--benchmarks", str(questions), "--max-tokens", "4"]
    monkeypatch.setattr("aipo.evaluation.benchmarking.require_engine", lambda kind: None)
    monkeypatch.setattr("aipo.inputs.find_spec", lambda name: name == "triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("aipo.inputs.triton_lacks", lambda: "no C compiler")
    with pytest.raises(UserError, match="finds no C compiler"):
        make_job(parse(arguments), print)


def test_a_baseline_of_other_problems_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, out = tmp_path / "sums.jsonl", tmp_path / "out"
    questions.write_text('{"question": "1 + 1", "answer": "2"}\n')
    arguments = ["--model", str(make_tiny(tmp_path / "model")), "--benchmarks", str(questions), "--avg1"]
    arguments += ["--engine", "hf", "--dtype", "float32", "--max-tokens", "4", "--baseline", str(tmp_path / "before")]
    (tmp_path / "before").mkdir()
    monkeypatch.setattr("aipo.evaluation.benchmarking.make_engine", lambda *_, **__: pytest.fail("built an engine"))
    mine = load_benchmarks([str(questions)])
    others = {"sums has other questions": replace(mine[0], fingerprint="other")}
    others["no problem in common"] = replace(mine[0], problems=[Problem("another", "1 + 2", "3")])
    for message, other in others.items():
        result = summarize(other, [completion(problem) for problem in other.problems], 1)
        save_results(tmp_path / "before", {"model": "m", "settings": {}}, {"sums": result})
        with pytest.raises(UserError, match=f"--baseline {tmp_path / 'before'}: .*{message}"):
            run(parse([*arguments, "--out", str(out)]))
    assert not out.exists()


def test_results_kept_of_other_problems_or_damaged_are_found_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a benchmark that is not asked for this time, in the folder of drop, which comes after that of baseline."""
    sums = tmp_path / "sums.jsonl"
    sums.write_text('{"question": "1 + 1", "answer": "2"}\n')
    arguments = ["--model", str(make_tiny(tmp_path / "model")), "--benchmarks", str(sums), "--avg1"]
    arguments += ["--engine", "hf", "--dtype", "float32", "--max-tokens", "4", "--out", str(tmp_path / "out")]
    arguments += ["--intervene", "both", "--tokens", "a"]
    monkeypatch.setattr("aipo.evaluation.benchmarking.make_engine", lambda *_, **__: pytest.fail("built an engine"))
    mine = load_benchmarks([str(sums)])[0]
    result = summarize(mine, [completion(problem) for problem in mine.problems], 1)
    drop, before = tmp_path / "out" / "drop", tmp_path / "before"
    for folder, fingerprint in ((drop, "one"), (before, "another")):
        folder.mkdir(parents=True)
        other = replace(result, fingerprint=fingerprint)
        save_results(folder, {"model": "m", "settings": {}}, {"sums": result, "other": other})
    with pytest.raises(UserError, match=f"{drop}: other has other questions .* or choose another --out"):
        run(parse([*arguments, "--baseline", str(before)]))
    (drop / "results.json").write_text("{")
    with pytest.raises(UserError, match=f"{drop / 'results.json'} is no results.json"):
        run(parse(arguments))


def completion(problem: Problem) -> dict[str, Any]:
    verdict = {"answer": "2", "gold": problem.answer, "correct": True, "verdict": "correct"}
    return {"id": problem.id, "sample": 0, "tokens": 1, "finish_reason": "stop", **verdict}


def test_a_baseline_is_a_file_or_its_folder(tmp_path: Path) -> None:
    questions = tmp_path / "sums.jsonl"
    questions.write_text('{"question": "1 + 1", "answer": "2"}\n{"question": "2 + 2", "answer": "4"}\n')
    out, before = tmp_path / "out", tmp_path / "before"
    arguments = ["--model", str(make_tiny(tmp_path / "model")), "--benchmarks", str(questions), "--avg1"]
    arguments += ["--engine", "hf", "--dtype", "float32", "--max-tokens", "4", "--out", str(out)]
    run(parse(arguments))
    assert " against " not in (out / "report.html").read_text()
    shutil.copytree(out, before)
    for baseline in (before, before / "results.json"):
        (out / "report.html").unlink()
        run(parse([*arguments, "--baseline", str(baseline)]))
        assert "model (out) against model (before)" in (out / "report.html").read_text()
