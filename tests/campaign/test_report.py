"""What a campaign makes of its runs: the same figures as loops over the run folders give."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import sweep
from aipo.campaign.cells import Plan, _content, check_here, differences, make_plan, write_configs
from aipo.campaign.estimate import Estimate, dry_run, estimates
from aipo.campaign.jobs import State
from aipo.campaign.plots import band
from aipo.campaign.report import write_report
from aipo.campaign.status import Seen, cores_of, show, time_left
from aipo.config import load_config
from aipo.errors import UserError
from aipo.evaluation.results import Result, save_results
from aipo.metrics import bootstrap_interval
from tests.tiny import make_tiny

CAMPAIGN = """
title: A try
base: tiny.yaml
common: {model.path: MODEL, optim.steps: 4, validation.every: 2}
conditions:
  before: {mask.rule: all, read: first}
  all: {mask.rule: all}
  "random_3 & 10%": {mask.rule: random, mask.fraction: 0.1}
control: all
columns: [accuracy, mag, otf, tes, best_step, steps, reward/correct]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"))


def planned(folder: Path, model: Path, text: str = CAMPAIGN, name: str = "mine") -> Plan:
    path = folder / f"{name}.yaml"
    path.write_text(text.replace("MODEL", str(model)))
    return make_plan(path, folder / "runs")


