"""One rank of test_sharding.py: optimizer steps on a fixed batch, their gradients saved by rank 0.

Usage: torchrun --nproc_per_node N update_worker.py MODEL UNTIED OUT
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer

from aipo import distributed

device = distributed.start()

from aipo import sharding  # noqa: E402
from aipo.config import Config, load_config  # noqa: E402
from aipo.errors import TrainingError  # noqa: E402
from aipo.passes import Passes  # noqa: E402
from aipo.policy import make_policy  # noqa: E402
from aipo.problems.datasets import Problem  # noqa: E402
from aipo.problems.prompts import Prompter  # noqa: E402
from aipo.record.checkpoints import CheckpointError, CheckpointStore, latest  # noqa: E402
from aipo.record.clock import Clock  # noqa: E402
from aipo.record.reporting import reduce_metrics  # noqa: E402
from aipo.rollout.base import Completion  # noqa: E402
from aipo.rollouts import Rollouts  # noqa: E402
from aipo.selection import TokenSelector  # noqa: E402
from aipo.sharding import (  # noqa: E402
    Sharded,
    frozen_reference,
    shard,
)
from aipo.trainer import Trainer  # noqa: E402

MODEL, UNTIED, OUT = sys.argv[1], sys.argv[2], Path(sys.argv[3])
RANK, WORLD = distributed.rank(), distributed.world_size()
BETA1 = 0.9
sharding.GATHERED = 10_000  # else all weights of so small a model are gathered at once
VARIANTS = {
    "plain, one by one": ["sharding.zero_stage=0", "optim.micro_tokens=1"],
    "zero 3, one by one": ["optim.micro_tokens=1"],
    "zero 3, two by two": ["optim.micro_tokens=100"],
    "zero 3, four by four": ["optim.micro_tokens=200"],
    "zero 3, packed": ["optim.micro_tokens=150", "optim.packing=true"],
    "zero 3, shared prompts": ["optim.micro_tokens=100", "optim.share_prompts=true"],
    "zero 3, balanced": ["optim.micro_tokens=100"],
    "zero 3, checkpointed": ["model.gradient_checkpointing=true", "optim.max_grad_norm=0.5"],
    "zero 2": ["sharding.zero_stage=2", "optim.max_grad_norm=0.5"],
    "zero 1": ["sharding.zero_stage=1"],
    "batch scope": ["mask.scope=batch"],
    "batch scope, one by one": ["mask.scope=batch", "optim.micro_tokens=1"],
    "pointwise": ["mi.estimator=pointwise", "mi.num_features=16", "mi.warmup_steps=0"],
    "token mean": ["loss.aggregation=token"],
}


def fixed_batch(prompter: Prompter) -> Rollouts:
    """6 questions x 2 rollouts, lengths 1 to 30. The first 5 questions are rank 0's where there are two ranks."""
    draw = torch.Generator().manual_seed(0)

    def ints(low: int, high: int, count: int = 1) -> list[int]:
        return torch.randint(low, high, (count,), generator=draw).tolist()

    problems = [Problem(str(q), f"{q} + {q} =", str(2 * q)) for q in range(6)]
    completions = []
    for _ in range(12):
        ids = ints(10, 300, ints(1, 31)[0])
        completions.append(Completion(ids, (-torch.rand(len(ids), generator=draw) * 5).tolist(), "length"))
    advantages = torch.randn(12, generator=draw)
    shares = [range(6)] if WORLD == 1 else [range(5), range(5, 6)]
    mine = list(shares[RANK])
    rows = [q * 2 + i for q in mine for i in range(2)]
    return Rollouts(
        problems=[problems[q] for q in mine],
        prompts=[prompter.encode(problems[q].question) for q in mine],
        completions=[completions[i] for i in rows],
        group_size=2,
        ids=torch.tensor(rows),
        texts=[""] * len(rows),
        advantages=advantages[rows],
        used=torch.ones(len(rows), dtype=torch.bool),
    )


def make_trainer(config: Config, prompter: Prompter, model: str = MODEL) -> Trainer:
    """What the update stage needs, all real; the stages around it are left out."""
    return Trainer(
        config,
        problems=[],
        held_out=[],
        collector=SimpleNamespace(prompter=prompter),  # type: ignore[arg-type]
        passes=Passes(config, shard(make_policy(config, model), config, device), prompter, device),
        reference=frozen_reference(config, model, device),
        selector=TokenSelector(config),
        curriculum=None,  # type: ignore[arg-type]
        store=None,  # type: ignore[arg-type]
        tracker=SimpleNamespace(folder=OUT),  # type: ignore[arg-type]
        progress=None,  # type: ignore[arg-type]
        identity={},
        engine_gap=lambda: 0.0,
    )


def gradient(sharded: Sharded) -> dict[str, torch.Tensor]:
    """The gradient that AdamW's first step was made with, from its first moment."""
    found = {}
    for name, parameter in sharded.names():
        if hasattr(sharded, "engine"):
            from deepspeed.utils import safe_get_full_optimizer_state

            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        else:
            moment = sharded.optimizer.state[parameter]["exp_avg"]  # type: ignore[attr-defined]
        found[name] = moment.float().cpu().clone() / (1 - BETA1)
    return found


def named_weights(sharded: Sharded) -> dict[str, torch.Tensor]:
    held = list(sharded.full_parameters())  # as vLLM holds some until their layer is complete
    return {name: tensor.float().cpu().clone() for name, tensor in held}


