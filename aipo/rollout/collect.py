"""Questions in, verified rollouts out: prompts, generation, and rewards computed while generation still runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aipo.problems.datasets import Problem
from aipo.problems.prompts import Prompter
from aipo.reward import Pending, Rewarder
from aipo.rollout.base import Completion, Request, RolloutEngine, Sampling
from aipo.rollouts import Rollouts


def request_seed(run_seed: int, stream: str, question: str, sample: int) -> int:
    """Seed of one completion: the same for any number of ranks, different for all (stream, question, sample)."""
    digest = hashlib.blake2b(f"{run_seed}/{stream}/{question}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


class Collector:
    """Holds the engine, the prompts and the verifier of a rank."""

    def __init__(self, engine: RolloutEngine, prompter: Prompter, rewarder: Rewarder, *, seed: int) -> None:
        self.engine, self.prompter, self.rewarder, self.seed = engine, prompter, rewarder, seed

    def collect(
        self,
        problems: Sequence[Problem],
        sampling: Sampling,
        *,
        samples: int,
        stream: str,
        on_done: Callable[[], None] | None = None,
        submit: bool = True,
    ) -> Rollouts:
        """``samples`` completions of each problem; the verifier gets each as it ends, :meth:`judge` waits for it.

        Args:
            submit: false leaves that to :meth:`submit`, for rollouts that are to be changed before, or never judged.
            stream: names the random stream, such as ``step 12``; each request's seed derives from it.
            on_done: called after every completion.
        """
        prompts = [self.prompter.encode(problem.question, problem.origin) for problem in problems]
        owner = [q for q in range(len(problems)) for _ in range(samples)]
        requests = [
            Request(prompts[q], request_seed(self.seed, stream, problems[q].id, i % samples))
            for i, q in enumerate(owner)
        ]
        texts = [""] * len(requests)
        pending: dict[int, Pending] = {}  # by request

        def finished(i: int, completion: Completion) -> None:
            texts[i] = self.prompter.decode(completion.token_ids)
            problem = problems[owner[i]]
            if submit:
                length = len(completion.token_ids)
                pending[i] = self.rewarder.submit(problem, texts[i], length, i % samples)
            if on_done is not None:
                on_done()

        completions = self.engine.generate(requests, sampling, on_done=finished)
        return Rollouts(
            problems=list(problems),
            prompts=prompts,
            completions=completions,
            group_size=samples,
            ids=torch.tensor([request.seed for request in requests], dtype=torch.long),
            texts=texts,
            pending=[pending[i] for i in sorted(pending)],
        )

    def submit(self, rollouts: Rollouts) -> None:
        """Hand rollouts to the verifier that were collected without."""
        rollouts.pending = [
            self.rewarder.submit(rollouts.question_of(i), text, len(tokens), i % rollouts.group_size)
            for i, (text, tokens) in enumerate(zip(rollouts.texts, rollouts.each_completion))
        ]

    def continue_from(
        self, rollouts: Rollouts, cuts: Tensor, sampling: Sampling, *, samples: int, stream: str
    ) -> tuple[Tensor, int]:
        """Complete the first ``cuts`` (B,) tokens of every rollout ``samples`` times, within the same length limit.

        Returns:
            How many of a rollout's continuations are right, (B,) float32 (as the share of those with a verdict, times
            ``samples``; NaN where none has one), and the tokens drawn for all of them.
        """
        prefixes = [c.token_ids[:cut] for c, cut in zip(rollouts.completions, cuts.tolist())]  # B
        owner = [row for row in range(len(prefixes)) for _ in range(samples)]
        requests = []
        for i, row in enumerate(owner):
            problem = rollouts.question_of(row)
            seed = request_seed(self.seed, f"{stream} of {row % rollouts.group_size}", problem.id, i % samples)
            prompt = [*rollouts.prompts[row // rollouts.group_size], *prefixes[row]]
            requests.append(Request(prompt, seed, sampling.max_tokens - len(prefixes[row])))

        pending: dict[int, Pending] = {}  # by request

        def finished(i: int, completion: Completion) -> None:
            problem = rollouts.question_of(owner[i])
            tokens = [*prefixes[owner[i]], *completion.token_ids]
            sample = owner[i] % rollouts.group_size
            pending[i] = self.rewarder.submit(problem, self.prompter.decode(tokens), len(tokens), sample)

        if not requests:
            return torch.zeros(0), 0
        completions = self.engine.generate(requests, sampling, on_done=finished)
        rewards, correct, _ = self.rewarder.collect([pending[i] for i in range(len(requests))])  # (B * samples,) each
        judged, right = (each.reshape(-1, samples).sum(1) for each in (rewards.isfinite(), correct))  # (B,)
        return samples * right / judged, sum(len(c.token_ids) for c in completions)

    def judge(self, rollouts: Rollouts) -> dict[str, float]:
        """Wait for what was handed in of these rollouts and fill in rewards; returns the rewarder's metrics, of this
        rank."""
        if not rollouts.completions:  # a rank without a share of the questions
            rollouts.rewards, rollouts.correct = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
            rollouts.judged = rollouts.correct
            return {}
        rollouts.rewards, rollouts.correct, metrics = self.rewarder.collect(rollouts.pending)
        rollouts.judged = rollouts.rewards.isfinite()  # (B,) kept: another reward may take the verdict's place
        rollouts.pending = []
        return metrics
