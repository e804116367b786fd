"""The fixed batch of rollouts that steps are measured on.

``bench/data/rollouts.json`` holds it: 4 questions with 8 answers each by SmolLM2-135M-Instruct, as token ids, with the
log-probabilities they were drawn with and their rewards. To record it anew (minutes on two cores):

    python bench/batches.py

Reading it needs PyTorch alone, because TRL runs in an environment without this package.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RECORDED = Path(__file__).parent / "data" / "rollouts.json"
SYSTEM = r"Reason step by step, then give the final answer in \boxed{}."
QUESTIONS, SAMPLES, LONGEST = 4, 8, 200


@dataclass
class Batch:
    """Q questions, B = Q * group_size completions; those of one question are adjacent."""

    prompts: list[list[int]]  # Q
    golds: list[list[int]]  # Q, token ids of the right answer
    completions: list[list[int]]  # B
    logprobs: list[list[float]]  # B, of sampling
    rewards: list[float]  # B
    group_size: int
    prompt_of: list[list[int]] = field(init=False)  # B

    def __post_init__(self) -> None:
        self.prompt_of = [self.prompts[row // self.group_size] for row in range(len(self.completions))]

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens; a prompt counts once for each completion."""
        return sum(map(len, self.prompt_of)) + self.generated

    @property
    def generated(self) -> int:
        return sum(map(len, self.completions))

    @property
    def lengths(self) -> list[int]:
        """Of prompt and completion together. B"""
        return [len(p) + len(c) for p, c in zip(self.prompt_of, self.completions)]

    def advantages(self) -> Tensor:
        """Reward minus the mean of the group. (B,)"""
        rewards = torch.tensor(self.rewards).view(-1, self.group_size)
        return (rewards - rewards.mean(1, keepdim=True)).flatten()

    def micro_batches(self, budget: int) -> list[list[int]]:
        """Rows sorted by length, cut where a padded micro-batch would exceed ``budget`` tokens."""
        sizes = self.lengths
        groups: list[list[int]] = []
        for row in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            if not groups or (len(groups[-1]) + 1) * sizes[groups[-1][0]] > budget:
                groups.append([])
            groups[-1].append(row)
        return groups


def load(*, questions: int = QUESTIONS, scale: float = 1.0, vocabulary: int | None = None) -> Batch:
    """The recorded batch, or its first ``questions``.

    Completions become ``scale`` times as long with random token ids below ``vocabulary``, which every id then obeys:
    for models with another vocabulary.
    """
    recorded = json.loads(RECORDED.read_text())["questions"][:questions]
    batch = Batch(
        prompts=[q["prompt"] for q in recorded],
        golds=[q["gold"] for q in recorded],
        completions=[c["ids"] for q in recorded for c in q["completions"]],
        logprobs=[c["logprobs"] for q in recorded for c in q["completions"]],
        rewards=[c["reward"] for q in recorded for c in q["completions"]],
        group_size=SAMPLES,
    )
    if vocabulary is None:
        return batch
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=draw).tolist()

    completions = [ids(round(scale * len(each))) for each in batch.completions]
    return Batch(
        prompts=[ids(len(each)) for each in batch.prompts],
        golds=[ids(len(each)) for each in batch.golds],
        completions=completions,
        logprobs=[[-float(torch.log(torch.tensor(vocabulary)))] * len(each) for each in completions],
        rewards=batch.rewards,
        group_size=SAMPLES,
    )


def padded(sequences: Sequence[Sequence[Any]], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of ids or numbers -> (b, s) values and (b, s) 1 where a token is, padded with 0."""
    width = max(map(len, sequences))
    rows, tokens = [], []
    for each in sequences:
        fill = [0] * (width - len(each))
        rows.append([*fill, *each] if left else [*each, *fill])
        tokens.append([0] * len(fill) + [1] * len(each) if left else [1] * len(each) + [0] * len(fill))
    return torch.tensor(rows), torch.tensor(tokens)


def record(candidates: int = 12) -> None:
    """Sample answers to word problems; keep the questions whose answers are nearest to 130 tokens on average.

    Where all of a question's answers are right, or none (which is usual: the model is small), the reward is 1 for an
    answer that ended within the limit. A step costs the same whatever the rewards, but they must vary.
    """
    import reasoning_gym
    from transformers import AutoTokenizer, GenerationConfig

    from aipo.problems.datasets import Problem
    from aipo.problems.embedded import embedded_model
    from aipo.problems.prompts import Prompter
    from aipo.rollout.base import Request, Sampling
    from aipo.rollout.hf import HfEngine
    from aipo.verify import is_correct

    path = embedded_model()
    prompter = Prompter(
        AutoTokenizer.from_pretrained(path),
        system=SYSTEM,
        examples=[],
        suffix=None,
        thinking=False,
        max_prompt_tokens=160,
        generation_config=GenerationConfig.from_pretrained(path),
    )
    drawn = [
        Problem(str(i), item["question"], item["answer"])
        for i, item in enumerate(reasoning_gym.create_dataset("gsm_symbolic", seed=11, size=10 * candidates))
    ]
    problems = sorted(drawn, key=lambda p: abs(len(prompter.encode(p.question)) - 140))[:candidates]
    prompts = [prompter.encode(problem.question) for problem in problems]
    requests = [Request(prompts[i // SAMPLES], seed=i) for i in range(SAMPLES * candidates)]
    engine = HfEngine(
        str(path),
        max_model_len=160 + LONGEST,
        end_token_ids=sorted(prompter.end_ids),
        batch_size=len(requests),
    )
    done = 0

    def progress(_i: int, _completion: Any) -> None:
        nonlocal done
        done += 1
        print(f"\r{done} of {len(requests)} answers", end="", file=sys.stderr, flush=True)

    completions = engine.generate(requests, Sampling(LONGEST), on_done=progress)
    found: list[dict[str, Any]] = []
    for q, problem in enumerate(problems):
        own = completions[q * SAMPLES : (q + 1) * SAMPLES]
        right = [is_correct(problem.answer, prompter.decode(each.token_ids)) for each in own]
        reward = right if len(set(right)) > 1 else [each.finish_reason == "stop" for each in own]
        found.append(
            {
                "question": problem.question,
                "answer": problem.answer,
                "prompt": prompts[q],
                "gold": prompter.encode_gold(problem),
                "completions": [
                    {"ids": c.token_ids, "logprobs": [round(p, 4) for p in c.logprobs], "reward": float(r)}
                    for c, r in zip(own, reward)
                ],
            }
        )
        mean = sum(len(c.token_ids) for c in own) / SAMPLES
        print(f"\n{sum(right)} of {SAMPLES} right, {mean:.0f} tokens: {problem.question[:60]}", file=sys.stderr)

    def order(question: dict[str, Any]) -> tuple[bool, float]:
        own = question["completions"]
        return len({c["reward"] for c in own}) == 1, abs(sum(len(c["ids"]) for c in own) / SAMPLES - 130)

    kept = sorted(found, key=order)[:QUESTIONS]
    about = "SmolLM2-135M-Instruct on reasoning-gym's gsm_symbolic, temperature 1; made by bench/batches.py"
    RECORDED.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(question, separators=(",", ":")) for question in kept)
    RECORDED.write_text(f'{{"about": {json.dumps(about)}, "questions": [\n{lines}\n]}}\n')
    print(f"written to {RECORDED}", file=sys.stderr)


if __name__ == "__main__":
    record()
