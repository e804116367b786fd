"""What a campaign will take, before it is started: memory from the planner, time from runs that were measured.

A run is as long as earlier runs of the same condition here; else as those of the same model on the same device, by
completion tokens at most; else as the embedded default or a bed took, or by arithmetic for a GPU. It is said which. On
a CPU only runs on as many cores count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from aipo.campaign.cells import Cell, Plan, differences, missing_data
from aipo.campaign.jobs import Job
from aipo.errors import UserError
from aipo.plan.memory import GIB, kv_token_bytes
from aipo.plan.planner import Plan as MemoryPlan
from aipo.plan.planner import plan as plan_memory
from aipo.problems import embedded

EMBEDDED_FIXED, EMBEDDED_RATE, EMBEDDED_CORES = 90.0, 3.9e-3, 2  # s a run, s a token at most: `make train` with AMX
BED_FIXED, BED_RATE = 9.0, 1.2e-4  # the same of a bed, on one core: more are no use to so small a model
FLOPS, UTILISATION, BANDWIDTH, REACHED = 312e12, 0.4, 2.0e12, 0.6  # of an A100 80 GB; shares supposed, not measured
LENGTH = 0.5  # completions of half the longest


@dataclass(frozen=True)
class Estimate:
    seconds: float  # of what is left to do; NaN where nothing is known
    source: str
    memory: float  # GiB of a rank at its peak
    problem: str = ""


def estimates(plan: Plan, cores: int) -> dict[str, Estimate]:
    """By job key, for runs on so many cores each."""
    noted = [json.loads(path.read_text()) for path in sorted((plan.folder.parents[1] / "cells").glob("*/cell.json"))]
    measured = [each for each in noted if each["device"] != "cpu" or each["cores"] == cores]
    made, cache = {}, {}
    for job in plan.jobs:
        cell = next(cell for cell in plan.cells if cell.key == job.key)
        if job.facts["twins"] not in cache:
            cache[job.facts["twins"]] = _memory(cell, job.gpus)
        memory = cache[job.facts["twins"]]
        seconds, source = _time(job, cell, measured, memory, cores)
        left = 1 - job.reached / job.last if job.steps else 1.0
        if not any(work.what == "training" for work in job.missing):
            left = 0.0
        peak = math.nan if isinstance(memory, str) else max(map(memory.peak, memory.phases)) / GIB
        problem = memory if isinstance(memory, str) else "; ".join(memory.problems)
        made[job.key] = Estimate(seconds * left if left else 0.0, source, peak, problem)
    return made


def _time(job: Job, cell: Cell, measured: list[Any], memory: MemoryPlan | str, cores: int) -> tuple[float, str]:
    facts = job.facts
    if not job.steps:
        return 0.0, "not trained"
    if same := [each["seconds"] for each in measured if each["twins"] == facts["twins"]]:
        return sum(same) / len(same), f"measured, {len(same)} seeds" if len(same) > 1 else "measured, 1 seed"
    alike = ("model", "engine", "gpus", "device")
    if near := [each for each in measured if all(each[key] == facts[key] for key in alike)]:
        rate = sum(each["seconds"] for each in near) / sum(each["work"] for each in near)
        return rate * facts["work"], f"measured rate of {len(near)} other runs"
    if facts["model"] == embedded.MODEL and facts["device"] == "cpu":
        seconds = (EMBEDDED_FIXED + EMBEDDED_RATE * facts["work"]) * EMBEDDED_CORES / cores
        return seconds, "rate of make train" + ", by the number of cores" * (cores != EMBEDDED_CORES)
    if facts["model"].startswith("data/beds/") and facts["device"] == "cpu":
        return BED_FIXED + BED_RATE * facts["work"], "rate of a bed"
    if isinstance(memory, str) or memory.device != "GPU":
        return math.nan, "nothing measured"
    return _arithmetic(cell, memory), "arithmetic, not measured"


def _arithmetic(cell: Cell, memory: MemoryPlan) -> float:
    """Decoding reads weights and KV cache once a token; the update is 8 FLOPs a parameter and token (recomputation)."""
    config, ranks = cell.setting.config, memory.ranks
    rollout, parameters = config.rollout, memory.model.parameters
    rows = rollout.questions_per_step * rollout.samples_per_question / ranks
    length = LENGTH * rollout.max_tokens
    cache = memory.phases["rollout"].get("KV cache", 0)
    cached = kv_token_bytes(memory.precision.settle(config), memory.model)
    held = max(min(rows, cache / (cached * length)), 1)
    token = (2 * parameters + held * length * cached / 2) / (REACHED * BANDWIDTH)
    generation = rows / held * length * token
    update = 8 * parameters * rows * (length + 200) / (UTILISATION * FLOPS)
    return config.optim.steps * (generation + update)


def _memory(cell: Cell, gpus: int) -> MemoryPlan | str:
    try:
        return plan_memory(cell.setting.config, gpus)
    except UserError as error:
        return str(error)


def dry_run(plan: Plan, workers: int, cores: int, show: Callable[[Any], None]) -> int:
    """Print every run with its keys, its time on so many cores, memory, what is there; 2 if one cannot work."""
    made, own = estimates(plan, cores), differences(plan)
    table = Table(title=f"{plan.name}: {plan.campaign.title}", title_justify="left")
    for column in ("run", "what differs; below the first, from it", "state", "time", "from", "GiB a rank"):
        table.add_column(column, overflow="fold", justify="right" if column in ("time", "GiB a rank") else "left")
    first: dict[str, str] = {}
    lead = next((own[cell.key] for cell in plan.cells if plan.job(cell).steps), {})
    for cell in plan.cells:
        job, estimate = plan.job(cell), made[cell.key]
        if cell.key in first:
            table.add_row(cell.name, "", f"same run as {first[cell.key]}", "", "", "")
            continue
        first[cell.key] = cell.name
        unlike = {k: v for k, v in own[cell.key].items() if own[cell.key] is lead or v != lead.get(k)}
        keys = " ".join(f"{key}={value}" for key, value in unlike.items()) if job.steps else "not trained"
        if cell.setting.seed != plan.campaign.seeds[0]:
            keys = "″"
        state = {"done": "reused", "waiting": "to do", "begun": f"goes on from step {job.reached}"}
        known = "model gone: trained again" if job.again else state.get(job.state(), job.state())
        done = not job.missing
        table.add_row(
            cell.name, keys, known, "" if done else hours(estimate.seconds), "" if done else estimate.source,
            "" if math.isnan(estimate.memory) else f"{estimate.memory:.1f}",
        )  # fmt: skip
    show(table)
    left = [job for job in plan.jobs if job.missing]
    times = [made[job.key].seconds for job in left]
    total, unknown = sum(each for each in times if not math.isnan(each)), sum(map(math.isnan, times))
    labelling = {cell.key: cell.labels for cell in plan.cells if cell.labels and plan.job(cell).steps}
    models = sorted({cell.setting.config.model.path for cell in plan.cells})
    asked = sum(work.what == "evaluation" for job in left for work in job.missing)
    show(
        f"{len(plan.cells)} cells are {len(plan.jobs)} runs: {len(plan.jobs) - len(left)} there already, "
        f"{len(left)} to do, {workers} at once"
    )
    if unknown < len(left) or not left:
        show(f"time: {hours(total / workers)} ({hours(total)} one after the other), an estimate")
    if unknown:
        show(
            f"of {unknown} runs the time is not known: nothing like them was measured here"
            + ", so it is not in it" * (unknown < len(left))
        )
    if asked:
        show(f"evaluations: {asked}, whose time is not in it")
    if plan.jobs and plan.jobs[0].gpus > 1:
        show(f"GPU hours: {total * plan.jobs[0].gpus / 3600:,.0f}")
    passes, bases = len(set(labelling.values())), ", ".join(models)
    show(f"shared: {passes} labelling passes for {len(labelling)} runs with a curriculum; base models {bases}")
    for missing in missing_data(plan):
        show(f"not there yet: {missing}")
    problems = dict.fromkeys(f"{job.name}: {made[job.key].problem}" for job in plan.jobs if made[job.key].problem)
    for problem in problems:
        show(f"does not fit: {problem}")
    return 2 if problems else 0


def hours(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.{1 if seconds < 360000 else 0}f} h"
