"""What a step leaves behind: metrics over all ranks and a sample of its rollouts."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import chain
from statistics import fmean
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aipo import distributed
from aipo.loss import LossTerms
from aipo.metrics import diversity
from aipo.problems.prompts import token_names
from aipo.rollouts import Rollouts
from aipo.selection import Selection

DIVERSITY_SAMPLE = 4
"""questions of a step of which it is measured: 3 s at most for 8 completions of 10,000 tokens each"""


def add_up(sums: dict[str, float], terms: LossTerms, entropy: Tensor) -> None:
    """What a micro-batch adds to the sums of a step, of the loss and of the entropies (K,); largest values stay so."""
    sums["loss"] += float(terms.total.detach())
    sums["entropy"] += float(entropy.detach().sum())
    for name, value in terms.sums.items():
        sums[name] = max(sums[name], float(value)) if name.endswith("_max") else sums[name] + float(value)


def reduce_metrics(rollouts: Rollouts, local: dict[str, float], phases: dict[str, float]) -> dict[str, float]:
    """Sums that this rank saw and its seconds by phase -> means over all ranks, under the names that are logged."""
    lengths = rollouts.lengths
    mine = dict(local) | {
        "tokens": float(lengths.sum()),
        "used_tokens": float(lengths[rollouts.used].sum() - rollouts.repeated().sum()),
        "generated": float(lengths.sum()) + rollouts.extra_tokens,
        "rollouts": float(len(lengths)),
        "truncated": float(rollouts.truncated.sum()),
        "judged": float(rollouts.rewards.isfinite().sum()),
        "used": float(rollouts.used.sum()),
        **by_source(rollouts),
    }
    questions = [problem.id for problem in rollouts.problems]
    parts = distributed.gather_objects((mine, phases, questions, diverse(rollouts)))
    total: defaultdict[str, float] = defaultdict(float)
    for part, *_ in parts:
        for key, value in part.items():
            total[key] += value

    def per(key: str, count: str) -> float:
        return total[key] / total[count] if total[count] else 0.0

    def mean(key: str) -> float:
        """Of each rank's mean. All draw equally many rollouts, of which not all have a verdict; what a rank has after
        they were dealt out anew says nothing of them."""
        by_verdict = key in ("reward/mean", "reward/correct")
        weighed = [(part[key], part["verdicts"] if by_verdict else 1.0) for part, *_ in parts if key in part]
        weighed = [(value, weight) for value, weight in weighed if weight]
        return sum(v * w for v, w in weighed) / sum(w for _, w in weighed) if weighed else math.nan

    sources = sorted(key.removeprefix("rollouts of ") for key in total if key.startswith("rollouts of "))
    seconds = {phase: max(part.get(phase, 0.0) for _, part, *_ in parts) for phase in phases}
    world = len(parts)
    sample = sorted(chain(*(measured for *_, measured in parts)), key=lambda each: each[0])[:DIVERSITY_SAMPLE]
    varied = [values for _, values in sample if values]
    twin = total["wrong_gold_either"] > 0  # else nothing was compared
    return {
        **{key: mean(key) for key in total if key.startswith("reward/")},
        **({"reward/trained": per("trained_reward", "judged")} if "trained_reward" in total else {}),
        **({"reward/kl": per("reward_kl", "rollouts")} if "reward_kl" in total else {}),
        **{f"advantage/{key}": per(key, "residual_rollouts") for key in ("gini", "effective_tokens") if key in total},
        **({"information/cumulative": per("information", "information_rollouts")} if "information" in total else {}),
        **({"rollout/early_exits": per("exit_tokens", "tokens")} if total.get("exit_tokens") else {}),
        **{f"source/{name}/share": per(f"rollouts of {name}", "rollouts") for name in sources},
        **{f"source/{name}/correct": per(f"correct of {name}", f"judged of {name}") for name in sources},
        **{f"diversity/{key}": fmean(values[key] for values in varied) for key in (varied[0] if varied else ())},
        "rollout/questions": float(len({question for _, _, part, _ in parts for question in part})),
        "rollout/length_mean": per("tokens", "rollouts"),
        "rollout/tokens": total["generated"],
        **{f"dynamic/{k}": total[f"dynamic_{k}"] / world for k in ("tries", "kept") if f"dynamic_{k}" in total},
        "rollout/truncated": per("truncated", "rollouts"),
        "rollout/used": per("used", "rollouts"),
        "rollout/used_tokens": total["used_tokens"],
        "loss/total": per("loss", "denominator"),
        **({"loss/kl": per("kl", "selected")} if "kl" in total else {}),
        "loss/clip_fraction": per("clip_fraction", "selected"),
        "loss/skipped_steps": total["skipped"] / world,
        "policy/entropy": per("entropy", "selected"),
        "policy/grad_norm": total["grad_norm"] / world,
        "mask/otf": per("selected", "used_tokens"),
        "mask/cost_share": per("selected", "generated"),
        **({"mask/wrong_gold_iou": per("wrong_gold_both", "wrong_gold_either")} if twin else {}),
        "mi/mean": per("mi", "mi_tokens"),
        "mi/skew": per("mi_skew", "mi_sequences"),
        "mismatch/kl": per("mismatch_kl", "selected"),
        "mismatch/gap": per("mismatch_gap", "selected"),
        **({"mismatch/dropped": per("mismatch_dropped", "selected")} if "mismatch_dropped" in total else {}),
        "mismatch/weight_mean": per("mismatch_weight", "selected"),
        "mismatch/weight_max": max(part.get("weight_max", 0.0) for part, *_ in parts),
        **{f"time/{phase}_s": value for phase, value in seconds.items()},
        "speed/tokens_per_s": total["generated"] / max(sum(seconds.values()), 1e-9),
    }


def diverse(rollouts: Rollouts) -> list[tuple[int, dict[str, float]]]:
    """How different the completions are of this rank's share of a sample of questions, random and the same whatever
    the number of ranks: (a number to sort all by, measures)."""
    n, drawn = rollouts.group_size, rollouts.each_completion
    first = sorted((number, q) for q, number in enumerate(rollouts.ids[::n].tolist()))[:DIVERSITY_SAMPLE]
    return [(number, diversity(drawn[q * n : (q + 1) * n])) for number, q in first]


def by_source(rollouts: Rollouts) -> dict[str, float]:
    """Sums over the rollouts of each source, where ``data.train`` has several."""
    sums: defaultdict[str, float] = defaultdict(float)
    for row, correct in enumerate(rollouts.judged_correct.tolist()):
        if name := rollouts.question_of(row).origin:
            sums[f"rollouts of {name}"] += 1
            sums[f"judged of {name}"] += correct == correct  # not NaN
            sums[f"correct of {name}"] += correct == 1
    return dict(sums)


def rollout_rows(
    rollouts: Rollouts, selection: Selection, tokenizer: PreTrainedTokenizerBase, count: int, budget: int
) -> list[dict[str, Any]]:
    """At most ``count`` of this rank's rollouts and ``budget`` tokens, with MI and mask of each; those of the update
    first."""
    shown = [i for i in range(len(rollouts.texts)) if not rollouts.question_of(i).protected]
    order = sorted(shown, key=lambda i: (not rollouts.used[i], -abs(rollouts.advantages[i])))
    rows = []
    for i in order[:count]:
        problem, completion = rollouts.question_of(i), rollouts.completions[i]
        length = len(completion.token_ids)
        budget -= length
        if budget < 0:
            break
        rows.append(
            {
                "question": problem.question,
                "answer": problem.answer,
                "completion": rollouts.texts[i],
                "reward": float(rollouts.rewards[i]),
                "correct": bool(rollouts.correct[i]),
                "advantage": float(rollouts.advantages[i]),
                "finish_reason": completion.finish_reason,
                "tokens": token_names(tokenizer, completion.token_ids),
                "mi": selection.scores[i, :length].tolist(),
                "mask": selection.mask[i, :length].int().tolist(),
            }
        )
    return rows
