"""One optimizer step by this package or by a plain loop; bench/step.py starts this in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from aipo.plan.flops import sizes
from bench.batches import SAMPLES, Batch, load, padded
from bench.measure import Clock, build_model, matmul_peak, measured

# name -> what the table calls it, and keys of the config
OURS: dict[str, tuple[str, list[str]]] = {
    "aipo": ("AIPO, a prompt once for its answers", ["optim.share_prompts=true"]),
    "aipo-padded": ("AIPO, padded as all below", []),
    "aipo-packed": ("AIPO, packed", ["optim.packing=true"]),
    "aipo-probe": ("AIPO, separate probe (`mask.scope: batch`)", ["mask.scope=batch"]),
    "grpo": ("GRPO on all tokens, this package", ["mask.rule=all"]),
}
LOOPS = {
    "plain": "GRPO, plain loop, all logits",
    "plain-completions": "GRPO, plain loop, logits of completions",
}


class Ours:
    """:meth:`Trainer.update` itself; the stages around it are left out."""

    def __init__(self, options: dict[str, Any], overrides: list[str]) -> None:
        from aipo import distributed
        from aipo.config import load_config
        from aipo.passes import Passes
        from aipo.policy import Policy
        from aipo.selection import TokenSelector
        from aipo.sharding import shard
        from aipo.trainer import Trainer

        device = distributed.start()
        torch.set_num_threads(options["threads"])
        batch = load(**options["batch"])
        common = {
            "model.attention": options["attention"],
            "model.gradient_checkpointing": str(options["checkpointing"]).lower(),
            "optim.micro_tokens": options["micro_tokens"],
            "optim.lr": 1e-6,  # as in the others, whose second step is measured, too
            "model.dtype": "bfloat16",  # the others compute in it
            "optim.share_prompts": "false",
            "rollout.samples_per_question": SAMPLES,
            "rollout.importance_correction": "none",  # the others have none, and so the same gradient
            "rollout.max_tokens": max(map(len, batch.completions)),
            "reward.overlong_buffer": 1,
            "advantage.drop_constant_groups": "none",
            "loss.kl_beta": 0,
            "sharding.zero_stage": options["zero_stage"],
        }
        name = "qwen3_1.7b.yaml" if device.type == "cuda" else "smollm2_135m.yaml"
        config = load_config(name, [*(f"{k}={v}" for k, v in common.items()), *overrides])
        model = build_model(
            options["model"], attention=options["attention"], checkpointing=options["checkpointing"], device=device
        )
        policy = Policy(model, temperature=1.0, layer=config.mi.layer, head_chunk=config.model.head_chunk)
        self.golds: list[list[int]] = []
        prompter = SimpleNamespace(
            encode_gold=lambda problem, _text: self.golds[int(problem.id)],
            tokenizer=SimpleNamespace(encode=lambda _text, **_: [0]),  # asked for the ids of an early exit: unused
        )
        unused: Any = None
        self.trainer = Trainer(
            config,
            problems=[],
            held_out=[],
            collector=SimpleNamespace(prompter=prompter),  # type: ignore[arg-type]
            passes=Passes(config, shard(policy, config, device), prompter, device),  # type: ignore[arg-type]
            reference=None,
            selector=TokenSelector(config),
            curriculum=unused,
            store=unused,
            tracker=unused,
            progress=unused,
            identity={},
            engine_gap=lambda: 0.0,
        )
        self.selected = self.norm = 0.0

    def __call__(self, batch: Batch, clock: Clock) -> None:
        from aipo.labelling import peaks
        from aipo.problems.datasets import Problem
        from aipo.rollout.base import Completion
        from aipo.rollouts import Rollouts

        trainer, self.golds = self.trainer, batch.golds
        self.rollouts = Rollouts(
            problems=[Problem(str(q), "", "") for q in range(len(batch.prompts))],
            prompts=batch.prompts,
            completions=[Completion(ids, logp, "stop") for ids, logp in zip(batch.completions, batch.logprobs)],
            group_size=batch.group_size,
            ids=torch.arange(len(batch.completions)),
            rewards=torch.tensor(batch.rewards),
        )
        trainer.set_advantages(self.rollouts, clock)  # type: ignore[arg-type]
        kappa = trainer.config.mask.kappa_start
        selection, sums = trainer.update(self.rollouts, kappa, clock)  # type: ignore[arg-type]
        self.selected, self.norm = sums["selected"], sums["grad_norm"]
        if trainer.selector.scored:
            with clock("mi"):
                peaks(self.rollouts, selection.scores, trainer.config.curriculum, trainer.config.mask)

    def read(self) -> int:
        """Tokens in the forward pass, without padding."""
        if not self.trainer.config.optim.share_prompts:
            return sum(self.rollouts.loads(share_prompts=False))
        return sum(
            micro.input_ids.numel() for part in self.trainer.passes.update_batches(self.rollouts) for micro in part
        )


class Loop:
    """The plain loop of a paper's appendix: logits in bfloat16, their log-softmax in float32, the clipped loss.

    With ``completions`` there are no logits of positions that belong to all prompts of the micro-batch.
    """

    def __init__(self, options: dict[str, Any], *, completions: bool) -> None:
        torch.set_num_threads(options["threads"])
        self.options, self.completions = options, completions
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build_model(
            options["model"], attention=options["attention"], checkpointing=options["checkpointing"], device=self.device
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def __call__(self, batch: Batch, clock: Clock) -> None:
        advantages = batch.advantages().to(self.device)  # (B,)
        for rows in batch.micro_batches(self.options["micro_tokens"]):
            with clock("forward"):
                prompts = [batch.prompt_of[i] for i in rows]
                ids, tokens = padded([p + batch.completions[i] for p, i in zip(prompts, rows)])  # (b, s), (b, s)
                first = torch.tensor([len(p) for p in prompts])[:, None]  # (b, 1)
                answered = (tokens.bool() & (torch.arange(ids.shape[1]) >= first))[:, 1:]  # (b, s - 1)
                ids, tokens, answered = (each.to(self.device) for each in (ids, tokens, answered))
                logp = self.log_probs(ids, tokens, int(first.min()) - 1 if self.completions else 0)  # (b, s - 1)
                ratio = (logp - logp.detach()).exp()  # (b, s - 1)
                a = advantages[rows][:, None]  # (b, 1)
                gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a) * answered  # (b, s - 1)
                loss = -(gain.sum(1) / answered.sum(1)).sum() / len(advantages)
            with clock("backward"):
                loss.backward()
        with clock("optimizer"):
            self.norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def log_probs(self, ids: Tensor, tokens: Tensor, start: int) -> Tensor:
        """Of each next token, 0 before ``start``. (b, s - 1)"""
        with torch.autocast(self.device.type, torch.bfloat16):
            places = torch.arange(start, ids.shape[1] - 1, device=self.device)
            logits = self.model(
                input_ids=ids, attention_mask=tokens, use_cache=False, logits_to_keep=places
            ).logits  # (b, s - 1 - start, V)
        logp = logits.float().log_softmax(-1).gather(-1, ids[:, start + 1 :, None])[..., 0]
        return nn.functional.pad(logp, (start, 0))


def child(options: dict[str, Any]) -> dict[str, Any]:
    """Measure one variant; or, without one, what the ratios and shares are made with."""
    name, batch = options["variant"], load(**options["batch"])
    if name is None:
        torch.set_num_threads(options["threads"])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        meta = build_model(options["model"], attention="sdpa", checkpointing=False, device=torch.device("cpu"))
        return {"matmul": matmul_peak(device), "sizes": sizes(meta)}
    step: Ours | Loop
    step = Ours(options, OURS[name][1]) if name in OURS else Loop(options, completions=name == "plain-completions")
    result = measured(step, batch, warm_up=load(**options["warm_up"]), repeats=options["repeats"]) | {"norm": step.norm}
    if isinstance(step, Ours):
        return result | {"positions": step.selected, "tokens": step.read()}
    return result | {"positions": batch.tokens if name == "plain" else batch.generated, "tokens": batch.tokens}


if __name__ == "__main__":
    print("\n" + json.dumps(child(json.loads(sys.argv[1]))))
