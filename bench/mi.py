"""Mutual-information scores: accuracy against cost, and how the cost grows.   python bench/mi.py [--quick]

Scores every token of some rollouts as a run does (``TokenScorer``, estimator ``coordinate``, bandwidth 50) with each
kind and number of Fourier features, and compares with exact HSIC: on the last-layer states of a real model on its own
answers to grade-school problems, on the same with their largest coordinates four times as large (larger models have
larger outliers), and on synthetic ones. Then the cost as tokens, d and D double. Baselines: exact HSIC
(``exact_hsic``, O(d^2) a token), the same from products of d x d matrices as in the code of the
mutual-information-peaks work (O(d^3)), and eq. 1 as printed (``fast_hsic``).
The tables go to bench/results/mi-MACHINE.md; --quick takes a sixth of the states and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aipo.config.base import Features  # noqa: E402
from aipo.config.sections import MIConfig  # noqa: E402
from aipo.evaluation.results import markdown  # noqa: E402
from aipo.mi import exact_hsic, fast_hsic  # noqa: E402
from aipo.problems.embedded import MODEL, embedded_model  # noqa: E402
from aipo.scorer import TokenScorer  # noqa: E402
from bench.machine import machine, slug  # noqa: E402
from bench.measure import Memory, synchronize  # noqa: E402

SIGMA = 50.0
COUNTS = (16, 32, 64, 128, 256, 1024)
KINDS: tuple[Features, ...] = ("random", "orthogonal", "quadrature")
DEFAULT = "random 256"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Rollout = tuple[Tensor, Tensor]  # hidden (T, d), gold (d,)
Method = Callable[[list[Rollout]], list[Tensor]]  # -> scores (T,) of each


def real_states(model_dir: str, seeds: int, questions: int) -> list[Rollout]:
    """Raw last-layer states that predict the tokens of sampled answers, and that of the gold answer's last token.

    Every seed asks other questions, at temperatures 0.6 and 1.
    """
    from reasoning_gym import create_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(DEVICE)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    last: list[Tensor] = []
    model.model.layers[-1].register_forward_hook(
        lambda _module, _inputs, output: last.append((output[0] if isinstance(output, tuple) else output)[0].float())
    )

    @torch.no_grad()
    def states(ids: Tensor) -> Tensor:
        model(ids)
        return last[-1]

    result = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        for problem in create_dataset("gsm_symbolic", size=questions, seed=1000 * seed):
            gold = states(tokenizer(problem["answer"], return_tensors="pt").input_ids.to(DEVICE))[-1]
            chat = [{"role": "user", "content": problem["question"]}]
            prompt = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(DEVICE)
            for temperature in (0.6, 1.0):
                ids = model.generate(
                    **prompt, max_new_tokens=120, do_sample=True, temperature=temperature, pad_token_id=0
                )
                result.append((states(ids)[prompt["input_ids"].shape[1] - 1 : -1], gold))
        print(f"states of seed {seed} are there", file=sys.stderr, flush=True)
    return result


def larger_outliers(rollouts: list[Rollout], factor: float = 4.0) -> list[Rollout]:
    """The same states with whatever lies beyond three bandwidths moved further out."""

    def stretched(x: Tensor) -> Tensor:
        return torch.where(x.abs() > 3 * SIGMA, factor * x, x)

    return [(stretched(hidden), stretched(gold)) for hidden, gold in rollouts]


def synthetic_states(rollouts: int, tokens: int, d: int, seed: int = 0) -> list[Rollout]:
    """Gaussian states of scale 20 that carry the gold state in strengths between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(rollouts):
        gold, noise = torch.randn(d, generator=generator), torch.randn(tokens, d, generator=generator)
        strength = torch.rand(tokens, 1, generator=generator)
        hidden = 20 * (strength * gold + (1 - strength**2).sqrt() * noise)
        result.append((hidden.to(DEVICE), 20 * gold.to(DEVICE)))
    return result


def features(kind: Features, count: int, seed: int = 0) -> Method:
    scorer = TokenScorer(MIConfig(features=kind, num_features=count, sigma=SIGMA), seed=seed)

    def score(rollouts: list[Rollout]) -> list[Tensor]:
        hidden, gold = (torch.cat([h for h, _ in rollouts]), torch.stack([g for _, g in rollouts]))
        lengths = [len(h) for h, _ in rollouts]
        return list(scorer.score(hidden, gold, torch.tensor(lengths)).split(lengths))

    return score


def of_few_tokens(hsic: Callable[[Tensor, Tensor], Tensor], tokens: int) -> Method:
    """Scores by an HSIC of x (c, d, 1) and y (c, d, 1), ``tokens`` at a time."""

    def score(rollouts: list[Rollout]) -> list[Tensor]:
        result = []
        for hidden, gold in rollouts:
            parts = [part[:, :, None] for part in hidden.split(tokens)]  # (c, d, 1)
            result.append(torch.cat([hsic(part, gold[None, :, None].expand_as(part)) for part in parts]))
        return result

    return score


def matrix_hsic(x: Tensor, y: Tensor) -> Tensor:
    """tr(K H L H) / (d - 1)^2 by products of full matrices, as the code of the peaks work has it."""
    d = x.shape[1]
    H = torch.eye(d, device=x.device) - 1 / d
    K, L = (torch.exp(-(v - v.transpose(1, 2)).square() / (2 * SIGMA**2)) for v in (x, y))  # (c, d, d)
    return (K @ H @ L @ H).diagonal(dim1=1, dim2=2).sum(-1) / (d - 1) ** 2


