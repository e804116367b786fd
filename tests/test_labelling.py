"""The labelling pass: saved as it goes, continued after a kill, reused."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from aipo.labelling import histogram, label_folder, label_questions, read_labels
from aipo.problems.datasets import Problem
from aipo.record.progress import Progress

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


def test_histogram() -> None:
    assert histogram([3, 3, 5, 3]) == ["  3 3 " + "#" * 40, "  4 0 ", "  5 1 " + "#" * 14]
    wide = histogram([77.5, *range(80, 105)])
    assert [line.split()[0] for line in wide] == [f"{low}-{low + 2}" for low in range(77, 105, 3)]
    assert sum(int(line.split()[1]) for line in wide) == 26
    assert histogram([2.0]) == ["  2 1 " + "#" * 40]
