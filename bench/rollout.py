"""What the vLLM engine adds to bare vLLM, and where the time of a rollout goes:  python bench/rollout.py [--quick]

The requests are those of one training step of the embedded default (SmolLM2-135M, 16 questions x 8 samples, at most 48
tokens, a seed each). The variants take turns in one process with one and the same ``vllm.LLM``. The last table is of
ranks started with torchrun, each with an engine of its own on the tiny model of the tests: how many threads it has,
where they may run, and on which cores it was seen. The tables go to bench/results/rollout-MACHINE.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from aipo import distributed
from aipo.config import load_config
from aipo.config.sections import RewardConfig
from aipo.evaluation.results import markdown
from aipo.inputs import check_inputs
from aipo.reward import Rewarder
from aipo.rollout import Completion, Request, Sampling, make_engine
from aipo.rollout.collect import Collector, request_seed
from aipo.rollout.vllm import VllmEngine
from bench.machine import machine, slug

ROOT = Path(__file__).resolve().parents[1]
SHARE_GOAL = 0.95


def rounds(variants: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant, which take turns in alternating order after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(-1, repeats):
        print(f"round {i + 1}/{repeats}", file=sys.stderr, flush=True)
        for name in list(variants) if i % 2 else reversed(variants):
            taken = variants[name]()
            if i >= 0:
                seconds[name].append(taken)
    return seconds


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def bare(engine: VllmEngine, requests: Sequence[Request], sampling: Sampling, *, shared: bool = True) -> list[Any]:
    """``LLM.generate`` on the same prompts and sampling parameters; not ``shared`` is without common prefixes."""
    from vllm.inputs import tokens_input

    llm = engine._llm
    llm.reset_prefix_cache()
    salts = [None] * len(requests) if shared else [str(i) for i in range(len(requests))]
    prompts = [tokens_input(list(r.prompt_ids), cache_salt=salt) for r, salt in zip(requests, salts)]
    params = [engine._params(request, sampling) for request in requests]
    return llm.generate(prompts, params, use_tqdm=False)


def engine_table(repeats: int, questions: int, samples: int) -> str:
    """Generation, rewards and sync, on the embedded default."""
    config = load_config("smollm2_135m.yaml")
    inputs = check_inputs(config, 1)
    problems = inputs.problems[:questions]
    engine = make_engine(
        "vllm",
        inputs.model_path,
        max_model_len=config.data.max_prompt_tokens + config.rollout.max_tokens,
        end_token_ids=sorted(inputs.prompter.end_ids),
        kv_cache_gb=None if torch.cuda.is_available() else config.rollout.kv_cache_gb,
    )
    assert isinstance(engine, VllmEngine)
    sampling = Sampling(max_tokens=config.rollout.max_tokens)
    requests = [
        Request(inputs.prompter.encode(problem.question, problem.origin), request_seed(0, "step 0", problem.id, sample))
        for problem in problems
        for sample in range(samples)
    ]
    drawn = engine.generate(requests, sampling)
    outputs = [output.outputs[0] for output in bare(engine, requests, sampling)]
    same = sum(list(a.token_ids) == b.token_ids for a, b in zip(outputs, drawn))
    tokens, prompt = sum(len(c.token_ids) for c in drawn), sum(len(r.prompt_ids) for r in requests)

    rewarder = Rewarder({"": RewardConfig(overlong_buffer=16)}, max_tokens=sampling.max_tokens)
    collector = Collector(engine, inputs.prompter, rewarder, seed=0)

    def with_rewards() -> None:
        collector.judge(collector.collect(problems, sampling, samples=samples, stream="step 0"))

    def then_rewards() -> None:
        rollouts = collector.collect(problems, sampling, samples=samples, stream="step 0", submit=False)
        collector.submit(rollouts)
        collector.judge(rollouts)

    weights = load_weights(inputs.model_path)
    seconds = rounds(
        {
            "bare vLLM": lambda: timed(lambda: bare(engine, requests, sampling)),
            "bare vLLM, no shared prefixes": lambda: timed(lambda: bare(engine, requests, sampling, shared=False)),
            "our engine": lambda: timed(lambda: engine.generate(requests, sampling)),
            "our engine, rewards during generation": lambda: timed(with_rewards),
            "our engine, rewards after it": lambda: timed(then_rewards),
            "sync of new weights": lambda: timed(lambda: engine.sync(weights)),
        },
        repeats,
    )
    rewarder.close()
    engine.close()
    rows = [
        [name, spread(each), "" if "sync" in name else f"{tokens / statistics.median(each):.0f}", ratio(each, seconds)]
        for name, each in seconds.items()
    ]
    share = paired(seconds["bare vLLM"], seconds["our engine"])
    prefix = paired(seconds["bare vLLM, no shared prefixes"], seconds["bare vLLM"])
    return (
        f"{questions} questions × {samples} samples, {prompt} prompt tokens, {tokens} drawn; bare vLLM drew the same "
        f"tokens in {same} of {len(requests)}. Each time is the median of {repeats} rounds with least and most.\n\n"
        + markdown(["", "seconds", "tokens/s", "time / bare vLLM"], rows)
        + f"\nOur engine reaches {share:.1%} of bare vLLM's throughput (goal: at least {SHARE_GOAL:.0%}); sharing "
        f"prefixes makes generation {prefix:.2f} times as fast.\n"
    )


def load_weights(path: str) -> list[tuple[str, torch.Tensor]]:
    """As a policy holds them: float32."""
    from transformers import AutoModelForCausalLM

    return list(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters())


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def paired(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over rounds of a / b: what slows a round down slows both."""
    return statistics.median(x / y for x, y in zip(a, b))


