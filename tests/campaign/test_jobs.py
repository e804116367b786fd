"""Jobs as processes: each once, one failure stops no other, a kill leaves what was done, and nothing runs on unseen."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aipo.campaign.jobs import APART, SCRIPTS, Job, Work, failure, load_jobs, run_job, save_jobs, source_version
from aipo.campaign.local import run_jobs, slots, stopping
from aipo.campaign.slurm import SCRIPT, submit
from aipo.errors import UserError
from tests.test_house import imports

ROOT = Path(__file__).parents[2]
CORES = sorted(os.sched_getaffinity(0))
PLACE = {"cores": CORES[:1], "gpus": []}


def job(folder: Path, key: str, script: str, **changes: Any) -> Job:
    """One whose training is a line of sh, and is done once it has written ``done``."""
    place = folder / "cells" / key
    work = Work("training", ("sh", "-c", f"cd {place}; {script}"), str(place / "done"))
    settings: dict[str, Any] = {"environment": {}, "gpus": 1, "retries": 0, "steps": 4, "keep_model": False}
    return Job(key, key, str(place), (work,), **(settings | changes))


def until(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_why_it_failed_is_what_the_last_try_said(tmp_path: Path) -> None:
    made = job(tmp_path, "bad", "test -f tried || echo error: out of luck; touch tried; kill -9 $$")
    for said in (True, False):
        assert run_jobs([made], [PLACE], lambda _: None) is False
        assert "training ended with -9" in failure(made)
        assert ("out of luck" in failure(made)) is said


def test_ctrl_c_stops_a_campaign_whose_listener_it_ended_too() -> None:
    def say(_: str) -> None:
        raise BrokenPipeError

    with stopping(say) as stopped:
        with pytest.raises(BrokenPipeError):
            os.kill(os.getpid(), signal.SIGINT)
        assert stopped.is_set()


def test_one_that_fails_stops_no_other_and_is_tried_again_next_time(tmp_path: Path) -> None:
    said: list[str] = []
    jobs = [
        job(tmp_path, "bad", "echo error: out of luck; test -f mended && touch done"),
        job(tmp_path, "good", "touch done"),
    ]
    assert run_jobs(jobs, [PLACE], said.append) is False
    assert [each.state() for each in jobs] == ["failed", "done"]
    assert "training ended with 1: error: out of luck" in failure(jobs[0])
    assert any("out of luck" in line for line in said)
    (jobs[0].place / "mended").touch()
    assert run_jobs(jobs, [PLACE], said.append) is True
    assert [(each.place / "cell.log").read_text().count("$ sh") for each in jobs] == [2, 1]


@pytest.mark.parametrize(("code", "starts"), [(1, 3), (2, 1)])
def test_a_failure_is_tried_again_but_not_a_mistake_of_the_user(code: int, starts: int, tmp_path: Path) -> None:
    failing = job(tmp_path, "a", f"echo x >> starts; exit {code}", retries=2)
    assert run_job(failing) == "failed"
    assert (failing.place / "starts").read_text() == "x\n" * starts


def test_code_that_was_changed_since_the_plan_computes_nothing(tmp_path: Path) -> None:
    """Else its results lie under the key of the code before."""
    apart = ("aipo/campaign/jobs.py", "aipo/credit/table.py", "aipo/beds/worlds.py", "aipo/replay.py")
    for name in ("train.py", "evaluate.py", "aipo/evaluation/scoring.py", *apart):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def of_both() -> list[str]:
        return [source_version("training", tmp_path), source_version("evaluation", tmp_path)]

    found = [of_both()]
    for name in (*apart, "evaluate.py", "aipo/evaluation/scoring.py"):
        (tmp_path / name).write_text("x = 1")
        found.append(of_both())
    assert [[a == b for a, b in zip(*pair)] for pair in itertools.pairwise(found)] == [
        *[[True, True]] * len(apart), [True, False], [False, False],
    ]  # fmt: skip
    (tmp_path / "aipo" / ".#scoring.py").symlink_to("me@here.1:2")  # Emacs, as long as the file is edited
    (tmp_path / "aipo" / ".#scoring.py~").touch()
    (tmp_path / "aipo" / ".copies").mkdir()
    (tmp_path / "aipo" / ".copies" / "scoring.py").touch()
    assert of_both() == found[-1]
    one = job(tmp_path, "a", "touch done", retries=5)
    now, before = (
        replace(one, work=(replace(one.work[0], source=each),)) for each in (source_version("training"), found[0][0])
    )
    assert run_job(before) == "failed"
    assert "the code was changed since this was planned: start the campaign again" in failure(before)
    assert (one.place / "cell.log").read_text().count("$ ") == 1
    assert run_job(now) == "done"


def test_what_is_apart_is_imported_by_no_run() -> None:
    """But for the plan of a dry run, and reports."""
    graph, found = imports(), set()
    left = {name for script in SCRIPTS.values() for name in re.findall(r"aipo\.[\w.]+", (ROOT / script).read_text())}
    while left:
        found |= left
        left = {name for each in left for name in graph.get(each, ())} - found
    assert {"aipo.mi", "aipo.trainer", "aipo.evaluation.scoring"} < found
    assert {name.split(".")[1] for name in found} & {name.removesuffix(".py") for name in APART} == {"plan", "report"}


def test_each_worker_has_cores_and_gpus_of_its_own(tmp_path: Path) -> None:
    show = f"{sys.executable} -c 'import os; print(os.sched_getaffinity(0))' > cores"
    show += "; echo $CUDA_VISIBLE_DEVICES > gpus; touch done"
    places = slots(2, 2, ["4", "5", "6", "7"], CORES[:2] if len(CORES) > 1 else CORES * 2)
    assert [place["gpus"] for place in places] == [["4", "5"], ["6", "7"]]
    one = job(tmp_path, "one", show)
    assert run_jobs([one], places[1:], print)
    assert (one.place / "gpus").read_text() == "6,7\n"
    assert (one.place / "cores").read_text() == f"{{{places[1]['cores'][0]}}}\n"


def test_what_no_command_did_fails_one_cell_alone(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "bad", "touch done"), job(tmp_path, "good", "touch done")]
    (jobs[0].place / "cell.log").mkdir(parents=True)  # where no log can be written
    said: list[str] = []
    assert run_jobs(jobs, [PLACE], said.append) is False
    assert jobs[1].state() == "done"
    assert any("bad: failed: IsADirectoryError" in line for line in said)


def test_more_gpus_than_cores_share_them() -> None:
    assert [place["cores"] for place in slots(None, 1, ["0", "1", "2"], [4, 5])] == [[4], [5], [4]]


def test_slots_that_are_not_there_are_refused() -> None:
    assert len(slots(None, 1, ["0", "1", "2"], [0, 1, 2])) == 3
    assert slots(None, 1, [], [0, 1]) == [{"cores": [0, 1], "gpus": []}]
    for workers, each, gpus, says in ((3, 1, [], "at most 2"), (None, 8, [], "--slurm"), (1, 2, ["0"], "here are 1")):
        with pytest.raises(UserError, match=says):
            slots(workers, each, gpus, [0, 1])


def test_two_campaigns_do_not_compute_one_cell_twice(tmp_path: Path) -> None:
    same = job(tmp_path, "a", "echo x >> starts; while ! test -f go; do sleep 0.05; done; touch done")
    threads = [threading.Thread(target=run_job, args=(same,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: same.state() == "running")
    (same.place / "go").touch()
    for thread in threads:
        thread.join(60)
    assert same.state() == "done"
    assert (same.place / "starts").read_text() == "x\n"


def test_told_to_stop_it_passes_it_on_and_waits(tmp_path: Path) -> None:
    saving = job(tmp_path, "a", "trap 'touch saved; exit 3' TERM; touch up; while :; do sleep 0.05; done", retries=5)
    event = threading.Event()
    outcome: list[str] = []
    thread = threading.Thread(target=lambda: outcome.append(run_job(saving, stopped=event.is_set)))
    thread.start()
    until((saving.place / "up").exists)
    event.set()
    thread.join(60)
    assert outcome == ["stopped"]
    assert (saving.place / "saved").is_file()
    assert saving.state() == "waiting"


def test_a_killed_campaign_takes_its_runs_along(tmp_path: Path) -> None:
    """SIGKILL: the kernel tells the run to save and end."""
    saving = job(tmp_path, "a", "trap 'touch saved; exit 3' TERM; touch up; while :; do sleep 0.05; done")
    listed = save_jobs([saving], tmp_path)
    assert load_jobs(listed) == [saving]
    parent = subprocess.Popen([sys.executable, "-m", "aipo.campaign.slurm", listed, "0"], cwd=ROOT)
    until((saving.place / "up").exists)
    assert saving.state() == "running"
    parent.kill()
    parent.wait()
    until((saving.place / "saved").exists)


@pytest.mark.slow
def test_a_run_that_outlives_its_campaign_is_waited_for(tmp_path: Path) -> None:
    """kill -9 frees the campaign's lock at once; its train.py keeps the folder until its step is saved."""
    one = job(tmp_path, "a", "test -f saved || exit 2; touch done")
    one.place.mkdir(parents=True)
    holds = "import sys, time; from filelock import FileLock; lock = FileLock('.lock'); lock.acquire(); "
    holds += "open('up', 'w'); time.sleep(2); open('saved', 'w')"
    with subprocess.Popen([sys.executable, "-c", holds], cwd=one.place):
        until((one.place / "up").exists)
        assert run_job(one, stopped=lambda: True) == "stopped"
        assert run_job(one) == "done"


