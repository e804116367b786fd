"""The labelling pass: saved as it goes, continued after a kill, reused."""

from __future__ import annotations

import copy
import statistics
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from aipo.config import load_config
from aipo.config.sections import CurriculumConfig, MaskConfig
from aipo.labelling import histogram, label, label_code, label_folder, label_questions, peaks, read_labels
from aipo.layout import MicroBatch
from aipo.passes import Passes
from aipo.problems.datasets import Problem
from aipo.record.progress import Progress
from aipo.rollout.base import Completion, Sampling
from aipo.rollouts import Rollouts
from aipo.scorer import batch_scores
from aipo.selection import TokenSelector
from aipo.trainer import Trainer

PROBLEMS = [Problem(f"q{i}", f"{i} + 1", str(i + 1)) for i in range(10)]
EXPECTED = {f"q{i}": float(i) for i in range(10)}


class Labeller:
    """Labels a question with its number; fails on the n-th block if told to, as a kill would."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.asked: list[str] = []
        self.blocks, self.fail_at = 0, fail_at

    def __call__(self, problems: Sequence[Problem]) -> dict[str, float]:
        self.blocks += 1
        if self.blocks == self.fail_at:
            raise KeyboardInterrupt
        self.asked += [problem.id for problem in problems]
        return {problem.id: float(problem.id[1:]) for problem in problems}


def run(label: Labeller, folder: Path) -> dict[str, float]:
    return label_questions(PROBLEMS, label, folder, block=3, progress=Progress(1, active=False))


def test_all_questions_once_and_never_again(tmp_path: Path) -> None:
    first, second = Labeller(), Labeller()
    assert run(first, tmp_path / "labels") == EXPECTED
    assert sorted(first.asked) == sorted(EXPECTED)
    assert first.blocks == 4
    assert run(second, tmp_path / "labels") == EXPECTED
    assert second.asked == []


def test_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    killed, after = Labeller(fail_at=3), Labeller()
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path)
    assert len(read_labels(tmp_path)) == 6
    assert run(after, tmp_path) == EXPECTED
    assert sorted(killed.asked + after.asked) == sorted(EXPECTED)


def test_a_torn_line_is_labelled_again(tmp_path: Path) -> None:
    run(Labeller(), tmp_path)
    file = tmp_path / "rank-0.jsonl"
    file.write_text(file.read_text()[:-8])
    after = Labeller()
    assert run(after, tmp_path) == EXPECTED
    assert after.asked == ["q9"]
    assert read_labels(tmp_path) == EXPECTED


def test_a_block_of_which_a_part_was_saved_is_labelled_as_a_whole(tmp_path: Path) -> None:
    run(Labeller(), tmp_path)
    file = tmp_path / "rank-0.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    after = Labeller()
    assert run(after, tmp_path) == EXPECTED
    assert after.asked == [f"q{i}" for i in range(3, 10)]  # in the blocks of a run that nothing disturbs
    assert after.blocks == 3


def test_runs_that_share_labels_make_them_once(tmp_path: Path) -> None:
    """Two at once, as a campaign starts them: the second waits for the first and asks for nothing."""
    began, go_on = threading.Event(), threading.Event()

    class Slow(Labeller):
        def __call__(self, problems: Sequence[Problem]) -> dict[str, float]:
            began.set()
            assert go_on.wait(60)
            return super().__call__(problems)

    first, second = Slow(), Labeller()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(run, first, tmp_path)
        assert began.wait(60)
        other = pool.submit(run, second, tmp_path)
        assert not wait([other], timeout=0.3).done
        go_on.set()
        assert one.result(60) == other.result(60) == EXPECTED
    assert second.asked == []


def test_labels_of_other_facts_lie_elsewhere(tmp_path: Path) -> None:
    one = label_folder(tmp_path, model="a", identity={"mi.sigma": 50.0})
    assert one == label_folder(tmp_path, identity={"mi.sigma": 50.0}, model="a")
    assert one != label_folder(tmp_path, model="b", identity={"mi.sigma": 50.0})
    assert one != label_folder(tmp_path, model="a", identity={"mi.sigma": 40.0})


def test_other_code_makes_other_labels(tmp_path: Path) -> None:
    for name in ("mi.py", "loss.py", "rollout/hf.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    before = label_code(tmp_path)
    (tmp_path / "loss.py").write_text("2")
    assert label_code(tmp_path) == before
    (tmp_path / "rollout" / "hf.py").write_text("2")
    assert label_code(tmp_path) != before


def test_histogram() -> None:
    assert histogram([3, 3, 5, 3]) == ["  3 3 " + "#" * 40, "  4 0 ", "  5 1 " + "#" * 14]
    wide = histogram([77.5, *range(80, 105)])
    assert [line.split()[0] for line in wide] == [f"{low}-{low + 2}" for low in range(77, 105, 3)]
    assert sum(int(line.split()[1]) for line in wide) == 26
    assert histogram([2.0]) == ["  2 1 " + "#" * 40]


# --- from rollouts to labels --------------------------------------------------------------------------------------

NAN = float("nan")


def rollouts_of(problems: Sequence[Problem], lengths: Sequence[int]) -> Rollouts:
    """Completions of so many tokens, equally many of each question."""
    return Rollouts(
        problems=list(problems),
        prompts=[[1, 2]] * len(problems),
        completions=[Completion([3] * n, [0.0] * n, "stop") for n in lengths],
        group_size=len(lengths) // len(problems),
        ids=torch.arange(len(lengths)),
    )


def test_peaks_by_hand() -> None:
    """Of a question the mean of its rollouts, each over its own tokens; those that were not scored are left out."""
    rollouts = rollouts_of(PROBLEMS[:3], [6, 4, 5, 5, 4, 6])
    scores = torch.tensor(
        [
            [0, 1, 0, 1, 0, NAN],  # its last token was not scored, so it does not count
            [0, 1, 0, 0, 9, 9],  # one peak, and 9 behind its end
            [0, 1, 0, 1, 0, NAN],  # two: the second needs the last token
            [1, 0, 0, 0, 1, NAN],  # none: an end is no peak
            [NAN, NAN, NAN, NAN, 0, 0],
            [NAN, 1, 0, 1, 0, 0],
        ]
    )
    assert peaks(rollouts, scores, CurriculumConfig(), MaskConfig()) == {"q0": 1.0, "q1": 1.0}
    scores[0, 5] = 0
    assert peaks(rollouts, scores, CurriculumConfig(), MaskConfig()) == {"q0": 1.5, "q1": 1.0}
    probed = CurriculumConfig(probe_tokens=4)
    assert peaks(rollouts, scores, probed, MaskConfig()) == {"q0": 1.0, "q1": 0.5}
    assert peaks(rollouts, scores, CurriculumConfig(), MaskConfig(kappa_start=1.6)) == {"q0": 0.5, "q1": 0.0}


class ScriptedPasses(Passes):
    """States by the place of a token, in sequences that the test knows."""

    def __init__(self, config: Any, lengths: Sequence[int]) -> None:
        super().__init__(config, None, None, torch.device("cpu"))  # type: ignore[arg-type]
        draw = torch.Generator().manual_seed(0)
        self.of_row = [torch.randn(n, 5, generator=draw) for n in lengths]
        self.gold = torch.randn(len(lengths), 5, generator=draw)
        self.woken: list[object] = []

    def wake(self, engine: Any) -> None:
        self.woken.append(engine)

    def gold_states(self, problems: Sequence[Problem]) -> Tensor:
        return self.gold[: len(problems)]

    def states(self, micro: MicroBatch) -> Tensor:
        return torch.cat([self.of_row[row] for row in micro.rows.tolist()])


def test_labelling_leaves_no_trace() -> None:
    """Not even in running statistics: a run that labels trains as one that finds its labels made."""
    keys = ["mi.estimator=pointwise", "mi.sigma=median", "mask.scope=running", "mask.kappa_start=0.2"]
    keys += ["rollout.max_tokens=30", "curriculum.probe_tokens=20", "rollout.temperature=0.7"]
    config = load_config("tiny.yaml", keys)
    lengths = [20, 7, 13, 20]
    passes, selector = ScriptedPasses(config, lengths), TokenSelector(config)
    asked: list[tuple[Sampling, dict[str, Any]]] = []

    def collect(problems: Sequence[Problem], sampling: Sampling, **options: Any) -> Rollouts:
        asked.append((sampling, options))
        return rollouts_of(problems, lengths)

    naps: list[int] = []
    engine = SimpleNamespace(sleep=lambda: naps.append(len(asked)))
    collector: Any = SimpleNamespace(engine=engine, collect=collect)
    hidden, count = torch.cat(passes.of_row), torch.tensor(lengths)
    scores = batch_scores(hidden, passes.gold, count, estimator="pointwise", num_features=256, sigma="median")
    found = [peaks_by_loops(own.tolist(), 0.2) for own in scores.split(lengths)]
    for steps in range(2):  # before the first step, and with what a step has left
        before = copy.deepcopy(selector.state_dict())
        assert [len(before["rule"]), int(before["scorer"]["steps"])] == [2 * steps, steps]
        labels = label(PROBLEMS[:4], collector, passes, selector)
        torch.testing.assert_close(selector.state_dict(), before, rtol=0, atol=0)
        if steps == 0:
            assert [labels[f"q{i}"] for i in range(4)] == found
            selector.scorer.observe(hidden, passes.gold, count)
            selector.scorer.reduce()
            selector.rule.select(scores[None], count.sum()[None], kappa=0.2, step=0, rollout_ids=torch.tensor([0]))
    # nothing is drawn that no peak is counted in, nothing is judged, and the engine makes room for the states
    assert asked == [(Sampling(20, 0.7), {"samples": 1, "stream": "label", "submit": False})] * 2
    assert (passes.woken, naps) == ([engine] * 2, [1, 2])


def peaks_by_loops(scores: list[float], kappa: float) -> int:
    """Scores above both neighbours and above mean + kappa deviations."""
    bar = statistics.fmean(scores) + kappa * statistics.pstdev(scores)
    return sum(a < b > c and b > bar for a, b, c in zip(scores, scores[1:], scores[2:]))


def test_questions_are_relabelled_from_their_newest_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second step, those seen since, of all ranks; a question seen twice by what was seen last."""
    relabelled: list[tuple[int, dict[str, float]]] = []
    trainer: Any = SimpleNamespace(config=load_config("tiny.yaml", ["curriculum.refresh_every=2"]), newest_peaks={})
    trainer.curriculum = SimpleNamespace(relabel=lambda labels: relabelled.append((trainer.step, labels)))
    of_other_rank = iter([{}, {"q9": 7.0}, {"q8": 2.0}, {}, {}])
    monkeypatch.setattr("aipo.distributed.gather_objects", lambda own: [own, next(of_other_rank)])

    def step(trainer: Any, number: int, found: dict[int, int]) -> None:
        """A batch with so many peaks in the one rollout of each question."""
        trainer.step = number
        scores = torch.tensor([[0.0, *[1.0, 0.0] * count, *[0.0] * (6 - 2 * count)] for count in found.values()])
        rollouts = rollouts_of([PROBLEMS[q] for q in found], [7] * len(found))
        Trainer.refresh_labels(trainer, rollouts, SimpleNamespace(scores=scores))  # type: ignore[arg-type]

    for number, found in enumerate([{0: 1, 1: 2}, {1: 3}, {2: 1}, {0: 3, 2: 2}, {1: 1}], 1):
        step(trainer, number, found)
    assert relabelled == [(2, {"q0": 1.0, "q1": 3.0, "q9": 7.0}), (4, {"q0": 3.0, "q2": 2.0, "q8": 2.0})]
    assert trainer.newest_peaks == {"q1": 1.0}
    never = SimpleNamespace(config=load_config("tiny.yaml"), newest_peaks={})
    step(never, 2, {0: 1})
    assert never.newest_peaks == {}
