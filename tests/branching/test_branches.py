"""Branch points, joining, and the information-bottleneck filter, by hand and against loops."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aipo.branching.branches import (
    Branch,
    bottleneck_scores,
    branch_point,
    join,
    join_branches,
    keep_best,
    mean_log_prob,
    plan_branches,
)
from aipo.problems.datasets import Problem
from aipo.rollout import Completion, HfEngine, Request, Sampling
from aipo.rollouts import Rollouts
from tests.tiny import make_tiny

PROMPTS = [[5, 6], [7, 8, 9]]


def completion(tokens: list[int], reason: str = "stop") -> Completion:
    return Completion(tokens, [-t / 100 for t in tokens], reason)


def base_rollouts() -> Rollouts:
    """Two questions with two base rollouts each; a token's surprisal is a hundredth of its id."""
    completions = [
        completion([10, 90, 20, 2]),
        completion([11, 12, 95, 13, 2]),
        completion([40]),
        completion([41, 42, 43, 97, 44, 45], "length"),
    ]
    problems = [Problem("a", "qa", "1", "math", "test"), Problem("b", "qb", "2", "math", "test")]
    return Rollouts(problems, PROMPTS, completions, 2, torch.arange(4), texts=list("wxyz"))


def plan(base: Rollouts, **changes) -> list[Branch]:
    options = {"samples": 5, "max_tokens": 8, "pick": "argmax", "seed": 1, "stream": "step 3"}
    return plan_branches(base, -base.logp_engine, **options | changes)


def test_branch_point_by_hand():
    signal = [0.1, 3.0, 0.2, 2.0, 3.0]
    assert branch_point(signal, pick="argmax", seed=0) == 1  # the first of equals
    assert branch_point(signal, fraction=0.05, seed=0) == 1  # at least one candidate
    drawn = {branch_point(signal, fraction=0.6, seed=seed) for seed in range(50)}
    assert drawn == {1, 4, 3}
    assert branch_point(signal, fraction=0.6, seed=7) == branch_point(signal, fraction=0.6, seed=7)
    with pytest.raises(ValueError, match="without tokens"):
        branch_point([], seed=0)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 2**60))
def test_branch_point_is_among_the_highest(signal, fraction, seed):
    t = branch_point(signal, fraction=fraction, seed=seed)
    allowed = max(int(fraction * len(signal)), 1)
    above = sum(other > signal[t] for other in signal)
    earlier = sum(other == signal[t] for other in signal[:t])
    assert above + earlier < allowed


def test_uniform_is_uniform():
    counts = torch.zeros(100)
    for seed in range(4000):
        counts[branch_point([*range(100)], fraction=0.04, seed=seed)] += 1
    assert counts[:96].sum() == 0
    assert counts[96:].min() > 900


def test_plan_by_hand():
    base = base_rollouts()
    branches = plan(base)
    assert [(b.parent, b.cut) for b in branches] == [(0, 1), (1, 2), (0, 1), (2, 0), (3, 3), (2, 0)]
    assert [list(b.request.prompt_ids) for b in branches[:2]] == [[5, 6, 10], [5, 6, 11, 12]]
    assert list(branches[3].request.prompt_ids) == [7, 8, 9]  # cut before the first token: the question alone
    assert [b.request.max_tokens for b in branches] == [7, 6, 7, 8, 5, 8]
    assert len({b.request.seed for b in branches}) == len(branches)


def test_plan_looks_at_completion_tokens_only_and_at_the_given_signal():
    base = base_rollouts()
    signal = -base.logp_engine
    signal[0, 4:] = 1e9  # behind the end
    signal[1] = torch.tensor([0.0, 0.0, 0.0, 5.0, 0.0, 0.0])
    branches = plan_branches(base, signal, samples=4, max_tokens=8, pick="argmax", seed=1, stream="s")
    assert [b.cut for b in branches[:2]] == [1, 3]


def test_plan_depends_on_seed_stream_and_question_alone():
    base = base_rollouts()
    both = plan(base, pick="uniform", fraction=1.0, samples=9)
    assert both == plan(base, pick="uniform", fraction=1.0, samples=9)
    second = dataclasses.replace(
        base, problems=base.problems[1:], prompts=PROMPTS[1:], completions=base.completions[2:], ids=base.ids[2:]
    )
    alone = plan(second, pick="uniform", fraction=1.0, samples=9)
    assert [(b.cut, b.request) for b in alone] == [(b.cut, b.request) for b in both[7:]]
    for change in ({"seed": 2}, {"stream": "step 4"}):
        other = plan(base, pick="uniform", fraction=1.0, samples=9, **change)
        assert [b.request.seed for b in other] != [b.request.seed for b in both]
        assert [b.cut for b in other] != [b.cut for b in both]
    few = dataclasses.replace(base, problems=[], prompts=[], completions=[], ids=base.ids[:0])
    assert plan_branches(few, torch.zeros(0, 1), samples=4, max_tokens=8, seed=0, stream="s") == []


@pytest.mark.parametrize("samples", [1, 2])
def test_plan_needs_room(samples):
    with pytest.raises(ValueError, match="nothing to branch"):
        plan(base_rollouts(), samples=samples)


