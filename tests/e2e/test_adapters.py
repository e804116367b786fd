"""Adapters on the real stack: the same gradient however ranks share it, exact resumption, and a vLLM that follows.

Run as a script, this file is one rank.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aipo import distributed
from aipo.config import load_config
from aipo.layout import MicroBatch, filler, micro_batches
from aipo.model.adapters import adapters_off, add_adapters, residual
from aipo.model.export import weights
from aipo.model.loading import load_model
from aipo.passes import Passes
from aipo.policy import Policy
from aipo.rollout import make_engine
from aipo.rollout.base import Request, Sampling
from aipo.rollout.check import TOLERANCE, check_weight_sync, logprob_gap
from aipo.sharding import Sharded, shard
from tests import processes
from tests.e2e.launch import ROOT, torchrun
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e

ALPHA = 12.0
BETA1 = 0.9
LIMIT = 0.5  # of the gradient's norm: it is clipped
EPS = 0.01  # else rounding decides the sign in which a weight without much gradient moves
VARIANTS = {
    "plain": ["sharding.zero_stage=0"],
    "zero 1": ["sharding.zero_stage=1"],
    "zero 2": ["sharding.zero_stage=2"],
    "zero 3": ["sharding.zero_stage=3", "model.gradient_checkpointing=true"],
    "zero 1, bfloat16": ["sharding.zero_stage=1", "model.dtype=bfloat16"],
    "zero 3, bfloat16": ["sharding.zero_stage=3", "model.dtype=bfloat16"],
}
PROMPTS = [[5, 6, 7], [9] * 12, [20, 21], [30]]
COMPLETIONS = [[40, 41, 42], [50] * 9, [60, 61], [70, 71, 72, 73, 74]]
SHARES = {1: [[0, 1, 2, 3]], 2: [[0, 1, 2], [3]]}  # rows of each rank, by number of ranks


def adapted(model: str, *overrides: str, device: torch.device) -> Sharded:
    """A policy whose adapters have been trained for a while, so to say: B is not zero."""
    usual = [f"model.path={model}", "model.dtype=float32", "model.gradient_checkpointing=false"]
    usual += [f"optim.max_grad_norm={LIMIT}", f"optim.betas=[{BETA1}, 0.95]", f"optim.eps={EPS}"]
    config = load_config("tiny.yaml", [*usual, *overrides])
    loaded = load_model(
        model,
        dtype=getattr(torch, config.model.dtype),
        attention="sdpa",
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    add_adapters(loaded, rank=4, alpha=ALPHA, targets=["all-linear"], seed=3)
    move_adapters(loaded, seed=1, scale=0.02)
    return shard(Policy(loaded, temperature=1.0), config, device)


def move_adapters(model: torch.nn.Module, *, seed: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += torch.randn(parameter.shape, generator=draw) * scale


# --- one rank -----------------------------------------------------------------------------------------------------


def batches(device: torch.device) -> list[MicroBatch]:
    """This rank's rows one by one, filled up to what the busiest rank has."""
    shares = SHARES[distributed.world_size()]
    mine = shares[distributed.rank()]
    made = [micro_batches([PROMPTS[i]], [COMPLETIONS[i]], budget=1, packing=False)[0] for i in mine]
    return [m.to(device) for m in made + [filler()] * (max(map(len, shares)) - len(mine))]


def update(sharded: Sharded, device: torch.device) -> float:
    for micro in batches(device):
        out = sharded.forward(micro, lambda states: torch.ones_like(states[:, 0], dtype=torch.bool))
        sharded.backward(-out["logp"].sum())
    return sharded.step(sum(map(len, COMPLETIONS)), 1e-2)


def gradient(sharded: Sharded) -> dict[str, Tensor]:
    """The gradient that AdamW's first step was made with, from its first moment."""
    found = {}
    for name, parameter in sharded.names():
        if not parameter.requires_grad:
            continue
        if hasattr(sharded, "engine"):
            from deepspeed.utils import safe_get_full_optimizer_state

            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        else:
            moment = sharded.optimizer.state[parameter]["exp_avg"]  # type: ignore[attr-defined]
        found[name] = moment.float().cpu().clone() / (1 - BETA1)
    return found


def full(sharded: Sharded) -> dict[str, Tensor]:
    return {name: tensor.float().cpu().clone() for name, tensor in sharded.full_parameters()}


def residuals(sharded: Sharded, device: torch.device) -> dict[int, Tensor]:
    """ARCA's weights of the tokens of this rank's rows, by row."""
    found = {}
    with torch.no_grad():
        for micro, row in zip(batches(device), [*SHARES[distributed.world_size()][distributed.rank()], -1, -1]):
            on = sharded.forward(micro)["states"]
            with adapters_off(sharded.policy):
                off = sharded.forward(micro)["states"]
            found[row] = residual(on, off)
    return found


