"""ZeRO on real ranks: the gradient of a fixed batch does not depend on how the batch is spread or laid out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import processes
from tests.e2e.launch import ROOT, torchrun
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e

TOLERANCE = 2e-5  # of the largest entry; float32, sums in another order
RATE, DECAY, EPS = 5e-4, 0.1, 1e-3  # of AdamW in the first of two steps of warm-up to 1e-3


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Results of update_worker.py on 1 and on 2 ranks."""
    model = make_tiny(tmp_path_factory.mktemp("model"), scale=0.1)
    untied = make_tiny(tmp_path_factory.mktemp("untied"), scale=0.1, tied=False)
    found = {}
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp(f"ranks{ranks}")
        done = processes.run(
            [*torchrun(ranks), str(Path(__file__).with_name("update_worker.py")), str(model), str(untied), str(out)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
        )
        assert done.returncode == 0, done.stderr[-20000:]
        found[ranks] = torch.load(out / "result.pt", weights_only=True)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    largest = max(float(t.abs().max()) for t in b.values())
    assert largest > 1e-4
    for name, tensor in b.items():
        assert float((a[name] - tensor).abs().max()) <= TOLERANCE * largest, name


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_are_whole_behind_passes_without_a_backward_one(results: dict[int, dict[str, Any]], ranks: int) -> None:
    """DeepSpeed asserts that none is on its way; here some were. (The worker gathers them.)"""
    assert results[ranks]["on their way"] > 0


LAYOUTS = ["one by one", "two by two", "four by four", "packed", "shared prompts", "balanced", "checkpointed"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("variant", [*(f"zero 3, {layout}" for layout in LAYOUTS), "zero 2", "zero 1"])
def test_gradient_is_the_plain_one(results: dict[int, dict[str, Any]], ranks: int, variant: str) -> None:
    ours, plain = results[ranks][variant], results[1]["plain, one by one"]
    same(ours["gradient"], clipped(plain, ours["limit"]))


def clipped(update: dict[str, Any], limit: float) -> dict[str, torch.Tensor]:
    """The gradient of an update that no limit changed, as it is with ``limit``."""
    norm = sum(float(tensor.double().square().sum()) for tensor in update["gradient"].values()) ** 0.5
    assert pytest.approx(update["metrics"]["policy/grad_norm"], rel=1e-4) == norm < update["limit"]
    return {name: tensor * min(1.0, limit / norm) for name, tensor in update["gradient"].items()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("variant", [*(f"zero 3, {layout}" for layout in LAYOUTS), "zero 2", "zero 1"])
def test_weights_after_a_step_are_those_of_adamw(results: dict[int, dict[str, Any]], ranks: int, variant: str) -> None:
    """Written out for a first step, of which both moments are; at the rate of the schedule, and clipped where it is."""
    ours, plain = results[ranks][variant], results[1]["plain, one by one"]
    for name, gradient in clipped(plain, ours["limit"]).items():
        moved = -RATE * (DECAY * plain["before"][name] + gradient / (gradient.abs() + EPS))
        wrong = ours["after"][name] - plain["before"][name] - moved
        assert float(wrong.abs().max()) <= 1e-3 * RATE, name


def test_some_are_clipped(results: dict[int, dict[str, Any]]) -> None:
    """Else the tests above say nothing of it; one with each of DeepSpeed's optimizers."""
    plain = results[1]["plain, one by one"]["metrics"]["policy/grad_norm"]
    assert [name for name, found in updates(results[1]).items() if found["limit"] < plain / 2] == [
        "zero 3, checkpointed",
        "zero 2",
    ]


def updates(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: each for name, each in found.items() if isinstance(each, dict)}


def test_plain_ranks_agree(results: dict[int, dict[str, Any]]) -> None:
    same(results[2]["plain, one by one"]["gradient"], results[1]["plain, one by one"]["gradient"])


@pytest.mark.parametrize("variant", ["batch scope", "pointwise", "token mean"])
def test_rules_that_look_at_the_whole_batch_agree_over_ranks(results: dict[int, dict[str, Any]], variant: str) -> None:
    same(results[2][variant]["gradient"], results[1][variant]["gradient"])


def test_batch_scope_does_not_see_micro_batches(results: dict[int, dict[str, Any]]) -> None:
    same(results[1]["batch scope, one by one"]["gradient"], results[1]["batch scope"]["gradient"])


def test_rules_differ(results: dict[int, dict[str, Any]]) -> None:
    """Else the tests above compare nothing."""
    plain = results[1]["plain, one by one"]["gradient"]
    largest = max(float(tensor.abs().max()) for tensor in plain.values())
    for variant in ("batch scope", "pointwise", "token mean"):
        other = results[1][variant]["gradient"]
        assert other.keys() == plain.keys()
        assert max(float(tensor.abs().max()) for tensor in other.values()) > largest / 10
        assert max(float((other[name] - tensor).abs().max()) for name, tensor in plain.items()) > largest / 10


def test_metrics_are_global(results: dict[int, dict[str, Any]]) -> None:
    for variant, found in updates(results[1]).items():
        one, two = found["metrics"], results[2][variant]["metrics"]
        assert two["rollout/questions"] == one["rollout/questions"] == 6
        assert one["rollout/tokens"] > 50
        assert 0 < one["mask/otf"] < 1
        for key in ("mask/otf", "rollout/tokens", "loss/total", "policy/entropy", "mi/mean", "mi/skew", "mismatch/kl"):
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), (variant, key)
        assert two["policy/grad_norm"] == pytest.approx(one["policy/grad_norm"], rel=1e-4), variant


def test_questions_are_dealt_out_by_their_tokens(results: dict[int, dict[str, Any]]) -> None:
    assert results[1]["questions of a rank"] == [6]
    assert results[2]["questions of a rank"] == [3, 3]  # the batch came as five and one


def test_full_disk_is_said(results: dict[int, dict[str, Any]]) -> None:
    assert "step 2" in results[2]["full disk"]
