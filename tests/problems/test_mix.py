"""Sources beyond a JSONL file: Parquet, folders laid out as on the hub, columns of other names, and mixes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aipo.config.data import Columns, Source, TrainSource
from aipo.errors import UserError
from aipo.problems.datasets import Problem, fingerprint, load_mix, load_problems
from aipo.problems.readers import rows_of
from bench import wrong_data


def jsonl(path: Path, *rows: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(path: Path, **columns: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder laid out as a set of the hub is: Parquet with a split in two files, and one of JSONL."""
    for part, questions in enumerate((["a", "b"], ["c"])):
        answers = [str(ord(question)) for question in questions]
        parquet(tmp_path / "set" / "data" / f"train-0000{part}-of-00002.parquet", problem=questions, solved=answers)
    parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", problem=["d"], solved=["1"])
    return tmp_path / "set"


NAMED = Columns(question="problem", answer="solved")


def test_parquet_says_what_jsonl_says(tmp_path: Path) -> None:
    rows = [
        {"id": "x", "question": " q ", "answer": "1/2", "kind": "math", "solution": "so"},
        {"id": "y", "question": "r\u2028s", "answer": "9007199254740993", "kind": "math", "solution": "then"},
    ]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    one = load_problems(jsonl(tmp_path / "a.jsonl", *rows), split="train")
    two = load_problems(parquet(tmp_path / "a.parquet", **columns), split="train")
    assert one == two
    assert fingerprint(one.problems) == fingerprint(two.problems)


def test_whole_numbers_of_parquet_keep_their_digits_and_null_is_no_value(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a.parquet",
        question=["q", "r"],
        answer=[9007199254740993, -7],
        id=[None, 5],
        kind=["math", None],
        options=[None, None],
        solution=[None, "s"],
    )
    first, second = load_problems(Source(path=path), split="train").problems
    assert (first.answer, second.answer) == ("9007199254740993", "-7")
    assert (first.kind, second.kind, second.id) == ("math", "math", "5")
    assert (first.solution, second.solution, first.options) == ("", "s", ())


def test_nested_columns(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "verl.parquet",
        prompt=[[{"role": "user", "content": "q"}], [{"role": "user", "content": "r"}]],
        reward_model=[{"ground_truth": "1"}, {"ground_truth": "2"}],
    )
    columns = Columns(question="prompt.0.content", answer="reward_model.ground_truth")
    problems = load_problems(Source(path=path, columns=columns), split="train").problems
    assert [(p.question, p.answer) for p in problems] == [("q", "1"), ("r", "2")]
    wrong = Source(path=path, columns=Columns(question="prompt.1.content", answer="reward_model.ground_truth"))
    with pytest.raises(UserError, match=r"verl\.parquet, row 1: no 'prompt\.1\.content' \(fields there: prompt, rew"):
        load_problems(wrong, split="train")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"question": ["q", "r"]}, "row 1: no 'answer' (fields there: question); rename or add it"),
        ({"question": ["q", "r"], "answer": ["1", None]}, "row 2: answer is null; fill it"),
        ({"question": ["q", " "], "answer": ["1", "2"]}, "row 2: question is empty"),
        ({"question": ["q", "r"], "answer": [27.0, 28.5]}, "row 1: answer is not a string but 27.0; name a column"),
        ({"question": ["q", "r"], "answer": [True, False]}, "row 1: answer is not a string but True"),
        ({"question": ["q", "r"], "answer": [["1"], ["2"]]}, "row 1: answer is not a string but ['1']"),
        ({"question": ["q", "r"], "answer": ["1", "2"], "kind": ["math", "poem"]}, "row 2: kind 'poem' is unknown"),
        ({"question": [], "answer": []}, "holds no usable problem (0 rows"),
    ],
)
def test_a_bad_row_of_parquet_is_named(tmp_path: Path, columns: dict[str, list[Any]], says: str) -> None:
    path = parquet(tmp_path / "bad.parquet", **columns)
    with pytest.raises(UserError) as caught:
        load_problems(path, split="train")
    assert f"{path}, {says}" in str(caught.value) or f"{path} {says}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parquet_that_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1\x15\x04\xff\xfe")
    with pytest.raises(UserError, match=r"p\.parquet cannot be read as Parquet \(.*\): is it whole\?"):
        load_problems(str(tmp_path / "p.parquet"), split="train")
    assert capfd.readouterr() == ("", "")


def test_a_value_that_cannot_be_read_is_of_a_row(tmp_path: Path) -> None:
    """Also beyond the rows that are read together, and where its column is not asked for."""
    rows = 2500
    days = pa.array([0] * 2222 + [10**9] + [0] * (rows - 2223), pa.date32())  # year 2,739,877
    columns = {"question": [f"q{i}" for i in range(rows)], "answer": ["1"] * rows, "day": days}
    path = parquet(tmp_path / "far.parquet", **columns)
    with pytest.raises(UserError, match=r"far\.parquet, row 2223: holds a value that cannot be read \(days=1000000000"):
        load_problems(path, split="train")
    assert len(load_problems(Source(path=path, rows=2000), split="train").problems) == 2000