def test_join_by_hand():
    whole = join(completion([10, 90, 20], "stop"), 2, completion([50, 51], "length"))
    assert whole == Completion([10, 90, 50, 51], [-0.1, -0.9, -0.5, -0.51], "length")


def test_join_branches_orders_by_question():
    base = base_rollouts()
    branches = plan(base, samples=3)
    rests = [completion([60], "length"), completion([70, 2], "stop")]
    joined = join_branches(base, branches, rests, decode=lambda ids: f"<{len(ids)}>")
    assert joined.group_size == 3
    assert [c.token_ids for c in joined.completions] == [
        [10, 90, 20, 2],
        [11, 12, 95, 13, 2],
        [10, 60],
        [40],
        [41, 42, 43, 97, 44, 45],
        [70, 2],
    ]
    assert [c.finish_reason for c in joined.completions] == ["stop", "stop", "length", "stop", "length", "stop"]
    assert joined.texts == ["w", "x", "<2>", "y", "z", "<2>"]
    assert joined.ids.tolist() == [0, 1, branches[0].request.seed, 2, 3, branches[1].request.seed]
    assert joined.logp_engine.shape == (6, 6)


def test_branches_of_an_engine_share_the_prefix_and_fit_the_budget(tmp_path):
    engine = HfEngine(str(make_tiny(tmp_path)), max_model_len=32, end_token_ids=[2], dtype="float32")
    problems = [Problem("a", "qa", "1", "math", "t"), Problem("b", "qb", "2", "math", "t")]
    sampling = Sampling(max_tokens=20)
    prompts = [[5] * 12, [7] * 12]  # prompt and budget fill the context: a branch may not ask for more
    requests = [Request(prompts[i // 2], i) for i in range(4)]
    base = Rollouts(problems, prompts, engine.generate(requests, sampling), 2, torch.arange(4), texts=[""] * 4)
    branches = plan_branches(base, -base.logp_engine, samples=6, max_tokens=20, fraction=0.5, seed=0, stream="step 0")
    joined = join_branches(base, branches, engine.generate([b.request for b in branches], sampling), str)
    assert len(joined.completions) == 12
    for i, branch in enumerate(branches):
        parent, whole = base.completions[branch.parent], joined.completions[i // 4 * 6 + 2 + i % 4]
        assert whole.token_ids[: branch.cut] == parent.token_ids[: branch.cut]
        assert whole.logprobs[: branch.cut] == parent.logprobs[: branch.cut]
        assert len(whole.token_ids) == len(whole.logprobs) <= 20
        assert (len(whole.token_ids) == 20) == (whole.finish_reason == "length")
    assert {len(c.token_ids) for c in joined.completions if c.finish_reason == "length"} == {20}


# -- the filter


def test_mean_log_prob_by_hand():
    logp = torch.tensor([[-1.0, -2.0, float("nan")], [-4.0, 9.0, 9.0], [7.0, 7.0, 7.0]])
    assert mean_log_prob(logp, torch.tensor([2, 1, 0])).tolist() == [-1.5, -4.0, 0.0]


def test_scores_and_filter_by_hand():
    # One question, gold answer of probability e^-3 a token without a trajectory. The first trajectory makes it e^-1 and
    # is e^0.5 a token likelier for having read the question; the second helps as much and owes it e^2; the third harms.
    after, before = torch.tensor([-1.0, -1.0, -4.0]), torch.tensor([-3.0, -3.0, -3.0])
    given_q, alone = torch.tensor([-1.0, -0.5, -1.0]), torch.tensor([-1.5, -2.5, -1.0])
    scores = bottleneck_scores(after, before, given_q, alone, beta=0.5)
    torch.testing.assert_close(scores, torch.tensor([2 - 0.25, 2 - 1.0, -1.0]))
    assert keep_best(scores, 3, 2).tolist() == [True, True, False]
    assert bottleneck_scores(after, before, given_q, alone, beta=0.0).tolist() == [2, 2, -1]


@given(st.lists(st.integers(-3, 3), min_size=12, max_size=12), st.sampled_from([2, 3, 4, 6]), st.data())
def test_keep_best_against_sorting(values, size, data):
    keep = data.draw(st.integers(1, size))
    kept = keep_best(torch.tensor(values, dtype=torch.float32), size, keep).tolist()
    for start in range(0, 12, size):
        best = sorted(range(start, start + size), key=lambda i: (-values[i], i))[:keep]
        assert [i for i in range(start, start + size) if kept[i]] == sorted(best)


def test_filter_keeps_rows_together():
    base = base_rollouts()
    base.rewards, base.correct = torch.tensor([0.0, 1.0, 0.5, 0.25]), torch.tensor([False, True, True, False])
    kept = keep_best(torch.tensor([1.0, 2.0, 4.0, 3.0]), 2, 1)
    few = base.keep(kept.nonzero()[:, 0].tolist())
    assert (few.group_size, few.texts, few.ids.tolist()) == (1, ["x", "y"], [1, 2])
    assert (few.rewards.tolist(), few.correct.tolist()) == ([1.0, 0.5], [True, True])
    assert few.completions == [base.completions[1], base.completions[2]]
    assert few.problems == base.problems
    assert len(few.advantages) == 0
    with pytest.raises(ValueError, match="keep 3 of 2"):
        keep_best(torch.zeros(4), 2, 3)
