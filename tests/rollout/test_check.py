"""What the check of the weight sync does to weights and memory; test_hf.py has engines that pass and fail it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from aipo.config.training import GuardsConfig
from aipo.rollout.base import Completion, Request, Sampling
from aipo.rollout.check import NOISE_ELEMENTS, GapGuard, check_weight_sync, engine_gap, perturbed
from tests.plan.test_planner import PeakBytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.slow
def test_noise_takes_one_copy_and_leaves_the_weights_as_they_are(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(3, NOISE_ELEMENTS, dtype=dtype).mul(0.02).transpose(0, 1))
    before = weight.detach().clone()
    with PeakBytes(weight) as memory:
        ((_, noisy),) = perturbed([("w", weight)], seed=1, strength=0.5)
    assert memory.peak <= 3 * NOISE_ELEMENTS * dtype.itemsize + 2 * NOISE_ELEMENTS * 4
    assert torch.equal(weight, before)
    assert (noisy.shape, noisy.dtype) == (weight.shape, dtype)
    noise = (noisy - before).float().reshape(3, NOISE_ELEMENTS)  # as it was drawn
    assert float(noise.std()) == pytest.approx(0.5 * 0.02, rel=0.02)
    assert float((torch.corrcoef(noise) - torch.eye(3)).abs().max()) < 0.01  # no piece repeats another
    ((_, again),) = perturbed([("w", weight)], seed=1, strength=0.5)
    assert torch.equal(noisy, again)


class Engine:
    """Draws one token a prompt, and notes what is asked of it."""

    asleep = False

    def __init__(self) -> None:
        self.asked: list[str] = []

    def sync(self, weights) -> None:
        self.asked.append("sync")
        list(weights)

    def sleep(self) -> None:
        self.asked.append("sleep")

    def generate(self, requests: list[Request], sampling: Sampling, **_) -> list[Completion]:
        self.asked.append("generate")
        return [Completion([7], [-1.0], "length") for _ in requests]

    def close(self) -> None: ...


def test_no_sync_and_no_forward_beside_an_engine_that_is_awake() -> None:
    engine = Engine()

    def logprobs(*_) -> list[float]:
        engine.asked.append("forward")
        return [-1.01]

    gap = check_weight_sync(engine, lambda: [("w", torch.ones(3))], logprobs, [[5]])
    assert gap == pytest.approx(0.01, abs=1e-6)
    assert engine.asked == ["sync", "sleep", "sync", "generate", "sleep", "forward"]


@pytest.mark.parametrize("ranks", [[0.01, math.nan], [math.nan, 0.01]])
def test_not_a_number_on_one_rank_is_that_on_all(ranks: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aipo.rollout.check.gather_objects", lambda gap: ranks)
    assert math.isnan(engine_gap(Engine(), lambda *_: [-1.0], [[5]]))


def test_a_gap_is_told_and_ends_the_run_when_it_stays() -> None:
    guard, said = GapGuard(GuardsConfig(max_gap=0.3, max_bad_steps=2)), []
    gaps = [0.1, 0.4, 0.3, math.nan, 0.31]
    assert [guard.ends(step, gap, said.append) for step, gap in enumerate(gaps)] == [False] * 4 + [True]
    assert [line.split(" engine")[0] for line in said] == [f"advice: in step {step}" for step in (1, 3, 4)]
    assert "guards.max_gap (0.3 nats a token) in 2 steps in a row. The policy is saved in x" in guard.why(Path("x"))


def test_an_engine_that_is_meant_to_differ_is_let_be() -> None:
    guard = GapGuard(GuardsConfig(max_bad_steps=1), apart=True)
    assert not guard.ends(1, 3.0, lambda line: pytest.fail(line))
