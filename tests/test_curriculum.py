"""Schedules by hand, sampling by its promises."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aipo.config.sections import CurriculumConfig, MaskConfig
from aipo.curriculum import Curriculum, bucket_of, kappa_at, mixture, peak_label

LABEL = (5, 20, 30)  # one count inside each bucket


def build(ids: list[str], *, total_steps: int = 100, seed: int = 0, **keys: Any) -> Curriculum:
    mask = MaskConfig(**{key: value for key, value in keys.items() if key in MaskConfig.model_fields})
    rest = {key: value for key, value in keys.items() if key not in MaskConfig.model_fields}
    return Curriculum(ids, CurriculumConfig(**rest), mask, total_steps=total_steps, seed=seed)


def make(sizes: tuple[int, int, int] = (60, 30, 10), **options: Any) -> Curriculum:
    ids = [f"{name}{i}" for name, size in zip("emh", sizes) for i in range(size)]
    curriculum = build(ids, **{"bucket_by": "count", **options})
    curriculum.set_labels({question: LABEL["emh".index(question[0])] for question in ids})
    return curriculum


def test_mixture_by_hand():
    for step in (0, 29.9):
        assert mixture(step, 100) == (0.70, 0.25, 0.05)
    assert mixture(50, 100) == pytest.approx((0.475, 0.30, 0.225))
    assert mixture(40, 100) == pytest.approx((0.5875, 0.275, 0.1375))
    for step in (70, 99, 200):
        assert mixture(step, 100) == (0.25, 0.35, 0.40)
    assert mixture(49, 100, t1=0.5, t2=0.5) == (0.70, 0.25, 0.05)  # a jump
    assert mixture(50, 100, t1=0.5, t2=0.5) == (0.25, 0.35, 0.40)


@given(st.floats(0, 300), st.integers(1, 200))
def test_mixture_sums_to_one(step, total):
    assert sum(mixture(step, total)) == pytest.approx(1)


def test_kappa_by_hand():
    def kappa(step: int, stalls: int = 0, schedule: Any = "combined") -> float:
        return kappa_at(step, decay_steps=100, stalls=stalls, schedule=schedule)

    assert [kappa(t) for t in (0, 50, 100, 150)] == pytest.approx([0.3, 0.2, 0.1, 0.1])
    assert [kappa(50, s) for s in (1, 2, 3)] == pytest.approx([0.15, 0.1, 0.1])
    assert kappa(50, 2, "linear") == pytest.approx(0.2)
    assert kappa(50, 2, "plateau") == pytest.approx(0.2)
    assert kappa(50, 3, "plateau") == pytest.approx(0.15)
    assert kappa(99, 9, "constant") == 0.3
    assert kappa(50, 9, "literal") == pytest.approx(0.2)  # stalls are in the clock that it is given
    assert kappa_at(10, start=0.5, end=0.0, decay_steps=20, stalls=1, stall_drop=0.1) == pytest.approx(0.15)


def test_kappa_of_a_run_by_hand():
    own = make(kappa_start=0.5, kappa_end=0.2, kappa_decay_steps=40, stall_patience=1)
    assert [own.kappa(t) for t in (0, 10, 20, 40, 90)] == pytest.approx([0.5, 0.425, 0.35, 0.2, 0.2])
    for _ in range(2):  # the first best, and a stall
        own.observe_validation(0.5)
    assert [own.kappa(t) for t in (0, 10, 38)] == pytest.approx([0.45, 0.375, 0.2])
    of_all_steps = make(kappa_start=0.5, kappa_end=0.2, total_steps=60)
    assert [of_all_steps.kappa(t) for t in (20, 60)] == pytest.approx([0.4, 0.2])


def test_buckets_by_hand():
    assert [bucket_of(n) for n in (0, 15, 16, 25, 26, 40)] == [0, 0, 1, 1, 2, 2]
    assert [bucket_of(n, (5, 15)) for n in (5, 6, 16)] == [0, 1, 2]
    by_quantile = build(list("abcdef"), total_steps=1, seed=0, bucket_by="quantile")
    by_quantile.set_labels(dict(zip("abcdef", [0, 1, 2, 3, 4, 5])))  # terciles 1.67 and 3.33
    assert by_quantile.buckets.tolist() == [0, 0, 1, 1, 2, 2]
    uneven = build(list("abcdef"), total_steps=1, seed=0, quantiles=(0.1, 0.5))
    uneven.set_labels(dict(zip("abcdef", [0, 1, 2, 3, 4, 5])))  # 0.5 and 2.5
    assert uneven.buckets.tolist() == [0, 1, 1, 2, 2, 2]
    by_count = build(list("abc"), total_steps=1, seed=0, bucket_by="count")
    by_count.set_labels({"a": 15.0, "b": 15.5, "c": 25.5})  # means over rollouts are no whole numbers
    assert by_count.buckets.tolist() == [0, 1, 2]
    earlier = build(list("abc"), total_steps=1, seed=0, bucket_by="count", cuts=(5, 10))
    earlier.set_labels({"a": 5, "b": 10, "c": 11})
    assert earlier.buckets.tolist() == [0, 1, 2]


def test_peak_label():
    scores = torch.tensor([0.0, 1.0] * 16)  # 15 peaks in 32 tokens: the last token is no peak
    assert peak_label(scores, MaskConfig(), "count") == 15
    assert peak_label(scores, MaskConfig(), "quantile") == 15
    assert peak_label(scores, MaskConfig(), probe_tokens=11) == 5
    many = torch.tensor([0.0, 1.0] * 100)
    assert peak_label(many, MaskConfig(), "count") == 40
    assert peak_label(many, MaskConfig()) == 99  # thirds of questions that all have more than 40
    assert peak_label(scores, MaskConfig(statistic="iqr")) == 0  # nothing is above 1 + 1.5 (1 - 0)
    # mean 0.6, standard deviation 1.3: 1 is above at kappa 0.3, and not at 1
    mixed = torch.tensor([0.0, 1.0, 0.0, 0.0, 5.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert peak_label(mixed, MaskConfig()) == 3
    assert peak_label(mixed, MaskConfig(kappa_start=1.0)) == 1
    assert peak_label(mixed, MaskConfig(statistic="iqr")) == 3  # Q3 = 0.25: above 0.625
    assert peak_label(mixed, MaskConfig(statistic="iqr", tau=5.0)) == 1  # above 1.5
    sparse = torch.zeros(1024)
    sparse[10:1000:100] = 1.0
    for by in ("count", "quantile"):
        assert peak_label(sparse, MaskConfig(), by, probe_tokens=1024) == 10
        assert peak_label(sparse, MaskConfig(), by, probe_tokens=256) == 3
        assert peak_label(torch.zeros(0), MaskConfig(), by) == 0


def test_the_bucket_of_a_question():
    assert [make().bucket(question) for question in ("h0", "e0", "m0")] == ["hard", "easy", "medium"]
    assert make(enabled=False).bucket("h0") is None


def test_a_small_bucket_is_said_with_its_remedy():
    assert make((60, 30, 10)).lopsided is None
    paper = make((2, 0, 98)).lopsided
    assert paper is not None
    assert "2 easy, 0 medium, 98 hard; set curriculum.bucket_by: quantile" in paper
    ties = build(list("abcdef"))
    ties.set_labels(dict.fromkeys("abcdef", 40.0))
    assert ties.lopsided is not None
    assert "6 easy, 0 medium, 0 hard; too many questions have equally many peaks" in ties.lopsided
    alone = make((2, 0, 98), start=(0.0, 0.0, 1.0), end=(0.0, 0.0, 1.0))  # Table 4
    assert alone.lopsided is None
    assert drawn_by_bucket(alone, range(0, 100, 7), 8) == {"h": 15 * 8}
    assert make((0, 0, 9), enabled=False).lopsided is None


def drawn_by_bucket(curriculum: Curriculum, steps: range, n: int) -> Counter[str]:
    return Counter(question[0] for step in steps for question in curriculum.sample(step, n))


def test_sampling_follows_the_mixture():
    # 10 a step for 30 steps of (.7, .25, .05): 210, 75, 15 on average, though .05 of 10 is less than one question.
    drawn = drawn_by_bucket(make((400, 400, 400)), range(30), 10)
    assert [drawn[name] for name in "emh"] == pytest.approx([210, 75, 15], abs=10)
    drawn = drawn_by_bucket(make((400, 400, 400)), range(70, 100), 10)
    assert [drawn[name] for name in "emh"] == pytest.approx([75, 105, 120], abs=10)


def test_each_question_once_before_any_comes_again():
    curriculum = make((7, 5, 3))
    drawn: dict[str, Counter[str]] = {name: Counter() for name in "emh"}
    for step in range(100):
        for question in curriculum.sample(step, 4):
            drawn[question[0]][question] += 1
    for name, size in zip("emh", (7, 5, 3)):
        counts = drawn[name].values()
        assert len(counts) == size
        # A step that ends an epoch skips what it has drawn already, so counts differ by one, and never by more.
        assert max(counts) - min(counts) <= 1


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(*[st.integers(0, 6)] * 3).filter(any),
    st.integers(0, 100),
    st.integers(1, 25),
    st.integers(0, 9),
    st.sampled_from([(0.7, 0.25, 0.05), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)]),
    st.booleans(),
)
def test_a_step_has_distinct_questions(sizes, step, n, seed, start, enabled):
    curriculum = make(sizes, seed=seed, start=start, enabled=enabled)
    for _ in range(3):
        questions = curriculum.sample(step, n)
        assert len(questions) == n
        counts = Counter(questions).values()
        assert len(counts) == min(n, sum(sizes))
        assert max(counts) <= -(-n // sum(sizes))


def test_an_empty_bucket_gives_its_share_in_proportion():
    drawn = drawn_by_bucket(make((300, 0, 300), t1=1, t2=1), range(90), 10)
    assert drawn["e"] == pytest.approx(900 * 0.70 / 0.75, abs=20)
    assert drawn["h"] == pytest.approx(900 * 0.05 / 0.75, abs=20)


def test_ranks_agree_seeds_differ_and_questions_are_mixed():
    first, second, other = make(), make(), make(seed=1)
    samples = [first.sample(step, 16) for step in range(5)]
    assert samples == [second.sample(step, 16) for step in range(5)]
    assert samples != [other.sample(step, 16) for step in range(5)]
    assert any(sample != sorted(sample) for sample in samples)  # not bucket by bucket: ranks take slices


def test_disabled_is_uniform_without_replacement_and_needs_no_labels():
    curriculum = build([str(i) for i in range(20)], total_steps=10, seed=0, enabled=False)
    drawn = [question for step in range(4) for question in curriculum.sample(step, 5)]
    assert len(set(drawn)) == 20
    assert set(curriculum.sample(4, 20)) == set(drawn)
    with pytest.raises(RuntimeError, match="set_labels"):
        build(["a"], total_steps=1, seed=0).sample(0, 1)


def test_stalls_lower_kappa_and_advance_the_clock_up_to_t2():
    curriculum = make(stall_patience=2)
    for accuracy in (0.4, 0.5, 0.5):
        curriculum.observe_validation(accuracy)
    assert curriculum.stalls == 0
    curriculum.observe_validation(0.45)
    assert curriculum.stalls == 1
    assert curriculum.kappa(0) == pytest.approx(0.25)
    assert curriculum.clock(28) == 33
    assert curriculum.mixture(28) == mixture(33, 100)
    literal = make(stall_patience=1, kappa_schedule="literal")
    literal.observe_validation(0.5)
    literal.observe_validation(0.5)
    # line 40 moves t to 33 and kappa to 0.25; line 42 then says 0.3 - 0.2 * 33 / 100
    assert literal.kappa(28) == pytest.approx(0.234)
    assert literal.kappa(68) == pytest.approx(0.16)  # t is at t2
    curriculum.observe_validation(0.6)  # a new best, and the count starts again
    curriculum.observe_validation(0.6)
    assert curriculum.stalls == 1
    curriculum.observe_validation(0.6)
    assert curriculum.stalls == 2
    assert [curriculum.clock(step) for step in (0, 55, 65, 69, 70, 90)] == [10, 65, 70, 70, 70, 90]
    flat, stalls = make(stall_patience=2), []
    for _ in range(7):  # a stall begins a new count, without a new best too
        flat.observe_validation(0.5)
        stalls.append(flat.stalls)
    assert stalls == [0, 0, 1, 1, 2, 2, 3]


def test_relabel_moves_questions_between_buckets():
    curriculum = make((10, 10, 10), t1=1, t2=1, start=(0.0, 0.0, 1.0))
    first = curriculum.sample(0, 4)
    curriculum.relabel({"e0": 33, first[0]: 3})
    second = curriculum.sample(1, 7)  # what the hard bucket still has: 6 of its own, and e0
    assert set(second) == {"e0"} | {f"h{i}" for i in range(10)} - set(first)
    assert first[0] not in curriculum.sample(2, 10)
    with pytest.raises(ValueError, match="belong to no question"):
        curriculum.relabel({"x": 1})
    with pytest.raises(ValueError, match="29 questions have no label"):
        curriculum.set_labels({"e0": 1})


def test_resume_is_exact():
    curriculum = make((9, 5, 4), stall_patience=1)
    for step in range(7):
        curriculum.sample(step, 5)
        curriculum.observe_validation(0.3)
    curriculum.relabel({"e1": 27, "h0": 2})
    state = json.loads(json.dumps(curriculum.state_dict()))
    resumed = build(curriculum.question_ids, bucket_by="count", stall_patience=1)
    resumed.load_state_dict(state)
    for step in range(7, 30):
        assert resumed.sample(step, 5) == curriculum.sample(step, 5)
        curriculum.observe_validation(step / 100)
        resumed.observe_validation(step / 100)
        assert resumed.metrics(step) == curriculum.metrics(step)
        assert resumed.kappa(step) == curriculum.kappa(step)
    assert resumed.state_dict() == curriculum.state_dict()
    with pytest.raises(ValueError, match="belong to no question"):
        build(["a"], total_steps=1, seed=0).load_state_dict(state)


def test_metrics():
    curriculum = make()
    curriculum.sample(50, 8)
    metrics = curriculum.metrics(50)
    assert metrics["curriculum/clock"] == 50
    assert metrics["curriculum/share_hard"] == pytest.approx(0.225)
    assert metrics["curriculum/questions_easy"] == 60


def test_metrics_are_of_a_step_though_the_next_is_drawn():
    """And though the run was resumed with a batch that waited for its step."""
    sizes, total_steps = (9, 5, 4), 10
    plain, ahead = make(sizes, total_steps=total_steps), make(sizes, total_steps=total_steps)
    ahead.sample(0, 4)
    for step in range(total_steps):
        for _ in range(2):  # dynamic sampling draws again
            plain.sample(step, 4)
        ahead.sample(step, 4)
        if step + 1 < total_steps:
            ahead.sample(step + 1, 4)
        assert ahead.metrics(step) == plain.metrics(step)
        state = json.loads(json.dumps(ahead.state_dict()))
        ahead = build(ahead.question_ids, bucket_by="count", total_steps=total_steps)
        ahead.load_state_dict(state)
    assert plain.metrics(total_steps - 1)["curriculum/epoch_hard"] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": []}, "no questions"),
        ({"ids": ["a", "a"]}, "distinct"),
        ({"t1": 0.8}, "t1"),
        ({"start": (0.5, 0.5, 0.5)}, "sum to 1"),
        ({"end": (1.5, -0.5, 0.0)}, "end"),
        ({"bucket_by": "size"}, "bucket_by"),
        ({"cuts": (25, 15)}, "cuts"),
        ({"cuts": (15, 15)}, "cuts"),
        ({"quantiles": (0.6, 0.4)}, "quantiles"),
        ({"kappa_end": 0.4}, "kappa_end"),
        ({"kappa_schedule": "cosine"}, "kappa_schedule"),
        ({"stall_patience": 0}, "stall_patience"),
    ],
)
def test_contradictory_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**{"ids": ["a"], **options})


# --- several sources


def mixed(sizes: dict[str, tuple[int, int, int]], weights: dict[str, float] | None, **keys: Any) -> Curriculum:
    """``sizes``: easy, medium and hard questions of each source."""
    ids = [f"{source}/{name}{i}" for source, own in sizes.items() for name, n in zip("emh", own) for i in range(n)]
    curriculum = Curriculum(
        ids,
        CurriculumConfig(**{"bucket_by": "count", **keys}),
        MaskConfig(),
        total_steps=100,
        seed=0,
        origins=[question.partition("/")[0] for question in ids],
        weights=weights,
    )
    if curriculum.enabled:
        curriculum.set_labels({question: LABEL["emh".index(question.partition("/")[2][0])] for question in ids})
    return curriculum


def test_a_mix_holds_its_weights_and_the_mixture() -> None:
    """Joint shares: weight of the source times share of the bucket, each rounded up or down."""
    curriculum = mixed({"a": (90, 90, 90), "b": (30, 30, 30)}, {"a": 1.0, "b": 3.0})
    total: Counter[tuple[str, str]] = Counter()
    for step in range(20):  # before t1: the start mixture
        drawn = curriculum.sample(step, 40)
        assert len(set(drawn)) == 40
        assert sum(question.startswith("b/") for question in drawn) == 30
        total.update((question[0], question[2]) for question in drawn)
    for source, weight in (("a", 0.25), ("b", 0.75)):
        for bucket, share in zip("emh", (0.70, 0.25, 0.05)):
            assert abs(total[source, bucket] - 20 * 40 * weight * share) <= 20


@given(st.integers(1, 60), st.floats(0.1, 10), st.lists(st.integers(0, 12), min_size=6, max_size=6))
def test_a_mix_gives_what_is_asked_of_any_sizes(n: int, weight: float, sizes: list[int]) -> None:
    one, two = tuple(sizes[:3]), tuple(sizes[3:])
    if sum(sizes) == 0:
        return
    curriculum = mixed({"a": one, "b": two}, {"a": 1.0, "b": weight})  # type: ignore[dict-item]
    drawn = curriculum.sample(0, n)
    assert len(drawn) == n
    assert max(Counter(drawn).values()) == -(-n // sum(sizes))


def test_every_question_of_a_cell_comes_before_any_comes_again() -> None:
    curriculum = mixed({"a": (4, 0, 0), "b": (8, 0, 0)}, {"a": 1.0, "b": 1.0}, start=(1, 0, 0), end=(1, 0, 0))
    drawn = [question for step in range(4) for question in curriculum.sample(step, 4)]
    counts = Counter(drawn)
    assert {counts[question] for question in counts if question.startswith("a/")} == {2}
    assert {counts[question] for question in counts if question.startswith("b/")} == {1}
    again = mixed({"a": (4, 0, 0), "b": (8, 0, 0)}, {"a": 1.0, "b": 1.0}, start=(1, 0, 0), end=(1, 0, 0))
    again.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    assert again.sample(4, 6) == curriculum.sample(4, 6)


def test_without_weights_a_mix_is_one_set() -> None:
    sizes = {"a": (9, 9, 9), "b": (30, 30, 30)}
    plain, several = build(mixed(sizes, None).question_ids, bucket_by="count"), mixed(sizes, None)
    plain.set_labels(several.labels)
    assert [plain.sample(step, 8) for step in range(9)] == [several.sample(step, 8) for step in range(9)]


def test_a_mix_without_curriculum() -> None:
    curriculum = mixed({"a": (10, 0, 0), "b": (50, 0, 0)}, {"a": 1.0, "b": 1.0}, enabled=False)
    assert Counter(question[0] for question in curriculum.sample(0, 8)) == {"a": 4, "b": 4}


def test_buckets_within_sources_and_across_them() -> None:
    """Easy source and hard source: together they fall apart by source, each by itself they are in thirds."""
    ids = [f"{source}/{i}" for source in "ab" for i in range(6)]
    labels = {question: float(int(question[2]) + 100 * (question[0] == "b")) for question in ids}

    def buckets(where: str) -> list[int]:
        config = CurriculumConfig(buckets=where, quantiles=(0.5, 0.8))  # type: ignore[arg-type]
        made = Curriculum(ids, config, MaskConfig(), total_steps=10, seed=0, origins=[q[0] for q in ids])
        made.set_labels(labels)
        return made.buckets.tolist()

    assert buckets("across") == [0] * 6 + [1, 1, 1, 2, 2, 2]
    assert buckets("within") == [0, 0, 0, 1, 1, 2] * 2
