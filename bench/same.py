"""Do two checkouts train alike?  python bench/same.py A B [--only NAME ...] [--keep FOLDER]

The proof of a refactor that should change no number. In each checkout the tiny model (fixed seed, HF engine, CPU, one
thread) trains through ``train.py``: every method's YAML for two steps, and what methods leave out: two ranks, ZeRO-0,
several updates a batch, a batch drawn ahead, packed and padded rows, adapters, the curriculum's relabelling, each
estimator, and a resume in the middle. Compared byte for byte: metrics.jsonl without times, the rollouts, and every file
of ``final/``. Prints one line a scenario; exits 1 if one differs, 2 if one did not run. Minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("time/", "speed/", "memory/")
FEW = ["optim.steps=2", "validation.every=2", "checkpoint.every=2"]
COMMON = ["rollout.engine=hf", "reward.workers=1", "rollout.check_sync=false", "tracking.wandb=disabled"]
# a random model is seldom right: lengths make rewards differ
REWARD = ["reward.correctness=0.5", "reward.length=0.5", "reward.overlong_buffer=15", "dynamic.by=reward"]

WORKER = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
import torch, transformers, deepspeed, pydantic, rich.progress, math_verify
torch.set_num_threads(1)
for line in sys.stdin:  # RANKS <tab> PORT <tab> arguments
    ranks, port, *arguments = line.rstrip("\\n").split("\\t")
    children = []
    for rank in range(int(ranks)):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            sys.argv = ["train.py", *arguments]
            code = 1
            try:
                runpy.run_path("train.py", run_name="__main__")
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                import traceback
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(f"done {max(map(abs, codes))}", flush=True)
"""


@dataclass(frozen=True)
class Scenario:
    name: str
    method: str | None
    keys: tuple[str, ...] = ()
    ranks: int = 1
    resume: str | None = None  # scenario whose checkpoint after step 2 is gone on from


def scenarios(root: Path) -> Iterator[Scenario]:
    for path in sorted((root / "configs" / "methods").glob("*.yaml")):
        yield Scenario(path.stem, path.stem)
    yield Scenario("two ranks", "aipo", (), 2)
    yield Scenario("two ranks, dynamic", "dapo_ft", (), 2)
    yield Scenario("two ranks, batch statistics", "aipo", ("mask.scope=batch", "advantage.baseline=batch"), 2)
    yield Scenario("two ranks, iapo", "iapo", ("dynamic.enabled=false",), 2)
    yield Scenario("zero 0", "aipo", ("sharding.zero_stage=0",))
    yield Scenario("two ranks, zero 0", "aipo", ("sharding.zero_stage=0",), 2)
    yield Scenario("two updates", "aipo", ("optim.updates_per_batch=2",))
    yield Scenario("two ranks, two updates", "grpo", ("optim.updates_per_batch=2", "loss.kl_beta=0.01"), 2)
    yield Scenario("ahead", "aipo", ("rollout.async_depth=1",))
    yield Scenario("two ranks, ahead", "grpo", ("rollout.async_depth=1",), 2)
    yield Scenario("two ranks, dynamic ahead", "dapo", ("rollout.async_depth=1",), 2)
    yield Scenario("packed", "aipo", ("optim.packing=true", "optim.share_prompts=false"))
    yield Scenario("padded", "aipo", ("optim.share_prompts=false",))
    yield Scenario("adapters", "aipo", ("lora.rank=4",))
    yield Scenario("adapters, padded", "arca", ("optim.share_prompts=false",))
    yield Scenario("relabelled", "aipo", ("curriculum.refresh_every=1", "curriculum.bucket_by=quantile"))
    yield Scenario("pointwise", "aipo", ("mi.estimator=pointwise", "mi.warmup_steps=1", "mi.num_features=32"))
    yield Scenario("position", "aipo", ("mi.estimator=position", "mi.num_features=32"), 2)
    yield Scenario("top fraction", "aipo", ("mask.rule=top_fraction", "mi.gold_pool=mean"))
    yield Scenario("blended", "aipo", ("advantage.mi_blend=additive", "mask.scope=running"))
    yield Scenario("quadrant", "dapo_ft", ("mask.rule=quadrant",))
    yield Scenario("importance", "dapo", ("rollout.importance_correction=sequence_mask", "loss.aggregation=constant"))
    yield Scenario("four steps", "aipo", ("optim.steps=4",))
    yield Scenario("resumed", "aipo", ("optim.steps=4",), 1, "four steps")
    yield Scenario("two ranks, four steps", "dapo", ("optim.steps=4",), 2)
    yield Scenario("two ranks, resumed", "dapo", ("optim.steps=4",), 2, "two ranks, four steps")


