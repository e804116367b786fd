"""Token selection against numpy, scipy and hand-worked rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import find_peaks
from torch import Tensor

from aipo.config.sections import MaskConfig
from aipo.mask import MaskRule, count_peaks, local_maxima, lowest, peaks, prefix_lengths, prefix_share, threshold_mask

NAN, INF = float("nan"), float("inf")
# Few distinct values make ties and plateaus common.
values = st.one_of(st.integers(0, 4).map(float), st.floats(0, 100, width=32, allow_subnormal=False))
completions = st.lists(st.lists(values, max_size=12), min_size=1, max_size=4)


def padded(rows: list[list[float]], filler: float = 1e6) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows)) + 2
    scores = torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.float32)
    return scores, torch.tensor([len(row) for row in rows])


def make(*, group_size: int = 1, seed: int = 0, **keys: Any) -> MaskRule:
    return MaskRule(MaskConfig(**keys), group_size=group_size, seed=seed)


def select(rule: MaskRule, scores: Tensor, lengths: Tensor, **options: Any) -> Tensor:
    defaults: dict[str, Any] = {"kappa": 0.3, "step": 0, "rollout_ids": torch.arange(len(scores))}
    return rule.select(scores, lengths, **{**defaults, **options})


# --- threshold ----------------------------------------------------------------------------------------------------


def test_threshold_by_hand():
    # mu = 2, sigma = 2 (population): thresholds 4 and 6 for kappa 1 and 2; 6 is not above 6.
    scores, lengths = padded([[1.0, 1.0, 1.0, 1.0, 6.0]])
    assert threshold_mask(scores, lengths, kappa=1)[0].tolist() == [False] * 4 + [True] + [False] * 2
    assert not threshold_mask(scores, lengths, kappa=2).any()
    # Q1 = 2, Q3 = 4, IQR = 2: the threshold is 7.
    scores, lengths = padded([[1.0, 2.0, 3.0, 4.0, 7.5], [1.0, 2.0, 3.0, 4.0, 7.0]])
    mask = threshold_mask(scores, lengths, kappa=0.3, statistic="iqr")
    assert mask.sum(1).tolist() == [1, 0]
    assert threshold_mask(scores, lengths, kappa=0.3, statistic="iqr", tau=0.5).sum(1).tolist() == [1, 1]


@given(completions, st.floats(-1, 2), st.sampled_from(["mean_std", "iqr", "iqr_kappa"]))
def test_threshold_matches_numpy(rows, kappa, statistic):
    mask = threshold_mask(*padded(rows), kappa=kappa, statistic=statistic)
    for row, selected in zip(rows, mask):
        x = np.array(row, dtype=np.float32).astype(np.float64)
        if len(x) == 0 or x.max() - x.min() <= 1e-5 * x.max():
            assert not selected.any()
            continue
        q1, q3 = np.quantile(x, [0.25, 0.75])
        spread = max(kappa * (q3 - q1), 0) if statistic == "iqr_kappa" else kappa * x.std()
        limit = q3 + 1.5 * (q3 - q1) if statistic == "iqr" else x.mean() + spread
        clear = np.abs(x - limit) > 1e-4 * x.max()  # leave out what rounding decides
        assert (selected[: len(x)].numpy() == (x > limit))[clear].all()


@given(completions, st.floats(0, 1), st.floats(0, 1))
def test_larger_kappa_selects_a_subset(rows, kappa, more):
    scores, lengths = padded(rows)
    loose, tight = (threshold_mask(scores, lengths, kappa=k) for k in (kappa, kappa + more))
    assert not (tight & ~loose).any()


SCOPES, STATISTICS = ("sequence", "group", "batch", "running"), ("mean_std", "iqr", "iqr_kappa")
LENGTHS_ONLY = ("all", "random", "bernoulli", "random_prefix")
ALL_RULES = [
    *({"rule": r, "scope": c, "statistic": t} for r in ("threshold", "peaks_only") for c in SCOPES for t in STATISTICS),
    *({"rule": "top_fraction", "scope": scope} for scope in SCOPES),
    *({"rule": rule, "scope": "sequence"} for rule in LENGTHS_ONLY),
    {"rule": "threshold", "scope": "causal"},
    {"rule": "peaks_only", "scope": "causal", "invert": True},
    {"rule": "threshold", "scope": "batch", "invert": True},
]


@settings(max_examples=15, deadline=None)
@given(rows=completions, filler=st.sampled_from([NAN, INF, -INF, -7.0, 0.0]))
@pytest.mark.parametrize("options", ALL_RULES, ids=lambda o: "-".join(map(str, o.values())))
def test_padding_never_matters(options, rows, filler):
    scores, lengths = padded(rows)
    other, _ = padded(rows, filler)
    mask = select(make(**options), scores, lengths)
    assert torch.equal(mask, select(make(**options), other, lengths))
    assert not (mask & (torch.arange(scores.shape[1]) >= lengths[:, None])).any()


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(rows=completions, data=st.data())
@pytest.mark.parametrize(
    "options", [o for o in ALL_RULES if o["scope"] != "group"], ids=lambda o: "-".join(map(str, o.values()))
)
def test_order_of_rollouts_does_not_matter(options, rows, data):
    scores, lengths = padded(rows)
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    straight = select(make(**options), scores, lengths)
    permuted = select(make(**options), scores[order], lengths[order], rollout_ids=order)
    # Summing in another order may move a mean by a rounding error: allow tokens that stand on the threshold.
    assert (straight[order] ^ permuted).sum() <= (0 if options.get("statistic") == "iqr" else 1)


@pytest.mark.parametrize("rule", ["top_fraction", *LENGTHS_ONLY])
def test_rules_without_a_threshold_know_no_statistic_and_those_that_look_at_lengths_no_scope(rule):
    scores, lengths = padded([[3.0, 1.0, 2.0, 9.0, 4.0, 0.5], [7.0, 5.0, 6.0]])
    scopes = SCOPES if rule in LENGTHS_ONLY else ("batch",)
    found = [
        select(make(rule=rule, scope=scope, statistic=statistic), scores, lengths)
        for scope in scopes
        for statistic in STATISTICS
    ]
    assert found[0].any()
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("options", [o for o in ALL_RULES if o["rule"] in ("threshold", "top_fraction", "peaks_only")])
def test_constant_and_non_finite_scores_are_never_selected(options):
    scores, lengths = padded([[0.3] * 6, [0.3] * 6])
    assert not select(make(**options), scores, lengths).any()
    noisy = scores * (1 + 1e-7 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(0)))
    if options["rule"] != "top_fraction":  # a budget is spent on whatever differs
        assert not select(make(**options), noisy, lengths).any()
    bad, lengths = padded([[1.0, NAN, 2.0, INF, 1.0, -INF, 8.0, 1.0], [NAN] * 8])
    mask = select(make(**options), bad, lengths)
    assert mask[0, 6] or options.get("invert")
    assert not (mask & ~bad.isfinite()).any()


def test_bf16_scores():
    scores, lengths = padded([[1.0, 2.0, 3.0, 9.0]])
    mask = select(make(), scores.bfloat16(), lengths)
    assert mask[0].tolist() == [False, False, False, True, False, False]


# --- by chance ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("keys", [("random", 0.3, 1), ("bernoulli", 0.3, 1), ("random_prefix", 0.3, 3)])
def test_chances_of_being_drawn(keys: tuple[Any, float, int]) -> None:
    """What inclusion says is how often tokens are drawn, over 5,000 steps; 5 standard deviations apart at most."""
    name, fraction, shortest = keys
    rule = make(rule=name, fraction=fraction, shortest=shortest)
    lengths = torch.tensor([8, 2, 0, 1]).repeat(500)
    masks = [select(rule, torch.zeros(2_000, 9), lengths, step=s, rollout_ids=torch.arange(2_000)) for s in range(10)]
    drawn = torch.cat(masks).double().reshape(-1, 4, 9).mean(0)  # (4, T)
    chance = rule.inclusion(lengths[:4], 9).double()
    inside = torch.arange(9) < lengths[:4, None]
    assert (chance[~inside] == 1).all()
    spread = (chance * (1 - chance) / 5_000).sqrt()
    assert ((drawn - chance).abs() <= 5 * spread + 1e-12)[inside].all()
    assert not drawn[~inside].any()


def test_chances_by_hand() -> None:
    lengths = torch.tensor([4, 2])
    assert make(rule="random", fraction=0.5).inclusion(lengths, 4)[0].tolist() == [0.5] * 4
    assert make(rule="bernoulli", fraction=0.25).inclusion(lengths, 4).tolist() == [[0.25] * 4, [0.25, 0.25, 1, 1]]
    # of 4 tokens, cuts after 2, 3 or 4; of 2 after 2
    chance = make(rule="random_prefix", shortest=2).inclusion(lengths, 4)
    torch.testing.assert_close(chance, torch.tensor([[1, 1, 2 / 3, 1 / 3], [1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="'threshold' draws no tokens"):
        make().inclusion(lengths, 4)


def test_random_prefixes_are_prefixes() -> None:
    mask = select(make(rule="random_prefix", shortest=2), torch.zeros(50, 7), torch.full((50,), 6))
    assert (mask.sum(1) >= 2).all()
    assert len(mask.sum(1).unique()) == 5
    assert torch.equal(mask, torch.arange(7) < mask.sum(1)[:, None])


# --- scopes -------------------------------------------------------------------------------------------------------


def test_scopes_share_their_threshold():
    # Two questions of two rollouts; the second question scores ten times higher.
    rows = [[1.0, 2.0, 1.0], [1.0, 1.0, 3.0], [10.0, 20.0, 10.0], [10.0, 10.0, 30.0]]
    scores, lengths = padded(rows)

    def selected(**options: Any) -> list[int]:
        return select(make(**options), scores, lengths, kappa=0.6).sum(1).tolist()

    assert selected(scope="sequence") == [1, 1, 1, 1]
    # group 1: mean 1.5, std 0.76, threshold 1.96: both the 2 and the 3. Batch: mean 8.25, std 8.73, threshold 13.5.
    assert selected(scope="group", group_size=2) == [1, 1, 1, 1]
    assert selected(scope="batch") == [0, 0, 1, 1]
    assert select(make(scope="group", group_size=2), scores, lengths, kappa=0.7).sum(1).tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="no whole number of groups of 3"):
        selected(scope="group", group_size=3)


@pytest.mark.parametrize("rule", ["threshold", "top_fraction"])
@pytest.mark.parametrize("scope", ["batch", "running"])
def test_batch_scope_is_global_over_ranks(rule, scope):
    scores, lengths = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([9, 4, 7, 0, 3, 9])
    whole = select(make(rule=rule, scope=scope), scores, lengths)
    halves = [slice(0, 2), slice(2, 6)]
    sent: list[Tensor] = []

    def send(tensor: Tensor) -> Tensor:
        sent.append(tensor)
        return tensor

    for half in halves:  # what each rank sends
        select(make(rule=rule, scope=scope), scores[half], lengths[half], gather=send)
    assert len(sent) == 2
    for half in halves:
        mask = select(make(rule=rule, scope=scope), scores[half], lengths[half], gather=lambda _: torch.cat(sent))
        assert torch.equal(mask, whole[half])


def test_a_rank_without_tokens_still_gathers():
    calls = []

    def gather(tensor: Tensor) -> Tensor:
        calls.append(len(tensor))
        return tensor

    mask = select(make(scope="batch"), torch.zeros(1, 4), torch.tensor([0]), gather=gather)
    assert calls == [0]
    assert not mask.any()


def test_running_scope_averages_and_resumes():
    first, lengths = padded([[0.0, 2.0]])  # mean 1, variance 1
    second, _ = padded([[10.0, 14.0]])  # mean 12, variance 4
    rule = make(scope="running")
    select(rule, first, lengths)
    state = {key: value.clone() for key, value in rule.state_dict().items()}
    # mean 0.9 + 1.2 = 2.1, variance 1.3: both tokens of the second step lie above.
    assert select(rule, second, lengths).sum() == 2
    torch.testing.assert_close(rule.state_dict()["running"], torch.tensor([[2.1, 1.3]], dtype=torch.float64))
    resumed = make(scope="running")
    resumed.load_state_dict(state)
    assert select(resumed, second, lengths).sum() == 2
    assert torch.equal(resumed.state_dict()["running"], rule.state_dict()["running"])
    before = rule.state_dict()["running"]
    select(rule, second, 0 * lengths)  # a step without tokens changes nothing
    assert torch.equal(rule.state_dict()["running"], before)
    assert make().state_dict() == {}


@given(completions, st.floats(0, 1))
def test_causal_scope_by_loops(rows, kappa):
    """The threshold of each token from the numbers that a stream would have seen by then."""
    scores, lengths = padded(rows)
    mask = select(make(scope="causal"), scores, lengths, kappa=kappa)
    for row, selected in zip(rows, mask):
        x = np.array(row, dtype=np.float32).astype(np.float64)
        for t in range(len(x)):
            mean, std = x[: t + 1].mean(), x[: t + 1].std()
            if abs(x[t] - mean - kappa * std) > 1e-4 * max(x.max(), 1e-30):  # else rounding decides
                assert bool(selected[t]) == (std > 0 and x[t] > mean + kappa * std)
        assert not selected[len(x) :].any()


def test_causal_scope_does_not_know_what_comes():
    scores = 1e4 + torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    scores[1, 3] = NAN
    whole = select(make(scope="causal"), scores, torch.tensor([40, 40, 40]))
    assert not whole[:, 0].any()
    part = select(make(scope="causal"), scores[:, :17], torch.tensor([17, 17, 17]))
    assert torch.equal(part, whole[:, :17])
    assert not torch.equal(whole, select(make(), scores, torch.tensor([40, 40, 40])))
    assert make(scope="causal").local


def test_running_scope_with_decay_1_is_the_run_so_far():
    """One completion a step: at each the threshold is that of all tokens until then, as numpy has it."""
    draw = np.random.default_rng(0)
    steps = [draw.normal(5 * step, 1 + step, size).astype(np.float32) for step, size in enumerate((7, 1, 0, 12, 30))]
    rule = make(scope="running", decay=1.0)
    for step, x in enumerate(steps):
        mask = select(rule, *padded([x.tolist()]))
        so_far = np.concatenate(steps[: step + 1]).astype(np.float64)
        assert mask[0, : len(x)].tolist() == (x > so_far.mean() + 0.3 * so_far.std()).tolist()
        resumed = make(scope="running", decay=1.0)
        resumed.load_state_dict(rule.state_dict())
        rule = resumed
    np.testing.assert_allclose(rule.state_dict()["running"][0], [so_far.mean(), so_far.var()])
    slow, fast = make(scope="running", decay=0.5), make(scope="running", decay=0.25)
    for x in (steps[0], steps[4]):
        for each in (slow, fast):
            select(each, *padded([x.tolist()]))
    first, last = (np.array([x.mean(dtype=np.float64), x.var(dtype=np.float64)]) for x in (steps[0], steps[4]))
    np.testing.assert_allclose(slow.state_dict()["running"][0], 0.5 * first + 0.5 * last)
    np.testing.assert_allclose(fast.state_dict()["running"][0], 0.25 * first + 0.75 * last)


# --- other rules --------------------------------------------------------------------------------------------------


def test_top_fraction_keeps_its_budget():
    rows = [[5.0, 1.0, 4.0, 2.0, 3.0], [7.0], [1.0, 2.0, 2.0, 2.0, 2.0]]
    scores, lengths = padded(rows)
    mask = select(make(rule="top_fraction", fraction=0.4), scores, lengths)
    assert mask[0].nonzero()[:, 0].tolist() == [0, 2]
    assert mask[1].nonzero()[:, 0].tolist() == [0]
    assert not mask[2].any()  # four tie for two places
    assert select(make(rule="top_fraction", fraction=1.0), scores, lengths).sum() == 11
    pooled = select(make(rule="top_fraction", fraction=0.2, scope="batch"), scores, lengths)  # 2 of 11
    assert pooled.nonzero().tolist() == [[0, 0], [1, 0]]


@given(
    completions, st.sampled_from(["sequence", "batch"]), st.sampled_from(["threshold", "top_fraction", "peaks_only"])
)
def test_invert_takes_the_lowest_equally_many(rows, scope, rule):
    scores, lengths = padded(rows)
    usual = select(make(rule=rule, scope=scope), scores, lengths)
    control = select(make(rule=rule, scope=scope, invert=True), scores, lengths)
    for row, chosen, instead in zip(rows, usual, control):
        k, x = int(chosen.sum()), np.array(row, dtype=np.float32)
        assert instead.nonzero()[:, 0].tolist() == sorted(np.argsort(x, kind="stable")[:k].tolist())


def test_lowest_passes_over_what_does_not_count():
    scores = torch.tensor([[NAN, 2.0, 1.0, 2.0, -INF, 0.0]])
    counted = torch.tensor([[False, True, True, True, False, False]])
    for count, expected in ((0, []), (1, [2]), (2, [1, 2]), (3, [1, 2, 3])):
        assert lowest(scores, counted, torch.tensor([count]))[0].nonzero()[:, 0].tolist() == expected


def test_all_and_random_look_at_lengths_only():
    scores, lengths = torch.full((3, 30), NAN), torch.tensor([30, 7, 0])
    assert select(make(rule="all"), scores, lengths).sum(1).tolist() == [30, 7, 0]
    rule = make(rule="random", fraction=0.2, seed=3)
    assert select(rule, scores, lengths).sum(1).tolist() == [6, 1, 0]
    mask = select(rule, scores, lengths)
    assert torch.equal(mask, select(rule, scores, lengths))
    assert not torch.equal(mask, select(rule, scores, lengths, step=1))
    assert not torch.equal(mask, select(make(rule="random", seed=4), scores, lengths))
    # A rollout keeps its tokens wherever it lands in a micro-batch, and others have other ones.
    alone = select(rule, scores[:1], lengths[:1], rollout_ids=torch.tensor([0]))
    assert torch.equal(alone, mask[:1])
    assert not torch.equal(alone, select(rule, scores[:1], lengths[:1], rollout_ids=torch.tensor([1])))
    # Every token is drawn about equally often.
    counts = sum(select(rule, scores[:1], lengths[:1], step=step)[0].int() for step in range(300))
    assert isinstance(counts, Tensor)
    assert (counts - 60).abs().max() < 30


def test_prefix_is_the_floor_of_its_share():
    scores, lengths = padded([[0.0] * n for n in (20, 7, 1, 3)])
    mask = select(make(rule="prefix"), scores, lengths, prefix=0.35)
    assert mask.sum(1).tolist() == [7, 2, 0, 1]  # 0.35 * 20 is not 6.99...
    assert all(row[: row.sum()].all() for row in mask)
    assert prefix_lengths(torch.tensor([32768]), 0.35).tolist() == [11468]
    shares = [prefix_share(stalls, MaskConfig()) for stalls in range(6)]
    assert shares == pytest.approx([0.15, 0.20, 0.25, 0.30, 0.35, 0.35])


def test_quadrant_selects_its_number():
    scores, lengths = padded([[0.0, 1.0, 2.0, 3.0], [3.0, 3.0]])
    mask = select(make(rule="quadrant", quadrant=3), scores, lengths)
    assert mask.nonzero().tolist() == [[0, 3], [1, 0], [1, 1]]
    none = select(make(rule="quadrant", quadrant=0), scores, lengths)
    assert none.sum() == 1  # padding is no zero


def test_micro_batch_scope_is_the_batch_of_one_call():
    rows = [[1.0, 2.0, 9.0], [1.0, 1.5]]
    scores, lengths = padded(rows)
    local = make(rule="top_fraction", fraction=0.4, scope="micro_batch")
    everywhere = make(rule="top_fraction", fraction=0.4, scope="batch")
    assert torch.equal(select(local, scores, lengths), select(everywhere, scores, lengths))
    assert select(local, scores, lengths).sum(1).tolist() == [2, 0]  # 9 and 2, of five
    others = torch.tensor([100.0] * 5)
    with_others = select(everywhere, scores, lengths, gather=lambda mine: torch.cat([mine, others]))
    assert with_others.sum() == 0
    alone = select(local, scores, lengths, gather=lambda mine: torch.cat([mine, others]))
    assert torch.equal(alone, select(local, scores, lengths))


@pytest.mark.parametrize("scope", ["sequence", "group", "micro_batch", "batch"])
@pytest.mark.parametrize("options", [{"rule": "threshold"}, {"rule": "top_fraction"}, {"statistic": "iqr"}])
def test_a_rank_without_rollouts(scope, options):
    rule = make(scope=scope, group_size=4, **options)
    mask = select(rule, torch.zeros(0, 1), torch.zeros(0, dtype=torch.long), gather=lambda mine: torch.ones(3))
    assert mask.shape == (0, 1)


def test_local_rules():
    assert make().local
    assert make(scope="micro_batch").local
    assert make(rule="prefix", scope="batch").local
    assert make(rule="random", scope="batch").local
    assert not make(scope="group", group_size=4).local


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "best"},
        {"scope": "micro"},
        {"statistic": "mad"},
        {"fraction": 0.0},
        {"fraction": 1.1},
        {"decay": 0.0},
        {"scope": "causal", "statistic": "iqr"},
        {"scope": "causal", "rule": "top_fraction"},
        {"decay": 1.0, "scope": "running", "statistic": "iqr_kappa"},
        {"invert": True, "rule": "all"},
    ],
)
def test_unknown_choices_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


# --- peaks --------------------------------------------------------------------------------------------------------


def test_peaks_by_hand():
    #        0  1  2  3  4  5  6  7
    scores = [9, 1, 5, 1, 4, 4, 1, 9]
    row, length = padded([[float(s) for s in scores]])
    # 2 is a peak; 4-5 is a plateau, counted at 4; the ends have one neighbour only.
    assert local_maxima(row, length)[0].nonzero()[:, 0].tolist() == [2, 4]
    assert peaks(row[0, :8], kappa=0.0).nonzero()[:, 0].tolist() == [2]  # mean 4.25
    assert count_peaks(row[0, :8], kappa=0.0) == 1
    assert count_peaks(row[0, :8], kappa=1.0) == 0
    assert count_peaks(torch.tensor([0.0, 1.0] * 60 + [0.0]), kappa=0.3) == 40  # clipped
    for flat in ([], [1.0], [1.0, 2.0], [3.0, 3.0, 3.0]):
        assert count_peaks(torch.tensor(flat), kappa=0.0) == 0
    assert count_peaks(torch.tensor([0.0, 5.0, NAN, 0.0, INF, 0.0, 0.0]), kappa=0.0) == 1


@pytest.mark.slow
@given(completions, st.floats(0, 1))
def test_peaks_match_scipy(rows, kappa):
    scores, lengths = padded(rows)
    maxima = local_maxima(scores, lengths)
    rule = select(make(rule="peaks_only"), scores, lengths, kappa=kappa)
    for row, batched, chosen in zip(rows, maxima, rule):
        x = np.array(row, dtype=np.float32)
        found, plateaus = find_peaks(x, plateau_size=1)
        assert batched.nonzero()[:, 0].tolist() == plateaus["left_edges"].tolist()
        alone = peaks(torch.from_numpy(x), kappa=kappa)
        assert torch.equal(alone, chosen[: len(x)])
        above = threshold_mask(torch.from_numpy(x)[None], torch.tensor([len(x)]), kappa=kappa)[0]
        assert count_peaks(torch.from_numpy(x), kappa=kappa) == int(above[found].sum())
        for statistic in ("iqr", "iqr_kappa"):
            keys = {"kappa": kappa, "statistic": statistic, "tau": 0.2}
            above = threshold_mask(torch.from_numpy(x)[None], torch.tensor([len(x)]), **keys)[0]
            assert count_peaks(torch.from_numpy(x), **keys) == int(above[found].sum())