# Few tokens at a time, for the cache's sake.
EXACT = of_few_tokens(lambda x, y: exact_hsic(x, y, sigma=SIGMA), 4)
MATRICES = of_few_tokens(matrix_hsic, 1)
PRINTED = of_few_tokens(lambda x, y: fast_hsic(x, y, num_features=256, sigma=SIGMA), 4)
BASELINES = {"exact": EXACT, "exact, d x d products": MATRICES, "eq. 1 as printed, random 256": PRINTED}


def methods() -> Iterator[tuple[str, Method]]:
    yield from BASELINES.items()
    for kind in KINDS:
        for count in COUNTS:
            yield f"{kind} {count}", features(kind, count)


def seconds(method: Method, rollouts: list[Rollout], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        method(rollouts)
        synchronize()
        found.append(time.perf_counter() - start)
    return found


def agreement(scores: list[Tensor], exact: list[Tensor]) -> tuple[float, float, float]:
    """Rank correlation, mean over rollouts and worst; share of the exact scores' top fifth that is found."""
    ranks, kept = [], []
    for a, b in zip(scores, exact):
        ranks.append(spearmanr(a.cpu(), b.cpu()).statistic)
        top = max(1, round(0.2 * len(a)))
        kept.append(len(set(a.topk(top).indices.tolist()) & set(b.topk(top).indices.tolist())) / top)
    return statistics.mean(ranks), min(ranks), statistics.mean(kept)


def accuracy_table(name: str, rollouts: list[Rollout], repeats: int) -> str:
    exact, rows, cost = EXACT(rollouts), [], {}
    for label, method in methods():
        memory, start = Memory(), time.perf_counter()
        scores = method(rollouts)
        synchronize()
        peak, first = memory.peak() / 2**20, time.perf_counter() - start
        # a baseline takes seconds: once is enough
        runs = [first] if label in BASELINES else seconds(method, rollouts, repeats)
        cost[label] = statistics.median(runs)
        rows.append((label, *agreement(scores, exact), min(runs), max(runs), peak))
        print(f"{name}: {label}, {cost[label]:.3f} s", file=sys.stderr, flush=True)
    size = torch.cat([hidden for hidden, _ in rollouts]).abs()
    tokens, d = sum(len(hidden) for hidden, _ in rollouts), rollouts[0][0].shape[1]
    head = ["features", "rank correlation", "worst rollout", "same top 20 %", "seconds", "spread", "ratio", "peak MiB"]
    body = [
        [
            label,
            f"{mean:.4f}",
            f"{worst:.4f}",
            f"{100 * same:.0f} %",
            f"{cost[label]:.3f}",
            f"{low:.3f} – {high:.3f}",
            f"{cost[label] / cost[DEFAULT]:.2f}",
            f"{peak:.0f}",
        ]
        for label, mean, worst, same, low, high, peak in rows
    ]
    about = (
        f"{len(rollouts)} rollouts, {tokens} tokens of {d} coordinates: median {size.median():.0f}, largest "
        f"{size.max():.0f} in absolute value. Ratio: to {DEFAULT}."
    )
    return f"## {name}\n\n{about}\n\n{markdown(head, body)}\n"


def growth_table(d: int, repeats: int) -> str:
    """Seconds while one size doubles, of the default and of the exact baselines."""
    rows: list[list[str]] = []

    def line(what: str, choices: list[int], run: Callable[[int], tuple[Method, list[Rollout]]]) -> None:
        before = None
        for choice in choices:
            method, rollouts = run(choice)
            method(rollouts)  # first use compiles and builds the draws' series
            total = statistics.median(seconds(method, rollouts, repeats))
            ratio = f"{total / before:.2f}" if before else ""
            rows.append([what, str(choice), f"{total:.4f}", f"{1e6 * total / len(rollouts[0][0]):.1f}", ratio])
            before = total

    default = features("random", 256)
    line(f"tokens (d {d}, D 256)", [512, 1024, 2048, 4096], lambda n: (default, synthetic_states(1, n, d)))
    line("d (1024 tokens, D 256)", [512, 1024, 2048, 4096], lambda n: (default, synthetic_states(1, 1024, n)))
    line(
        f"D (1024 tokens, d {d})",
        [128, 256, 512, 1024],
        lambda n: (features("random", n), synthetic_states(1, 1024, d)),
    )
    line("d, exact (8 tokens)", [512, 1024, 2048], lambda n: (EXACT, synthetic_states(1, 8, n)))
    line("d, exact by d x d products (4 tokens)", [512, 1024, 2048], lambda n: (MATRICES, synthetic_states(1, 4, n)))
    return "## Growth\n\n" + markdown(["what doubles", "value", "seconds", "µs a token", "times the one before"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer states and repetitions, nothing written")
    parser.add_argument("--model", default=MODEL, help="a Hugging Face checkpoint with a chat template")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; default 1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seeds, questions, repeats = (1, 2, 3) if args.quick else (3, 4, 7)
    model_dir = str(embedded_model()) if args.model == MODEL else args.model
    real = real_states(model_dir, seeds, questions)
    synthetic = synthetic_states(4, 60, real[0][0].shape[1])
    title = f"# Mutual-information scores\n\n{machine()}, {args.threads} thread(s), torch {torch.__version__}."
    parts = [
        f"{title} Raw states of {args.model}; written by bench/mi.py.\n",
        accuracy_table("Real states", real, repeats),
        accuracy_table("Real states, outliers four times as large", larger_outliers(real), repeats),
        accuracy_table("Synthetic states", synthetic, repeats),
        growth_table(real[0][0].shape[1], repeats),
    ]
    text = "\n".join(parts)
    print(text)
    if not args.quick:
        target = ROOT / "bench" / "results" / f"mi-{slug()}.md"
        target.write_text(text + "\n")
        print(f"written: {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
