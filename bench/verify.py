"""How many answers does the verifier judge in a second, and how often is it right?

Prints Markdown: agreement with the labelled pairs of tests/verify, of this verifier and of Math-Verify alone;
throughput on those pairs that cannot be judged on their text, once each and as the rollouts of a question (where equal
answers are judged once), and what a bomb costs. A minute on two cores:

    python bench/verify.py [--workers 4] [--data FILE]

``--data`` takes a JSONL file with ``answer`` (MATH-500, say): each expression there against 2(...)/2 as well.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

from math_verify import parse, verify

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aipo.verify import Verdict, Verifier
from aipo.verify.answers import bare_gold, settle

PAIRS = Path(__file__).resolve().parents[1] / "tests" / "verify" / "pairs.jsonl"
ROLLOUTS = 8
BOMBS = {
    "power tower": "9^{9^{9^{9}}}",
    "factorials": "((9!)!)!",
    "binomial": r"\binom{1000000000}{500000000}",
    "200,000 digits": "7" * 200_000,
    "5,000 brackets": "(" * 5000 + "6" + ")" * 5000,
    "nested fractions": r"\frac{1}{1+" * 40 + "5" + "}" * 40,
    "matrix of 400": r"\begin{pmatrix}" + "&".join("x" * 400) + r"\end{pmatrix}",
    "900 summands": "+".join(["1"] * 900),
    "500 units": "5 " + "cm " * 500,
    "endless sum": r"\sum_{n=1}^{10^9} n!",
    "symbolic determinant": r"\begin{vmatrix}"
    + r"\\".join("&".join(f"x_{{{8 * i + j}}}" for j in range(8)) for i in range(8))
    + r"\end{vmatrix}",
}

Pair = tuple[str, str]


def boxed(answer: str) -> str:
    return rf"The answer is \boxed{{{answer}}}."


def rate(pairs: list[Pair], workers: int) -> float:
    """Answers a second, start-up of the workers not counted."""
    with Verifier(workers, timeout=20.0) as pool:
        warm = [pool.submit("x", boxed(f"{i} + x")) for i in range(20 * workers)]
        for future in warm:
            future.result()
        start = time.perf_counter()
        for future in [pool.submit(gold, boxed(answer)) for gold, answer in pairs]:
            future.result()
        return len(pairs) / (time.perf_counter() - start)


def rewritten(answer: str) -> str:
    """The same expression, which only a parser can tell."""
    return rf"\frac{{2 \cdot \left({answer}\right)}}{{2}}"


def math_verify_alone(gold: str, answer: str) -> bool:
    """As its README uses it."""
    return bool(verify(parse(gold if "$" in gold or "boxed" in gold else f"${gold}$"), parse(boxed(answer))))


def report(name: str, pairs: list[Pair], workers: int) -> None:
    parsed = [pair for pair in pairs if settle(bare_gold(pair[0]), bare_gold(pair[1])) is None]
    rollouts = [pair for pair in parsed for _ in range(ROLLOUTS)]
    text = 100 - 100 * len(parsed) / len(pairs)
    cells = [f"{rate(parsed, workers):.0f}", f"{rate(rollouts, workers):.0f}"]
    print(f"| {name} | {len(pairs)} | {text:.0f} % | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--data", type=Path, metavar="FILE")
    args = parser.parse_args()

    labelled = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    pairs = [(pair["gold"], pair["answer"]) for pair in labelled]
    with Verifier(args.workers, timeout=20.0) as pool:
        judged = [pool.submit(gold, boxed(answer), "math") for gold, answer in pairs]
        verdicts = [each.result() for each in judged]
    total = Counter(pair["equal"] for pair in labelled)
    print(f"| verifier | accepts, of {total[True]} right | refuses, of {total[False]} wrong |\n|---|---:|---:|")
    alone = [math_verify_alone(*pair) for pair in pairs]
    for name, accepted in (("AIPO", [verdict.correct for verdict in verdicts]), ("Math-Verify alone", alone)):
        right = Counter(pair["equal"] for pair, correct in zip(labelled, accepted) if correct == pair["equal"])
        print(f"| {name} | {right[True] / total[True]:.1%} | {right[False] / total[False]:.1%} |")
    print()

    random.Random(0).shuffle(pairs)
    print(f"| answers | pairs | settled on text | others, each once: /s | others, {ROLLOUTS} rollouts: /s |")
    print("|---|---:|---:|---:|---:|")
    report("labelled pairs", pairs, args.workers)
    if args.data:
        golds = sorted({str(json.loads(line)["answer"]) for line in args.data.read_text().splitlines()})
        golds = [gold for gold in golds if not re.search(r"[,=_]|text|mbox|\\\$|circ|begin|[a-z]{2} |pm", gold)]
        report(f"{args.data.stem}, doubled and halved", [(gold, rewritten(gold)) for gold in golds], args.workers)

    print("\n| bomb | verdict | seconds, of 2 |\n|---|---|---:|")
    with Verifier(args.workers, timeout=2.0) as pool:
        pool.submit("x", boxed("x + 0")).result()
        for name, bomb in BOMBS.items():
            start = time.perf_counter()
            verdict = pool.submit(r"\sqrt{2}", boxed(bomb)).result()
            print(f"| {name} | {verdict.value} | {time.perf_counter() - start:.2f} |", flush=True)
        assert pool.submit(r"\sqrt{2}", boxed("2^{1/2}")).result() is Verdict.CORRECT


if __name__ == "__main__":
    main()
