"""What is computed, each once: what the key of a cell goes by, and what is refused before anything runs."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import sweep
from aipo.campaign.cells import READ_BY_EVALUATION, Plan, _content, check_here, differences, make_plan, write_configs
from aipo.campaign.estimate import dry_run
from aipo.campaign.jobs import ROOT
from aipo.campaign.report import write_report
from aipo.config import load_config
from aipo.errors import UserError
from aipo.record.checkpoints import write_atomically
from tests.campaign.trial import CAMPAIGN, EVALUATED, planned
from tests.tiny import make_tiny


def test_equal_cells_are_one_run(tmp_path: Path, model: Path) -> None:
    """Whatever they are called, in one campaign or in two; another key, seed or model file is another run."""
    plan = planned(tmp_path, model)
    assert (len(plan.cells), len(plan.jobs)) == (9, 6)
    other = planned(
        tmp_path, model, CAMPAIGN.replace("before: ", "mine: ").replace("fraction: 0.1", "fraction: 0.2"), "other"
    )
    assert len({job.key for job in plan.jobs} & {job.key for job in other.jobs}) == 3
    free = planned(tmp_path, model, CAMPAIGN.replace("optim.steps", "guards.max_bad_steps: 9, optim.steps"), "free")
    assert {job.key for job in free.jobs} == {job.key for job in plan.jobs}  # what changes no number
    assert not {job.key for job in planned(tmp_path, make_tiny(tmp_path / "m", seed=1)).jobs} & {
        j.key for j in plan.jobs
    }
    assert plan.jobs[0].environment["WANDB_RUN_GROUP"] == "mine"
    assert plan.jobs[0].environment["WANDB_TAGS"] == "all,before,seed 0"
    assert (
        int(plan.jobs[0].environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) > 600
    )  # torchrun's own 30 s save no checkpoint
    assert [job.name.rpartition(" ")[2] for job in plan.jobs] == ["0", "0", "1", "1", "2", "2"]


def test_questions_of_a_benchmark_and_a_reward_function_are_part_of_what_is_computed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine").mkdir()
    function, benchmark = tmp_path / "mine" / "judge.py", tmp_path / "own.jsonl"
    text = EVALUATED.replace("mine.jsonl", str(benchmark)).replace("mine: ", "own: ")
    text = text.replace("{model.path", "{reward.function: mine.judge:score, reward.length: 0, model.path")

    def keys(judge: str, question: str) -> tuple[set[str], set[str]]:
        function.write_text(judge)
        benchmark.write_text(question)
        _content.cache_clear()
        cells = planned(tmp_path, model, text).cells
        return {cell.key for cell in cells}, {str(cell.results and cell.results.parent.name) for cell in cells}

    first = keys("raise ImportError", "1")
    assert keys("raise ImportError", "1") == first
    trained, results = keys("raise ImportError", "2")
    assert trained == first[0]
    assert not results & first[1] - {"drop"}
    trained, results = keys("def score(problem, completion): return 1", "1")
    assert len(trained & first[0]) == 1  # the backbone: nothing of it is rewarded
    assert results == first[1]


def test_a_named_benchmark_that_was_prepared_anew_is_evaluated_anew(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else old and new questions stand in one mean."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()

    def keys(questions: str) -> tuple[set[str], set[Path | None]]:
        (tmp_path / "data" / "aime24.jsonl").write_text(questions)
        _content.cache_clear()
        cells = planned(tmp_path, model, EVALUATED).cells
        return {cell.key for cell in cells}, {cell.results for cell in cells}

    (trained, results), (trained_then, results_then) = keys("1"), keys("2")
    assert trained == trained_then
    assert not results & results_then


def test_what_is_fetched_is_fetched_before_results_get_their_place(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next call would look for them elsewhere, and evaluate all again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").touch()
    fetched: list[str] = []

    def ensure(name: str) -> None:
        fetched.append(name)
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / f"{name}.jsonl").write_text("questions")

    run: list[Plan] = []
    monkeypatch.setattr("aipo.campaign.cells.ensure", ensure)
    monkeypatch.setattr(sweep, "run_here", lambda plan, _: run.append(plan) or 0)
    path = planned(tmp_path, model, EVALUATED).path
    monkeypatch.setattr("sys.argv", ["sweep.py", str(path), "--runs", str(tmp_path / "runs")])
    for _ in range(2):
        assert sweep.main() == 0
    assert fetched == ["aime24"]
    assert [cell.results for cell in run[0].cells] == [cell.results for cell in run[1].cells]


def test_evaluations_of_an_untrained_model_are_told_apart_by_all_that_they_read_of_a_config() -> None:
    source = (ROOT / "aipo" / "evaluation" / "benchmarking.py").read_text()
    assert set(re.findall(r"\bconfig\.(\w+\.\w+)", source)) == set(READ_BY_EVALUATION)


def test_what_is_common_need_not_be_a_config_of_its_own(tmp_path: Path, model: Path) -> None:
    """Here reweight needs the rule that each condition chooses."""
    common = "{mask.reweight: true, model.path"
    text = CAMPAIGN.replace("{model.path", common)
    text = re.sub(r"(before|all): \{mask.rule: all", r"\1: {mask.rule: random, mask.fraction: 0.5", text)
    with pytest.raises(UserError, match=r"mask\.reweight"):
        load_config("tiny.yaml", ["mask.reweight=true"])
    plan = planned(tmp_path, model, text)
    found = differences(plan)
    assert [set(found[cell.key]) for cell in plan.cells[3::3]] == [{"mask.fraction"}] * 2
    assert "0 of 9 cells are there" in write_report(plan)


def test_two_campaigns_of_one_name_do_not_share_a_folder(tmp_path: Path, model: Path) -> None:
    one = planned(tmp_path, model)
    write_configs(one)
    (tmp_path / "b").mkdir()
    other = Path(shutil.copy(one.path, tmp_path / "b"))
    for write in (write_configs, write_report):
        with pytest.raises(UserError, match=f"mine is of {one.path}, and {other} has the same name: rename one"):
            write(make_plan(other, tmp_path / "runs"))
    one.path.unlink()  # moved
    write_configs(make_plan(other, tmp_path / "runs"))


def test_two_campaigns_that_start_at_once_do_not_disturb_each_other(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, replace, others = planned(tmp_path, model), os.replace, []

    def meanwhile(source: Path, target: Path) -> None:
        if not others:  # the other comes to all its files before this one's first has its name
            others.append(multiprocessing.get_context("fork").Process(target=write_configs, args=(plan,)))
            others[0].start()
            others[0].join(60)
        replace(source, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    write_configs(plan)
    assert others[0].exitcode == 0
    assert {load_config(str(cell.folder / "cell.yaml")).folder for cell in plan.cells} == {
        cell.folder for cell in plan.cells
    }


def test_what_a_kill_left_of_a_file_goes_when_it_is_written_later(tmp_path: Path) -> None:
    for name, age in ((".tmp-1-report.md", 7200), (".tmp-2-report.md", 60), (".tmp-1-table.tex", 7200)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_atomically(tmp_path / "report.md", "all")
    assert sorted(os.listdir(tmp_path)) == [".tmp-1-table.tex", ".tmp-2-report.md", "report.md"]


def test_a_config_that_is_there_is_let_alone(tmp_path: Path, model: Path) -> None:
    """Its run may be at work."""
    plan = planned(tmp_path, model)
    path = plan.cells[0].folder / "cell.yaml"
    write_configs(plan)
    before = path.stat()
    write_configs(plan)
    assert path.stat() == before


def test_the_config_of_a_run_is_the_resolved_one(tmp_path: Path, model: Path) -> None:
    plan = planned(tmp_path, model)
    write_configs(plan)
    for cell in plan.cells:
        read = load_config(str(cell.folder / "cell.yaml"))
        assert read.folder == cell.folder
        assert read.model_copy(update={"name": "tiny", "runs": "runs"}) == cell.setting.config


def test_what_evaluate_py_would_refuse_is_refused_before_anything_runs(tmp_path: Path, model: Path) -> None:
    text = EVALUATED.replace("samples: 2", "samples: 2, options: [--temprature, '1']")
    with pytest.raises(
        UserError, match=r"mine.yaml: small: Backbone: evaluate: options: unrecognized arguments: --temprature 1$"
    ):
        planned(tmp_path, model, text)
    with pytest.raises(UserError, match=r"options: --temperature must lie between 0 and 100, not 101"):
        planned(tmp_path, model, text.replace("temprature, '1'", "temperature, '101'"))
    there = planned(tmp_path, model, text.replace("temprature", "temperature"))
    command = there.jobs[0].work[-1].command
    assert command.index("--temperature") < command.index("--config")  # ours are last, and so hold
    with pytest.raises(UserError, match=r"mine\.jsonl not there"):
        check_here(there)


def test_benchmarks_that_are_still_to_be_fetched_are_not_for_nodes_without_a_network(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "aime24"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    plan = planned(tmp_path, model, EVALUATED.replace("[aime24, mine.jsonl]", "[aime24, gpqa, embedded, mine.jsonl]"))
    missing = ["data/aime24.jsonl", "data/gpqa_diamond/gpqa_diamond.jsonl"]
    check_here(plan)  # evaluate.py fetches them
    said: list[Any] = []
    dry_run(plan, 1, 1, said.append)
    assert [f"not there yet: {path}" in said for path in missing] == [True, True]
    monkeypatch.setattr("sys.argv", ["sweep.py", str(plan.path), "--slurm", "--runs", str(tmp_path / "runs")])
    assert sweep.main() == 2
    assert f"{plan.name}: {', '.join(missing)} not there: make data" in capsys.readouterr().err
    (tmp_path / "data" / "gpqa_diamond").mkdir(parents=True)
    for path in missing:
        (tmp_path / path).touch()
    check_here(plan, offline=True)
