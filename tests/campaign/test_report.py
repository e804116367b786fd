"""What a campaign makes of its runs: the same figures as loops over the run folders give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from aipo.campaign.collect import at, collect
from aipo.campaign.plots import _curves, band
from aipo.campaign.report import write_report
from aipo.campaign.schema import Plot
from aipo.campaign.status import show
from aipo.metrics import bootstrap_interval
from tests.campaign.trial import CAMPAIGN, EVALUATED, evaluate, finish, planned, runs


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
        assert row["best_step"] == 2 + 2 * int(np.argmax(values[1:]))
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


def test_conditions_are_ranked_by_what_is_shown_of_them(tmp_path: Path, model: Path) -> None:
    text = CAMPAIGN.replace("accuracy, mag, ", "").replace("random, mask", "random, read: best, mask") + "seeds: 1\n"
    plan = planned(tmp_path, model, text + "label: 'm^2 ~ \\n'\n")
    finish(plan.cells[1].folder, [0.1, 0.2, 0.3], 0.0124)
    finish(plan.cells[2].folder, [0.1, 0.2, 0.3], 0.0121)
    lines = [line.split(" | ") for line in write_report(plan).splitlines()]
    assert [line[1] for line in lines if line[0] in ("| all", "| random_3 & 10%")][:2] == ["<u>1.24</u>", "**1.21**"]
    assert r"m\textasciicircum{}2 \textasciitilde{} \textbackslash{}n &" in (plan.folder / "table.tex").read_text()


def test_the_best_is_the_highest_of_a_trained_model() -> None:
    log: list[dict[str, Any]] = [{"step": step, "m": value} for step, value in enumerate([0.9, 0.2, 0.5, 0.5, 0.1])]
    assert at(log, "m", "best") == 0.5  # as checkpoints/best, of which step 0 is none
    assert at(log, "m", "first") == 0.9
    assert at(log[:1], "m", "best") == 0.9
    assert at([], "m", "best") is None


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
    assert "| all | **30.0 (1 of 3)** | **20.00 (1 of 3)** |" in text
    assert "second underlined; (1 of 3): of so many seeds only." in text
    assert "30.0 (1 of 3)" in (plan.folder / "table.tex").read_text()
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


def test_curves_have_shares_in_percent_and_tokens_in_thousands(tmp_path: Path, model: Path) -> None:
    plan = planned(tmp_path, model)
    names = list(plan.campaign.variants())
    rows = [
        {"panel": "", "condition": name, "seed": 0, "step": step, "tokens": 4000 * step, "validation/accuracy": i / 10}
        for i, name in [*enumerate(names)][::-1]
        for step in (0, 2)
    ]
    for x, end, label in (("step", 2, "step"), ("tokens", 8, "thousand generated tokens")):
        sheet = _curves(plan, Plot(kind="curves", x=x), pd.DataFrame(rows))
        (ax,) = sheet.axes
        assert [text.get_text() for text in sheet.legends[0].get_texts()] == names  # in the order of the campaign
        assert [line.get_ydata()[-1] for line in ax.lines] == pytest.approx([10.0 * i for i in range(len(names))])
        assert {line.get_xdata()[-1] for line in ax.lines} == {end}
        assert sheet.get_supxlabel() == label
        assert sheet.get_supylabel() == "validation/accuracy, %; mean and 95 % over seeds"


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
        evaluate(cell, share, "aime24", "mine")
    text = write_report(plan)
    assert "| *small* |" in text
    assert "75.0 (42)" in text
    assert "50.00 (12.1)" in text  # MAG: 75 - 25
    assert "In round brackets the paper's figures" in text
    assert "Made at the paper's scale" in text
    assert (plan.folder / "bars.png").is_file()


def test_gains_are_over_the_model_before_training_with_the_same_prompt_and_length(tmp_path: Path, model: Path) -> None:
    text = """
base: tiny.yaml
common: {model.path: MODEL}
conditions:
  before: {read: first}
  long, before: {read: first, rollout.max_tokens: 32}
  trained: {}
  adapter: {method: arca}
  long: {rollout.max_tokens: 32}
  why: {data.suffix: Why?}
seeds: 1
evaluate: {benchmarks: [embedded], samples: 2}
columns: [mag]
"""
    plan = planned(tmp_path, model, text)
    for cell, share in zip(plan.cells, (0.25, 0.5, 0.75, 1.0, 0.75, 0.75)):
        evaluate(cell, share, "embedded")
    runs, _ = collect(plan)
    assert list(runs["mag"].fillna(-1)) == [0, 0, 50, 75, 25, -1]


def test_without_its_benchmarks_a_trained_cell_has_no_accuracy(tmp_path: Path, model: Path) -> None:
    """Held-out accuracy must not stand among means over benchmarks."""
    plan = planned(tmp_path, model, EVALUATED.replace("read: first", "mask.rule: all"))
    finish(plan.cells[0].folder, [0.1, 0.2, 0.3], 1.0)
    text = write_report(plan)
    row = pd.read_parquet(plan.folder / "runs.parquet").iloc[0]
    assert row["otf"] == 100
    assert row[["accuracy", "before", "mag", "tes"]].isna().all()
    assert "| Backbone | – | – | – | – |" in text


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
