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
    same(results[ranks][variant][0], results[1]["plain, one by one"][0])


def test_plain_ranks_agree(results: dict[int, dict[str, Any]]) -> None:
    same(results[2]["plain, one by one"][0], results[1]["plain, one by one"][0])


@pytest.mark.parametrize("variant", ["batch scope", "pointwise", "token mean"])
def test_rules_that_look_at_the_whole_batch_agree_over_ranks(results: dict[int, dict[str, Any]], variant: str) -> None:
    same(results[2][variant][0], results[1][variant][0])


def test_batch_scope_does_not_see_micro_batches(results: dict[int, dict[str, Any]]) -> None:
    same(results[1]["batch scope, one by one"][0], results[1]["batch scope"][0])


def test_rules_differ(results: dict[int, dict[str, Any]]) -> None:
    """Else the tests above compare nothing."""
    plain = results[1]["plain, one by one"][0]
    for variant in ("batch scope", "pointwise", "token mean"):
        with pytest.raises(AssertionError):
            same(results[1][variant][0], plain)


def test_metrics_are_global(results: dict[int, dict[str, Any]]) -> None:
    for variant, (_, one) in ((k, v) for k, v in results[1].items() if isinstance(v, tuple)):
        two = results[2][variant][1]
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
