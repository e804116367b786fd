"""The parts of bench/ that decide something: what gpu.sh starts, what two runs differ in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from aipo.config import load_config
from bench import gpu, soak, step
from bench.batches import load
from bench.growth import grown
from bench.same import TIMES, contents, difference

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(["bash", SCRIPT], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no NVIDIA GPU")


def test_what_it_starts_takes_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Recorded(gpu.Job):
        def __init__(self, command: list[str], log: Path, deadline: float) -> None:
            started.append(command)
            if "--out" in command:
                Path(command[-1]).write_text("# Title\n")

        def wait(self, *_: object, **__: object) -> None:
            pass

    monkeypatch.setattr(gpu, "Job", Recorded)
    assert gpu.step(tmp_path, 0, small=False) == "## Title\n"
    monkeypatch.setattr(sys, "argv", started[0][1:])
    parsed = step.parse()
    assert parsed.attention == "sdpa"
    assert (parsed.scale, parsed.quick, parsed.random, parsed.micro_tokens) == (60, True, True, 12288)
    longest = max(map(len, load(questions=1, scale=parsed.scale, vocabulary=9).completions))
    assert 10_000 < longest <= parsed.micro_tokens - 200  # and its prompt
    config = load_config("qwen3_1.7b.yaml", [*gpu.RUN, *gpu.LARGE_RUN])
    assert (config.rollout.engine, config.sharding.zero_stage) == ("hf", 3)
    assert not config.validation.watch  # of files that no machine has by itself
    assert sum(share for _, share in gpu.PARTS.values()) == pytest.approx(1)


def test_a_part_ends_with_its_time_and_says_why_it_failed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hanging = gpu.Job(["sh", "-c", "sleep 600 & echo $!; wait"], log, time.monotonic() + 60)
    hanging.wait(lambda: log.read_text().endswith("\n"))
    hanging.deadline = time.monotonic()
    with pytest.raises(gpu.NotDone, match="not done in its time"):
        hanging.wait()
    child, limit = Path("/proc") / log.read_text().strip() / "stat", time.monotonic() + 60
    while child.exists() and " Z " not in child.read_text():  # a zombie is one whose exit code nobody has fetched
        assert time.monotonic() < limit, "the child lives on"
        time.sleep(0.01)
    with pytest.raises(gpu.NotDone, match="ended with 4: out of memory"):
        gpu.Job(["sh", "-c", "echo out of memory; exit 4"], log, time.monotonic() + 60).wait()
    gpu.Job(["sh", "-c", "exit 3"], log, time.monotonic() + 60).wait(code=gpu.STOPPED)


def test_what_two_runs_differ_in(tmp_path: Path) -> None:
    """Any file and any number but times; a run against itself in nothing."""
    for name, loss, weight in (("a", 0.5, b"w"), ("b", 0.5000001, b"v")):
        run = tmp_path / name
        (run / "final").mkdir(parents=True)
        (run / "final" / "model.safetensors").write_bytes(weight)
        lines = [{"step": 0, "loss/total": 0.1}, {"step": 1, "loss/total": loss, f"{TIMES[0]}rollout_s": loss}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert difference(a, dict(a)) == ""
    assert difference(a, b) == "final/model.safetensors, metrics.jsonl, (step 1: loss/total)"
    assert difference(a, {}) == "final/model.safetensors, metrics.jsonl, (no metrics)"


def test_the_soak_adds_rows_up_and_tells_what_grew() -> None:
    done = "SIGKILLs"
    rows = [
        soak.Row("data", 3, "files", {"JSONL": 3}, code=["a"]),
        soak.Row("kills", 4, done, {"runs": 1, "saving": 0, "elsewhere": 1}, code=["a"]),
        soak.Row("kills", 6, done, {"runs": 2, "saving": 3, "elsewhere": 1}, ["kills-2: hung"], ["b+"]),
        soak.Row("kills", 10, done, {"runs": 1, "saving": 7, "elsewhere": 2}, code=["a"]),
    ]
    assert soak.table(rows).splitlines()[2:] == [
        "| kills | 20 | SIGKILLs; 80% inside a phase; runs 4, saving 10, elsewhere 4 | 1 | a b+ |",
        "| data | 3 | files; JSONL 3 | 0 | a |",
        "",
        "What was wrong:",
        "",
        "- kills-2: hung",
    ]
    flat = {"RSS": 5e8, "shared memory": 0, "file handles": 20, "threads": 9, "folder": 0}
    steps = [flat | {"folder": 9000.0 * step, "RSS": 5e8 + 1e6 * min(step, 100)} for step in range(1000)]
    told, wrong = grown(steps, len(steps))
    assert not wrong  # what is made in the first eighth does not count
    assert told.startswith("RSS +0.0 MiB (bound ")
    assert "folder +9000 bytes a step (bound 16384)" in told
    few = [flat | {"RSS": 5e8 + 1e6 * step, "folder": 3e4 * step} for step in range(24)]
    assert not grown(few, len(few))[1]  # a short run is only the start
    for key, each in (("RSS", 3e4), ("shared memory", 1), ("file handles", 0.1), ("threads", 0.1), ("folder", 1e4)):
        _, wrong = grown([seen | {key: seen[key] + each * step} for step, seen in enumerate(steps)], 1000)
        assert len(wrong) == 1
        assert wrong[0].startswith(f"growth: {key} grew by ")


def test_the_soak_notices_damage_that_a_run_passes_over() -> None:
    newest = Path("checkpoints/step-000006")
    file = newest / "rank-0.pt"
    said = f"checkpoint {newest} is damaged ({file} is not as it was written); looking for an earlier one\n"
    assert soak.unsaid(said + "resumed after step 4 from there\n", file, newest) == ""
    assert soak.unsaid(said + "resumed after step 4\nTraceback\n", file, newest) == "traceback"
    for resumed in ("", "resumed after step 6 from there\n"):
        assert soak.unsaid(said + resumed, file, newest) == "no older checkpoint was taken"
    assert soak.unsaid(f"resumed after step 4; not {file}\n", file, newest) == "no line says so"
    pointer = newest.parent / "latest"
    assert soak.unsaid("checkpoints/latest is damaged\nresumed after step 6\n", pointer, newest) == ""
