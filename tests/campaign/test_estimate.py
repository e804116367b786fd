"""What a campaign is expected to take, before it is started and while it runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import sweep
from aipo.campaign.cells import check_here, make_plan, write_configs
from aipo.campaign.estimate import Estimate, dry_run, estimates
from aipo.campaign.jobs import State
from aipo.campaign.status import Seen, cores_of, show, time_left
from aipo.errors import UserError
from tests.campaign.trial import CAMPAIGN, finish, planned


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
    for gpus, says in ((1, "6 to do, 3 at once"), (4, "6 to do, 1 at once")):  # four are elsewhere
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