def test_a_model_that_was_not_kept_is_trained_again_for_an_evaluation(tmp_path: Path) -> None:
    trained = job(tmp_path, "a", "mkdir -p final; touch done; echo x >> starts")
    assert run_job(trained) == "done"
    assert not (trained.place / "final").exists()
    evaluation = Work(
        "evaluation", ("sh", "-c", f"cd {trained.place}; test -d final && touch score"), str(trained.place / "score")
    )
    more = replace(trained, work=(*trained.work, evaluation))
    assert [work.what for work in more.missing] == ["training", "evaluation"]
    assert run_job(more) == "done"
    assert (trained.place / "starts").read_text() == "x\nx\n"
    assert more.missing == []


def evaluated(trained: Job, name: str) -> Job:
    """With an evaluation that needs the model."""
    command = ("sh", "-c", f"cd {trained.place}; test -d final && test -f ready-{name} && touch {name}")
    evaluation = Work("evaluation", command, str(trained.place / name))
    return replace(trained, work=(*trained.work, evaluation))


def test_no_campaign_removes_a_model_that_another_keeps_or_still_needs(tmp_path: Path) -> None:
    plain = job(tmp_path, "a", "mkdir -p final; touch done; echo x >> starts")
    evaluated(plain, "score").claim()  # a campaign that has not come to it yet
    assert run_job(plain) == "done"
    assert (plain.place / "final").is_dir()
    (plain.place / "ready-score").touch()
    assert run_job(evaluated(plain, "score")) == "done"
    assert not (plain.place / "final").exists()
    keeping = replace(plain, keep_model=True)
    assert run_job(keeping) == run_job(plain) == "done"
    assert keeping.missing == []
    assert (plain.place / "starts").read_text() == "x\nx\n"


