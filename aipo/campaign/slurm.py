"""A campaign as a Slurm job array: ``configs/cluster/campaign.slurm`` with a task for each job that is missing.

``python -m aipo.campaign.slurm JOBS.json INDEX`` is what a task runs. Why no library: submitit, the usual one, queues
pickled functions and asks them for their checkpoints; ours are commands that save at SIGTERM and go on by themselves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from aipo.campaign.jobs import ROOT, Job, failure, load_jobs, run_job, save_jobs
from aipo.errors import UserError

SCRIPT = ROOT / "configs" / "cluster" / "campaign.slurm"


def submit(name: str, jobs: Sequence[Job], folder: Path, *, hours: int, at_once: int | None) -> str | None:
    """Queue what is missing; the id of the array job, None if nothing is. UserError where sbatch refuses."""
    missing = [job for job in jobs if job.missing]
    if not missing:
        return None
    listed = save_jobs(missing, folder)
    gpus = missing[0].gpus
    options = {
        "job-name": name,
        "array": f"0-{len(missing) - 1}" + (f"%{at_once}" if at_once else ""),
        "gpus-per-node": gpus,
        "time": f"{hours}:00:00",
        "output": folder / "slurm-%A_%a.out",
    }
    command = ["sbatch", "--parsable", *(f"--{key}={value}" for key, value in options.items())]
    command += [str(SCRIPT), str(listed)]
    python = {"PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")}
    try:
        done = subprocess.run(command, env=os.environ | python, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("--slurm: there is no sbatch here: run it where jobs are submitted") from None
    if done.returncode:
        raise UserError(f"sbatch: {done.stderr.strip() or done.stdout.strip()} (edit {SCRIPT.relative_to(ROOT)})")
    return done.stdout.strip().partition(";")[0]


def task(job: Job, told: Sequence[int]) -> int:
    """Run one job in a task of the array. Told to stop it saves; it queues itself again if only its time is up."""
    print(job.name, flush=True)
    outcome = run_job(job, stopped=lambda: bool(told))
    if outcome == "failed":
        print(failure(job), file=sys.stderr, flush=True)
    if outcome == "stopped" and signal.SIGTERM not in told:
        task_id = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        return subprocess.run(["scontrol", "requeue", task_id]).returncode
    return 0 if outcome == "done" else 1


def main(listed: str, index: str) -> int:
    told: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):  # of the time limit, as the script asks for; of scancel
        signal.signal(number, lambda got, _: told.append(got))
    return task(load_jobs(Path(listed))[int(index)], told)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
