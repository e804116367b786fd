"""Problems in: a JSONL file of questions and answers, or the embedded ``chain_sum`` set."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from aipo.errors import UserError
from aipo.problems.problem import Problem as Problem  # as it is asked for here
from aipo.problems.problem import Split

KINDS = ("math", "choice")
EMBEDDED = "embedded:"
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Loaded:
    """``dropped`` counts rows by reason: ``duplicate`` and ``conflicting_answers``."""

    problems: list[Problem]
    dropped: dict[str, int]


def load_problems(spec: str, *, split: Split) -> Loaded:
    """Read ``embedded:chain_sum`` (its ``split``) or a JSONL file (the whole file, whatever the split).

    A row is ``{"question": str, "answer": str}`` with optional ``id``, ``kind``, ``source``, ``solution``, ``critical``
    (a list of places of tokens) and, for ``choice``, ``options``; answers are strings, because an integer beyond 2**53
    or ``1/2`` does not survive as a number. Rows that repeat a question and its answer are kept once; questions with
    more than one answer are dropped altogether.
    Raises ``UserError`` naming file and row for anything else that is wrong.
    """
    if spec.startswith(EMBEDDED):
        from aipo.problems.embedded import PROBLEMS, embedded_problems  # imported here: it brings reasoning-gym

        if spec != PROBLEMS:
            raise UserError(f"unknown embedded problems {spec!r}: the one set is {PROBLEMS!r}")
        return Loaded(embedded_problems(split), {"duplicate": 0, "conflicting_answers": 0})

    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(
            f"data file {spec} does not exist: put a JSONL file there, one object a line with question and answer"
        )
    rows = _read(path)

    answers: dict[str, set[str]] = {}
    for _, problem in rows:
        answers.setdefault(problem.question, set()).add(problem.answer)
    unanimous = [(row, problem) for row, problem in rows if len(answers[problem.question]) == 1]
    first: dict[str, tuple[int, Problem]] = {}
    for row, problem in unanimous:
        first.setdefault(problem.question, (row, problem))

    row_of_id: dict[str, int] = {}
    for row, problem in first.values():
        if problem.id in row_of_id:
            raise UserError(
                f"{path}: rows {row_of_id[problem.id]} and {row} are different questions with the same id "
                f"{problem.id!r}: make ids unique, or leave them out"
            )
        row_of_id[problem.id] = row

    dropped = {"duplicate": len(unanimous) - len(first), "conflicting_answers": len(rows) - len(unanimous)}
    if not first:
        raise UserError(f"{path} holds no usable problem ({len(rows)} rows, dropped: {dropped})")
    return Loaded([problem for _, problem in first.values()], dropped)


def fingerprint(problems: Sequence[Problem]) -> str:
    """sha256 over all fields in order: equal exactly when a label file or sampler position can be reused."""
    digest = hashlib.sha256()
    for problem in problems:
        # without options, solution or critical tokens a problem hashes as before there were any: labels and
        # checkpoints stay valid
        used = 8 if problem.critical else 7 if problem.solution else 6 if problem.options else 5
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


def _read(path: Path) -> list[tuple[int, Problem]]:
    """(row number from 1, problem) of every line that is not blank."""
    rows = []
    row = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for row, line in enumerate(file, start=1):
                if line.strip():
                    rows.append((row, _parse(line, f"{path}, row {row}")))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text after row {row} ({error.reason}): it must be JSONL") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return rows


def _parse(line: str, where: str) -> Problem:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); write one JSON object a line") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object but {type(row).__name__}; write one JSON object a line")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # an escape that JSON allows and no text can hold
        raise UserError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is no character; mend it") from None

    def text(key: str, default: str | None = None) -> str:
        if key not in row and default is not None:
            return default
        if key not in row:
            raise UserError(f"{where}: no {key!r} (fields there: {', '.join(row) or 'none'}); rename or add it")
        if not isinstance(row[key], str):
            raise UserError(f"{where}: {key} is not a string but {row[key]!r:.80}; put it in quotes")
        if not row[key].strip() and default is None:
            raise UserError(f"{where}: {key} is empty; fill it or remove the row")
        return row[key].strip()

    question, answer = text("question"), text("answer")
    kind = text("kind", default="math")
    if kind not in KINDS:
        raise UserError(f"{where}: kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    # an id from the text, unlike a row number, stays the same when rows are added or reordered
    made_id = hashlib.sha256(question.encode()).hexdigest()[:16]
    given_id = str(row["id"]) if type(row.get("id")) is int else text("id", default=made_id)
    options = _options(row["options"], question, answer, kind, where) if "options" in row else ()
    source, solution = text("source", default=""), text("solution", default="")
    return Problem(
        given_id, question, answer, kind, source, options, solution, _critical(row.get("critical", []), where)
    )


def _critical(places: Any, where: str) -> tuple[int, ...]:
    if not isinstance(places, list) or not all(type(place) is int and place >= 0 for place in places):
        raise UserError(f"{where}: critical is not a list of whole numbers from 0, places of tokens; mend or remove it")
    return tuple(places)


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