def finish(folder: Path, accuracies: list[float], otf: float) -> None:
    """A run folder as train.py leaves it: validations at steps 0, 2 and 4."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(5):
        line: dict[str, Any] = {"step": step}
        if step % 2 == 0:
            line["validation/accuracy"] = accuracies[step // 2]
        if step:
            line |= {"mask/otf": otf, "rollout/used_tokens": 100 + step, "mask/cost_share": otf / 2}
            line |= {
                "rollout/tokens": 200 + step,
                "time/rollout_s": 1.0,
                "time/forward_s": 0.5,
                "reward/correct": step / 10,
            }
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"length": 9.0, "peak_memory_bytes": {"host": 2**30}}))


def runs(plan: Plan) -> dict[tuple[str, int], list[float]]:
    """Three validations for each condition and seed, written to the cells."""
    rng, made = np.random.default_rng(0), {}
    for cell in plan.cells:
        if not cell.folder.exists():
            values = [round(float(v), 3) for v in rng.uniform(0.2, 0.6, 3)]
            finish(cell.folder, values, 1.0 if cell.setting.condition != "random_3 & 10%" else 0.1)
            made[cell.folder.name, cell.setting.seed] = values
    return {(c.setting.condition, c.setting.seed): made[c.folder.name, c.setting.seed] for c in plan.cells}


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


def test_the_config_of_a_run_is_the_resolved_one(tmp_path: Path, model: Path) -> None:
    plan = planned(tmp_path, model)
    write_configs(plan)
    for cell in plan.cells:
        read = load_config(str(cell.folder / "cell.yaml"))
        assert read.folder == cell.folder
        assert read.model_copy(update={"name": "tiny", "runs": "runs"}) == cell.setting.config


@pytest.mark.slow
def test_the_tables_are_what_the_runs_say(tmp_path: Path, model: Path) -> None:
    plan = planned(tmp_path, model)
    found = runs(plan)
    text = write_report(plan)
    table = pd.read_parquet(plan.folder / "runs.parquet")
    assert len(table) == len(pd.read_csv(plan.folder / "runs.csv")) == 9
    for row in table.to_dict("records"):
        values = found[row["condition"], row["seed"]]
        trained = row["condition"] != "before"
        assert row["accuracy"] == pytest.approx(100 * (values[2] if trained else values[0]))
        assert row["best_step"] == 2 * int(np.argmax(values))
        if trained:
            otf = 10 if "random" in row["condition"] else 100
            assert row["mag"] == pytest.approx(100 * (values[2] - values[0]))
            assert row["tes"] == pytest.approx(row["mag"] / otf * 100)
            assert (row["otf"], row["cost_share"], row["steps"]) == (pytest.approx(otf), pytest.approx(otf / 2), 4)
            assert row["tokens"] == 201 + 202 + 203 + 204
            assert row["seconds"] == 1.5
            assert row["reward/correct"] == pytest.approx(40)
    shown = [100 * found["all", seed][2] for seed in range(3)]
    low, high = bootstrap_interval(shown, 0)
    assert f"{np.mean(shown):.1f} [{low:.1f}, {high:.1f}]" in text
    assert "9 of 9 cells are there" in text
    assert "Made at own scale" in text
    assert re.search(r"random_3 & 10% \| 3 \| [+-]\d+\.\d \| \[.*\] \| 0\.\d{4} \| 0\.\d{4} \| (not )?told apart", text)
    latex = (plan.folder / "table.tex").read_text()
    assert r"random\_3 \& 10\% &" in latex
    assert latex.count("{") == latex.count("}")
    rows = pd.read_csv(plan.folder / "table.csv")
    assert len(rows) == 3 * 7
    steps = pd.read_parquet(plan.folder / "curves.parquet")
    assert set(steps["condition"]) == {row["condition"] for row in table.to_dict("records")} - {"before"}
    for name in ("curves.png", "forest.png", "curves.csv", "curves.parquet"):
        assert (plan.folder / name).stat().st_size > 500


@pytest.mark.slow
def test_best_is_bold_and_lower_is_better_for_costs(tmp_path: Path, model: Path) -> None:
    plan = planned(tmp_path, model, CAMPAIGN.replace("[accuracy, mag,", "[accuracy,"))
    runs(plan)
    lines = [line for line in write_report(plan).splitlines() if line.startswith(("| all", "| random"))][:2]
    otf = [line.split(" | ")[2] for line in lines]
    assert otf[0].startswith("<u>100.00")
    assert otf[1].startswith("**10.00")


@pytest.mark.slow
def test_a_campaign_half_done_says_what_is_missing(tmp_path: Path, model: Path) -> None:
    plan = planned(tmp_path, model)
    text = write_report(plan)
    assert "0 of 9 cells are there" in text
    assert "| all | – |" in text
    finish(plan.cells[3].folder, [0.1, 0.2, 0.3], 1.0)
    broken = plan.cells[-1].folder
    broken.mkdir(parents=True)
    (broken / "failed.json").write_text(json.dumps({"code": 1, "what": "training", "last": "error: no memory"}))
    text = write_report(plan)
    assert "2 of 9 cells are there" in text  # before and all share one
    assert "| all | **30.0** |" in text
    assert "training ended with 1: error: no memory" in text
    console = Console(record=True, width=200)
    show(plan, console, 1)
    status = console.export_text()
    assert re.search(r"1 done.*1 failed|1 failed.*1 done", status)
    assert "0.300" in status
    assert "4/4" in status
    for cell in plan.cells:  # what has failed is nothing that will take time
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / "failed.json").write_text((broken / "failed.json").read_text())
    show(plan, console, 1)
    assert "nothing is left to run" in console.export_text()


def test_the_dry_run_lists_all_and_writes_nothing(tmp_path: Path, model: Path) -> None:
    plan = planned(tmp_path, model)
    said: list[Any] = []
    assert dry_run(plan, 2, 1, said.append) == 0
    console = Console(record=True, width=200)
    console.print(said[0])
    table, text = console.export_text(), "\n".join(map(str, said[1:]))
    assert "same run as before, seed 0" in table
    assert "mask.rule=all mask.fraction=" in table  # of the first run, then what is not as in it
    assert "mask.rule=random mask.fraction=0.1" in table
    assert "9 cells are 6 runs: 0 there already, 6 to do, 2 at once" in text
    assert "of 6 runs the time is not known" in text
    assert "time:" not in text  # of none
    assert "shared: 3 labelling passes for 6 runs" in text
    assert not (tmp_path / "runs").exists()
    facts = plan.jobs[0].facts
    finish(plan.cells[0].folder, [0.1, 0.2, 0.3], 1.0)
    (plan.cells[0].folder / "cell.json").write_text(json.dumps(facts | {"seconds": 60.0, "cores": 2}))
    said.clear()
    dry_run(plan, 1, 2, said.append)
    console.print(said[0])
    assert "measured, 1 seed" in console.export_text()  # seeds 1 and 2 of the same condition
    assert "time: 5 min" in "\n".join(map(str, said[1:]))
    assert {each.source for each in estimates(plan, 1).values()} == {"nothing measured"}  # on as many cores
    assert cores_of(plan, 1) == 2


def test_a_run_whose_model_is_gone_is_announced_with_its_whole_time(tmp_path: Path, model: Path) -> None:
    plan = planned(tmp_path, model, CAMPAIGN + "keep_models: true\n")
    job = plan.jobs[0]
    finish(job.place, [0.1, 0.2, 0.3], 1.0)
    (job.place / "cell.json").write_text(json.dumps(job.facts | {"seconds": 60.0, "cores": 2}))
    assert estimates(plan, 2)[job.key].seconds == 60
    said: list[Any] = []
    dry_run(plan, 1, 2, said.append)
    console = Console(record=True, width=200)
    console.print(said[0])
    assert "model gone: trained again" in console.export_text()
    write_configs(plan)
    assert (job.place / "keep.wanted").exists()


def test_the_dry_run_takes_as_many_at_once_as_the_run_would(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    for gpus, says in ((1, "6 to do, 3 at once"), (8, "6 to do, 1 at once")):  # eight are elsewhere
        path = planned(tmp_path, model, f"{CAMPAIGN}gpus: {gpus}\n").path
        monkeypatch.setattr("sys.argv", ["sweep.py", str(path), "--dry-run", "--runs", str(tmp_path / "runs")])
        sweep.main()
        assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("visible", "gpus"), [("-1", []), ("NoDevFiles", []), ("2,GPU-8932f937,-1,3", ["2", "GPU-8932f937"])]
)
def test_what_names_no_gpu_is_none(
    visible: str, gpus: list[str], tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    places = sweep.places_here(planned(tmp_path, model), None)
    assert [gpu for place in places for gpu in place["gpus"]] == gpus


def test_the_rate_of_make_train_is_for_two_cores(tmp_path: Path) -> None:
    plan = make_plan(Path("laptop/table3.yaml"), tmp_path)
    if plan.jobs[0].facts["device"] != "cpu":
        pytest.skip("of a machine without a GPU")
    on_one, on_two = (estimates(plan, cores)[plan.jobs[0].key] for cores in (1, 2))
    assert on_one.seconds == 2 * on_two.seconds > 0
    assert (on_two.source, on_one.source) == ("rate of make train", "rate of make train, by the number of cores")


@pytest.mark.slow
def test_a_bed_that_was_never_trained_here_has_a_time(tmp_path: Path) -> None:
    plan = make_plan(Path("laptop/beds.yaml"), tmp_path)
    if plan.jobs[0].facts["device"] != "cpu":
        pytest.skip("of a machine without a GPU")
    made = estimates(plan, 1)
    assert {each.source for each in made.values()} == {"rate of a bed"}
    assert all(10 < each.seconds < 60 for each in made.values())


def test_time_left_is_by_the_pace_since_a_run_was_seen_at_work(tmp_path: Path, model: Path) -> None:
    job = replace(planned(tmp_path, model).jobs[0], steps=10)
    job.place.mkdir(parents=True)
    seen: Seen = {}

    def left(state: State, step: int, now: float) -> float:
        (job.place / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")
        return time_left(job, state, Estimate(500.0, "", 1.0), seen, now)

    assert left("waiting", 0, 0) == 500
    assert left("running", 0, 3600) == 500  # begins an hour later
    assert left("running", 2, 3620) == 80  # eight steps of 10 s
    assert left("failed", 2, 4000) == 500
    assert left("running", 2, 5000) == 500
    assert left("running", 6, 5080) == 80  # four of 20 s
    assert left("done", 10, 6000) == 0


def test_a_run_with_a_budget_of_tokens_is_expected_to_end_with_it(tmp_path: Path, model: Path) -> None:
    """Half of 800 are generated by step 2, so that it ends after 4 of its 100 steps."""
    plan = planned(tmp_path, model, CAMPAIGN.replace("optim.steps: 4", "optim.steps: 100, optim.generated_tokens: 800"))
    done, begun = plan.jobs[0], plan.jobs[2]  # seeds 0 and 1 of one condition
    finish(done.place, [0.1, 0.2, 0.3], 1.0)
    (done.place / "cell.json").write_text(json.dumps(done.facts | {"seconds": 60.0, "cores": 2}))
    begun.place.mkdir(parents=True)
    assert estimates(plan, 2)[begun.key].seconds == 60

    def reach(step: int) -> None:
        lines = [{"step": i, "rollout/tokens": 200 * (i > 0)} for i in range(step + 1)]
        (begun.place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    reach(2)
    assert estimates(plan, 2)[begun.key].seconds == 30
    seen: Seen = {begun.key: (0.0, 1)}
    assert time_left(begun, "running", Estimate(500.0, "", 1.0), seen, 10.0) == 20  # two steps of 10 s
    console = Console(record=True, width=200)
    show(plan, console, 2)
    assert "2/4 " in console.export_text()
    reach(4)
    assert begun.last == 4


def test_the_papers_campaigns_fit_the_papers_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight A100, no network: every run is planned, none exceeds its memory, and each has a time."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plan = make_plan(Path("paper/table3.yaml"), tmp_path)
    made = estimates(plan, 8)
    assert not [estimate.problem for estimate in made.values() if estimate.problem]
    assert all(estimate.memory > 10 for estimate in made.values())
    assert all(estimate.source == "arithmetic, not measured" for estimate in made.values())
    by_model = {plan.job(cell).facts["model"]: made[cell.key].seconds for cell in plan.cells}
    assert list(by_model.values()) == sorted(by_model.values())
    with pytest.raises(UserError, match=r"data/aime24\.jsonl"):
        check_here(plan)


def test_a_band_is_the_interval_at_each_step() -> None:
    rows = [(s, step, v) for s, values in enumerate([[1, 2, 4], [2, 4, 5], [0, 0, 9]]) for step, v in enumerate(values)]
    curves = pd.DataFrame(rows, columns=["seed", "step", "m"])
    x, mean, low, high = band(curves, "m", "step")
    assert list(x) == [0, 1, 2]
    assert mean == pytest.approx([1, 2, 6])
    assert [low[1], high[1]] == pytest.approx(bootstrap_interval([2, 4, 0], 0, resamples=1000))
    curves["tokens"] = curves["step"] * (10 + curves["seed"])
    x, mean, _, _ = band(curves, "m", "tokens")
    assert x[-1] == 20
    assert mean[-1] == pytest.approx(
        np.mean([4, np.interp(20, [0, 11, 22], [2, 4, 5]), np.interp(20, [0, 12, 24], [0, 0, 9])])
    )


EVALUATED = """
base: tiny.yaml
scale: paper
common: {model.path: MODEL}
panels: {small: {}, smaller: {optim.lr: 1e-5}}
conditions:
  Backbone: {read: first}
  trained: {}
  drop: {intervene: drop}
