"""Dynamic sampling and rewards by continuation, with an engine whose answers the test decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from aipo.config import Config, load_config
from aipo.config.sections import RewardConfig
from aipo.errors import TrainingError
from aipo.generation import Generation, varying_groups
from aipo.layout import MicroBatch
from aipo.passes import Passes
from aipo.problems.datasets import Problem
from aipo.problems.prompts import Prompter
from aipo.record.reporting import by_source
from aipo.reward import Rewarder
from aipo.rollout.base import Completion, Request, Sampling
from aipo.rollout.collect import Collector
from aipo.rollouts import Rollouts
from tests.tiny import make_tiny

N = 4
Right = Callable[[int, int], bool]  # (number of the question, sample) -> whether that rollout is right


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny(tmp_path_factory.mktemp("model")))
    return Prompter(tokenizer, system=None, examples=(), suffix=None, thinking=False, max_prompt_tokens=512)


class Scripted:
    """Answers question ``q`` with q where ``right`` says so, else with -1."""

    def __init__(self, prompter: Prompter, right: Right) -> None:
        self.prompter, self.right = prompter, right
        self.seen: list[Request] = []
        self.weights: list[int] = []  # how many updates those had that answered each request
        self.updates = 0
        self.tokens = 0
        self.naps = 0
        self.free = threading.Event()  # cleared: an answer has to wait
        self.free.set()

    def sleep(self) -> None:
        assert clock.phase == "rollout"  # or nobody would pay for it
        self.naps += 1

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        assert self.free.wait(60)
        self.seen += requests
        self.weights += [self.updates] * len(requests)
        done = []
        for i, request in enumerate(requests):
            number = int(self.prompter.tokenizer.decode(request.prompt_ids).partition("number ")[2].partition(".")[0])
            text = rf"it is \boxed{{{number if self.right(number, i % N) else -1}}}"
            ids = self.prompter.tokenizer.encode(text)
            done.append(Completion(ids, [0.0] * len(ids), "stop"))
            self.tokens += len(ids)
            if on_done is not None:
                on_done(i, done[-1])
        return done


def config(*overrides: str) -> Config:
    fixed = [f"rollout.samples_per_question={N}", "rollout.questions_per_step=4", "dynamic.factor=2"]
    return load_config("tiny.yaml", ["dynamic.enabled=true", *fixed, *overrides])


def problems(numbers: Sequence[int]) -> list[Problem]:
    return [Problem(f"q{n}", f"Say number {n}.", str(n)) for n in numbers]


def generation(prompter: Prompter, right: Right, settings: Config) -> Generation:
    rewarder = Rewarder({"": RewardConfig(overlong_buffer=16, workers=1)}, max_tokens=64)
    collector = Collector(Scripted(prompter, right), prompter, rewarder, seed=0)  # type: ignore[arg-type]

    return Generation(collector, settings, ScriptedPasses(settings, prompter))


class ScriptedPasses(Passes):
    def __init__(self, settings: Config, prompter: Prompter) -> None:
        super().__init__(settings, SimpleNamespace(forward=self.forward), prompter, torch.device("cpu"))  # type: ignore[arg-type]

    def forward(self, micro: MicroBatch, *, full: bool) -> dict[str, Tensor]:
        """The policy is least sure of the fourth token of each rollout."""
        assert full
        unsure = torch.cat([(torch.arange(n) == 3).float() for n in micro.lengths] + [torch.empty(0)])  # (N,)
        return {"entropy": unsure, "certainty": 1 - unsure}

    def log_probs(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Tensor:
        """Anything is the likelier the longer what stands before it, and the shorter it is itself."""
        width = max(map(len, completions))
        return torch.tensor([[-len(c) / len(p)] * width for p, c in zip(prompts, completions, strict=True)])


class Phase:
    """A clock that knows what is being timed."""

    phase = ""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase = phase
        yield
        self.phase = ""


clock = Phase()


class Questions:
    """0, 1, 2, ... one after another, a rank's share of each draw."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world, self.next = rank, world, 0

    def __call__(self, step: int, count: int) -> list[Problem]:
        drawn = range(self.next, self.next + count)
        self.next += count
        return problems(drawn[self.rank :: self.world])


