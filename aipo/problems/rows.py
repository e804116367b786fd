"""Rows of data files: what a row of each shape says, as a problem, with every digit as it was.

The readers take one row and return a problem without id and source, white space and all. What is wrong with a row
they say by ValueError, in words that show none of its text.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from aipo.errors import UserError
from aipo.problems.datasets import Problem, render_options

Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a parquet, JSON (an array, or an object a line) or CSV file. UserError if it cannot be read."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet  # a big library, for this alone

            # in pieces: DAPO's file repeats its rows a hundred times
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=10_000):
                yield from batch.to_pylist()
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from csv.DictReader(file)
        elif path.suffix in (".json", ".jsonl"):
            yield from _json_rows(path.read_text(encoding="utf-8-sig"))
        else:
            raise UserError(f"{path} is none of {', '.join(SUFFIXES)}: convert it, or name another file")
    except (ValueError, OSError, csv.Error) as error:  # ValueError: not JSON, not UTF-8, not parquet
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as {path.suffix[1:]} ({reason}): is it whole?") from error


def _json_rows(text: str) -> Iterator[Row]:
    """ValueError for what is not JSON; of an object a line it names the row."""
    if text.lstrip().startswith("["):
        yield from json.loads(text, parse_float=Decimal)
        return
    # split at "\n" only: splitlines also breaks at characters that JSON strings may hold
    for row, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line, parse_float=Decimal)
            except ValueError as error:
                raise ValueError(f"row {row}: {error}") from error


def read_plain(row: Row) -> Problem:
    """``question`` or ``problem`` with ``answer``, under the names that common copies give them."""
    if (bare := _BARE_SOLUTION.fullmatch(str(row.get("solution")).strip())) and row.get("answer") in (None, ""):
        row = row | {"answer": bare[1] or bare[2]}
    question = _text(row, "question", "problem", "Question", "Problem", "prompt")
    return Problem("", question, _text(row, "answer", "Answer", "final_answer", "expected_answer"))


def read_verl(row: Row) -> Problem:
    """``prompt`` (turns of a chat) with ``reward_model.ground_truth``; without the instructions around the question."""
    if isinstance(row.get("prompt"), list):
        try:
            row = row | {"prompt": "\n".join(turn["content"] for turn in row["prompt"] if turn["role"] == "user")}
        except (KeyError, TypeError) as error:
            raise ValueError("its prompt is not a list of turns with role and content") from error
    if isinstance(row.get("reward_model"), dict):
        row = {"prompt": row.get("prompt"), "answer": row["reward_model"].get("ground_truth")}
    problem = read_plain(row)
    question = problem.question
    for before, after in _INSTRUCTIONS:
        question = question.removeprefix(before).removesuffix(after)
    return replace(problem, question=question)


def read_gsm8k(row: Row) -> Problem:
    """``answer`` is a worked solution whose last line is ``#### 1,234``."""
    solution, marks, answer = _text(row, "answer").rpartition("####")
    if not marks:
        raise ValueError("its answer has no '#### ' line")
    return Problem("", _text(row, "question"), answer, solution=solution.strip())


def read_gpqa(row: Row) -> Problem:
    """A stem, the right and three wrong answers; the right one comes out as A, to be shuffled."""
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    options = tuple(_text(row, name).strip() for name in names)
    return Problem("", _text(row, "Question").strip() + render_options(options), "A", "choice", options=options)


# a solution column that holds nothing but the answer
_BARE_SOLUTION = re.compile(r"\\boxed\{(.*)\}|(-?\d+)")
_INSTRUCTIONS = (
    (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.",
        'Remember to put your answer on its own line after "Answer:".',
    ),
    # in some of the Chinese rows: reason step by step, answer in this format, the letters for multiple choice
    (
        "",
        "让我们一步一步地思考。请以“Answer: \\boxed{<final_answer>}”的格式输出最终答案。"
        "如果是选择题，请按顺序输出正确的选项，不带任何标点或空格。对于其他类型的问题，请只输出最终答案的数值。",
    ),
)


def _text(row: Row, *names: str) -> str:
    """The first of these columns that is not empty, as text. A number keeps its digits or is refused: ValueError."""
    for name in names:
        value = row.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if isinstance(value, float) and not abs(value) < 2**53:
            raise ValueError(f"its {name} is the float {value}, which has lost digits: take a copy that has text")
        if isinstance(value, float | Decimal):  # 27.0, as float64 in parquet or as a number in JSON
            value = re.sub(r"\.0+$", "", format(Decimal(repr(value)) if isinstance(value, float) else value, "f"))
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(f"its {name} is not text but {type(value).__name__}")
        if re.search(r"[\ud800-\udfff]", text := str(value)):
            raise ValueError(f"its {name} holds half of a surrogate pair, which is no character")
        return text
    raise ValueError(f"no {' or '.join(names)} (columns with content: {', '.join(k for k in row if k and row[k])})")


def plain_integer(answer: str) -> str:
    r"""``336^\circ``, ``025``, ``27.0``, ``$1,234$`` -> the integer alone, by its text; anything else as it is."""
    found = _DECORATED.fullmatch(answer)
    return str(int(found[1].replace(",", ""))) if found else answer


_DECORATED = re.compile(
    r"\$?\s*(-?(?:\d{1,3}(?:,\d{3})+|\d{1,1000}))(?:\.0+)?\s*(?:\^\{?\\circ\}?|\\degree|°)?\s*\.?\s*\$?"
)


def looks_rounded(answer: str) -> bool:
    """An integer beyond 2^53 that a float holds exactly, although its digits are not the shortest for that float.

    105263157894736848 is such a one (the answer was ...842). Few integers of that size are floats by chance; round
    ones such as 2 * 10^22 are, and have the shortest digits.
    """
    if not re.fullmatch(r"-?\d{16,300}", answer):
        return False
    number = int(answer)
    return abs(number) > 2**53 and int(float(number)) == number and int(Decimal(repr(float(number)))) != number
