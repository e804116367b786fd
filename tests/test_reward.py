"""Reward components, their combination, and the rewarder on real verifier processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aipo.config.sections import RewardConfig
from aipo.errors import TrainingError
from aipo.problems.problem import Problem
from aipo.reward import Rewarder, combine, soft_overlong, well_formed


@pytest.fixture(scope="module")
def rewarder() -> Iterator[Rewarder]:
    config = RewardConfig(overlong_buffer=20, correctness=0.8, format=0.1, length=0.1, workers=1, timeout_s=20.0)
    scorer = Rewarder({"": config}, max_tokens=100)
    yield scorer
    scorer.close()


def test_soft_overlong_by_hand() -> None:
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480, 20481])
    expected = torch.tensor([0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0])
    torch.testing.assert_close(soft_overlong(lengths, 20480, 4096), expected)


@given(st.lists(st.integers(0, 300), min_size=1), st.integers(1, 200), st.integers(1, 200))
def test_soft_overlong_is_the_three_cases_of_dapo(lengths: list[int], max_length: int, buffer: int) -> None:
    def slow(y: int) -> float:
        if y <= max_length - buffer:
            return 0.0
        return (max_length - buffer - y) / buffer if y <= max_length else -1.0

    shaped = soft_overlong(torch.tensor(lengths), max_length, buffer)
    torch.testing.assert_close(shaped, torch.tensor([slow(y) for y in lengths]))


@pytest.mark.parametrize(
    ("text", "plain", "with_thinking"),
    [
        (r"\boxed{5}", True, False),
        (r"<think>a</think>\boxed{5}", True, True),
        (r"a</think>\boxed{5}", True, True),  # the prompt opened the block
        (r"<think>a</think><think>b</think>\boxed{5}", True, False),
        (r"<think>a</think></think>\boxed{5}", True, False),
        (r"</think><think>\boxed{5}", False, False),
        (r"<think>\boxed{5}", False, False),
        (r"<think>\boxed{5}</think>", False, False),
        (r"<think>a</think>\boxed{5", False, False),
        (r"<think>a</think>\boxed{ }", False, False),
        ("<think>a</think>Answer: 5", False, False),
    ],
)
def test_well_formed_math(text: str, plain: bool, with_thinking: bool) -> None:
    assert well_formed(text) is plain
    assert well_formed(text, thinking=True) is with_thinking


def test_well_formed_choice() -> None:
    assert well_formed("Answer: B", kind="choice")
    assert not well_formed("<think>Answer: B", kind="choice")
    assert not well_formed("It is B.", kind="choice")


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0, 1)), min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_combined_rewards_stay_between_0_and_1(parts: list[tuple[bool, bool, float]], u: float, v: float) -> None:
    low, high = sorted((u, v))
    weights = (low, high - low, 1 - high)
    correct, formed, length = (torch.tensor(part) for part in zip(*parts, strict=True))
    rewards = combine(correct, formed, length, weights)
    assert rewards.shape == (len(parts),)
    assert -1e-6 <= rewards.min() <= rewards.max() <= 1 + 1e-6
    for reward, (c, f, n) in zip(rewards.tolist(), parts, strict=True):
        assert reward == pytest.approx(weights[0] * c + weights[1] * f + weights[2] * n, abs=1e-6)


GOLDS = [r"\frac{1}{2}", r"\frac{1}{2}", "5", "B", "5"]
KINDS = ["math", "math", "math", "choice", "math"]
PROBLEMS = [Problem(str(i), "q", gold, kind) for i, (gold, kind) in enumerate(zip(GOLDS, KINDS))]
TEXTS = [r"\boxed{0.5}", r"\boxed{0.25}", "Answer: 5", "Answer: B", r"\boxed{5"]
LENGTHS = [10, 90, 100, 80, 85]


def score(rewarder: Rewarder, problems: list[Problem], texts: list[str], lengths: list[int]) -> tuple:
    return rewarder.collect([rewarder.submit(*rollout) for rollout in zip(problems, texts, lengths, strict=True)])


def test_score_by_hand(rewarder: Rewarder) -> None:
    rewards, correct, metrics = score(rewarder, PROBLEMS, TEXTS, LENGTHS)
    assert correct.tolist() == [True, False, True, True, False]
    assert correct.dtype == torch.bool
    # 0.8 correct + 0.1 format + 0.1 length; lengths count 1, 0.5, 0, 1, 0.75
    torch.testing.assert_close(rewards, torch.tensor([1.0, 0.15, 0.8, 1.0, 0.075]))
    assert metrics == pytest.approx(
        {
            "reward/mean": 3.025 / 5,
            "reward/correct": 3 / 5,
            "reward/format": 3 / 5,
            "reward/length": 3.25 / 5,
            "reward/no_answer": 1 / 5,
            "reward/timed_out": 0.0,
            "reward/killed": 0.0,
            "verdicts": 5.0,
        }
    )


def test_streaming_in_any_order_is_the_same_as_all_at_once(rewarder: Rewarder) -> None:
    together = score(rewarder, PROBLEMS, TEXTS, LENGTHS)
    pending = {i: rewarder.submit(PROBLEMS[i], TEXTS[i], LENGTHS[i]) for i in (3, 0, 4, 2, 1)}
    other = rewarder.submit(Problem("x", "q", "5"), "5", 1)  # of another batch: nothing to do with this one
    rewards, correct, metrics = rewarder.collect([pending[i] for i in range(5)])
    torch.testing.assert_close(rewards, together[0])
    assert correct.tolist() == together[1].tolist()
    assert metrics == together[2]
    assert len(rewarder.collect([other])[0]) == 1
    with pytest.raises(ValueError, match="no rollout"):
        rewarder.collect([])


@pytest.mark.slow
def test_a_hostile_answer_has_no_verdict_and_is_counted() -> None:
    rewarder = Rewarder({"": RewardConfig(overlong_buffer=20, workers=1, timeout_s=0.5)}, max_tokens=100)
    answers = [r"\boxed{\sum_{n=1}^{10^9} n!}", r"\boxed{5}"]
    rewards, correct, metrics = score(rewarder, [Problem("1", "q", "5")] * 2, answers, [9, 9])
    rewarder.close()
    assert rewards[0].isnan()
    assert rewards[1] == metrics["reward/mean"] == metrics["reward/correct"] == 1.0
    assert correct.tolist() == [False, True]
    assert metrics["reward/timed_out"] == 0.5


# --- functions of the user's

FUNCTIONS = """
import os, time

