import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aipo.errors import UserError
from aipo.problems.datasets import Problem, fingerprint, load_problems, render_options, reshuffled, stem


def write(path: Path, *rows: object) -> str:
    """A JSONL file; strings are written as they are, so that a row can be broken JSON."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


GOOD = {"question": "1 + 1 =", "answer": "2"}


def test_rows_become_problems(tmp_path: Path) -> None:
    spec = write(
        tmp_path / "p.jsonl",
        {"id": "a", "question": " Which? ", "answer": "C", "kind": "choice", "source": "gpqa"},
        "",
        {"id": 60, "question": "2\u2028lines", "answer": "9007199254740993", "ability": "MATH"},
        {"id": "c", "question": "Which one?", "answer": "(b)", "kind": "choice"},
        {"id": "d", "question": "Issue number", "answer": "No. #### is it"},
    )
    first, second, *others = load_problems(spec, split="train").problems
    assert [problem.answer for problem in others] == ["(b)", "No. #### is it"]
    assert first == Problem("a", "Which?", "C", "choice", "gpqa")
    assert second == Problem("60", "2\u2028lines", "9007199254740993", "math", "")


def test_made_ids_depend_on_the_question_only(tmp_path: Path) -> None:
    one = load_problems(write(tmp_path / "a", GOOD), split="train").problems
    two = load_problems(write(tmp_path / "b", {"question": "x", "answer": "1"}, GOOD), split="train").problems
    assert one[0].id == two[1].id != two[0].id


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"question": ', "not JSON"),
        ('{"question": "1+1", "answer": "2", "answer": "3"}', "answer stands twice"),
        ('{"question": ' + "[" * 200_000 + "]" * 200_000 + "}", "not JSON"),
        ("[1]", "not a JSON object but list"),
        ({"question": "x \ud83d", "answer": "1"}, "surrogate"),
        ({"question": "x", "answer": "1", "source": "\udc00"}, "surrogate"),
        ({"answer": "1"}, "no 'question'"),
        ({"question": "x", "solution": "1"}, "no 'answer' (fields there: question, solution)"),
        ({"question": "x", "answer": ""}, "answer is empty"),
        ({"question": " ", "answer": "1"}, "question is empty"),
        ({"question": "x", "answer": 27.0}, "answer is not a string but 27.0"),
        ({"question": "x", "answer": None}, "answer is null; fill it or remove the row"),
        ({"question": "x", "answer": "1", "id": None}, "id is null; remove it"),
        ({"question": "x", "answer": "9 * 2 = 18\n#### 18"}, "answer is a worked solution with a line '#### ...'"),
        ({"question": "x", "answer": "#### 18"}, "python data/prepare.py gsm8k (--from FILE) take it apart"),
        ({"question": "x", "answer": "No", "kind": "choice"}, "the answer of a choice names no letter; write"),
        ({"question": "x", "answer": "AB", "kind": "choice"}, "the answer of a choice names no letter"),
        ({"question": "x", "answer": "1", "id": 3.0}, "id is not a string"),
        ({"question": "x", "answer": "1", "kind": "essay"}, "kind 'essay' is unknown"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: object, says: str) -> None:
    spec = write(tmp_path / "bad.jsonl", GOOD, row)
    with pytest.raises(UserError) as caught:
        load_problems(spec, split="train")
    message = str(caught.value)
    assert f"{spec}, row 2: " in message
    assert says in message
    assert "\n" not in message


def test_missing_file_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist: put a JSONL file there"):
        load_problems(str(tmp_path / "nowhere.jsonl"), split="train")
    with pytest.raises(UserError, match=r"cannot be read as a set of the hub .*doesn't contain any data files"):
        load_problems(str(tmp_path), split="train")


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"PAR1\x15\x04\xff\xfe")
    with pytest.raises(UserError, match=r"p\.jsonl is not UTF-8 text"):
        load_problems(str(tmp_path / "p.jsonl"), split="train")


def test_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no usable problem"):
        load_problems(write(tmp_path / "p.jsonl"), split="train")


def test_unknown_embedded_set() -> None:
    with pytest.raises(UserError, match="unknown embedded problems 'embedded:sums'"):
        load_problems("embedded:sums", split="train")


def test_duplicates_and_conflicts_are_counted(tmp_path: Path) -> None:
    spec = write(
        tmp_path / "p.jsonl",
        {"question": "a", "answer": "1"},
        {"question": "b", "answer": "1"},
        {"question": "a", "answer": "1", "id": "again"},
        {"question": "b", "answer": "2"},
        {"question": "b", "answer": "1"},
        {"question": "c", "answer": "3"},
    )
    loaded = load_problems(spec, split="train")
    assert [(p.question, p.answer) for p in loaded.problems] == [("a", "1"), ("c", "3")]
    assert loaded.dropped == {"duplicate": 1, "conflicting_answers": 3}


@given(rows=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("12")), min_size=1, max_size=12))
@pytest.mark.slow
def test_every_row_is_kept_or_counted(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    agreed = {q for q, _ in rows if len({a for r, a in rows if r == q}) == 1}
    spec = write(tmp_path_factory.mktemp("rows") / "p", *({"question": q, "answer": a} for q, a in rows))
    if not agreed:
        with pytest.raises(UserError, match="no usable problem"):
            load_problems(spec, split="train")
        return
    loaded = load_problems(spec, split="train")
    assert {p.question for p in loaded.problems} == agreed
    assert loaded.dropped["conflicting_answers"] == sum(q not in agreed for q, _ in rows)
    assert len(loaded.problems) + sum(loaded.dropped.values()) == len(rows)


def test_one_id_for_two_questions_is_an_error_and_for_a_repeat_is_not(tmp_path: Path) -> None:
    a, b = {"id": "7", "question": "a", "answer": "1"}, {"id": "7", "question": "b", "answer": "1"}
    assert load_problems(write(tmp_path / "same", a, a), split="train").dropped["duplicate"] == 1
    with pytest.raises(UserError, match=r"two, row 3: a different question than .*two, row 1 with the same id '7'"):
        load_problems(write(tmp_path / "two", a, a, b), split="train")


def test_fingerprint_sees_every_field_and_the_order() -> None:
    problems = [Problem("1", "q", "a"), Problem("2", "r", "b")]
    changed = [replace(problems[0], **{field: "other"}) for field in ("id", "question", "answer", "kind", "source")]
    prints = {fingerprint(problems), fingerprint(problems[::-1]), fingerprint(problems[:1])}
    prints |= {fingerprint([c, problems[1]]) for c in changed}
    assert len(prints) == 3 + len(changed)
    assert fingerprint(list(problems)) == fingerprint(tuple(problems))


CHOICE = {
    "question": "Which is even?\n\nA) 1\nB) 2\nC) 3",
    "answer": "B",
    "kind": "choice",
    "options": ["1", "2", "3"],
}


def test_options_are_read_and_rendered(tmp_path: Path) -> None:
    (problem,) = load_problems(write(tmp_path / "p.jsonl", CHOICE), split="train").problems
    assert problem.options == ("1", "2", "3")
    assert render_options(problem.options) == "\n\nA) 1\nB) 2\nC) 3"
    assert stem(problem) == "Which is even?"
    assert stem(Problem("1", "Which?", "A", "choice")) == "Which?"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "math"}, "options go with kind"),
        ({"options": "123"}, "not a list of strings"),
        ({"options": ["1", 2, "3"]}, "not a list of strings"),
        ({"options": ["1", " ", "3"]}, "not a list of strings"),
        ({"options": ["1"]}, "2 to 10 and all different"),
        ({"options": []}, "2 to 10 and all different"),
        ({"options": ["1", "2", "1"]}, "2 to 10 and all different"),
        ({"options": [str(i) for i in range(11)]}, "2 to 10 and all different"),
        ({"answer": "D"}, "not a letter from A to C"),
        ({"answer": "b"}, "not a letter from A to C"),
        ({"answer": "AB"}, "not a letter from A to C"),
        ({"options": ["1", "3", "2"]}, "does not end with its options"),
        ({"question": "Which is even?\nA) 1\nB) 2\nC) 3"}, "does not end with its options"),
    ],
)
def test_bad_options_are_named_without_their_text(tmp_path: Path, change: dict[str, object], says: str) -> None:
    spec = write(tmp_path / "p.jsonl", GOOD, CHOICE | change)
    with pytest.raises(UserError, match="row 2: ") as caught:
        load_problems(spec, split="train")
    assert says in str(caught.value)
    assert "even" not in str(caught.value)


@given(
    options=st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=10, unique=True),
    right=st.integers(0, 9),
    seed=st.integers(0, 2**64),
)
def test_reshuffling_moves_the_letter_with_its_option(options: list[str], right: int, seed: int) -> None:
    right %= len(options)
    problem = Problem("1", "Which?" + render_options(options), "ABCDEFGHIJ"[right], "choice", "s", tuple(options))
    moved = reshuffled(problem, seed)
    assert sorted(moved.options) == sorted(options)
    assert moved.options["ABCDEFGHIJ".index(moved.answer)] == options[right]
    assert moved.question == "Which?" + render_options(moved.options)
    assert (moved.id, moved.kind, moved.source) == ("1", "choice", "s")
    assert moved == reshuffled(problem, seed)


def test_all_orders_come_up_and_problems_without_options_stay() -> None:
    options = ("x", "y", "z")
    problem = Problem("1", "Which?" + render_options(options), "A", "choice", options=options)
    assert len({reshuffled(problem, seed).options for seed in range(60)}) == 6
    plain = Problem("1", "Which?", "A", "choice")
    assert reshuffled(plain, 7) == plain


def test_fingerprint_is_that_of_before_there_were_options_and_sees_them() -> None:
    plain = Problem("1", "q", "a")
    assert fingerprint([plain]) == hashlib.sha256(b'["1", "q", "a", "math", ""]\n').hexdigest()
    one = Problem("1", "q", "A", "choice", options=("x", "y"))
    assert len({fingerprint([p]) for p in (one, replace(one, options=("y", "x")), replace(one, options=()))}) == 3
    assert len({fingerprint([p]) for p in (plain, replace(plain, solution="s"), replace(plain, source="s"))}) == 3


def test_a_solution_is_read_and_must_be_text(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "1", "solution": "So it is 1."}
    assert load_problems(write(tmp_path / "data", row), split="train").problems[0].solution == "So it is 1."
    with pytest.raises(UserError, match="row 1: solution is not a string"):
        load_problems(write(tmp_path / "bad", row | {"solution": 1}), split="train")


def test_places_of_critical_tokens_are_read_and_must_be_whole_numbers(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "1", "critical": [0, 4]}
    (problem,) = load_problems(write(tmp_path / "data", row), split="train").problems
    assert problem.critical == (0, 4)
    assert fingerprint([problem]) != fingerprint([replace(problem, critical=())])
    for bad in (3, [-1], [True], ["0"]):
        with pytest.raises(UserError, match="row 1: critical is not a list of whole numbers"):
            load_problems(write(tmp_path / "bad", row | {"critical": bad}), split="train")
