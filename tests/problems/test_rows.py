import csv
import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aipo.errors import UserError
from aipo.problems.datasets import Problem
from aipo.problems.rows import looks_rounded, plain_integer, read_gpqa, read_gsm8k, read_plain, read_rows, read_verl

ROWS = [{"problem": "1\u2028+ 1?", "answer": "2"}, {"problem": "求 2_3", "answer": "2516_8"}]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "array.json", "lines.json", "a.csv"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif name == "a.csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0].keys())
            writer.writeheader()
            writer.writerows(ROWS)
    elif name == "array.json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    else:
        path.write_text("\ufeff" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS), encoding="utf-8")
    assert list(read_rows(path)) == ROWS


@pytest.mark.parametrize(
    ("name", "content"), [("a.parquet", b"PAR1"), ("a.json", b'{"a":'), ("a.csv", b"a\n\xff"), ("a.txt", b"")]
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_broken_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "1"}\n{"a": "1", "b": "2"\n')
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read as jsonl \(row 2: Expecting ',' delimiter"):
        list(read_rows(tmp_path / "a.jsonl"))


def test_json_numbers_keep_their_digits(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 27.0, "b": 105263157894736842, "c": 0.1000000000000000000001}')
    (row,) = read_rows(tmp_path / "a.json")
    assert row == {"a": Decimal("27.0"), "b": 105263157894736842, "c": Decimal("0.1000000000000000000001")}


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("2516_8", "2516_8"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("27.0", "27.0"),  # text stays what it is; what should be an integer is tidied later
        (Decimal("27.0"), "27"),
        (27.0, "27"),
        (-1.0, "-1"),
        (0.5, "0.5"),
        (Decimal("1E+22"), "1" + "0" * 22),
        (105263157894736842, "105263157894736842"),
        (0, "0"),
    ],
)
def test_answers_become_text_digit_by_digit(answer: object, text: str) -> None:
    assert read_plain({"problem": "q", "answer": answer}) == Problem("", "q", text)


@pytest.mark.parametrize("answer", [1.0526315789473685e17, float("nan"), float("inf"), True, [1], None, " ", "\ud83d"])
def test_answers_that_are_none_are_refused(answer: object) -> None:
    with pytest.raises(ValueError, match="answer"):
        read_plain({"problem": "q", "answer": answer})


def test_names_that_copies_use() -> None:
    assert read_plain({"Problem": "q", "Answer": 33, "Solution": "long"}) == Problem("", "q", "33")
    assert read_plain({"problem": "q", "question": "", "solution": r"\boxed{204}"}) == Problem("", "q", "204")
    assert read_plain({"problem": "q", "solution": r"so \boxed{1}", "answer": "2"}).answer == "2"
    assert read_plain({"problem": "q", "solution": "7", "answer": 0}).answer == "0"
    with pytest.raises(ValueError, match=r"no answer or .* \(columns with content: problem, solution\)"):
        read_plain({"problem": "q", "solution": r"We see that it is \boxed{204}."})


BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def test_verl_rows_lose_the_instructions() -> None:
    turns = [{"role": "system", "content": "Be nice."}, {"role": "user", "content": f"{BEFORE}Solve x = 1.{AFTER}"}]
    row = {"prompt": turns, "reward_model": {"ground_truth": "1", "style": "rule"}, "data_source": "math_dapo"}
    problem = read_verl(row)
    assert (problem.question.strip(), problem.answer) == ("Solve x = 1.", "1")
    assert read_verl({"prompt": "Solve x = 1.", "solution": "34"}) == Problem("", "Solve x = 1.", "34")
    chinese = (
        "求 x\n让我们一步一步地思考。请以“Answer: \\boxed{<final_answer>}”的格式输出最终答案。"
        "如果是选择题，请按顺序输出正确的选项，不带任何标点或空格。对于其他类型的问题，请只输出最终答案的数值。"
    )
    assert (
        read_verl({"prompt": [{"role": "user", "content": chinese}], "reward_model": {"ground_truth": "1"}}).question
        == "求 x\n"
    )


@pytest.mark.parametrize("prompt", [[{"content": "q"}], ["q"], [], None])
def test_verl_rows_of_another_shape(prompt: object) -> None:
    with pytest.raises(ValueError, match="prompt"):
        read_verl({"prompt": prompt, "reward_model": {"ground_truth": "1"}})


def test_gsm8k_rows() -> None:
    assert read_gsm8k({"question": "q", "answer": "48/2 = <<48/2=24>>24\n#### 1,024"}).answer.strip() == "1,024"
    with pytest.raises(ValueError, match="####"):
        read_gsm8k({"question": "q", "answer": "24"})


def test_gpqa_rows() -> None:
    row = {"Question": "Which?\n", "Correct Answer": "w \n", "Subdomain": "Optics", "Record ID": "rec1"}
    row |= {f"Incorrect Answer {i}": text for i, text in enumerate("xyz", start=1)}
    question = "Which?\n\nA) w\nB) x\nC) y\nD) z"
    assert read_gpqa(row) == Problem("", question, "A", "choice", "", ("w", "x", "y", "z"))
    with pytest.raises(ValueError, match="no Incorrect Answer 3"):
        read_gpqa(row | {"Incorrect Answer 3": None})


@pytest.mark.parametrize(
    ("answer", "integer"),
    [
        (r"336^\circ", "336"),
        (r"336^{\circ}", "336"),
        ("336°", "336"),
        ("025", "25"),
        ("000", "0"),
        ("27.0", "27"),
        ("$1,450,000$", "1450000"),
        ("-3", "-3"),
        ("105263157894736842", "105263157894736842"),
        ("2516_8", "2516_8"),
        ("27.5", "27.5"),
        ("1,23", "1,23"),
        ("3, 5", "3, 5"),
        ("50\\%", "50\\%"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_plain_integer(answer: str, integer: str) -> None:
    assert plain_integer(answer) == integer


@given(st.integers())
def test_integers_stay(number: int) -> None:
    assert plain_integer(str(number)) == str(number)
    assert plain_integer(f"{number:,}") == str(number)


def test_rounded_answers_are_told_from_round_ones() -> None:
    rounded = ["105263157894736848", "22099999999999998951424", "-105263157894736848"]
    fine = ["105263157894736842", "2" + "0" * 22, "9007199254740992", "34", "-1", "2516_8", "", "9" * 5000]
    assert [a for a in (*rounded, *fine) if looks_rounded(a)] == rounded


@given(st.integers(2**53 + 1, 10**30))
def test_what_a_float_kept_is_never_called_rounded_unless_a_float_holds_it(number: int) -> None:
    if looks_rounded(str(number)):
        assert int(float(number)) == number
