"""Run a campaign:  python sweep.py CAMPAIGN.yaml [--dry-run | --status | --collect | --slurm]

CAMPAIGN is a path, or a name under configs/campaigns such as laptop/table1.yaml (docs/campaigns.md). Without a flag it
is run here, and goes on where it was stopped or killed; at its end tables and plots lie in RUNS/campaigns/NAME.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aipo.errors import UserError, exit_code

if TYPE_CHECKING:
    from aipo.campaign.cells import Plan

GPU = re.compile(r" *(\d|GPU-|MIG-)")  # how CUDA_VISIBLE_DEVICES names one


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("campaign", type=Path, help="YAML file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="list the runs, their time and memory, and what is there")
    what.add_argument("--status", action="store_true", help="how far it is; on a terminal a live table")
    what.add_argument("--collect", action="store_true", help="tables and plots of what is there, without running")
    what.add_argument("--slurm", action="store_true", help="submit what is missing as a job array")
    parser.add_argument("--workers", type=int, help="runs at once (default: as many as GPUs allow, 1 without GPUs)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where cells and campaigns lie (default: runs)")
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers must be at least 1, not {options.workers}")
    return options


def say(line: str) -> None:
    with suppress(OSError):  # nobody reads any more, as behind | tee after Ctrl-C: the campaign goes on to its end
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


@exit_code
def main() -> int:
    options = parse()
    try:
        from aipo.campaign.cells import check_here, fetch_benchmarks, make_plan, write_configs

        plan = make_plan(options.campaign, options.runs)
        if options.dry_run or options.status:
            from aipo.evaluation.results import make_console

            console = make_console()
            try:
                places = places_here(plan, options.workers)
            except UserError:  # it is for another machine than this one
                places = [{"cores": list(os.sched_getaffinity(0))}] * (options.workers or 1)
            cores = len(places[0]["cores"])
            if options.status:
                from aipo.campaign.status import show

                show(plan, console, cores)
                return 0
            from aipo.campaign.estimate import dry_run

            return dry_run(plan, len(places), cores, lambda each: console.print(each, highlight=False, soft_wrap=True))
        if options.collect:
            from aipo.campaign.report import write_report

            print(write_report(plan))
            return 0
        check_here(plan, offline=options.slurm)  # campaign.slurm lets its nodes fetch nothing
        if options.slurm:
            from aipo.campaign.slurm import submit

            write_configs(plan)
            made = submit(plan.name, plan.jobs, plan.folder, hours=plan.campaign.hours, at_once=options.workers)
            say(f"submitted as array job {made}" if made else "all runs are there; --collect makes the tables")
            return 0
        if fetch_benchmarks(plan):
            plan = make_plan(options.campaign, options.runs)
        return run_here(plan, options.workers)
    except KeyboardInterrupt:
        return 130


def places_here(plan: Plan, workers: int | None) -> list[dict[str, list[Any]]]:
    """Cores and GPUs of each run that is at work here. UserError where there are too few."""
    import torch

    from aipo.campaign.local import slots

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
    gpus = list(itertools.takewhile(GPU.match, named))  # CUDA too stops at the first that is none, such as -1
    return slots(workers, plan.campaign.gpus, gpus, sorted(os.sched_getaffinity(0)))


def run_here(plan: Plan, workers: int | None) -> int:
    """Run what is missing and report; 1 if a run failed, 130 if a signal stopped it."""
    from aipo.campaign.cells import write_configs
    from aipo.campaign.local import run_jobs
    from aipo.campaign.report import write_report

    places = places_here(plan, workers)
    write_configs(plan)
    done = run_jobs(plan.jobs, places, say)
    if done is None:
        return 130
    print(write_report(plan))
    say(f"report, tables, plots and data: {plan.folder}")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