def folder_name(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_")


class Worker:
    """A process in a checkout, with the libraries loaded, that forks one training run after another."""

    def __init__(self, checkout: Path, work: Path, cache: Path) -> None:
        self.runs = work / "runs"
        self.log = (work / "log.txt").open("wb")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "AIPO_CACHE": str(cache), "DS_ACCELERATOR": "cpu"}
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def start(self, scenario: Scenario, inputs: list[str]) -> None:
        arguments = ["--config", "tiny.yaml", *(["--method", scenario.method] if scenario.method else [])]
        if scenario.resume:
            arguments += ["--resume", str(self.runs / folder_name(scenario.resume) / "checkpoints" / "step-000002")]
        arguments += [*inputs, *COMMON, *REWARD, *FEW, *scenario.keys]
        arguments += [f"runs={self.runs}", f"name={folder_name(scenario.name)}"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        assert self.process.stdin is not None
        self.process.stdin.write("\t".join([str(scenario.ranks), port, *arguments]) + "\n")
        self.process.stdin.flush()

    def wait(self) -> bool:
        """Whether the run that was started ended well."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("done "):
                return line.split()[1] == "0"
        return False

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def contents(run: Path) -> dict[str, bytes]:
    """What a run computed, by file name."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in lines]
    found = {"metrics.jsonl": "\n".join(json.dumps(line, sort_keys=True) for line in kept).encode()}
    for path in sorted([*run.glob("rollouts*"), *run.glob("rollouts/**/*"), *run.glob("final/**/*")]):
        if path.is_file():
            found[str(path.relative_to(run))] = path.read_bytes()
    return found


def difference(a: dict[str, bytes], b: dict[str, bytes]) -> str:
    """Names of what differs, with the first metrics that do; empty where nothing does."""
    names = [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
    if "metrics.jsonl" in names and not all("metrics.jsonl" in side for side in (a, b)):
        names.append("(no metrics)")
    elif "metrics.jsonl" in names:
        before, after = ([json.loads(line) for line in side["metrics.jsonl"].decode().splitlines()] for side in (a, b))
        for old, new in zip(before, after):
            keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
            if keys:
                names.append(f"(step {old['step']}: {', '.join(keys[:4])}{', ...' if keys[4:] else ''})")
                break
    return ", ".join(names)


def make_inputs(folder: Path) -> list[str]:
    """The tiny model and twelve sums, as configuration keys."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny import make_tiny

    model = make_tiny(folder / "model", scale=0.15, tied=False)
    data = folder / "sums.jsonl"
    rows = [{"question": f"{a} + {b}", "answer": str((a + b) % 10)} for a in range(3) for b in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"model.path={model}", f"data.train={data}", f"data.validation={data}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, type=Path, metavar="CHECKOUT")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="scenarios whose name contains one of these")
    parser.add_argument("--keep", type=Path, help="folder in which runs and logs stay")
    arguments = parser.parse_args()
    for checkout in arguments.checkouts:
        if not (checkout / "train.py").is_file():
            parser.error(f"{checkout} has no train.py: give two checkouts of this repository")
    chosen = [s for s in scenarios(ROOT) if not arguments.only or any(part in s.name for part in arguments.only)]
    needed = {s.resume for s in chosen if s.resume}
    chosen = [s for s in scenarios(ROOT) if s in chosen or s.name in needed]
    if not chosen:
        parser.error(f"no scenario is called {' or '.join(arguments.only)}")
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.keep or Path(temporary)
        inputs = make_inputs(work / "inputs")
        workers = []
        for side, checkout in zip("ab", arguments.checkouts):
            (work / side).mkdir(parents=True)
            workers.append(Worker(checkout.resolve(), (work / side).resolve(), (work / side / "cache").resolve()))
        verdicts = []
        for scenario in chosen:
            for worker in workers:
                worker.start(scenario, inputs)
            ran = [worker.wait() for worker in workers]
            folders = [worker.runs / folder_name(scenario.name) for worker in workers]
            if all(ran):
                found = difference(*map(contents, folders))
                verdict, code = (f"DIFFERS: {found}", 1) if found else ("same", 0)
            else:
                failed = " and ".join(side for side, well in zip("AB", ran) if not well)
                verdict, code = f"DID NOT RUN in {failed} (--keep shows log.txt)", 2
            verdicts.append(code)
            print(f"{scenario.name:32} {verdict}", flush=True)
        for worker in workers:
            worker.close()
    print(f"{verdicts.count(0)} of {len(verdicts)} scenarios are the same")
    return max(verdicts)


if __name__ == "__main__":
    sys.exit(main())
