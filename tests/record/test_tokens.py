"""What is recorded of tokens, against the model asked again, and its bounds."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import skew
from transformers import Qwen3ForCausalLM

from aipo.advantage import assign
from aipo.policy import Policy
from aipo.problems.problem import Problem
from aipo.record.clock import Clock
from aipo.record.reporting import reduce_metrics
from aipo.record.tokens import BYTES_PER_TOKEN, answer_of, recorded_rows, token_texts
from aipo.rollouts import Rollouts
from aipo.selection import Selection
from tests.record.test_reporting import batch
from tests.test_curriculum import build
from tests.test_trainer import LENGTHS, config_of, made
from tests.tiny import make_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"), scale=0.1)


TOKENIZER = tiny_tokenizer()


def updated(model: Path, *overrides: str) -> tuple[dict[str, float], Rollouts, list[dict[str, Any]]]:
    """What is logged of one update of which everything was recorded, its rollouts, and the rows of the table."""
    trainer, rollouts = made(config_of(model, "tracking.rollouts_per_step=4", *overrides), model)
    rollouts.rewards = torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 1])
    rollouts.correct = rollouts.rewards == 1
    selection, sums = trainer.update(rollouts, 0.1, Clock())
    return reduce_metrics(rollouts, sums, {}), rollouts, trainer.recorder.table(selection).to_pylist()


def log_probabilities(model: Path, rollouts: Rollouts) -> list[torch.Tensor]:
    """Of the initial weights under Hugging Face's own forward, a rollout after the other: (T, V) each."""
    plain = Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for prompt, ids in zip(rollouts.each_prompt, rollouts.each_completion):
        with torch.no_grad():
            logits = plain(torch.tensor([[*prompt, *ids]])).logits  # (1, s, V)
        found.append(logits[0, len(prompt) - 1 : -1].log_softmax(-1))
    return found


def test_figures_are_those_of_the_model(model: Path) -> None:
    _, rollouts, rows = updated(model, "advantage.drop_constant_groups=correctness")
    assert [len(row["tokens"]) for row in rows] == LENGTHS
    for i, (row, logits) in enumerate(zip(rows, log_probabilities(model, rollouts))):  # (T, V)
        ids = rollouts.completions[i].token_ids
        assert row["token_ids"] == ids
        for t, selected in enumerate(row["mask"]):
            figures = {name: row[name][t] for name in ("logp", "entropy", "ratio", "mismatch", "weight")}
            if not selected:
                assert set(figures.values()) == {None}
                continue
            logp = float(logits[t, ids[t]])
            assert figures["logp"] == pytest.approx(logp, abs=1e-3)
            assert figures["entropy"] == pytest.approx(float(-(logits[t].exp() * logits[t]).sum()), abs=1e-3)
            assert figures["ratio"] == pytest.approx(1.0)
            assert figures["mismatch"] == pytest.approx(logp + 1.0, abs=1e-3)  # the engine said -1 of every token
            assert figures["weight"] == pytest.approx(min(math.exp(logp + 1), 2.0), rel=1e-2)  # rollout.importance_cap
            assert row["advantage_token"][t] == pytest.approx(float(rollouts.advantages[i]))
        if row["used"]:
            assert any(row["mask"]) or len(row["mask"]) == 1  # no threshold takes the only token
            assert None not in row["mi"]
    assert [row["reason"] for row in rows if not row["used"]] == ["all of its group got the same verdict"]
    assert [row["used"] for row in rows] == rollouts.used.tolist()