def one_rank(model: str, out: Path) -> None:
    device = distributed.start()
    results: dict[str, Any] = {}
    for variant, overrides in VARIANTS.items():
        sharded = adapted(model, *overrides, device=device)
        before, found = full(sharded), residuals(sharded, device)
        assert all(map(torch.equal, before.values(), full(sharded).values()))
        norm = update(sharded, device)
        first = gradient(sharded)

        # saved, trained on, loaded into another policy, trained on: the same weights to the last bit
        folder = out / variant
        if distributed.rank() == 0:
            folder.mkdir()
        distributed.all_true(True)  # the folder is there
        sharded.save(folder)
        distributed.all_true(True)  # the files are there
        after = full(sharded)
        norms = [update(sharded, device)]
        further = full(sharded)
        other = adapted(model, *overrides, device=device)
        other.load(folder)
        assert all(map(torch.equal, after.values(), full(other).values())), variant
        norms.append(update(other, device))
        assert norms[0] == norms[1], variant
        assert all(map(torch.equal, further.values(), full(other).values())), variant

        gathered = {k: v for part in distributed.gather_objects(found) for k, v in part.items() if k >= 0}
        results[variant] = {"before": before, "after": after, "gradient": first, "norm": norm, "residual": gathered}
    if distributed.rank() == 0:
        torch.save(results, out / "results.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("model"), scale=0.1))


@pytest.fixture(scope="module")
def outs(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What one_rank wrote, by number of ranks."""
    made = {}
    for ranks in SHARES:
        out = made[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
        done = processes.run(
            [*torchrun(ranks), __file__, model, str(out)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
        )
        assert done.returncode == 0, done.stderr[-10000:]
    return made


@pytest.fixture(scope="module")
def results(outs: dict[int, Path]) -> dict[int, dict[str, Any]]:
    return {ranks: torch.load(out / "results.pt", weights_only=True) for ranks, out in outs.items()}


def same(a: dict[Any, Tensor], b: dict[Any, Tensor], tolerance: float) -> None:
    """Up to ``tolerance`` times the largest entry."""
    assert a.keys() == b.keys()
    largest = max(float(t.abs().max()) for t in b.values())
    assert largest > 1e-3
    for name, tensor in b.items():
        assert float((a[name] - tensor).abs().max()) <= tolerance * largest, name


EXACT, ROUGH = 2e-5, 0.05  # float32, sums in another order; bfloat16


@pytest.mark.parametrize("ranks", SHARES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_and_stages_agree(results: dict[int, dict[str, Any]], variant: str, ranks: int) -> None:
    tolerance = ROUGH if "bfloat16" in variant else EXACT
    ours, reference = results[ranks][variant], results[1]["plain"]
    assert all("lora_" in name for name in ours["gradient"])
    for key in ("before", "gradient", "residual"):
        same(ours[key], reference[key], tolerance)
    assert pytest.approx(reference["norm"], rel=tolerance) == ours["norm"] > 2 * LIMIT
    clipped = sum(float(tensor.double().square().sum()) for tensor in ours["gradient"].values()) ** 0.5
    assert clipped == pytest.approx(LIMIT, rel=tolerance)
    if "bfloat16" not in variant:  # where a step is hardly more than the rounding of a weight
        same(moved(ours), moved(reference), 1e-4)
    assert all((weight > 0).all() for weight in ours["residual"].values())
    frozen = [name for name in ours["after"] if "_proj" not in name]
    assert len(frozen) == len(ours["after"]) - 14  # 7 linear layers in each of 2
    for name, tensor in ours["after"].items():
        assert torch.equal(tensor, ours["before"][name]) == (name in frozen), name


def moved(result: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor - result["before"][name] for name, tensor in result["after"].items()}


@pytest.mark.parametrize("ranks", SHARES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_weights_are_merged(
    outs: dict[int, Path], results: dict[int, dict[str, Any]], variant: str, ranks: int
) -> None:
    exported, after = weights(outs[ranks] / variant, ALPHA), results[ranks][variant]["after"]
    same({name: exported[name] for name in after}, after, 0.01 if "bfloat16" in variant else 1e-6)


# --- vLLM ---------------------------------------------------------------------------------------------------------


def test_vllm_follows_the_adapters(model: str) -> None:
    cpu = torch.device("cpu")
    sharded = adapted(model, "sharding.zero_stage=0", device=cpu)
    log_probs = Passes(load_config("tiny.yaml"), sharded, None, cpu).completion_log_probs  # type: ignore[arg-type]
    engine = make_engine(
        "vllm", model, max_model_len=128, end_token_ids=[2], kv_cache_gb=0.1, dtype="bfloat16", load_weights=False
    )

    def gap() -> float:
        requests = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
        completions = engine.generate(requests, Sampling(max_tokens=24))
        drawn = [x for c in completions for x in c.logprobs]
        return logprob_gap(drawn, [x for p, c in zip(PROMPTS, completions) for x in log_probs(p, c.token_ids, 1.0)])

    try:
        assert check_weight_sync(engine, sharded.full_parameters, log_probs, PROMPTS) < TOLERANCE
        move_adapters(sharded.policy, seed=2, scale=0.3)
        assert gap() > 5 * TOLERANCE  # the adapters moved, the engine did not
        engine.sync(sharded.full_parameters())
        assert gap() < TOLERANCE
        with adapters_off(sharded.policy):
            assert gap() > 5 * TOLERANCE  # the engine has them
    finally:
        engine.close()


if __name__ == "__main__":
    one_rank(sys.argv[1], Path(sys.argv[2]))