def test_a_kill_while_a_model_is_removed_leaves_no_half_of_it(tmp_path: Path) -> None:
    trained = job(tmp_path, "a", "mkdir final; touch final/one final/two; touch done")

    def killed_after_one_file() -> None:
        real, gone = os.unlink, itertools.count()

        def unlink(path: Any, **more: Any) -> None:
            if Path(path).name in ("one", "two") and next(gone):
                os.kill(os.getpid(), signal.SIGKILL)
            real(path, **more)

        os.unlink = unlink  # of this process alone
        run_job(trained)

    child = multiprocessing.get_context("fork").Process(target=killed_after_one_file)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    more = evaluated(trained, "score")
    assert [work.what for work in more.missing] == ["training", "evaluation"]
    (trained.place / "ready-score").touch()
    assert run_job(more) == "done"
    assert sorted(path.name for path in trained.place.iterdir() if path.is_dir()) == []


def broken_when_trained_again(tmp_path: Path, how: str) -> tuple[Job, Path]:
    """A run that is done, and its metrics, which are written over before the next training ends so."""
    trained = job(tmp_path, "a", f"test -f broken && {{ echo 1 > metrics.jsonl; {how}; }}; mkdir final; echo x >> done")
    metrics = trained.place / "metrics.jsonl"
    assert run_job(trained) == "done"
    metrics.write_text('{"step": 4}\n')
    (trained.place / "broken").touch()
    return trained, metrics


def test_a_run_that_is_trained_again_in_vain_stays_there_for_others(tmp_path: Path) -> None:
    trained, metrics = broken_when_trained_again(tmp_path, "exit 1")
    more = evaluated(trained, "score")
    assert (more.again, more.reached, more.state()) == (True, 0, "waiting")
    assert run_job(replace(more, retries=1)) == "failed"
    assert trained.state() == "done"
    assert metrics.read_text() == '{"step": 4}\n'