def test_what_is_logged_is_the_mean_of_the_figures(model: Path) -> None:
    """Those of the policy over selected tokens, MI over all of the update, and its skewness over completions."""
    logged, rollouts, rows = updated(model)
    names = ("entropy", "mismatch", "weight", "mi")
    of = {name: [value for row in rows for value in row[name] if value is not None] for name in names}
    assert 4 < len(of["entropy"]) < len(of["mi"]) == int(rollouts.lengths[rollouts.used].sum())
    assert logged["policy/entropy"] == pytest.approx(fmean(of["entropy"]))
    assert logged["mismatch/kl"] == pytest.approx(fmean(math.exp(nats) - nats - 1 for nats in of["mismatch"]))
    assert logged["mismatch/gap"] == pytest.approx(fmean(abs(nats) for nats in of["mismatch"]))
    assert logged["mismatch/weight_mean"] == pytest.approx(fmean(of["weight"]))
    assert logged["mismatch/weight_max"] == pytest.approx(max(math.exp(nats) for nats in of["mismatch"]))
    assert logged["mi/mean"] == pytest.approx(fmean(of["mi"]))
    skewed = [float(skew(row["mi"])) for row in rows if row["used"] and len(row["mi"]) > 1]  # one does not vary
    assert logged["mi/skew"] == pytest.approx(fmean(skewed), rel=1e-4)
    losses = [  # the ratio is 1
        -fmean(a * w for a, w in zip(row["advantage_token"], row["weight"]) if w is not None)
        for row in rows
        if any(row["mask"])
    ]
    assert logged["loss/total"] == pytest.approx(fmean(losses))
    assert logged["mask/otf"] == pytest.approx(len(of["entropy"]) / len(of["mi"]))


def test_the_ratio_is_the_one_of_the_loss(model: Path) -> None:
    keys = ["loss.ratio=tv_mask", "loss.old_policy=engine", "rollout.importance_correction=none"]
    _, _, rows = updated(model, *keys)
    found = [(logp, ratio) for row in rows for logp, ratio in zip(row["logp"], row["ratio"]) if ratio is not None]
    assert len(found) > 4
    for logp, ratio in found:
        assert ratio == pytest.approx(math.exp(logp + 1), rel=1e-4)  # the engine said -1 of every token


@pytest.mark.parametrize(
    ("drop", "reason"),
    [
        ("none", "cut off at the length limit"),
        ("correctness", "all of its group got the same verdict"),
        ("reward", "all of its group got the same reward"),
    ],
)
def test_constant_groups_are_a_reason_where_they_are_dropped(model: Path, drop: str, reason: str) -> None:
    config = config_of(model, "loss.truncated=mask", f"advantage.drop_constant_groups={drop}")
    trainer, rollouts = made(config, model)
    rollouts.rewards = torch.tensor([0.0, 0, 1, 0, 1, 0, 1, 0])  # only the first group does not vary
    rollouts.correct = rollouts.rewards == 1
    assign(rollouts, config.advantage, truncated=config.loss.truncated)
    trainer.recorder.start(rollouts, {})
    assert [trainer.recorder.reason(row) for row in range(4)] == [reason] * 2 + ["cut off at the length limit"] * 2


def test_the_bucket_is_the_one_that_a_question_was_drawn_from(model: Path) -> None:
    trainer, rollouts = made(config_of(model, "tracking.rollouts_per_step=4"), model)
    rollouts.rewards = torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 1])
    rollouts.correct = rollouts.rewards == 1
    ids = [problem.id for problem in rollouts.problems]
    labels = dict(zip(ids, (30, 5, 20, 5), strict=True))
    curriculum = trainer.recorder.curriculum = build(ids, bucket_by="count")
    curriculum.set_labels(labels)
    selection, _ = trainer.update(rollouts, 0.1, Clock())
    curriculum.relabel(dict.fromkeys(ids, 20))
    found = {row["question_id"]: row["bucket"] for row in trainer.recorder.table(selection).to_pylist()}
    assert [found[question] for question in ids] == ["hard", "easy", "medium", "easy"]


def test_recording_runs_no_forward_of_its_own(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))  # type: ignore
    counts = []
    for groups in (0, 4):
        calls.clear()
        trainer, rollouts = made(config_of(model, f"tracking.rollouts_per_step={groups}"), model)
        trainer.update(rollouts, 0.1, Clock())
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_several_updates_and_a_measure_that_was_asked_for(model: Path) -> None:
    keys = ["optim.updates_per_batch=2", "mask.rule=top_fraction", "mask.score=entropy", "optim.lr=1e-3"]
    _, rollouts, rows = updated(model, *keys)
    assert all(value is not None for row in rows if row["used"] for value in row["entropy"])  # of all tokens
    ratios: dict[bool, list[float]] = {True: [], False: []}  # of the first part, and of the second
    for row, log_p in zip(rows, log_probabilities(model, rollouts)):  # (T, V)
        for t, ratio in enumerate(row["ratio"]):
            if ratio is not None:
                ratios[row["group"] < 2].append(ratio)
                old = row["logp"][t] - math.log(ratio)
                assert old == pytest.approx(float(log_p[t, row["token_ids"][t]]), abs=1e-4)
    assert len(ratios[True]) > 4
    assert ratios[True] == pytest.approx([1.0] * len(ratios[True]), abs=1e-5)
    assert any(abs(ratio - 1) > 1e-3 for ratio in ratios[False])  # it met changed weights


