"""Forward passes of the policy over any number of sequences, and what they say back in the batch's shape.

Every method is a collective: ZeRO-3 gathers weights pass by pass, so all ranks run equally many micro-batches, whatever
they have to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aipo import distributed
from aipo.config import Config
from aipo.errors import UserError
from aipo.layout import MicroBatch, TokenIds, filler, micro_batches, shared_prompt_batches
from aipo.problems.datasets import Problem
from aipo.problems.prompts import Prompter, wrong_golds
from aipo.rollout.base import RolloutEngine
from aipo.rollouts import Rollouts
from aipo.sharding import Reference, Sharded

LAYOUT_TOKENS = 256
"""of a completion, most at which layouts are compared"""
LAYOUT_TOLERANCE = {"float32": 0.01, "bfloat16": 0.08, "float16": 0.08}
"""Nats a token by which a layout may differ by rounding: TF32 on a GPU, half precision's logits."""


class Passes:
    """The policy as the stages around the update see it.

    Args:
        prompter: makes token ids of gold answers.
        problems: all training questions, among which ``mi.gold_control: shuffled`` looks for a wrong gold answer.
    """

    def __init__(
        self,
        config: Config,
        sharded: Sharded,
        prompter: Prompter,
        device: torch.device,
        problems: Sequence[Problem] = (),
    ) -> None:
        self.config, self.sharded, self.prompter, self.device = config, sharded, prompter, device
        shuffled = config.mi.gold_control == "shuffled" and problems
        self.wrong_golds = wrong_golds(problems, config.seed) if shuffled else {}
        self.kept_golds: dict[str, Tensor] = {}  # (d,) each

    # -- rollouts -> micro-batches -----------------------------------------------------------------------------------

    def batches(self, prompts: TokenIds, completions: TokenIds) -> list[MicroBatch]:
        """Micro-batches of sequences, equally many on every rank and at least one."""
        optim = self.config.optim
        if optim.share_prompts:
            made = shared_prompt_batches(prompts, completions, budget=optim.micro_tokens)
        else:
            made = micro_batches(prompts, completions, budget=optim.micro_tokens, packing=optim.packing)
        made += [filler()] * (max(distributed.agree_max(len(made)), 1) - len(made))
        return [micro.to(self.device) for micro in made]

    def batches_of(self, rollouts: Rollouts) -> list[MicroBatch]:
        """Micro-batches of all rollouts, whether they take part in the update or not."""
        return self.batches(rollouts.each_prompt, rollouts.each_completion)

    def update_batches(self, rollouts: Rollouts, ends: Tensor | None = None) -> list[list[MicroBatch]]:
        """Micro-batches of each optimizer step on these rollouts.

        Args:
            ends: (B,) tokens of each rollout that are laid out; None is all. What lies behind the last selected token
                reaches neither loss nor gradient. A rollout that ends at 0 keeps its row, since averages count it.
        """
        ends = rollouts.lengths if ends is None else ends  # (B,)
        prompts, completions = rollouts.each_prompt, rollouts.each_completion
        parts = []
        updates = self.config.optim.updates_per_batch
        read_by = torch.tensor(rollouts.updates(updates)).repeat_interleave(rollouts.group_size)  # (B,)
        for part_number in range(updates):
            used = (rollouts.used & (read_by == part_number)).nonzero()[:, 0]
            rows, empty = used[ends[used] > 0], used[ends[used] == 0]
            part = self.batches([prompts[i] for i in rows], [completions[i][: ends[i]] for i in rows])
            for micro in part:
                micro.rows = rows.to(micro.rows.device)[micro.rows]
            part[0] = part[0].with_empty(empty)
            parts.append(part)
        return parts

    # -- passes ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def states(self, micro: MicroBatch) -> Tensor:
        """Hidden states that predict the completion tokens. (N, d)"""
        return self.sharded.forward(micro)["states"]

    @torch.no_grad()
    def per_token(
        self, batches: Sequence[MicroBatch], lengths: Tensor, measure: Callable[[MicroBatch], Tensor]
    ) -> Tensor:
        """What ``measure`` says of each micro-batch's tokens (N,), put together: (B, T) float32.

        NaN in padding and in rollouts (of ``lengths`` (B,)) that no micro-batch holds.
        """
        values = torch.full((len(lengths), max([*lengths.tolist(), 1])), float("nan"))  # (B, T)
        for micro in batches:
            micro.write(values, measure(micro).float().cpu())
        return values

    def log_probs(self, prompts: TokenIds, completions: TokenIds) -> Tensor:
        """Log-probabilities of given completions under the policy, 0 in padding. (B, T)"""
        lengths = torch.tensor([len(each) for each in completions], dtype=torch.long)  # (B,)
        return self.per_token(
            self.batches(prompts, completions), lengths, lambda micro: self.sharded.forward(micro, _every)["logp"]
        ).nan_to_num(0.0)

    @torch.no_grad()
    def layout_gap(self, prompts: TokenIds) -> float:
        """What the layout in use changes: mean absolute difference in nats a token between all of a few sequences in
        one row and each in a forward pass of its own. A collective, the same on all ranks; 0 where rows are padded.

        Each of the prompts has two completions, as long as any may be up to ``LAYOUT_TOKENS``, of the prompts' text.
        """
        optim, length = self.config.optim, min(self.config.rollout.max_tokens, LAYOUT_TOKENS)
        if not (optim.share_prompts or optim.packing):
            return 0.0
        text = [token for prompt in prompts for token in prompt] * (length + 1)
        each = [prompt for prompt in prompts for _ in range(2)]
        completions = [text[i : i + length] for i in range(1, len(each) + 1)]
        everything = sum(len(prompt) + length for prompt in each)
        if optim.share_prompts:
            (row,) = shared_prompt_batches(each, completions, budget=everything)
        else:
            (row,) = micro_batches(each, completions, budget=everything, packing=True)
        together = torch.zeros(len(each), length)  # (B, T)
        row.write(together, self.sharded.forward(row.to(self.device), _every)["logp"].cpu())
        alone = torch.tensor(
            [self.completion_log_probs(p, c, self.config.rollout.temperature) for p, c in zip(each, completions)]
        )  # (B, T)
        gaps = distributed.gather_objects(float((together - alone).abs().mean()))
        return float(torch.tensor(gaps).max())  # of NaN, too

    def check_layout(self, prompts: TokenIds) -> float:
        """:meth:`layout_gap`; raises UserError on every rank where it is more than rounding."""
        gap = self.layout_gap(prompts)
        most = LAYOUT_TOLERANCE[self.config.model.dtype]
        if not gap <= most:  # so written that NaN fails
            key = "share_prompts" if self.config.optim.share_prompts else "packing"
            raise UserError(
                f"optim.{key}: {self.config.model.path} says something else of sequences that lie in one row: "
                f"log-probabilities differ by {gap:.2g} nats a token from those of one sequence a pass (at most {most} "
                f"expected): set optim.{key}: false"
            )
        return gap

    def reference_gaps(self, rollouts: Rollouts, reference: Reference) -> Tensor:
        """log pi - log pi_ref of every completion as a whole, nats; a collective. (B,)"""

        def gap(micro: MicroBatch) -> Tensor:
            out = self.sharded.forward(micro, _every)
            return out["logp"] - reference(micro, out["mask"])[0]  # (N,)

        return self.per_token(self.batches_of(rollouts), rollouts.lengths, gap).nansum(1)

    @torch.no_grad()
    def selected_log_probs(self, batches: Sequence[MicroBatch], rollouts: Rollouts, select: Selector) -> Tensor:
        """Log-probabilities at the selected tokens, 0 elsewhere. (B, T)"""
        values = torch.zeros_like(rollouts.logp_engine)  # (B, T)
        for micro in batches:
            out = self.sharded.forward(micro, lambda states, micro=micro: select(micro, states))
            micro.write(values, out["logp"].cpu(), out["mask"].cpu())
        return values

    def gold_states(self, problems: Sequence[Problem]) -> Tensor:
        """State of each question's gold answer, from the weights that score it, or from those of :meth:`keep_golds`.

        (Q, d)
        """
        mi = self.config.mi
        if self.kept_golds:
            kept = [self.kept_golds[problem.id] for problem in problems] or list(self.kept_golds.values())[:1]
            return torch.stack(kept)[: len(problems)].to(self.device)
        problems = [self.wrong_golds.get(problem.id, problem) for problem in problems]
        golds = [self.prompter.encode_gold(problem, mi.gold_text) for problem in problems]
        # the state at a token is the one that predicts the next: shift by one to get every token's own
        batches = self.batches([gold[:1] for gold in golds], [[*gold[1:], gold[-1]] for gold in golds])
        pooled: dict[int, Tensor] = {}
        for micro in batches:
            flat = self.states(micro)  # (N, d)
            for row, own in zip(micro.rows.tolist(), flat.split(micro.lengths.tolist())):
                pooled[row] = own[-1] if mi.gold_pool == "last" else own.float().mean(0).to(own.dtype)
        return torch.stack([pooled[q] for q in range(len(golds))]) if golds else flat[:0]

    def keep_golds(self, problems: Sequence[Problem]) -> None:
        """Compute the gold states of all questions once, from the present weights, and stay with them
        (``mi.gold_refresh: never``). Every rank computes its share and keeps all of them in host memory."""
        mine = problems[distributed.rank() :: distributed.world_size()]
        states = {problem.id: state for problem, state in zip(mine, self.gold_states(mine).cpu())}
        self.kept_golds = {key: state for part in distributed.gather_objects(states) for key, state in part.items()}

    def wake(self, engine: RolloutEngine) -> None:
        """Give the engine the present weights if it sleeps; within a step it is awake until its rollouts are drawn."""
        if engine.asleep:
            engine.sync(self.sharded.full_parameters())

    @torch.no_grad()
    def completion_log_probs(self, prompt: Sequence[int], completion: Sequence[int], temperature: float) -> list[float]:
        """Log-probability of each token of one completion at a temperature of its own."""
        (micro,) = micro_batches([prompt], [completion], budget=1, packing=False)
        usual, self.sharded.policy.temperature = self.sharded.policy.temperature, temperature
        try:
            return self.sharded.forward(micro.to(self.device), _every)["logp"].tolist()
        finally:
            self.sharded.policy.temperature = usual


Selector = Callable[[MicroBatch, Tensor], Tensor]
"""micro-batch, (N, d) states -> (N,) bool"""


def _every(states: Tensor) -> Tensor:
    return torch.ones_like(states[:, 0], dtype=torch.bool)  # (N,)
