"""Which rollouts a step trains on: one draw of questions, or as many as dynamic sampling takes, and their rewards.

With ``rollout.async_depth: 1`` the next step's are drawn while this step's are trained on, all of them (those too that
dynamic sampling drops, branches, continuations) by weights one update old, which the importance correction of the loss
weighs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aipo import distributed
from aipo.advantage import constant_groups
from aipo.branching.branches import Paths, bottleneck_scores, branches_by_round, keep_best, mean_log_prob
from aipo.branching.cvae import Latents
from aipo.config import Config
from aipo.errors import TrainingError
from aipo.layout import TokenIds
from aipo.mask import prefix_lengths
from aipo.passes import Passes
from aipo.problems.datasets import Problem
from aipo.rollout.base import Completion, Request, Sampling
from aipo.rollout.collect import Collector
from aipo.rollouts import Rollouts, nth_part
from aipo.sharding import Reference
from aipo.tokens.early_exit import postfix_ids
from aipo.tokens.table import measure

Draw = Callable[[int, int], Sequence[Problem]]
"""step, number of questions over all ranks -> this rank's share; the same call on every rank"""
Judged = tuple[Rollouts, dict[str, float]]
Clock = Callable[[str], AbstractContextManager[None]]


class Generation:
    """From questions to judged rollouts.

    Args:
        passes: of the policy, which branching and its filter ask.
        latents: what branches are drawn with, where the config wants it.
    """

    def __init__(self, collector: Collector, config: Config, passes: Passes, *, latents: Latents | None = None) -> None:
        self.collector, self.config, self.passes, self.latents = collector, config, passes, latents
        self.sampling = Sampling.of(config.rollout)
        self.ahead: tuple[int, Future[Judged]] | None = None  # step, its batch
        own_stream = config.rollout.engine == "hf"  # vLLM keeps to the stream that it generated on first
        setting = partial(_same_device, torch.get_num_threads(), own_stream=own_stream)
        self.thread = ThreadPoolExecutor(1, "generation", initializer=setting)
        if config.rollout.async_depth and config.dynamic.enabled:
            distributed.open_beside()

    def rollouts(self, step: int, draw: Draw, clock: Clock, *, prefix: float) -> Judged:
        """The batch of a step on this rank, with rewards; and sums and means for the log.

        Afterwards the engine sleeps or, with ``rollout.async_depth: 1``, draws the next batch until :meth:`wait`.

        Args:
            prefix: :attr:`Rollouts.prefix` of the batch that is drawn now, which keeps it.
        """
        if self.ahead is not None and self.ahead[0] == step:
            rollouts, metrics = self.ahead[1].result()
        else:
            rollouts, metrics = self._drawn(step, draw, clock, prefix)
        self.ahead = None
        if self.config.rollout.async_depth == 0:
            with clock("rollout"):
                self.collector.engine.sleep()
        elif step + 1 < self.config.optim.steps:
            # the curriculum is drawn from there: nothing else asks or changes it before wait()
            self.ahead = step + 1, self.thread.submit(self._drawn, step + 1, draw, _unmeasured, prefix)
        return rollouts, metrics

    def wait(self) -> None:
        """Until the engine is idle: before its weights change, and before anything else is asked of it."""
        if self.ahead is not None:
            self.ahead[1].result()
            distributed.gather_objects(None)  # where ranks may wait; NCCL, which is next, ends after 30 minutes

    def close(self) -> None:
        """End its thread; a batch that is still drawn there is given up."""
        if self.ahead is not None and not self.ahead[1].done():
            self.collector.engine.stopped.set()
        self.thread.shutdown()

    def state_dict(self) -> dict[str, Any]:
        """The batch that waits for its step, if there is one."""
        if self.ahead is None:
            return {}
        step, batch = self.ahead
        rollouts, metrics = batch.result()
        return {"step": step, "rollouts": rollouts.state_dict(), "metrics": metrics}

    def load_state_dict(self, state: Mapping[str, Any], problems: Mapping[str, Problem]) -> None:
        self.ahead = None
        if state:
            batch: Future[Judged] = Future()
            batch.set_result((Rollouts.from_state(state["rollouts"], problems), state["metrics"]))
            self.ahead = state["step"], batch

    def policy_rewards(self, rollouts: Rollouts, reference: Reference | None) -> dict[str, float]:
        """Rewards that the policy itself gives, and the KL to the initial model that ``loss.kl_in: reward`` takes off.

        A collective; sums for the log. The KL of a rollout is the sum over its tokens of log pi - log pi_ref.
        """
        if self.config.reward.rule == "certainty":
            batches = self.passes.batches_of(rollouts)
            rollouts.rewards = measure({"certainty"}, self.passes, batches, rollouts)[0]["certainty"].nanmean(1)  # (B,)
        if reference is None or self.config.loss.kl_in == "loss":
            return {}
        gaps = self.passes.reference_gaps(rollouts, reference)  # (B,) nats
        rollouts.rewards = rollouts.rewards - self.config.loss.kl_beta * gaps
        return {"reward_kl": float(gaps.sum())}

    def _drawn(self, step: int, draw: Draw, clock: Clock, prefix: float) -> Judged:
        if self.config.dynamic.enabled:
            rollouts, metrics = self._until_full(step, draw, clock)
        else:
            problems = draw(step, self.config.rollout.questions_per_step)
            rollouts, metrics = self._once(problems, f"step {step}", clock)
        rollouts.prefix = prefix
        if self.config.reward.rule == "continuations":
            with clock("rollout"):
                self._count_continuations(rollouts, step)
        return rollouts, metrics

    def _once(self, problems: Sequence[Problem], stream: str, clock: Clock) -> Judged:
        with clock("rollout"):
            if self.config.branch.enabled:
                rollouts = self._branched(problems, stream)
            else:
                samples = self.config.rollout.samples_per_question
                rollouts = self.collector.collect(problems, self.sampling, samples=samples, stream=stream)
        with clock("reward"):
            metrics = self.collector.judge(rollouts)
        return rollouts, metrics

    def _branched(self, problems: Sequence[Problem], stream: str) -> Rollouts:
        """Base rollouts, branches from where the policy was unsure, and the filter (IIB-LPO)."""
        branch, collector, keep = self.config.branch, self.collector, self.config.rollout.samples_per_question
        base = collector.collect(problems, self.sampling, samples=branch.base, stream=stream, submit=False)
        most, seed = self.sampling.max_tokens, self.config.seed
        paths = Paths(base, self._unsureness(base), branch, max_tokens=most, seed=seed, stream=stream)
        counts = branches_by_round(branch.base, branch.total or keep, branch.rounds)
        for number, count in enumerate(counts, 1):
            plan = paths.plan(count)
            new = paths.join(plan, self._draw([each.request for each in plan]), collector.prompter.decode)
            if number < len(counts):
                paths.go_on(new, self._unsureness(new))
        rollouts = paths.rollouts
        if branch.total is not None and branch.total > keep:
            best = keep_best(self._bottleneck(rollouts), branch.total, keep)  # (B,)
            rollouts = rollouts.keep(best.nonzero()[:, 0].tolist())
        collector.submit(rollouts)
        return rollouts

    def _unsureness(self, rollouts: Rollouts) -> Tensor:
        """What branch points are found by: entropy or surprisal of each token, nats. (B, T)"""
        if self.config.branch.signal == "logprob":
            return -rollouts.logp_engine
        return measure({"entropy"}, self.passes, self.passes.batches_of(rollouts), rollouts)[0]["entropy"]

    def _draw(self, requests: Sequence[Request]) -> list[Completion]:
        engine: Any = self.collector.engine
        if not requests:
            return []
        if self.latents is None:
            return engine.generate(requests, self.sampling)
        injection = self.latents.injection(engine, requests, self.config.branch)
        return engine.generate(requests, self.sampling, injection=injection)

    def _bottleneck(self, rollouts: Rollouts) -> Tensor:
        """:func:`~aipo.branching.branches.bottleneck_scores` of every rollout, from four passes of the policy. (B,)"""
        prompter, ends = self.collector.prompter, self.collector.prompter.end_ids
        blanks = {origin: prompter.encode("", origin) for origin in {each.origin for each in rollouts.problems}}
        questions, drawn = rollouts.each_prompt, rollouts.each_completion
        golds = [prompter.encode_gold(rollouts.question_of(i)) for i in range(len(drawn))]
        postfix = postfix_ids(prompter.tokenizer, thinking=self.config.data.thinking)
        reasoned = [ids[:-1] if ids and ids[-1] in ends else ids for ids in drawn]

        def mean(prompts: TokenIds, completions: TokenIds) -> Tensor:
            lengths = torch.tensor([len(completion) for completion in completions], dtype=torch.long)
            return mean_log_prob(self.passes.log_probs(prompts, completions), lengths)  # (B,)

        return bottleneck_scores(
            mean([[*q, *r, *postfix] for q, r in zip(questions, reasoned)], golds),
            mean([[*q, *postfix] for q in questions], golds),
            mean(questions, drawn),
            mean([blanks[rollouts.question_of(i).origin] for i in range(len(drawn))], drawn),  # without its question
            beta=self.config.branch.beta,
        )

    def _until_full(self, step: int, draw: Draw, clock: Clock) -> Judged:
        """Dynamic sampling (DAPO): keep groups that vary, draw again until there are enough over all ranks.

        The questions kept are the first that vary in the order of the draw, whatever the number of ranks; a rank may
        end up with more of them than another.
        """
        dynamic, target = self.config.dynamic, self.config.rollout.questions_per_step
        rank, world = distributed.rank(), distributed.world_size()
        parts: list[Rollouts] = []
        order: list[int] = []  # places of its questions among all that are kept
        seen: list[dict[str, float]] = []
        have = 0
        for attempt in range(1, dynamic.max_tries + 1):
            batch, metrics = self._once(draw(step, target * dynamic.factor), f"step {step} try {attempt}", clock)
            seen.append(metrics)
            mine = [rank + world * i for i in varying_groups(batch, by=dynamic.by)]
            gathered = distributed.gather_objects(mine, beside=bool(self.config.rollout.async_depth))
            everywhere = sorted(place for places in gathered for place in places)
            kept = {place: have + i for i, place in enumerate(everywhere[: target - have])}
            have += len(kept)
            taken = [place // world for place in mine if place in kept]
            order += [kept[place] for place in mine if place in kept]
            parts.append(batch.keep(batch.rows_of(taken)))
            if attempt == 1:
                left = sorted(set(range(len(batch.problems))).difference(taken))
                parts[0].dropped = batch.take(batch.rows_of(left))
            if have == target:
                break
        if have < target and dynamic.on_exhausted == "error":
            raise TrainingError(
                f"step {step + 1}: {dynamic.max_tries} draws of {target * dynamic.factor} questions brought {have} of "
                f"{target} whose rollouts differ: they are too easy or too hard for the policy. Raise "
                "dynamic.max_tries, or set dynamic.on_exhausted=continue, and go on with --resume auto; dynamic.factor "
                "is for a run of another name"
            )
        rollouts = Rollouts.joined(parts)
        rollouts.update = nth_part(order, have, self.config.optim.updates_per_batch)
        keys = {key for metrics in seen for key in metrics}
        means = {key: sum(metrics.get(key, 0.0) for metrics in seen) / len(seen) for key in keys}
        return rollouts, means | {"dynamic_tries": float(attempt), "dynamic_kept": float(have)}

    def _count_continuations(self, rollouts: Rollouts, step: int) -> None:
        """Continuation-accumulated reward (PPPO): right answers of ``reward.continuations`` completions of each
        rollout's prefix, plus 1 if the rollout itself is right."""
        cuts = prefix_lengths(rollouts.lengths, rollouts.prefix)  # (B,)
        right, tokens = self.collector.continue_from(
            rollouts, cuts, self.sampling, samples=self.config.reward.continuations, stream=f"step {step} continuation"
        )
        rollouts.rewards = (right + rollouts.correct).where(rollouts.rewards.isfinite(), torch.nan)  # (B,)
        rollouts.extra_tokens += tokens


def _unmeasured(phase: str) -> AbstractContextManager[None]:
    """The clock of what runs beside the training: only waiting for it takes time."""
    return nullcontext()


def _same_device(threads: int, *, own_stream: bool) -> None:
    """What a thread does not inherit: its number of CPU threads, and a CUDA stream beside the training's."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if own_stream:
            torch.cuda.set_stream(torch.cuda.Stream())


def varying_groups(rollouts: Rollouts, *, by: str) -> list[int]:
    """Questions of which some rollouts are right and some wrong, or (``by: reward``) whose rewards differ by more
    than rounding; a rollout without a verdict is neither."""
    if not rollouts.completions:
        return []
    values = rollouts.judged_correct if by == "correct" else rollouts.rewards  # (B,)
    constant = constant_groups(values.reshape(-1, rollouts.group_size))  # (Q,)
    return torch.nonzero(~constant)[:, 0].tolist()