def varies_from(first: int) -> Right:
    """Every third question from ``first`` on has right and wrong rollouts; the others are all right or all wrong."""
    return lambda number, sample: sample == 0 if number >= first and number % 3 == 0 else number % 2 == 0


def test_groups_that_do_not_vary_are_replaced(prompter: Prompter) -> None:
    made = generation(prompter, varies_from(0), config())
    rollouts, metrics = made.rollouts(0, Questions(), clock, prefix=1.0)
    assert [problem.id for problem in rollouts.problems] == ["q0", "q3", "q6", "q9"]  # the first four that vary
    assert rollouts.correct.reshape(-1, N).sum(1).tolist() == [1, 1, 1, 1]
    assert (metrics["dynamic_tries"], metrics["dynamic_kept"]) == (2, 4)  # two draws of eight
    engine: Any = made.collector.engine
    assert rollouts.extra_tokens == engine.tokens - int(rollouts.lengths.sum())  # what was dropped is not forgotten
    kept = Rollouts.from_state(rollouts.state_dict(), {each.id: each for each in problems(range(16))})
    for each in (rollouts, kept):  # of the first draw
        assert each.dropped is not None
        assert [problem.id for problem in each.dropped.problems] == ["q1", "q2", "q4", "q5", "q7"]
    assert len(rollouts.prompts) == 4
    assert len(rollouts.completions) == len(rollouts.texts) == len(rollouts.ids) == 16
    assert len(set(rollouts.ids.tolist())) == 16


def on_two_ranks(prompter: Prompter, monkeypatch: pytest.MonkeyPatch, right: Right, settings: Config) -> list[Rollouts]:
    """The batch of each of two ranks, of which the first has questions 0, 2, 4, ..."""
    local, meet, board = threading.local(), threading.Barrier(2), [None, None]

    def gather(value: Any) -> list[Any]:
        board[local.rank] = value
        meet.wait(60)
        everything = list(board)
        meet.wait(60)
        return everything

    monkeypatch.setattr("aipo.distributed.rank", lambda: local.rank)
    monkeypatch.setattr("aipo.distributed.world_size", lambda: 2)
    monkeypatch.setattr("aipo.distributed.gather_objects", lambda value, *, beside: gather(value))
    found: list[Rollouts | None] = [None, None]

    def work(rank: int) -> None:
        local.rank = rank
        found[rank], _ = generation(prompter, right, settings).rollouts(0, Questions(rank, 2), clock, prefix=1.0)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [part for part in found if part is not None]


def test_two_ranks_keep_what_one_keeps(prompter: Prompter, monkeypatch: pytest.MonkeyPatch) -> None:
    found = on_two_ranks(prompter, monkeypatch, varies_from(0), config())
    assert [[problem.id for problem in part.problems] for part in found] == [["q0", "q6"], ["q3", "q9"]]


