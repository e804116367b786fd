from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aipo import distributed
from aipo.problems.datasets import Problem
from aipo.record.reporting import diverse, reduce_metrics, rollout_rows
from aipo.rollout.base import Completion
from aipo.rollouts import Rollouts
from tests.tiny import tiny_tokenizer


def batch(*ids: str) -> Rollouts:
    count = 2 * len(ids)
    return Rollouts(
        problems=[Problem(name, f"question of {name}", "1") for name in ids],
        prompts=[[1]] * len(ids),
        completions=[Completion([10 + i] * (i + 1), [-0.5] * (i + 1), "stop") for i in range(count)],
        group_size=2,
        ids=torch.arange(count),
        rewards=torch.arange(float(count)),
        correct=torch.arange(count) % 2 == 0,
        texts=[f"completion {i}" for i in range(count)],
        advantages=torch.tensor([0.1, -0.9, 0.5, -0.5, 0.3, 0.2][:count]),
        used=torch.tensor([True, True, True, False, True, True][:count]),
    )


def selector(rollouts: Rollouts) -> Any:
    width = int(rollouts.lengths.max())
    scores = torch.arange(float(len(rollouts.texts) * width)).reshape(-1, width)
    return SimpleNamespace(scores=scores, mask=scores % 2 == 0)


def test_the_sample_has_rollouts_of_the_update_with_large_advantages_first() -> None:
    rollouts = batch("a", "b")
    rows = rollout_rows(rollouts, selector(rollouts), tiny_tokenizer(), 3, budget=100)
    assert [row["completion"] for row in rows] == ["completion 1", "completion 2", "completion 0"]
    assert len(rows[0]["tokens"]) == len(rows[0]["mi"]) == len(rows[0]["mask"]) == 2
    assert rows[0]["question"] == "question of a"
    for budget, count in ((1, 0), (4, 1), (5, 2)):  # they have 2, 3 and 1 tokens; what would be beyond ends it
        assert rollout_rows(rollouts, selector(rollouts), tiny_tokenizer(), 3, budget=budget) == rows[:count]


def test_a_model_with_more_rows_than_tokens() -> None:
    tokenizer = tiny_tokenizer()
    rollouts = batch("a")
    rollouts.completions[1] = Completion([10, len(tokenizer) + 7], [-0.5] * 2, "stop")
    tokens = rollout_rows(rollouts, selector(rollouts), tokenizer, 1, budget=100)[0]["tokens"]
    assert tokens == [tokenizer.convert_ids_to_tokens(10), f"<no token {len(tokenizer) + 7}>"]


def test_text_that_must_not_get_out_does_not() -> None:
    rollouts = batch("gpqa_diamond/1", "b")
    rows = rollout_rows(rollouts, selector(rollouts), tiny_tokenizer(), 10, budget=100)
    assert {row["question"] for row in rows} == {"question of b"}


def test_otf_is_of_what_the_update_read_and_the_cost_share_of_all_that_was_generated() -> None:
    rollouts = batch("a", "b")  # 1 + 2 + 3 + 4 tokens
    rollouts.extra_tokens = 10
    logged = reduce_metrics(rollouts, {"selected": 5.0, "trained_reward": 6.0}, {"rollout": 2.0})
    assert logged["rollout/tokens"] == 20
    assert logged["rollout/used_tokens"] == 1 + 2 + 3  # the fourth rollout is not in the update
    assert logged["mask/otf"] == pytest.approx(5 / 6)
    assert logged["mask/cost_share"] == pytest.approx(5 / 20)
    assert logged["rollout/length_mean"] == pytest.approx(10 / 4)
    assert logged["reward/trained"] == pytest.approx(6 / 4)
    assert logged["rollout/used"] == pytest.approx(3 / 4)
    assert logged["speed/tokens_per_s"] == pytest.approx(10)


def test_means_over_ranks_are_over_all_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks draw alike, whatever they hold when the rollouts are dealt out; one counts by its verdicts in a reward."""
    mine = batch("a", "b"), {"reward/mean": 0.5, "reward/format": 1.0, "selected": 6.0, "entropy": 9.0, "verdicts": 3.0}
    mine[1].update(mi=2.0, mi_tokens=8.0, mi_skew=1.5, mi_sequences=3.0, weight_max=3.0)
    one = batch("c"), {"reward/mean": math.nan, "reward/format": 0.25, "verdicts": 0.0}
    two = batch("d"), {"reward/mean": 0.8, "reward/format": 0.5, "selected": 3.0, "entropy": 1.0, "verdicts": 2.0}
    two[1].update(mi=4.0, mi_tokens=2.0, mi_skew=0.5, mi_sequences=1.0, weight_max=1.5)
    shares: list[Any] = []

    def gather(share: Any) -> list[Any]:
        shares.append(share)
        return shares

    monkeypatch.setattr(distributed, "gather_objects", gather)  # each rank's share, one after the other
    logged = [reduce_metrics(rollouts, dict(sums), {"rollout": 1.0}) for rollouts, sums in (mine, one, two)][-1]
    assert logged["reward/mean"] == pytest.approx((3 * 0.5 + 2 * 0.8) / 5)
    assert logged["reward/format"] == pytest.approx((1.0 + 0.25 + 0.5) / 3)
    assert logged["policy/entropy"] == pytest.approx((9 + 1) / (6 + 3))  # a token counts the same on every rank
    assert logged["mi/mean"] == pytest.approx((2 + 4) / (8 + 2))
    assert logged["mi/skew"] == pytest.approx((1.5 + 0.5) / (3 + 1))
    assert logged["mismatch/weight_max"] == 3  # of one token anywhere


def test_tokens_that_branches_share_count_once_in_the_otf() -> None:
    rollouts = batch("a", "b")
    rollouts.lineage = [((0, 1),), ((0, 1), (1, 2)), ((2, 3),), ((2, 3), (3, 4))]
    logged = reduce_metrics(rollouts, {"selected": 5.0}, {"rollout": 2.0})
    assert logged["rollout/used_tokens"] == 1 + 1 + 3
    assert logged["mask/otf"] == pytest.approx(1)


def test_diversity_is_a_mean_over_questions_with_long_completions() -> None:
    rollouts = batch("a", "b", "c")  # 1 and 2, 3 and 4, 5 and 6 tokens, each one token over and over
    logged = reduce_metrics(rollouts, {}, {"rollout": 1.0})
    assert logged["diversity/distinct_1"] == pytest.approx(2 / 11)
    assert logged["diversity/distinct_4"] == pytest.approx(2 / 5)
    assert logged["diversity/repetition_4"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert logged["diversity/self_bleu"] == 0
    many = batch("a", "b", "c")
    many.ids = torch.tensor([5, 0, 1, 0, 4, 0])  # the same four questions whatever the number of ranks
    assert [number for number, _ in diverse(many)] == [1, 4, 5]
    assert not [key for key in reduce_metrics(batch("a"), {}, {"rollout": 1.0}) if key.startswith("diversity/")]