def ratio(each: Sequence[float], seconds: dict[str, list[float]]) -> str:
    return f"{paired(each, seconds['bare vLLM']):.3f}"


def rank_report(folder: str) -> None:
    """One rank: generate for a while, watching where the threads are, and print what was seen as JSON."""
    distributed.start()
    engine = make_engine("vllm", folder, max_model_len=256, end_token_ids=[2], kv_cache_gb=0.1, seed=distributed.rank())
    cores: Counter[int] = Counter()
    this_core = ctypes.CDLL(None).sched_getcpu
    requests = [Request([5, 6, 7 + i % 99], i) for i in range(64)]

    def note(_: int, __: Completion) -> None:
        cores[this_core()] += 1

    before = {task: ticks(task) for task in os.listdir("/proc/self/task")}
    seconds = timed(lambda: engine.generate(requests, Sampling(max_tokens=100), on_done=note))
    busy = [task for task in os.listdir("/proc/self/task") if ticks(task) - before.get(task, 0) > 0.2 * 100 * seconds]
    report = {
        "rank": distributed.rank(),
        "threads": torch.get_num_threads(),
        "busy": len(busy),
        "allowed": sorted({str(sorted(os.sched_getaffinity(int(task)))) for task in os.listdir("/proc/self/task")}),
        "seen": dict(sorted(cores.items())),
        "seconds": seconds,
    }
    reports = distributed.gather_objects(report)
    if distributed.rank() == 0:
        print("REPORT " + json.dumps(reports), flush=True)
    engine.close()
    distributed.stop()


def ticks(task: str) -> int:
    """CPU time of one thread of this process so far, in hundredths of a second (proc(5), utime and stime)."""
    try:
        fields = Path(f"/proc/self/task/{task}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:  # it has ended
        return 0
    return int(fields[11]) + int(fields[12])


def threads_table() -> str:
    from tests.tiny import make_tiny

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(folder)
        for ranks in (1, 2):
            print(f"threads of {ranks} ranks", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            done = subprocess.run(
                [*command, __file__, "--rank", folder], cwd=ROOT, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            line = next(line for line in done.stdout.splitlines() if line.startswith("REPORT "))
            rows += [
                [
                    f"{report['rank']} of {ranks}",
                    str(report["threads"]),
                    str(report["busy"]),
                    " or ".join(report["allowed"]),
                    ", ".join(f"{core} ({count})" for core, count in report["seen"].items()),
                    f"{report['seconds']:.2f}",
                ]
                for report in json.loads(line.removeprefix("REPORT "))
            ]
    columns = ["rank", "threads", "of them busy", "may run on", "main thread seen on core (times)", "seconds"]
    return markdown(columns, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests and rounds, to see that all works")
    parser.add_argument("--threads-only", action="store_true", help="only the last table")
    parser.add_argument("--rank", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_report(options.rank)
        return 0
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    text = f"# Rollouts\n\n{machine()}; vLLM {vllm_version()}, {packages}.\n\n"
    if not options.threads_only:
        text += engine_table(*((3, 4, 4) if options.quick else (9, 16, 8)))
    if not torch.cuda.is_available():
        text += "\n## Threads of ranks on CPUs\n\n" + threads_table()
    print(text)
    if not (options.quick or options.threads_only):
        target = ROOT / "bench" / "results" / f"rollout-{slug()}.md"
        target.write_text(text)
        print(f"written to {target}")
    return 0


def vllm_version() -> str:
    from vllm import __version__

    return __version__


if __name__ == "__main__":
    sys.exit(main())