def test_two_ranks_with_unequally_many_questions_read_them_in_the_updates_of_one(
    prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 0, 2, 4 and 7 the first update reads 0 and 2, though the ranks keep three and one."""
    settings = config("optim.updates_per_batch=2")

    def varies(number: int, sample: int) -> bool:
        return sample == 0 and number in (0, 2, 4, 7)

    def read(rollouts: Rollouts) -> list[list[str]]:
        rollouts.used = torch.ones(len(rollouts.completions), dtype=torch.bool)
        updates = ScriptedPasses(settings, prompter).update_batches(rollouts)
        rows = [[int(row) for micro in update for row in micro.rows if row >= 0] for update in updates]
        return [sorted({rollouts.question_of(row).id for row in each}) for each in rows]

    alone, _ = generation(prompter, varies, settings).rollouts(0, Questions(), clock, prefix=1.0)
    assert read(alone) == [["q0", "q2"], ["q4", "q7"]]
    first, second = on_two_ranks(prompter, monkeypatch, varies, settings)
    monkeypatch.undo()
    assert read(first) == [["q0", "q2"], ["q4"]]
    assert second.update == [1]
    whole = Rollouts.from_state(first.state_dict(), {each.id: each for each in problems(range(99))})
    assert whole.update == [0, 0, 1]  # a batch that waits for its step keeps it


def test_nothing_varies(prompter: Prompter) -> None:
    message = r"step 6: 3 draws of 8 questions brought 0 of 4 whose rollouts differ.*dynamic\.on_exhausted"
    with pytest.raises(TrainingError, match=message):
        generation(prompter, varies_from(10**6), config("dynamic.max_tries=3")).rollouts(
            5, Questions(), clock, prefix=1.0
        )
    lenient = generation(prompter, varies_from(20), config("dynamic.max_tries=3", "dynamic.on_exhausted=continue"))
    rollouts, metrics = lenient.rollouts(5, Questions(), clock, prefix=1.0)
    assert [problem.id for problem in rollouts.problems] == ["q21"]  # of 24 questions
    assert (metrics["dynamic_tries"], metrics["dynamic_kept"]) == (3, 1)


def test_what_varies() -> None:
    rollouts = Rollouts(
        problems=problems(range(4)),
        prompts=[[1]] * 4,
        completions=[Completion([1], [0.0], "stop")] * 8,
        group_size=2,
        ids=torch.arange(8),
        rewards=torch.tensor([0.0, 1.0, 1.0, 1.0, 0.5, 0.5 + 1e-8, 0.5, 0.6]),
        correct=torch.tensor([False, True, True, True, False, False, True, True]),
    )
    assert varying_groups(rollouts, by="correct") == [0]
    assert varying_groups(rollouts, by="reward") == [0, 3]  # rounding is no difference
    rollouts.rewards[0] = torch.nan  # no verdict: what is left of the first group is right
    assert varying_groups(rollouts, by="correct") == []


def test_continuations_are_counted(prompter: Prompter) -> None:
    """The reward is the number of right continuations of the prefix, plus 1 for a right rollout."""
    calls: list[int] = []

    def right(number: int, place: int) -> bool:
        calls.append(place)
        if len(calls) <= 2 * N:  # the rollouts themselves: the first of each question is right
            return place == 0
        return place % 2 == 0  # every other continuation

    overrides = ["dynamic.enabled=false", "reward.rule=continuations", "mask.rule=prefix", "reward.continuations=4"]
    made = generation(prompter, right, config(*overrides))
    judge, batches = made.collector.rewarder.collect, 0

    def without_some(pending: Sequence[Any]) -> tuple[Tensor, Tensor, dict[str, float]]:
        """No verdict on a wrong continuation of the first rollout, on all of the last, and on the sixth itself."""
        nonlocal batches
        batches += 1
        rewards, correct, metrics = judge(pending)
        missing = [5] if batches == 1 else [1, 28, 29, 30, 31]
        rewards[missing], correct[missing] = torch.nan, False
        return rewards, correct, metrics

    made.collector.rewarder.collect = without_some  # type: ignore[method-assign]
    rollouts, _ = made.rollouts(0, lambda step, count: problems([7, 8]), clock, prefix=0.35)
    assert rollouts.correct.tolist() == [True, False, False, False] * 2
    # 2 of 3 judged count as 2 2/3 of 4
    expected = torch.tensor([1 + 4 * 2 / 3, 2, 2, 2, 3, torch.nan, 2, torch.nan])
    torch.testing.assert_close(rollouts.rewards, expected, equal_nan=True)
    engine: Any = made.collector.engine
    asked = engine.seen[2 * N :]
    assert len(asked) == 2 * N * 4
    first = rollouts.completions[0].token_ids
    cut = int(0.35 * len(first))
    assert list(asked[0].prompt_ids) == [*rollouts.prompts[0], *first[:cut]]
    assert asked[0].max_tokens == made.sampling.max_tokens - cut
    assert len({request.seed for request in engine.seen}) == len(engine.seen)
    assert rollouts.extra_tokens > 0


def test_a_reward_of_certainty_is_no_verdict(prompter: Prompter) -> None:
    """An answer whose check gave none is not wrong, though the policy rewards it; here and in a batch that waited."""
    made = generation(prompter, varies_from(0), config("dynamic.enabled=false", "reward.rule=certainty"))
    judged = torch.tensor([1.0, torch.nan, 0.0, torch.nan])
    made.collector.rewarder.collect = lambda pending: (judged, judged == 1, {})  # type: ignore[method-assign]
    asked = [Problem("q7", "Say number 7.", "7", origin="numbers")]
    rollouts, _ = made.rollouts(0, lambda step, count: asked, clock, prefix=1.0)
    waited = Rollouts.from_state(rollouts.state_dict(), {"q7": asked[0]})
    kept = rollouts.keep(rollouts.rows_of([0]))
    for batch in (rollouts, waited, kept, Rollouts.joined([rollouts.take([]), waited])):
        batch.used = torch.ones(4, dtype=torch.bool)
        made.policy_rewards(batch, None)
        # a certainty of 1 a token, and of 0 at the fourth: the mean over a completion's own tokens
        assert batch.rewards.tolist() == pytest.approx([1 - 1 / n for n in batch.lengths.tolist()])
        assert by_source(batch) == {"rollouts of numbers": 4, "judged of numbers": 2, "correct of numbers": 1}


def test_branches_fill_a_question_up(prompter: Prompter) -> None:
    overrides = ["dynamic.enabled=false", "branch.enabled=true", "branch.base=2"]
    made = generation(prompter, lambda number, place: place % 2 == 0, config(*overrides))
    rollouts, metrics = made.rollouts(0, lambda step, count: problems([7, 8]), clock, prefix=1.0)
    assert (rollouts.group_size, len(rollouts.completions)) == (N, 2 * N)
    engine: Any = made.collector.engine
    assert int(rollouts.lengths.sum()) + rollouts.extra_tokens == engine.tokens  # beginnings are generated once
    base, branches = engine.seen[:4], engine.seen[4:]
    assert len(branches) == 4  # two more of each question
    for q in range(2):
        for i, parent in enumerate(rollouts.completions[q * N : q * N + 2]):
            child, request = rollouts.completions[q * N + 2 + i], branches[q * 2 + i]
            assert list(request.prompt_ids) == [*base[2 * q].prompt_ids, *parent.token_ids[:3]]
            assert request.max_tokens == made.sampling.max_tokens - 3
            assert child.token_ids[:3] == parent.token_ids[:3]
    assert rollouts.texts[2] == prompter.decode(rollouts.completions[2].token_ids)
    assert len(rollouts.rewards) == 2 * N
    assert metrics["reward/correct"] > 0


def test_branches_in_rounds(prompter: Prompter, tmp_path: Path) -> None:
    """One branch of each path a round; who drew which token goes with the batch, into its checkpoint too."""
    overrides = ["dynamic.enabled=false", "branch.enabled=true", "branch.base=1", "branch.rounds=3"]
    overrides += ["branch.pick=argmax", "branch.cut=after", "branch.skip=1"]
    made = generation(prompter, lambda number, place: place % 2 == 0, config(*overrides))
    rollouts, _ = made.rollouts(0, lambda step, count: problems([7, 8]), clock, prefix=1.0)
    engine: Any = made.collector.engine
    assert len(engine.seen) == 2 * N
    assert int(rollouts.lengths.sum()) + rollouts.extra_tokens == engine.tokens
    drawn = {request.seed: request for request in engine.seen}
    for row, completion in enumerate(rollouts.completions):
        prompt, request = rollouts.prompts[row // N], drawn[int(rollouts.ids[row])]
        begun = list(request.prompt_ids)[len(prompt) :]
        assert begun == completion.token_ids[: len(begun)]
        assert bool(begun) == (row % N > 0)
        assert rollouts.lineage[row][-1] == (request.seed, len(completion.token_ids))
        assert len(begun) == (rollouts.lineage[row][-2][1] if row % N else 0)
    torch.save(rollouts.state_dict(), tmp_path / "batch.pt")
    again = Rollouts.from_state(
        torch.load(tmp_path / "batch.pt", weights_only=True), {problem.id: problem for problem in problems([7, 8])}
    )
    assert again.lineage == rollouts.lineage


@pytest.mark.parametrize(("beta", "kept"), [(0.0, [2, 3, 4, 5]), (30.0, [0, 1, 2, 4])])
def test_the_filter_keeps_the_best(prompter: Prompter, beta: float, kept: list[int]) -> None:
    """Two rollouts and four branches, each three tokens longer, the wrong ones a little longer still. To these passes
    what is long says most about the answer and owes most to the question."""
    overrides = ["dynamic.enabled=false", "branch.enabled=true", "branch.base=2", "branch.total=6"]
    made = generation(prompter, lambda number, place: place % 2 == 0, config(*overrides, f"branch.beta={beta}"))
    rollouts, _ = made.rollouts(0, lambda step, count: problems([7]), clock, prefix=1.0)
    engine: Any = made.collector.engine
    assert len(engine.seen) == 6
    assert (rollouts.group_size, len(rollouts.rewards)) == (N, N)
    assert int(rollouts.lengths.sum()) + rollouts.extra_tokens == engine.tokens
    assert [[request.seed for request in engine.seen].index(seed) for seed in rollouts.ids.tolist()] == kept


def test_dynamic_sampling_of_branches_counts_all_that_was_drawn(prompter: Prompter) -> None:
    overrides = ["branch.enabled=true", "branch.base=2", "branch.total=6", "dynamic.on_exhausted=continue"]
    made = generation(prompter, lambda number, place: place % 2 == 0, config("dynamic.max_tries=2", *overrides))
    rollouts, _ = made.rollouts(0, Questions(), clock, prefix=1.0)
    engine: Any = made.collector.engine
    assert int(rollouts.lengths.sum()) + rollouts.extra_tokens == engine.tokens


def test_empty_share(tmp_path: Path, prompter: Prompter) -> None:
    overrides = ["dynamic.enabled=false", "reward.rule=continuations", "mask.rule=prefix"]
    rollouts, metrics = generation(prompter, varies_from(0), config(*overrides)).rollouts(
        0, lambda step, count: [], clock, prefix=0.2
    )
    assert len(rollouts.rewards) == 0
    assert metrics == {}


# --- one batch ahead ----------------------------------------------------------------------------------------------

AHEAD = ["dynamic.enabled=false", "rollout.async_depth=1", "optim.steps=3"]


def test_the_next_batch_is_drawn_beside_the_update(prompter: Prompter) -> None:
    questions = Questions()
    made = generation(prompter, varies_from(0), config(*AHEAD))
    plain = generation(prompter, varies_from(0), config("dynamic.enabled=false", "optim.steps=3"))
    engine: Any = made.collector.engine
    batches = []
    for step in range(3):
        batches.append(made.rollouts(step, questions, clock, prefix=1.0))
        engine.free.clear()  # whatever is being drawn now does not keep this step from going on
        assert len(engine.seen) <= 4 * N * (step + 2)
        engine.free.set()
        made.wait()
    assert len(engine.seen) == 3 * 4 * N  # nothing after the last step
    assert engine.naps == 0
    made.close()
    draw = Questions()
    for step, (rollouts, metrics) in enumerate(batches):
        expected, means = plain.rollouts(step, draw, clock, prefix=1.0)
        assert rollouts.problems == expected.problems
        assert rollouts.completions == expected.completions
        assert torch.equal(rollouts.rewards, expected.rewards)
        assert metrics.keys() == means.keys()
    asleep: Any = plain.collector.engine
    assert asleep.naps == 3
    assert [request.seed for request in asleep.seen] == [request.seed for request in engine.seen]


def test_an_update_does_not_wait_for_the_next_batch(prompter: Prompter) -> None:
    made = generation(prompter, varies_from(0), config(*AHEAD))
    engine: Any = made.collector.engine
    questions = Questions()
    made.rollouts(0, questions, clock, prefix=1.0)
    made.wait()
    engine.free.clear()
    rollouts, _ = made.rollouts(1, questions, clock, prefix=1.0)  # returns although the engine is stuck
    assert [problem.id for problem in rollouts.problems] == ["q4", "q5", "q6", "q7"]
    assert len(engine.seen) == 2 * 4 * N
    engine.free.set()
    made.wait()
    assert len(engine.seen) == 3 * 4 * N
    made.close()


def test_a_batch_under_way_is_given_up_at_the_end(prompter: Prompter) -> None:
    made = generation(prompter, varies_from(0), config(*AHEAD))
    engine: Any = made.collector.engine
    engine.stopped = SimpleNamespace(set=engine.free.set)
    questions = Questions()
    made.rollouts(0, questions, clock, prefix=1.0)
    made.wait()
    engine.free.clear()
    made.rollouts(1, questions, clock, prefix=1.0)
    made.close()  # within the 60 seconds that the engine would be stuck for
    assert engine.free.is_set()
    engine.stopped = None
    made.close()  # nothing is under way


def test_a_batch_that_waits_survives_a_checkpoint(prompter: Prompter, tmp_path: Path) -> None:
    made = generation(prompter, varies_from(0), config(*AHEAD))
    made.rollouts(0, Questions(), clock, prefix=1.0)
    torch.save(made.state_dict(), tmp_path / "state.pt")
    known = {problem.id: problem for problem in problems(range(20))}
    again = generation(prompter, varies_from(0), config(*AHEAD))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), known)
    rollouts, metrics = again.rollouts(1, lambda step, count: problems(range(8, 12)), clock, prefix=1.0)
    expected, means = made.rollouts(1, lambda step, count: problems(range(8, 12)), clock, prefix=1.0)
    assert rollouts.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        other = rollouts.state_dict()[key]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, key
    assert metrics == means
    for each in (made, again):
        each.wait()
        each.close()
    empty = generation(prompter, varies_from(0), config("dynamic.enabled=false"))
    assert empty.state_dict() == {}


def test_what_goes_wrong_beside_the_update_is_not_lost(prompter: Prompter) -> None:
    made = generation(prompter, varies_from(0), config(*AHEAD))

    def broken(step: int, count: int) -> list[Problem]:
        return problems([0]) if step == 0 else [Problem("x", "no such question", "1")]

    made.rollouts(0, broken, clock, prefix=1.0)
    with pytest.raises(ValueError, match="invalid literal"):
        made.wait()
    made.close()


BRANCHES = ["branch.enabled=true", "branch.base=2", "branch.signal=logprob"]
CONTINUED = ["reward.rule=continuations", "mask.rule=prefix", "reward.continuations=2"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["dynamic.enabled=true"],
        ["dynamic.enabled=false", *CONTINUED],
        ["dynamic.enabled=false", *BRANCHES],
        ["dynamic.enabled=true", *BRANCHES, *CONTINUED],
    ],
    ids=["dynamic sampling", "continuations", "branches", "all of them"],
)
def test_all_of_a_batch_drawn_ahead_is_one_update_old(prompter: Prompter, overrides: list[str]) -> None:
    """Whatever it takes to draw it, and it is the batch that would be drawn one after the other."""
    made = generation(prompter, varies_from(0), config(*overrides, "rollout.async_depth=1", "optim.steps=4"))
    engine: Any = made.collector.engine
    questions, asked, batches, answered = Questions(), [], [], 0
    for step in range(4):
        batches.append(made.rollouts(step, questions, clock, prefix=0.1 * (step + 2)))
        made.wait()  # all that the next step needs is drawn
        asked.append(engine.weights[answered:])
        answered = len(engine.weights)
        engine.updates += 1  # the sync after the update
    made.close()
    assert set(asked[0]) == {0}  # steps 0 and 1
    assert [set(each) for each in asked[1:]] == [{1}, {2}, set()]
    plain = generation(prompter, varies_from(0), config(*overrides, "optim.steps=4"))
    draw = Questions()
    for step, (rollouts, metrics) in enumerate(batches):
        expected, means = plain.rollouts(step, draw, clock, prefix=0.1 * (max(step - 1, 0) + 2))
        assert rollouts.problems == expected.problems
        assert rollouts.completions == expected.completions
        assert torch.equal(rollouts.rewards, expected.rewards)
        assert (rollouts.prefix, rollouts.extra_tokens) == (expected.prefix, expected.extra_tokens)
        assert metrics == means
    asleep: Any = plain.collector.engine
    assert [request.seed for request in asleep.seen] == [request.seed for request in engine.seen]


def test_continuations_keep_the_prefix_they_started_from(prompter: Prompter, tmp_path: Path) -> None:
    """A stall between draw and update lengthens the prefix of the mask, and not that of a batch already rewarded."""
    made = generation(prompter, varies_from(0), config("dynamic.enabled=false", *CONTINUED, *AHEAD[1:]))
    draw = Questions()
    assert made.rollouts(0, draw, clock, prefix=0.2)[0].prefix == 0.2
    torch.save(made.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["rollouts"]["prefix"] == made.rollouts(1, draw, clock, prefix=0.3)[0].prefix == 0.2
    made.wait()
    assert made.rollouts(2, draw, clock, prefix=0.3)[0].prefix == 0.3
    made.close()