def test_the_files_of_a_run_stay_in_their_bound(model: Path, tmp_path: Path) -> None:
    steps, mb = 4, 0.001
    trainer, rollouts = made(
        config_of(model, f"tracking.tokens_mb={mb}", f"optim.steps={steps}", "tracking.rollouts_per_step=4"), model
    )
    assert trainer.recorder.budget == int(mb * 2**20 / steps / BYTES_PER_TOKEN)
    rows = recorded_rows(rollouts, 4, budget=30)
    assert sum(LENGTHS[row] for row in rows) <= 30
    # what a token takes in a file, of random numbers that no compression helps
    count = 50_000
    noise = torch.randn(12, count)
    ids = torch.randint(0, 150_000, (count,)).tolist()
    columns: dict[str, Any] = {f"figure {i}": [values.numpy()] for i, values in enumerate(noise)}
    table = pyarrow.table(columns | {"ids": [ids], "tokens": [[f"token{i % 1000}" for i in ids]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", write_statistics=False)
    assert (tmp_path / "a.parquet").stat().st_size < count * BYTES_PER_TOKEN


def test_groups_of_the_update_come_first_and_a_quarter_is_for_the_others() -> None:
    rollouts = batch("a", "b", "c")
    rollouts.used = torch.tensor([False, False, True, True, True, True])
    assert recorded_rows(rollouts, 1, 1000) == [2, 3]  # the largest advantages
    assert recorded_rows(rollouts, 2, 1000) == [2, 3, 4, 5]
    assert recorded_rows(rollouts, 3, 1000) == list(range(6))
    assert recorded_rows(batch("gpqa_diamond/1", "b"), 4, 1000) == [2, 3]
    assert recorded_rows(rollouts, 0, 1000) == []


@given(st.text(max_size=40))
def test_token_texts_are_the_completion_in_pieces(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    pieces = token_texts(TOKENIZER, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)


def test_what_was_compared() -> None:
    several = r"so \boxed{4} and \boxed{11}"
    assert answer_of(several, Problem("a", "?", "4, 11")) == "4, 11"
    assert answer_of(several, Problem("a", "?", "11")) == "11"
    assert answer_of("nothing", Problem("a", "?", "4")) is None


def test_what_dynamic_sampling_left_out_is_there_without_figures(model: Path) -> None:
    trainer, rollouts = made(config_of(model, "tracking.rollouts_per_step=4"), model)
    rollouts.rewards, rollouts.correct = torch.ones(8), torch.ones(8, dtype=torch.bool)
    left_out = batch("a", "b")
    left_out.rewards, left_out.correct = torch.tensor([1.0, 0, 0, 0]), torch.tensor([True, False, False, False])
    left_out.used = left_out.advantages = torch.empty(0)  # as they are before advantages are assigned
    trainer.recorder.start(rollouts, {}, left_out)
    selection = Selection(trainer.selector, rollouts, None, kappa=0.1, step=0)
    rows = trainer.recorder.table(selection).to_pylist()
    assert len({row["group"] for row in rows}) == 4  # three of the batch's, and the first that was left out
    assert [row["group"] for row in rows[-2:]] == [4, 4]
    assert rows[-1]["reason"] == "dynamic sampling: other groups came first"
    assert not rows[-1]["used"]
    assert rows[-1]["mi"] == [None] * 2
    assert rows[-1]["mask"] == [False] * 2


def test_ranks_but_the_first_record_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aipo.distributed.rank", lambda: 1)
    trainer, rollouts = made(config_of(model), model)
    assert trainer.recorder.groups == 0
    selection, _ = trainer.update(rollouts, 0.1, Clock())
    trainer.recorder.write(SimpleNamespace(), 1, selection)  # type: ignore[arg-type]
