"""Problems in: rows of files and hub sets, checked, or the embedded ``chain_sum`` set; one source or a mix of them."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from itertools import islice
from typing import Any

from aipo.config.data import Source
from aipo.errors import UserError
from aipo.problems.embedded import PROBLEMS, embedded_problems
from aipo.problems.problem import Problem as Problem  # as it is asked for here
from aipo.problems.problem import Split
from aipo.problems.readers import rows_of
from aipo.verify.answers import choice_letter

KINDS = ("math", "choice")
EMBEDDED = "embedded:"
LETTERS = "ABCDEFGHIJ"
GSM8K_MARK = re.compile("^####", re.MULTILINE)  # before the answer, at the end of a worked solution


@dataclass(frozen=True)
class Loaded:
    """``dropped`` counts rows by reason: ``duplicate`` and ``conflicting_answers``."""

    problems: list[Problem]
    dropped: dict[str, int]


def load_problems(spec: str | Source, *, split: Split, origin: str = "") -> Loaded:
    """All problems of one set: a path (see :class:`aipo.config.data.Source`) or a source.

    A row is ``{"question": str, "answer": str}`` with optional ``id``, ``kind``, ``source``, ``solution``, ``critical``
    (a list of places of tokens) and, for ``choice``, ``options``, or has them in ``columns`` of other names; answers
    are strings, because an integer beyond 2**53 or ``1/2`` does not survive as a number in JSON (whole numbers of
    Parquet do). Rows that repeat a question and its answer are kept once; questions with more than one answer are
    dropped altogether.
    Raises ``UserError`` naming file and row for anything else that is wrong.

    Args:
        split: which of the embedded problems; all others are read whole.
        origin: what the problems carry as such.
    """
    source = Source(path=spec) if isinstance(spec, str) else spec
    rows = _read(source, split, origin)
    kept, dropped = _distinct(rows)

    row_of_id: dict[str, str] = {}
    for where, problem in kept:
        if problem.id in row_of_id:
            raise UserError(
                f"{where}: a different question than {row_of_id[problem.id]} with the same id {problem.id!r}: make "
                "ids unique, or leave them out"
            )
        row_of_id[problem.id] = where

    if not kept:
        raise UserError(f"{source.path} holds no usable problem ({len(rows)} rows, dropped: {dropped})")
    return Loaded([problem for _, problem in kept], dropped)


def load_mix(sources: Sequence[Source]) -> dict[str, Loaded]:
    """The training problems of several sources by their names; what two sources share counts for the first.

    Ids are ``NAME/ID``, and origins are names. A question to which two sources give different answers is dropped from
    both. Raises ``UserError`` as :func:`load_problems`, and for a source that others leave nothing of.
    """
    loaded = {source.called: load_problems(source, split="train", origin=source.called) for source in sources}
    kept, _ = _distinct([("", problem) for each in loaded.values() for problem in each.problems])
    answers: dict[str, set[str]] = {}
    for each in loaded.values():
        for problem in each.problems:
            answers.setdefault(problem.question, set()).add(problem.answer)
    mixed = {}
    for name, each in loaded.items():
        own = [replace(problem, id=f"{name}/{problem.id}") for _, problem in kept if problem.origin == name]
        conflicts = sum(len(answers[problem.question]) > 1 for problem in each.problems)
        repeats = len(each.problems) - len(own) - conflicts
        dropped = {
            "duplicate": each.dropped["duplicate"] + repeats,
            "conflicting_answers": each.dropped["conflicting_answers"] + conflicts,
        }
        if not own:
            raise UserError(f"data.train: all questions of {name} are in sources before it, or answered differently")
        mixed[name] = Loaded(own, dropped)
    return mixed


def _distinct(rows: Sequence[tuple[str, Problem]]) -> tuple[list[tuple[str, Problem]], dict[str, int]]:
    """(where, problem) of the first of each question of one answer, and how many rows were dropped by reason."""
    answers: dict[str, set[str]] = {}
    for _, problem in rows:
        answers.setdefault(problem.question, set()).add(problem.answer)
    unanimous = [(where, problem) for where, problem in rows if len(answers[problem.question]) == 1]
    first: dict[str, tuple[str, Problem]] = {}
    for where, problem in unanimous:
        first.setdefault(problem.question, (where, problem))
    dropped = {"duplicate": len(unanimous) - len(first), "conflicting_answers": len(rows) - len(unanimous)}
    return list(first.values()), dropped


def fingerprint(problems: Sequence[Problem]) -> str:
    """sha256 over all fields in order: equal exactly when a label file or sampler position can be reused."""
    digest = hashlib.sha256()
    for problem in problems:
        # without these fields a problem hashes as before there were any: labels and checkpoints stay valid
        last = 8 if problem.origin else 7 if problem.solution else 6 if problem.options else 5
        used = 9 if problem.critical else last
        fields = astuple(problem)[:used]
        digest.update(json.dumps(fields).encode() + b"\n")
    return digest.hexdigest()


def render_options(options: Sequence[str]) -> str:
    """What a choice question ends with: a blank line, then ``A) ...``, ``B) ...``, one below the other."""
    return "\n\n" + "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options))


def stem(problem: Problem) -> str:
    """The question without its options."""
    return problem.question.removesuffix(render_options(problem.options)) if problem.options else problem.question


def reshuffled(problem: Problem, seed: int) -> Problem:
    """The same problem with its options in an order drawn from ``random.Random(seed)``; one without stays as it is."""
    if not problem.options:
        return problem
    order = random.Random(seed).sample(range(len(problem.options)), len(problem.options))
    options = tuple(problem.options[i] for i in order)
    answer = LETTERS[order.index(LETTERS.index(problem.answer))]
    return replace(problem, question=stem(problem) + render_options(options), answer=answer, options=options)


def _read(source: Source, split: Split, origin: str) -> list[tuple[str, Problem]]:
    """(where it stands, problem) of every row."""
    if source.path.startswith(EMBEDDED):
        if source.path != PROBLEMS:
            raise UserError(f"unknown embedded problems {source.path!r}: the one set is {PROBLEMS!r}")
        rows = islice(embedded_problems(split), source.rows)
        return [(f"{PROBLEMS}, row {row}", replace(each, origin=origin)) for row, each in enumerate(rows, start=1)]
    return [
        (where := f"{file}, row {row}", _problem(content, where, source, typed, origin))
        for file, row, content, typed in rows_of(source)
    ]


def _problem(row: Any, where: str, source: Source, typed: bool, origin: str) -> Problem:
    """What a row says, checked. In ``typed`` columns whole numbers have kept their digits, and null is no value."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object but {type(row).__name__}; write one JSON object a line")
    columns = source.columns

    def text(column: str | None, default: str | None = None) -> str:
        value = _ABSENT if column is None else _at(row, column)
        if value is None and typed and default is not None:
            value = _ABSENT
        if value is _ABSENT and default is not None:
            return default
        if value is _ABSENT:
            raise UserError(f"{where}: no {column!r} (fields there: {', '.join(row) or 'none'}); rename or add it")
        if typed and type(value) is int:
            value = str(value)
        if value is None:
            remedy = "fill it or remove the row" if default is None else "remove it"
            raise UserError(f"{where}: {column} is null; {remedy}")
        if not isinstance(value, str):
            remedy = "name a column of text or whole numbers" if typed else "put it in quotes"
            raise UserError(f"{where}: {column} is not a string but {value!r:.80}; {remedy}")
        if not value.strip() and default is None:
            raise UserError(f"{where}: {column} is empty; fill it or remove the row")
        return value.strip()

    question, answer = text(columns.question), text(columns.answer)
    kind = text(columns.kind, default=source.kind)
    if kind not in KINDS:
        raise UserError(f"{where}: kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    if GSM8K_MARK.search(answer):  # no answer would ever be right
        raise UserError(
            f"{where}: {columns.answer} is a worked solution with a line '#### ...', not its answer; let "
            "python data/prepare.py gsm8k (--from FILE) take it apart, or name another column in columns.answer"
        )
    # an id from the text, unlike a row number, stays the same when rows are added or reordered
    made_id = hashlib.sha256(question.encode()).hexdigest()[:16]
    number = None if columns.id is None else _at(row, columns.id)
    given_id = str(number) if type(number) is int else text(columns.id, default=made_id)
    options = _ABSENT if columns.options is None else _at(row, columns.options)
    has_options = options is not _ABSENT and not (typed and options is None)
    if kind == "choice" and not has_options and choice_letter(answer) is None:
        raise UserError(f"{where}: the answer of a choice names no letter; write the letter, or change the kind")
    return Problem(
        given_id,
        question,
        answer,
        kind,
        text(columns.source, default=""),
        _options(options, question, answer, kind, where) if has_options else (),
        text(columns.solution, default=""),
        origin,
        _critical(row.get("critical", []), where),
    )


def _critical(places: Any, where: str) -> tuple[int, ...]:
    if not isinstance(places, list) or not all(type(place) is int and place >= 0 for place in places):
        raise UserError(f"{where}: critical is not a list of whole numbers from 0, places of tokens; mend or remove it")
    return tuple(places)


def _at(row: Any, column: str) -> Any:
    """What stands in a column, or down a dotted path; ``_ABSENT`` if nothing does."""
    if column in row:
        return row[column]
    value = row
    for step in column.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return _ABSENT
    return value


_ABSENT: Any = object()


def _options(options: Any, question: str, answer: str, kind: str, where: str) -> tuple[str, ...]:
    """The options of a row, checked; messages show no text, since some sets ask not to be printed."""
    if kind != "choice":
        raise UserError(f'{where}: options go with kind "choice", not {kind!r}; change the kind or leave them out')
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise UserError(f"{where}: options is not a list of strings with text; write them out, the right one included")
    if not 2 <= len(options) <= len(LETTERS) or len(set(options)) < len(options):
        raise UserError(f"{where}: options must be 2 to {len(LETTERS)} and all different; mend or remove the row")
    if answer not in LETTERS[: len(options)] or len(answer) != 1:
        raise UserError(f"{where}: the answer is not a letter from A to {LETTERS[len(options) - 1]}; name an option")
    if not question.endswith(render_options(options)):
        raise UserError(
            f"{where}: the question does not end with its options as 'A) ...', one a line after a blank line; "
            "append them, or leave the field options out"
        )
    return tuple(options)
