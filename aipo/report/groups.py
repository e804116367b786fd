"""The groups that the page shows token by token, in as many bytes as they may take."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from aipo.report.load import FIXED, Row, Run

BUDGET = 2_800_000  # bytes of JSON for all groups of a page
LONGEST = 4_000  # tokens of a rollout, and characters of a text, that are shown
FEWEST, GROUPS = 200, 16  # where so many groups would not fit, less of each rollout is shown, but not fewer tokens
DIGITS = 3


class Figure(NamedTuple):
    """What can colour the tokens; ``middle`` is the neutral value of one with two sides."""

    label: str
    unit: str = ""
    middle: float | None = None


FIGURES = {
    "mi": Figure("mutual information"),
    "mask": Figure("selected"),
    "entropy": Figure("entropy", "nats"),
    "gap": Figure("gap of the two likeliest"),
    "ratio": Figure("ratio π / π_old", middle=1.0),
    "mismatch": Figure("trainer − engine", "nats", 0.0),
    "kl": Figure("KL to the reference", "nats"),
    "advantage_token": Figure("advantage", middle=0.0),
    "weight": Figure("importance weight", middle=1.0),
    "logp": Figure("log-probability", "nats"),
}


def collect(run: Run, budget: int = BUDGET) -> dict[str, Any]:
    """``{vocabulary, groups, left_out}``: tokens are numbers of the vocabulary, figures rounded to three digits.

    Where not all fits, rollouts lose their middles, then steps are thinned out evenly, and of a step that is left the
    first groups stay.
    """
    files = run.recorded()
    vocabulary: dict[str, int] = {}
    groups: list[Row] = []
    used, steps = 0, order(list(files))
    longest = min((tokens_shown(rows, budget) for step in steps[:1] for rows in run.groups(step)), default=LONGEST)
    for step in steps:
        for rows in run.groups(step):
            known = len(vocabulary)
            group = packed(step, rows, vocabulary, longest)
            used += len(json.dumps([group, list(vocabulary)[known:]]))
            if used > budget and groups:
                break
            groups.append(group)
        if used > budget:
            break
    groups.sort(key=lambda group: (group["step"], group["group"]))
    left_out = len(files) - len({group["step"] for group in groups})
    return {"vocabulary": list(vocabulary), "groups": groups, "steps_left_out": left_out}


def order(steps: list[int]) -> list[int]:
    """First, last, then the middles of what lies between, so that any number from the front is spread evenly."""
    if not steps:
        return []
    taken, rest, queue = [steps[-1], steps[0]][: len(steps)], set(steps[1:-1]), [(0, len(steps) - 1)]
    while queue:
        low, high = queue.pop(0)
        middle = (low + high) // 2
        if high - low < 2:
            continue
        taken.append(steps[middle])
        rest.discard(steps[middle])
        queue += [(low, middle), (middle, high)]
    return [*taken, *sorted(rest)]


def tokens_shown(rows: list[Row], budget: int) -> int:
    """How much of a rollout there is room for, if all groups are like this one."""
    share = budget / GROUPS / len(json.dumps(packed(0, rows, {}, LONGEST)))
    longest = min(max(len(row["tokens"]) for row in rows), LONGEST)
    return LONGEST if share >= 1 else max(FEWEST, int(longest * share))


def packed(step: int, rows: list[Row], vocabulary: dict[str, int], longest: int) -> Row:
    """A group as the page's script reads it."""
    first = rows[0]
    return {
        "step": step,
        "group": first["group"],
        "id": first["question_id"],
        "question": cut(first["question"]),
        "prompt": cut(first["prompt"]),
        "answer": cut(first["answer"]),
        "bucket": first.get("bucket"),
        "size": first["group_size"],
        "rollouts": [rollout(row, vocabulary, longest) for row in rows],
    }


def rollout(row: Row, vocabulary: dict[str, int], longest: int) -> Row:
    """``gap``: after how many tokens how many are left out; None where all are there."""
    tokens = [
        token.replace("Ġ", " ").replace("Ċ", "\n") if row["question_id"] is None else token for token in row["tokens"]
    ]
    figures = {
        name: [number(value) for value in ends(values, longest)]
        for name, values in row.items()
        if name not in FIXED and isinstance(values, list) and any(value is not None for value in values)
    }
    figures["mask"] = [int(value) for value in ends(row["mask"], longest)]
    return {
        "sample": row["sample"],
        "tokens": [vocabulary.setdefault(cut(token, 200), len(vocabulary)) for token in ends(tokens, longest)],
        "length": len(tokens),
        "gap": [longest - longest // 2, len(tokens) - longest] if len(tokens) > longest else None,
        "selected": sum(row["mask"]),
        "figures": figures,
        "reward": number(row["reward"]),
        "correct": row["correct"],
        "extracted": None if row["extracted"] is None else cut(row["extracted"], 400),
        "advantage": number(row["advantage"]),
        "used": row["used"],
        "reason": row["reason"],
        "truncated": row["finish_reason"] == "length",
    }


def ends(values: list[Any], count: int) -> list[Any]:
    """Without the middle of a longer list: ``count`` values, half of them its last."""
    return values if len(values) <= count else values[: count - count // 2] + values[-(count // 2) :]


def number(value: float | None) -> float | int | None:
    """Three digits are more than a colour shows."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e6 else rounded


def cut(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[:longest]} … {len(text) - longest} more characters"
