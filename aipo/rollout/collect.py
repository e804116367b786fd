"""Questions in, verified rollouts out: prompts, generation, and rewards computed while generation still runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from aipo.datasets import Problem
from aipo.prompts import Prompter
from aipo.reward import Rewarder
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
    ) -> Rollouts:
        """``samples`` completions of each problem; the verifier gets each as it ends, :meth:`judge` waits for it.

        Args:
            stream: names the random stream, such as ``step 12``; each request's seed derives from it.
            on_done: called after every completion.
        """
        prompts = [self.prompter.encode(problem.question) for problem in problems]
        owner = [q for q in range(len(problems)) for _ in range(samples)]
        requests = [
            Request(prompts[q], request_seed(self.seed, stream, problems[q].id, i % samples))
            for i, q in enumerate(owner)
        ]
        texts = [""] * len(requests)

        def finished(i: int, completion: Completion) -> None:
            text = self.prompter.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            texts[i] = f"{self.prompter.opening}{text}"
            problem = problems[owner[i]]
            self.rewarder.submit(i, problem.answer, problem.kind, texts[i], len(completion.token_ids))
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
        )

    def judge(self, rollouts: Rollouts) -> dict[str, float]:
        """Fill in the rewards of what :meth:`collect` gave last; returns the rewarder's metrics, of this rank."""
        if not rollouts.completions:  # a rank without a share of the questions
            rollouts.rewards, rollouts.correct = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
            return {}
        rollouts.rewards, rollouts.correct, metrics = self.rewarder.collect()
        return metrics