def burns(problem, completion):
    start = time.process_time()
    while time.process_time() < start + float(completion):
        pass
    return 1.0

def length(problem, completion):
    return len(completion) / len(problem.question)

def picky(problem, completion):
    return {"right": 1, "half": 0.5, "none": None, "nan": float("nan"), "text": "1"}[completion]

def loops(problem, completion):
    while completion == "loop":
        pass
    if completion == "crash":
        os._exit(3)
    if completion == "hoard":
        return len(bytes(1 << 40))
    return 1.0
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The module that workers import them from."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "graders.py").write_text(FUNCTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield


@pytest.fixture(scope="module")
def graded(functions: None) -> Iterator[Rewarder]:
    """By origin, in one process: what it is given by one test changes nothing for the next."""
    plain = RewardConfig(overlong_buffer=20, workers=1, timeout_s=20.0)
    configs = {
        "": plain,
        "mixed": RewardConfig(overlong_buffer=20, correctness=0.5, length=0.5),
        "length": RewardConfig(function="graders:length", overlong_buffer=20),
        "weighed": RewardConfig(function="graders:length", overlong_buffer=20, correctness=0.8, format=0.2),
        "picky": RewardConfig(function="graders:picky", overlong_buffer=20),
        "dapo": RewardConfig(signed=True, overlong=0.8, overlong_buffer=20),
    }
    rewarder = Rewarder(configs, max_tokens=100)
    yield rewarder
    rewarder.close()


@pytest.mark.slow
def test_a_function_takes_the_place_of_the_verifier(graded: Rewarder) -> None:
    problem = Problem("1", "four", "B", "choice", options=("x", "y"), solution="s", origin="weighed")
    rewards, correct, metrics = score(graded, [problem] * 3, ["ab", "abcd", "Answer: B"], [9, 9, 9])
    torch.testing.assert_close(rewards, torch.tensor([0.8 * 0.5, 0.8, 0.8 * 9 / 4 + 0.2]))
    assert correct.tolist() == [False, True, True]  # 1 or more
    assert metrics["reward/correct"] == pytest.approx(2 / 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("else", r"KeyError: 'else' \(.*graders.py, line 14\)"),
        ("none", "it returned None, which is not a finite number"),
        ("nan", "it returned nan, which is not"),
        ("text", "it returned '1', which is not"),
    ],
)
def test_what_a_function_raises_names_the_rollout(graded: Rewarder, text: str, says: str) -> None:
    problem = Problem("q7", "q", "5", origin="picky")
    fine, broken = graded.submit(problem, "half", 9, 2), graded.submit(problem, text, 9, 3)
    assert graded.collect([fine])[0].tolist() == [0.5]
    with pytest.raises(TrainingError, match=rf"graders:picky failed on sample 4 of question q7: .*{says}"):
        graded.collect([fine, broken])
    assert score(graded, [problem], ["right"], [9])[1].tolist() == [True]  # its process lives on