seeds: [4]
control: Backbone
evaluate: {benchmarks: [aime24, mine.jsonl], samples: 2}
columns: {aime24: AIME'24, mine: "", accuracy: Avg., mag: ""}
printed: {small: {trained: [42.0, null, 53.6, 12.1]}}
plots: [bars, forest]
"""


def test_benchmarks_are_columns_and_the_papers_figures_stand_beside(tmp_path: Path, model: Path) -> None:
    plan = planned(tmp_path, model, EVALUATED, "figure")
    assert plan.name == "paper-figure"
    assert len(plan.jobs) == 3  # the backbone is evaluated once for both panels
    job = plan.job(plan.cells[1])
    assert [work.what for work in job.work] == ["training", "evaluation", "evaluation"]
    assert "--intervene drop" in " ".join(job.work[2].command)
    assert f"--model {job.folder}" in " ".join(job.work[1].command)
    untrained = plan.job(plan.cells[0])
    assert [work.what for work in untrained.work] == ["evaluation"]
    assert "--model" not in untrained.work[0].command
    for cell, share in zip(plan.cells, (0.25, 0.75, 0.5, 0.25, 0.5, 0.5)):
        assert cell.results is not None
        result = Result(share, 0, 1, 2, 2, {"1": share, "2": 1}, share, 9, 0, 0, 0, 0, "f", {"a": [1, 0], "b": [1, 0]})
        cell.results.parent.mkdir(parents=True, exist_ok=True)
        save_results(cell.results.parent, {"model": "m", "settings": {}}, {"aime24": result, "mine": result})
    text = write_report(plan)
    assert "| *small* |" in text
    assert "75.0 (42)" in text
    assert "50.00 (12.1)" in text  # MAG: 75 - 25
    assert "In round brackets the paper's figures" in text
    assert "Made at the paper's scale" in text
    assert (plan.folder / "bars.png").is_file()


def test_without_its_benchmarks_a_trained_cell_has_no_accuracy(tmp_path: Path, model: Path) -> None:
    """Held-out accuracy must not stand among means over benchmarks."""
    plan = planned(tmp_path, model, EVALUATED.replace("read: first", "mask.rule: all"))
    finish(plan.cells[0].folder, [0.1, 0.2, 0.3], 1.0)
    text = write_report(plan)
    row = pd.read_parquet(plan.folder / "runs.parquet").iloc[0]
    assert row["otf"] == 100
    assert row[["accuracy", "before", "mag", "tes"]].isna().all()
    assert "| Backbone | – | – | – | – |" in text


def test_what_evaluate_py_would_refuse_is_refused_before_anything_runs(tmp_path: Path, model: Path) -> None:
    text = EVALUATED.replace("samples: 2", "samples: 2, options: [--temprature, '1']")
    with pytest.raises(
        UserError, match=r"mine.yaml: small: Backbone: evaluate: options: unrecognized arguments: --temprature 1$"
    ):
        planned(tmp_path, model, text)
    with pytest.raises(UserError, match=r"options: --temperature must lie between 0 and 100, not 101"):
        planned(tmp_path, model, text.replace("temprature, '1'", "temperature, '101'"))
    there = planned(tmp_path, model, text.replace("temprature", "temperature"))
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


@pytest.mark.slow
def test_a_metric_that_no_run_has_is_named_and_a_plot_that_fails_leaves_the_tables(tmp_path: Path, model: Path) -> None:
    text = CAMPAIGN.replace("reward/correct]", "reward/corect]") + "metric: validation/acuracy\n"
    plan = planned(tmp_path, model, text)
    assert "Not measured" not in write_report(plan)  # there is no run yet
    runs(plan)
    (plan.folder / "curves.png").mkdir()  # where a picture cannot be written
    for name in ("report.md", "table.tex", "table.csv"):
        (plan.folder / name).unlink()
    with pytest.raises(IsADirectoryError):
        write_report(plan)
    assert "No run has reward/corect, validation/acuracy in its metrics" in (plan.folder / "report.md").read_text()
    assert (plan.folder / "table.tex").is_file()
    assert (plan.folder / "table.csv").is_file()