def test_a_kill_while_a_model_is_trained_again_leaves_the_earlier_figures(tmp_path: Path) -> None:
    trained, metrics = broken_when_trained_again(tmp_path, "rm broken; kill -9 $PPID; exit 1")
    more = evaluated(trained, "score")
    child = multiprocessing.get_context("fork").Process(target=run_job, args=(more,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    until(lambda: metrics.read_text() == "1\n")
    assert run_job(trained) == "done"  # of a campaign that has no need of the model
    assert metrics.read_text() == '{"step": 4}\n'
    assert (trained.place / "done").read_text() == "x\n"
    (trained.place / "ready-score").touch()
    assert run_job(more) == "done"
    assert not list(trained.place.glob("*.earlier"))


def test_an_evaluation_that_fails_stops_no_other(tmp_path: Path) -> None:
    trained = job(tmp_path, "a", "mkdir final; touch done")
    good = Work("evaluation", ("sh", "-c", f"cd {trained.place}; touch score"), str(trained.place / "score"))
    bad = Work("evaluation", ("sh", "-c", "exit 2"), str(trained.place / "never"))
    both = replace(trained, work=(*trained.work, bad, good))
    assert run_job(both) == "failed"
    assert [work.done for work in both.work] == [True, False, True]
    assert (trained.place / "final").is_dir()  # kept for the one that is missing


SBATCH = """#!/bin/bash
# a stand-in: runs the tasks of the array one after the other, as Slurm would on a machine with one slot
for argument; do case "$argument" in
  --array=*) range=${argument#--array=}; range=${range%%%*};;
  --*) ;;
  *) rest+=("$argument");;
esac; done
echo "$@" >> "$LOG"
for ((i = ${range%-*}; i <= ${range#*-}; i++)); do
  SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$i bash "${rest[@]}" >> "$LOG" 2>&1
done
echo "77;cluster"
"""


@pytest.mark.slow
def test_slurm_gets_an_array_of_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("sbatch", SBATCH), ("scontrol", "#!/bin/bash\necho scontrol $@ >> $LOG\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.chdir(tmp_path)
    time_is_up = SCRIPT.read_text().partition("--signal=B:")[2].partition("@")[0]
    jobs = [
        job(tmp_path, "a", "touch done", gpus=8),
        job(tmp_path, "b", "test -f mended && touch done", gpus=8),
        job(tmp_path, "c", "test -f again && touch done; touch again", gpus=8, retries=1),
        job(
            tmp_path,
            "d",
            f"test -f more && touch done || {{ touch more; kill -{time_is_up} $PPID; sleep 60; }}",
            gpus=8,
        ),
        job(tmp_path, "e", "test -f more && touch done || { touch more; kill -TERM $PPID; sleep 60; }", gpus=8),
    ]
    assert run_job(jobs[0]) == "done"
    assert submit("mine", jobs, tmp_path / "campaign", hours=3, at_once=2) == "77"
    log = (tmp_path / "log").read_text()
    assert "--array=0-3%2" in log
    assert "--gpus-per-node=8" in log
    assert "--time=3:00:00" in log
    assert "training ended with 1" in log  # b
    assert [line for line in log.splitlines() if "scontrol" in line] == ["scontrol requeue 77_2"]  # e was cancelled
    assert [each.state() for each in jobs] == ["done", "failed", "done", "waiting", "waiting"]
    (jobs[1].place / "mended").touch()
    (queued,) = (tmp_path / "campaign").glob("jobs-*.json")
    assert submit("mine", jobs, tmp_path / "campaign", hours=3, at_once=None) == "77"
    assert load_jobs(queued) == jobs[1:]  # whose tasks read it when they start, and again
    assert "--array=0-2 " in (tmp_path / "log").read_text()
    assert submit("mine", jobs, tmp_path / "campaign", hours=3, at_once=None) is None


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no sbatch here"):
        submit("mine", [job(tmp_path, "a", "true")], tmp_path, hours=1, at_once=None)


def test_the_step_that_a_run_has_come_to(tmp_path: Path) -> None:
    one = job(tmp_path, "a", "true")
    assert (one.reached, one.state()) == (0, "waiting")
    one.place.mkdir(parents=True)
    (one.place / "metrics.jsonl").write_text(json.dumps({"step": 3}) + '\n{"step": 4, "torn')
    assert (one.reached, one.state()) == (3, "begun")


def test_signals_end_a_campaign_in_order(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, key, "trap 'touch saved; exit 3' TERM; touch up; while :; do sleep 0.05; done") for key in "ab"
    ]

    def interrupt() -> None:
        until((jobs[0].place / "up").exists)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run_jobs(jobs, [PLACE], print) is None
    thread.join()
    assert (jobs[0].place / "saved").is_file()
    assert not jobs[1].place.exists()
