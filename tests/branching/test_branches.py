"""Branch points, joining, and the information-bottleneck filter, by hand and against loops."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aipo.branching.branches import (
    Branch,
    Paths,
    bottleneck_scores,
    branch_point,
    branches_by_round,
    join,
    keep_best,
    kept_tokens,
    mean_log_prob,
)
from aipo.config.sections import BranchConfig
from aipo.problems.datasets import Problem
from aipo.rollout import Completion, HfEngine, Request, Sampling
from aipo.rollouts import Rollouts
from tests.tiny import make_tiny

PROMPTS = [[5, 6], [7, 8, 9]]
BRANCH, UNIFORM = BranchConfig(pick="argmax"), BranchConfig(fraction=1.0)


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


def paths(base: Rollouts, signal: torch.Tensor | None = None, *, branch=BRANCH, **changes) -> Paths:
    options = {"max_tokens": 8, "seed": 1, "stream": "step 3"}
    return Paths(base, -base.logp_engine if signal is None else signal, branch, **options | changes)


def plan(base: Rollouts, *, samples: int = 5, **changes) -> list[Branch]:
    return paths(base, **changes).plan(samples - base.group_size)


def test_branch_point_by_hand():
    signal = [0.1, 3.0, 0.2, 2.0, 3.0]
    assert branch_point(signal, BRANCH, seed=0) == 1  # the first of equals
    assert branch_point(signal, BranchConfig(fraction=0.05), seed=0) == 1  # at least one candidate
    most = BranchConfig(fraction=0.6)
    drawn = {branch_point(signal, most, seed=seed) for seed in range(50)}
    assert drawn == {1, 4, 3}
    assert branch_point(signal, most, seed=7) == branch_point(signal, most, seed=7)
    with pytest.raises(ValueError, match="without tokens"):
        branch_point([], BRANCH, seed=0)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.floats(0, 1, exclude_min=True), st.integers(0, 2**60))
def test_branch_point_is_among_the_highest(signal, fraction, seed):
    t = branch_point(signal, BranchConfig(fraction=fraction), seed=seed)
    allowed = max(int(fraction * len(signal)), 1)
    above = sum(other > signal[t] for other in signal)
    earlier = sum(other == signal[t] for other in signal[:t])
    assert above + earlier < allowed


def test_uniform_is_uniform():
    counts = torch.zeros(100)
    for seed in range(4000):
        counts[branch_point([*range(100)], BranchConfig(fraction=0.04), seed=seed)] += 1
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
    assert [b.cut for b in paths(base, signal).plan(2)[:2]] == [1, 3]


def test_plan_depends_on_seed_stream_and_question_alone():
    base = base_rollouts()
    both = plan(base, branch=UNIFORM, samples=9)
    assert both == plan(base, branch=UNIFORM, samples=9)
    second = dataclasses.replace(
        base, problems=base.problems[1:], prompts=PROMPTS[1:], completions=base.completions[2:], ids=base.ids[2:]
    )
    alone = plan(second, branch=UNIFORM, samples=9)
    assert [(b.cut, b.request) for b in alone] == [(b.cut, b.request) for b in both[7:]]
    for change in ({"seed": 2}, {"stream": "step 4"}):
        other = plan(base, branch=UNIFORM, samples=9, **change)
        assert [b.request.seed for b in other] != [b.request.seed for b in both]
        assert [b.cut for b in other] != [b.cut for b in both]
    few = dataclasses.replace(base, problems=[], prompts=[], completions=[], ids=base.ids[:0])
    nothing = paths(few, torch.zeros(0, 1))
    assert nothing.plan(2) == nothing.join([], [], str).completions == []


def test_kept_tokens_by_hand():
    def kept(signal: list[float], **options) -> int:
        return kept_tokens(signal, BranchConfig(fraction=0.05, pick="argmax", **options), seed=0)

    signal = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert kept(signal) == 4  # the last is drawn anew
    assert kept(signal, cut="after") == 1  # behind the last there is nothing: the first, which stays
    assert kept(signal, cut="after", skip=1) == 3
    assert kept(signal[:4], skip=1) == 2
    assert kept([4.0, 1.0], cut="after", skip=1) == 1  # no other token than the first
    assert kept([4.0, 1.0], skip=3) == 1
    assert kept([4.0], cut="after") == kept([4.0], skip=1) == 0


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=40),
    st.sampled_from(["before", "after"]),
    st.integers(0, 50),
    st.integers(0, 99),
)
def test_something_is_left_to_draw(signal, cut, skip, seed):
    """A branch never keeps everything, and its branch point is no token skipped unless there is no other."""
    kept = kept_tokens(signal, BranchConfig(fraction=0.3, cut=cut, skip=skip), seed=seed)
    assert 0 <= kept < len(signal)
    at = kept - (cut == "after")
    assert at >= min(skip, len(signal) - 1 - (cut == "after"))


def test_branches_by_round_by_hand():
    assert branches_by_round(2, 8, 3) == [2, 2, 2]  # the authors': 2 rollouts, 3 rounds
    assert branches_by_round(2, 8, 1) == [6]
    assert branches_by_round(4, 12, 2) == [4, 4]
    assert branches_by_round(2, 7, 2) == [4, 1]  # three turns: two, then one of a single branch
    for base, samples in ((2, 1), (2, 2), (0, 4)):
        with pytest.raises(ValueError, match="nothing to branch"):
            branches_by_round(base, samples, 1)
    with pytest.raises(ValueError, match="are 3 turns, not 4 rounds"):
        branches_by_round(2, 8, 4)


@given(st.integers(1, 6), st.integers(1, 30), st.data())
def test_rounds_share_the_branches(base, more, data):
    rounds = data.draw(st.integers(1, -(-more // base)))
    counts = branches_by_round(base, base + more, rounds)
    assert sum(counts) == more
    assert min(counts) > 0
    assert all(count % base == 0 for count in counts[:-1])  # each path had its turn before a round begins


def test_join_by_hand():
    whole = join(completion([10, 90, 20], "stop"), 2, completion([50, 51], "length"))
    assert whole == Completion([10, 90, 50, 51], [-0.1, -0.9, -0.5, -0.51], "length")


def test_branches_join_their_question():
    base = base_rollouts()
    all_paths = paths(base)
    branches = all_paths.plan(1)
    rests = [completion([60], "length"), completion([70, 2], "stop")]
    new = all_paths.join(branches, rests, decode=lambda ids: f"<{len(ids)}>")
    joined = all_paths.rollouts
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
    first, second = (branch.request.seed for branch in branches)
    assert joined.ids.tolist() == [0, 1, first, 2, 3, second]
    assert joined.logp_engine.shape == (6, 6)
    assert joined.lineage == [((0, 4),), ((1, 5),), ((0, 1), (first, 2)), ((2, 1),), ((3, 6),), ((second, 2),)]
    assert joined.extra_tokens == -1  # the one token that the first branch kept was not drawn twice
    assert (new.completions, new.group_size) == ([joined.completions[2], joined.completions[5]], 1)


def chain(signals: list[list[float]], rounds: int, skip: int) -> list[tuple[int, int]]:
    """The authors' loop over one path, slowly: (which of the paths drawn is branched, tokens it keeps), by round.

    But for the last token, which they do not except: behind it nothing is left to draw.

    ``signals``: entropies that the base path and each branch drew, in the order drawn.
    """
    begins, active, found = [0], 0, []  # tokens a path has from earlier ones
    for number in range(1, rounds + 1):
        own = signals[active]
        best = skip if len(own) > skip + 1 else max(len(own) - 2, 0)
        for t in range(best, len(own) - 1):
            if own[t] > own[best]:
                best = t
        kept = begins[active] + (best + 1 if len(own) > 1 else 0)
        found.append((active, kept))
        begins.append(kept)
        if sum(signals[number]) / len(signals[number]) > sum(own) / len(own):
            active = number
    return found


@given(st.lists(st.lists(st.integers(0, 9).map(float), min_size=1, max_size=7), min_size=4, max_size=4))
def test_rounds_against_the_authors_loop(signals):
    """Three rounds of one path: where each branch comes from, what it keeps, and that it is its parent's beginning."""
    first = Completion([100 + t for t in range(len(signals[0]))], [0.0] * len(signals[0]), "stop")
    base = Rollouts([Problem("a", "qa", "1")], [[5]], [first], 1, torch.tensor([7]), texts=["w"])
    after = BranchConfig(pick="argmax", cut="after", skip=1)
    made = paths(base, torch.tensor([signals[0]]), max_tokens=40, branch=after)
    found, drawn = [], [first]
    for number in (1, 2, 3):
        (branch,) = made.plan(1)
        own = len(signals[number])
        rest = Completion([100 * (number + 1) + t for t in range(own)], [0.0] * own, "stop")
        found.append((branch.parent, branch.cut))
        new = made.join([branch], [rest], str)
        drawn.append(new.completions[0])
        assert drawn[-1].token_ids == drawn[branch.parent].token_ids[: branch.cut] + rest.token_ids
        assert list(branch.request.prompt_ids) == [5, *drawn[branch.parent].token_ids[: branch.cut]]
        made.go_on(new, torch.tensor([[0.0] * branch.cut + signals[number]]))
    assert found == chain(signals, 3, skip=1)
    assert made.rollouts.completions == drawn
    for completed, lineage in zip(drawn, made.rollouts.lineage):
        start = 0
        for who, end in lineage:  # a token says who drew it: hundreds count the requests
            number = 1 if who == 7 else made.rollouts.ids.tolist().index(who) + 1
            assert {token // 100 for token in completed.token_ids[start:end]} == {number}
            start = end
        assert start == len(completed.token_ids)


def test_several_branches_of_a_round_send_their_path_on_from_the_least_sure():
    base = base_rollouts()
    made = paths(base, torch.ones(4, 6))
    branches = made.plan(4)  # two of each path
    rests = [completion([token]) for token in (50, 51, 52, 53, 54, 55, 56, 57)]
    new = made.join(branches, rests, str)
    signal = torch.zeros(8, new.logp_engine.shape[1])
    for row, (branch, value) in enumerate(zip(branches, [0.5, 2.0, 0.9, 3.0, 2.0, 1.0, 4.0, 1.0])):
        signal[row, : branch.cut] = 99.0  # of the beginning, which the parent drew
        signal[row, branch.cut] = value
    made.go_on(new, signal)
    # question a: its first path stays, its second goes on from sample 5, the surer of two was 2.0; question b: the
    # first goes on from sample 4, and the second stays, since 1.0 is not less sure
    assert made.active == [[0, 5], [4, 1]]
    assert [b.parent for b in made.plan(2)] == [0, 5, 6 + 4, 6 + 1]


@pytest.mark.slow
def test_branches_of_an_engine_share_the_prefix_and_fit_the_budget(tmp_path):
    engine = HfEngine(str(make_tiny(tmp_path)), max_model_len=32, end_token_ids=[2], dtype="float32")
    problems = [Problem("a", "qa", "1", "math", "t"), Problem("b", "qb", "2", "math", "t")]
    sampling = Sampling(max_tokens=20)
    prompts = [[5] * 12, [7] * 12]  # prompt and budget fill the context: a branch may not ask for more
    requests = [Request(prompts[i // 2], i) for i in range(4)]
    base = Rollouts(problems, prompts, engine.generate(requests, sampling), 2, torch.arange(4), texts=[""] * 4)
    made = paths(base, branch=BranchConfig(fraction=0.5), max_tokens=20, seed=0, stream="step 0")
    branches = made.plan(4)
    made.join(branches, engine.generate([b.request for b in branches], sampling), str)
    joined = made.rollouts
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