@given(st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=3), st.integers(0), st.booleans())
@settings(max_examples=100, deadline=None)
@pytest.mark.slow
def test_damaged_parquet_is_one_line_or_read(flips: list[tuple[int, int]], end: int, cut: bool) -> None:
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "damaged.parquet"
        parquet(path, question=[f"q{i}" for i in range(50)], answer=[str(i) for i in range(50)])
        content = bytearray(path.read_bytes())
        for place, bits in flips:
            content[place % len(content)] ^= bits
        path.write_bytes(content[: end % len(content)] if cut else content)
        assert not wrong_data.complaint(path, [path.name], may_pass=True)


@pytest.mark.parametrize("name", ["hub:", "hub:../x", "x" * 5000, "~nobody-of-that-name/a.jsonl"])
def test_a_path_that_can_be_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"does not exist|cannot be read as a set of the hub"):
        load_problems(name, split="train")


@pytest.mark.slow
def test_every_kind_of_fault_is_one_line(tmp_path: Path) -> None:
    tried, wrong = wrong_data.everything(tmp_path, random.Random(0), count=0)
    assert not wrong
    assert min(tried[form] for form in ("JSONL", "Parquet", "hub folder")) > 20


def test_a_folder_of_the_hub_has_splits(hub: Path) -> None:
    source = Source(path=str(hub), columns=NAMED)
    assert [p.question for p in load_problems(source, split="train").problems] == ["a", "b", "c"]
    test = source.model_copy(update={"split": "test"})
    assert [p.question for p in load_problems(test, split="train").problems] == ["d"]
    missing = source.model_copy(update={"split": "validation"})
    with pytest.raises(UserError, match=r"set has no split 'validation' \(there: train, test\): set split to one"):
        load_problems(missing, split="train")
    with pytest.raises(UserError, match=r"\(BuilderConfig 'main' not found\. Available: \['default'\]\)"):
        load_problems(source.model_copy(update={"subset": "main"}), split="train")
    named = Source(path=str(hub))
    with pytest.raises(UserError, match=r"train-00000-of-00002\.parquet, row 1: no 'question' .*problem, solved"):
        load_problems(named, split="train")
    parquet(hub / "data" / "train-00001-of-00002.parquet", problem=["c"], solved=[None])
    with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet, row 1: solved is null"):
        load_problems(source, split="train")


def test_a_folder_of_jsonl_and_of_something_else(tmp_path: Path) -> None:
    jsonl(tmp_path / "set" / "train.jsonl", {"question": "q", "answer": "9007199254740993"}, {"question": 1})
    with pytest.raises(UserError, match=r"train\.jsonl, row 2: question is not a string but 1; put it in quotes"):
        load_problems(str(tmp_path / "set"), split="train")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("question,answer\nq,1\n")
    with pytest.raises(UserError, match=r"train\.csv is neither Parquet nor JSONL"):
        load_problems(str(tmp_path / "csv"), split="train")


def test_only_the_first_rows_are_read(tmp_path: Path, hub: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"question": f"q{i}", "answer": "1"} for i in range(3)), {"broken": 1})
    assert len(load_problems(Source(path=path, rows=3), split="train").problems) == 3
    assert len(load_problems(Source(path=str(hub), columns=NAMED, rows=2), split="train").problems) == 2
    assert len(load_problems(Source(path="embedded:chain_sum", rows=5), split="train").problems) == 5


def test_signs_of_a_pattern_in_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "a[1]*?"
    rows = list(rows_of(Source(path=jsonl(folder / "a.jsonl", {"question": "q"}))))
    assert [(row, content) for _, row, content, _ in rows] == [(1, {"question": "q"})]
    assert len(list(rows_of(Source(path=parquet(folder / "a.parquet", question=["q", "r"]))))) == 2


def test_a_mix_keeps_every_question_once(tmp_path: Path) -> None:
    def rows(*pairs: tuple[str, str]) -> list[dict[str, str]]:
        return [{"question": question, "answer": answer, "id": str(i)} for i, (question, answer) in enumerate(pairs)]

    one = jsonl(tmp_path / "one.jsonl", *rows(("a", "A"), ("b", "B"), ("b", "B"), ("c", "C")))
    two = jsonl(tmp_path / "two.jsonl", *rows(("b", "B"), ("c", "4"), ("d", "5")))
    mix = load_mix([TrainSource(path=one, kind="choice"), TrainSource(path=two, name="second")])
    assert list(mix) == ["one", "second"]
    assert mix["one"].problems == [
        Problem("one/0", "a", "A", "choice", origin="one"),
        Problem("one/1", "b", "B", "choice", origin="one"),
    ]
    assert mix["second"].problems == [Problem("second/2", "d", "5", origin="second")]
    assert mix["one"].dropped == {"duplicate": 1, "conflicting_answers": 1}
    assert mix["second"].dropped == {"duplicate": 1, "conflicting_answers": 1}
    with pytest.raises(UserError, match=r"all questions of same are in sources before it"):
        load_mix([TrainSource(path=one), TrainSource(path=one, name="same")])
    assert not mix["one"].problems[0].protected
    assert Problem("mine/gpqa_diamond/0", "q", "A").protected


def test_origins_are_part_of_the_fingerprint() -> None:
    plain = Problem("1", "q", "a")
    assert fingerprint([plain]) != fingerprint([Problem("1", "q", "a", origin="x")])