def test_each_origin_has_its_own_reward(graded: Rewarder) -> None:
    origins = ["length", "", "mixed", "length", "else", "dapo", "dapo", "dapo"]
    problems = [Problem(str(i), "four", "5", origin=origin) for i, origin in enumerate(origins)]
    texts = ["ab", r"\boxed{5}", r"\boxed{5}", "abcd", *[r"\boxed{6}"] * 2, r"\boxed{5}", r"\boxed{5}"]
    rewards, correct, _ = score(graded, problems, texts, [90] * 7 + [100])
    # DAPO's: -1 or 1, less 0.8 of how far the last 20 tokens of 100 were used
    dapo = [-1 - 0.8 * 0.5, 1 - 0.8 * 0.5, 1 - 0.8]
    torch.testing.assert_close(rewards, torch.tensor([0.5, 1.0, 0.5 + 0.5 * 0.5, 1.0, 0.0, *dapo]))
    assert correct[5:].tolist() == [False, True, True]  # whatever is taken off


@pytest.mark.usefixtures("functions")
@pytest.mark.slow
def test_a_function_that_hangs_or_crashes_gives_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("aipo.reward.SAY_S", 0.1)
    config = RewardConfig(function="graders:loops", overlong_buffer=20, workers=1, timeout_s=0.5)
    rewarder = Rewarder({"": config}, max_tokens=100)
    problem = Problem("1", "q", "5")
    rewards, correct, metrics = score(rewarder, [problem] * 5, ["loop", "fine", "crash", "hoard", "well"], [9] * 5)
    rewarder.close()
    assert "waiting for the verdicts of 1 answers\n" in capsys.readouterr().err
    assert rewards.isnan().tolist() == [True, False, True, True, False]
    assert correct.tolist() == [False, True, False, False, True]
    assert (metrics["reward/timed_out"], metrics["reward/killed"]) == (0.2, 0.4)
    assert metrics["reward/correct"] == 1.0


@contextmanager
def load(each: int = 2) -> Iterator[None]:
    """``each`` busy processes a core, every one in a session of its own, as a scheduler may share by sessions."""
    spin = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(spin, start_new_session=True) for _ in range(each * len(os.sched_getaffinity(0)))]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
        for process in busy:
            process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="sched_getaffinity")
@pytest.mark.usefixtures("functions")
@pytest.mark.slow
def test_a_busy_machine_changes_no_reward() -> None:
    """The limit is CPU time: what takes half of it is judged although it takes longer than it by the clock."""
    limit = 0.2
    usual = RewardConfig(overlong_buffer=20, workers=2, timeout_s=limit)
    configs = {"": usual, "burns": usual.model_copy(update={"function": "graders:burns"})}
    plain, burns = Problem("1", "q", r"\sqrt{8}"), Problem("2", "q", "5", origin="burns")
    problems = [*[plain] * 3, *[burns] * 3, plain, burns]  # what ends a worker comes last: none has to start under load
    texts = [r"\boxed{2\sqrt{2}}", r"\boxed{2\sqrt{3}}", "nothing", "0.1", "0.095", "0.09"]
    texts += [r"\boxed{\sum_{n=1}^{10^9} n!}", "1000"]

    def scored(around: AbstractContextManager[None]) -> tuple[list[float], list[bool], dict[str, float]]:
        rewarder = Rewarder(configs, max_tokens=100)
        score(rewarder, problems[3:5], ["0", "0.01"], [9] * 2)  # workers have started
        with around:
            rewards, correct, metrics = score(rewarder, problems, texts, [9] * 8)
        rewarder.close()
        return rewards.nan_to_num(-1.0).tolist(), correct.tolist(), metrics

    rewards, correct, metrics = scored(nullcontext())
    assert rewards == [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, -1.0, -1.0]
    assert metrics["reward/timed_out"] == 0.25
    assert scored(load()) == (rewards, correct, metrics)
