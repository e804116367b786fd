from __future__ import annotations

import json
from pathlib import Path

import pytest

from aipo.errors import UserError
from aipo.evaluation.benchmarks import load_benchmarks


def write(path: Path, count: int, **more: str) -> Path:
    rows = [{"question": f"What is {i}?", "answer": str(i), **more} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_of_ones_own_and_the_embedded_set(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.jsonl", 5)
    own, embedded = load_benchmarks([str(mine), "embedded"], limit=3)
    assert (own.name, len(own.problems)) == ("mine", 3)
    assert (embedded.name, len(embedded.problems)) == ("embedded", 3)
    (whole,) = load_benchmarks([str(mine)])
    assert whole.fingerprint == own.fingerprint  # of the whole set: a limit is no other benchmark
    write(mine, 6)
    assert load_benchmarks([str(mine)])[0].fingerprint != own.fingerprint


def test_dropped_rows_are_told(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.jsonl", 2)
    mine.write_text(mine.read_text() * 2)
    said: list[str] = []
    load_benchmarks([str(mine)], say=said.append)
    assert said == ["mine: 2 rows dropped (2 duplicate)"]


def test_prepared_benchmarks_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    write(Path("data/aime24.jsonl"), 30)
    write(Path("data/math500.jsonl"), 500)
    assert [(b.name, len(b.problems)) for b in load_benchmarks(["aime24", "math"])] == [
        ("aime24", 30),
        ("math500", 500),
    ]


def test_unknown_names_and_double_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mathh500 is unknown: did you mean math500"):
        load_benchmarks(["mathh500"])
    with pytest.raises(UserError, match=r"gone\.jsonl does not exist"):
        load_benchmarks([str(tmp_path / "gone.jsonl")])
    (tmp_path / "other").mkdir()
    files = [str(write(folder / "mine.jsonl", 1)) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(UserError, match="mine is named twice"):
        load_benchmarks(files)
