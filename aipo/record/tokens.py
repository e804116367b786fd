"""Every figure that a step has of single tokens, for whole groups of rollouts: a Parquet file a step.

Nothing is computed for the record but a few differences: what is written is what the update itself had in hand. So
figures of the policy (entropy, ratio, KL, ...) are there at selected tokens, as nothing else went through the head.
docs/run-folder.md explains the columns; :mod:`aipo.report` shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aipo import distributed
from aipo.advantage import constant_groups
from aipo.config import Config
from aipo.curriculum import Curriculum
from aipo.layout import MicroBatch
from aipo.loss import LossInputs, importance_weights, k3
from aipo.problems.problem import Problem
from aipo.problems.prompts import Prompter, token_names
from aipo.record.reporting import rollout_rows
from aipo.record.tracker import Tracker
from aipo.rollouts import Rollouts
from aipo.selection import Selection
from aipo.verify import extract_answer
from aipo.verify.answers import bare_gold, lists_several

if TYPE_CHECKING:
    import pyarrow

BYTES_PER_TOKEN = 80  # uncompressed: an id, a text, and up to fifteen figures of 4 bytes
SAME = "all of its group got the same verdict"
UNKNOWN = "�"


class TokenRecorder:
    """Keeps the figures of some groups while a step goes by: :meth:`start`, :meth:`see` each micro-batch,
    :meth:`write`. Works on rank 0, for its own rollouts; does nothing elsewhere. The curriculum says in which
    bucket a question is; without one it is in none.
    """

    def __init__(self, config: Config, prompter: Prompter, curriculum: Curriculum | None) -> None:
        tracking, rollout = config.tracking, config.rollout
        self.groups = tracking.rollouts_per_step if distributed.rank() == 0 else 0
        self.budget = int(tracking.tokens_mb * 2**20 / config.optim.steps / BYTES_PER_TOKEN)  # tokens a step
        rule, cap, floor = rollout.importance_correction, rollout.importance_cap, rollout.importance_floor
        self.correction: dict[str, Any] = {"rule": rule, "cap": cap, "floor": floor}
        self.drops, self.by_engine = config.advantage.drop_constant_groups, config.loss.old_policy == "engine"
        self.prompter, self.curriculum = prompter, curriculum
        self.rows: list[int] = []  # of the batch, as recorded
        self.figures: dict[str, Tensor] = {}  # (R, T) each, NaN where there is none

    def start(self, rollouts: Rollouts, signals: Mapping[str, Tensor], dropped: Rollouts | None = None) -> None:
        """A new batch: choose what is recorded of it.

        Args:
            signals: the measures that a rule asked for, (B, T) each.
            dropped: what dynamic sampling left out; a quarter of the places is for it, without figures.
        """
        aside = min(len(dropped.problems), self.groups // 4) if dropped else 0
        if dropped is not None:  # it never came as far as these
            count = len(dropped.completions)
            dropped = replace(dropped, used=torch.zeros(count, dtype=torch.bool), advantages=torch.zeros(count))
        self.rollouts, self.dropped = rollouts, dropped
        self.rows = recorded_rows(rollouts, self.groups - aside, self.budget)
        left = self.budget - int(rollouts.lengths[self.rows].sum())
        self.aside = recorded_rows(dropped, aside, left) if dropped else []
        self.place = torch.full((len(rollouts.completions),), -1)  # (B,) -> position among the recorded, or -1
        self.place[self.rows] = torch.arange(len(self.rows))
        self.figures = {name: values[self.rows] for name, values in signals.items()}
        self.measured = set(signals)
        drawn = [problem.id for batch in (rollouts, dropped) if batch for problem in batch.problems]
        self.buckets = {i: self.curriculum.bucket(i) if self.curriculum else None for i in drawn}  # as it was drawn

    @torch.no_grad()
    def see(self, micro: MicroBatch, inputs: LossInputs, entropy: Tensor, mask: Tensor) -> None:
        """A micro-batch of the update: entropy (K,) at the selected tokens, mask (N,)."""
        place = self.place[micro.rows.cpu()]  # (b,)
        here = (place >= 0).nonzero()[:, 0].to(inputs.mask.device)  # (r,)
        if not len(here):
            return
        selected = inputs.mask[here].bool()  # (r, t)
        logp, old = inputs.logp[here], inputs.logp_old[here]  # (r, t)
        advantages = inputs.advantages[here]  # (r,) or (r, t)
        found = {
            "logp": logp,
            "ratio": (logp - old).clamp(max=80).exp(),
            "advantage_token": advantages if advantages.dim() == 2 else advantages[:, None].expand_as(logp),
        }
        if "entropy" not in self.measured:  # else it is known of all tokens
            found["entropy"] = micro.grid(entropy, mask)[here]
        if inputs.logp_engine is not None:
            engine = inputs.logp_engine[here]  # (r, t)
            found["mismatch"] = old - engine
            if self.by_engine:  # which the ratio of the loss then compares with
                found["ratio"] = (logp - engine).clamp(max=80).exp()
            found["weight"] = importance_weights(old, engine, selected, **self.correction)[0]
        if inputs.logp_ref is not None:
            found["kl"] = k3(logp, inputs.logp_ref[here])
        whole = torch.stack([values.float() for values in found.values()])  # (F, r, t)
        whole = torch.where(selected, whole, torch.nan).cpu()  # one wait for the device
        width = max(int(self.rollouts.lengths.max()), 1)
        for name, values in zip(found, whole):
            store = self.figures.setdefault(name, torch.full((len(self.rows), width), torch.nan))  # (R, T)
            store[place[here.cpu()], : values.shape[1]] = values

    def write(self, tracker: Tracker, step: int, selection: Selection) -> None:
        """What was kept, into the run folder: some rollouts as lines of JSON, the groups as Parquet."""
        if self.groups:
            rows = rollout_rows(self.rollouts, selection, self.prompter.tokenizer, self.groups, self.budget)
            tracker.log_rollouts(step, rows, self.table(selection))

    def table(self, selection: Selection) -> pyarrow.Table:
        """A row a rollout; columns of lists hold a value a token."""
        import pyarrow as pa

        flat = {"mi": selection.scores[self.rows], "mask": selection.mask[self.rows], **self.figures}  # (R, T) each
        reasons = [self.reason(i) for i in self.rows]
        tables = [_table(self.prompter, self.rollouts, self.rows, flat, reasons, self.buckets)]
        if self.dropped is not None and self.aside:
            width = int(self.dropped.lengths[self.aside].max())
            none = torch.full((len(self.aside), width), torch.nan)  # (R, T)
            varies = ~constant_groups(self.dropped.judged_correct.reshape(-1, self.dropped.group_size))  # (Q,)
            reasons = [
                "dynamic sampling: " + ("other groups came first" if varies[i // self.dropped.group_size] else SAME)
                for i in self.aside
            ]
            plain = {"mi": none, "mask": none > 0}
            first = len(self.rollouts.problems)
            tables.append(_table(self.prompter, self.dropped, self.aside, plain, reasons, self.buckets, first=first))
        return pa.concat_tables(tables, promote_options="permissive")

    def reason(self, row: int) -> str:
        """Why a rollout is not in the update; empty where it is."""
        rollouts, n = self.rollouts, self.rollouts.group_size
        if rollouts.used[row]:
            return ""
        if not rollouts.rewards[row].isfinite():
            return "the check of its answer gave no verdict"
        group = slice(row // n * n, row // n * n + n)
        looked_at = rollouts.rewards if self.drops == "reward" else rollouts.judged_correct  # (B,)
        if self.drops != "none" and bool(constant_groups(looked_at[group][None])):
            return "all of its group got the same reward" if self.drops == "reward" else SAME
        return "cut off at the length limit"


def _table(
    prompter: Prompter,
    rollouts: Rollouts,
    rows: Sequence[int],
    figures: Mapping[str, Tensor],
    reasons: Sequence[str],
    buckets: Mapping[str, str | None],
    *,
    first: int = 0,
) -> pyarrow.Table:
    """Some rollouts, R of them, with figures (R, T) each; groups are counted from ``first``."""
    import pyarrow as pa

    n = rollouts.group_size
    lengths = rollouts.lengths[rows]  # (R,)
    problems = [rollouts.question_of(i) for i in rows]
    ids = [rollouts.completions[i].token_ids for i in rows]
    texts = [rollouts.texts[i] for i in rows]
    inside = torch.arange(figures["mask"].shape[1]) < lengths[:, None]  # (R, T)
    offsets = pa.array([0, *lengths.cumsum(0).tolist()], pa.int32())

    def ragged(values: Tensor) -> pa.Array:
        numbers = values[:, : inside.shape[1]][inside].numpy()
        return pa.ListArray.from_arrays(offsets, pa.array(numbers, from_pandas=True))  # NaN becomes null

    columns: dict[str, Any] = {
        "group": pa.array([first + i // n for i in rows], pa.int32()),
        "sample": pa.array([i % n for i in rows], pa.int32()),
        "group_size": pa.array([n] * len(rows), pa.int32()),
        "question_id": [problem.id for problem in problems],
        "bucket": pa.array([buckets[problem.id] for problem in problems], pa.string()),
        "question": [problem.question for problem in problems],
        "prompt": [prompter.tokenizer.decode(rollouts.prompts[i // n]) for i in rows],
        "answer": [problem.answer for problem in problems],
        "extracted": pa.array([answer_of(text, p) for text, p in zip(texts, problems)], pa.string()),
        "completion": texts,
        "reward": pa.array(rollouts.rewards[rows].float().numpy(), from_pandas=True),
        "correct": rollouts.correct[rows].numpy(),
        "advantage": rollouts.advantages[rows].float().numpy(),
        "used": rollouts.used[rows].numpy(),
        "reason": list(reasons),
        "finish_reason": [rollouts.completions[i].finish_reason for i in rows],
        "token_ids": pa.array(ids, pa.list_(pa.int32())),
        "tokens": pa.array([token_texts(prompter.tokenizer, each) for each in ids], pa.list_(pa.string())),
        **{name: ragged(values) for name, values in figures.items()},
    }
    return pa.table(columns)


def recorded_rows(rollouts: Rollouts, groups: int, budget: int) -> list[int]:
    """Rollouts of ``groups`` groups, in their order, with at most ``budget`` tokens together.

    Groups of the update come first, those with the largest advantages ahead; a quarter of the places is for groups
    that are not in it. Questions whose text must not get out are left out.
    """
    n, lengths = rollouts.group_size, rollouts.lengths  # (B,)
    free = [q for q, problem in enumerate(rollouts.problems) if not problem.protected]
    used = [q for q in free if rollouts.used[q * n : (q + 1) * n].any()]
    used.sort(key=lambda q: -float(rollouts.advantages[q * n : (q + 1) * n].abs().max()))
    dropped = [q for q in free if q not in used]
    aside = min(len(dropped), max(groups // 4, groups - len(used)))
    chosen = (used[: groups - aside] + dropped[:aside])[:groups]
    rows: list[int] = []
    for row in rollouts.rows_of(chosen):
        budget -= int(lengths[row])
        if budget < 0:
            break
        rows.append(row)
    return sorted(rows)


def answer_of(text: str, problem: Problem) -> str | None:
    """What the verifier compared with the gold answer; None where it found no answer."""
    several = problem.kind == "math" and lists_several(bare_gold(problem.answer))
    return extract_answer(text, problem.kind, several=several)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text: joined, they are the completion, special tokens included.

    Of a character that several tokens spell, the first has all and the others nothing.
    """
    single = tokenizer.batch_decode([[i] for i in dict.fromkeys(ids)], skip_special_tokens=False)
    text = dict(zip(dict.fromkeys(ids), single))
    names = dict(zip(text, token_names(tokenizer, list(text))))
    for i, name in names.items():
        if name.startswith("▁") and not text[i].startswith(" "):  # which a decoder drops at the beginning
            text[i] = " " + text[i]
    found: list[str] = []
    for broken, part in groupby(ids, key=lambda i: UNKNOWN in text[i]):
        run = list(part)
        whole = [tokenizer.decode(run, skip_special_tokens=False)] if broken else []
        found += whole + [""] * (len(run) - 1) if broken else [text[i] for i in run]
    return found