def weights(sharded: Sharded) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in named_weights(sharded).values()])


def config_of(overrides: list[str]) -> Config:
    usual = [f"model.path={MODEL}", "model.dtype=float32", "rollout.samples_per_question=2", "optim.max_grad_norm=1e9"]
    usual += [
        "rollout.questions_per_step=6",
        "loss.kl_beta=0.1",
        "mask.kappa_start=0.3",
        "rollout.max_tokens=30",
        "optim.share_prompts=false",
        "optim.eps=1e-3",  # else rounding decides the sign in which a weight without much gradient moves
        "optim.weight_decay=0.1",
        "optim.warmup_steps=2",  # the first step goes at half the rate that the optimizer was made with
    ]
    return load_config("tiny.yaml", [*usual, f"optim.betas=[{BETA1}, 0.95]", *overrides])


def gather_between_passes(base: Config, prompter: Prompter) -> int:
    """With weights that are too large to be kept, as a real model's are: passes without a backward one, as the engine's
    check makes between two steps, leave some on their way, and all are whole for the engine nevertheless.

    Returns:
        How many were on their way.
    """
    usual = sharding.deepspeed_config
    large = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 30_000,
    }
    sharding.deepspeed_config = lambda config: (
        usual(config) | {"zero_optimization": usual(config)["zero_optimization"] | large}
    )
    trainer = make_trainer(base, prompter, UNTIED)
    sharding.deepspeed_config = usual
    passes = Passes(base, trainer.sharded, prompter, device)
    micro, *_ = passes.batches_of(fixed_batch(prompter))

    @torch.no_grad()
    def check() -> None:
        for _ in range(2):
            trainer.sharded.forward(micro, full=True)

    check()  # before training, and what labels are made of
    with torch.no_grad():
        for _ in range(3):
            passes.states(micro)
    trainer.update(fixed_batch(prompter), 0.3, Clock())
    whole = weights(trainer.sharded)
    check()
    found = sum(weight.ds_status.name == "INFLIGHT" for _, weight in trainer.sharded.names())
    assert torch.equal(whole, weights(trainer.sharded))
    trainer.update(fixed_batch(prompter), 0.3, Clock())
    assert not torch.equal(whole, weights(trainer.sharded))
    return found


def main() -> None:
    base = config_of([])
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompter = Prompter(tokenizer, system=None, examples=[], suffix=None, thinking=False, max_prompt_tokens=192)
    result: dict[str, Any] = {}
    for name, overrides in VARIANTS.items():
        trainer = make_trainer(config_of(overrides), prompter)
        rollouts = fixed_batch(prompter)
        rollouts.rewards, rollouts.correct = torch.zeros(len(rollouts.ids)), torch.zeros(len(rollouts.ids))
        if name == "zero 3, balanced":
            rollouts = trainer.balance(rollouts)
            result["questions of a rank"] = [len(part) for part in distributed.gather_objects(rollouts.problems)]
        clock = Clock()
        before = named_weights(trainer.sharded)
        _, local = trainer.update(rollouts, 0.3, clock)
        trainer.step = 1
        logged = reduce_metrics(rollouts, local, clock.seconds)
        result[name] = {
            "gradient": gradient(trainer.sharded),
            "metrics": {k: v for k, v in logged.items() if not k.startswith(("time", "sp"))},
            "before": before,
            "after": named_weights(trainer.sharded),
            "limit": trainer.config.optim.max_grad_norm,
        }

    # a gradient that is not finite on one rank is skipped on all, dumped, and ends the run the second time
    trainer = make_trainer(config_of(["guards.max_bad_steps=2"]), prompter)
    before = weights(trainer.sharded)
    rollouts = fixed_batch(prompter)
    if RANK == WORLD - 1:
        rollouts.advantages[:] = float("inf")
    trainer.update(rollouts, 0.3, Clock())
    assert torch.equal(before, weights(trainer.sharded)), "a bad step changed the weights"
    assert list(OUT.glob(f"bad_steps/step-000001-rank-{RANK}.pt"))
    try:
        trainer.update(rollouts, 0.3, Clock())
        raise AssertionError("two bad steps in a row went on")
    except TrainingError as error:
        assert "2 steps in a row" in str(error)  # noqa: PT017
    trainer = make_trainer(base, prompter)
    trainer.update(fixed_batch(prompter), 0.3, Clock())
    assert trainer.bad_steps == 0

    # a rank whose disk is full fails the save on all; what was saved before stays
    store = CheckpointStore(OUT / "checkpoints", keep_last=2, rank=RANK)
    saved = store.save(1, trainer.sharded.save)
    kept = weights(trainer.sharded)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    if RANK == WORLD - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, usual[1]))
    try:
        store.save(2, trainer.sharded.save)
        raise AssertionError("a full disk went unnoticed")
    except CheckpointError as error:
        result["full disk"] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert latest(OUT / "checkpoints") == saved
    trainer.update(fixed_batch(prompter), 0.3, Clock())
    assert not torch.equal(kept, weights(trainer.sharded))
    trainer.sharded.load(saved)
    assert torch.equal(kept, weights(trainer.sharded)), "the checkpoint does not bring the weights back"
    result["on their way"] = gather_between_passes(base, prompter)
    if RANK == 0:
        torch.save(result, OUT / "result.pt")
    distributed.stop()


if __name__ == "__main__":
    main()
