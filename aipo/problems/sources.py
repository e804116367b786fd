"""The data sets: where they come from, and what is expected of each.

:func:`prepare` turns a file of the Hugging Face hub, or a local one of the same shape, into ``data/NAME.jsonl`` with
the schema of :mod:`aipo.problems.datasets`, checked. ``data/prepare.py`` is its command line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from aipo.errors import UserError
from aipo.problems.contamination import find_overlaps, words
from aipo.problems.datasets import Problem, Split, load_problems, reshuffled
from aipo.problems.embedded import PROBLEMS
from aipo.problems.rows import (
    SUFFIXES,
    Row,
    looks_rounded,
    plain_integer,
    read_gpqa,
    read_gsm8k,
    read_plain,
    read_rows,
    read_verl,
)

NOTICE = """GPQA (Rein et al. 2023, https://huggingface.co/datasets/Idavidrein/gpqa).
Its authors ask not to reveal its examples online, in plain text or as images, so that they do not get into
training data: do not commit, publish or paste what lies in this folder.
"""


def dapo_notes(problems: Sequence[Problem]) -> list[str]:
    """How many questions are Chinese, and which answers look as if they had gone through a float."""
    chinese = sum(re.search("[\u4e00-\u9fff]", problem.question) is not None for problem in problems)
    rounded = [f"{problem.answer} ({problem.id})" for problem in problems if looks_rounded(problem.answer)]
    notes = [f"{chinese:,} questions are in Chinese; they are kept"]
    if rounded:
        notes.append(f"answers that look rounded by a float at the source, so probably wrong: {', '.join(rounded)}")
    return notes


@dataclass(frozen=True)
class Source:
    """One data set.

    ``file`` of the dataset ``repo`` on the hub at ``revision``, and ``read`` for a row of it (ValueError says what is
    wrong with the row). ``counts`` are the sizes it has; another size is an error in a set for evaluation. ``tidy``
    rewrites answers, ``form`` is what they must then match. ``official`` are answers that some copies have wrong, by
    the words their questions begin with. A ``protected`` set lies in a folder of its own, and is never printed.
    """

    repo: str
    file: str
    revision: str
    read: Callable[[Row], Problem]
    counts: tuple[int, ...]
    role: Literal["train", "evaluation"] = "evaluation"
    tidy: Callable[[str], str] = str
    form: str = "(?s).+"
    official: Mapping[str, str] = field(default_factory=dict)
    notes: Callable[[Sequence[Problem]], list[str]] = lambda problems: []
    protected: bool = False


_GSM8K = "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866"
_AIME = r"\d{1,3}"
_INTEGER: dict[str, Any] = {"tidy": plain_integer, "form": r"-?\d+"}

SOURCES = {
    "aime24": Source(
        repo="HuggingFaceH4/aime_2024",
        file="data/train-00000-of-00001.parquet",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        read=read_plain,
        counts=(30,),
        tidy=plain_integer,
        form=_AIME,
        official={"eight circles of radius 34 are sequentially tangent": "197"},  # 2024-I problem 8; 480 in a copy
    ),
    "aime25": Source(
        repo="math-ai/aime25",
        file="test.jsonl",
        revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
        read=read_plain,
        counts=(30,),
        tidy=plain_integer,
        form=_AIME,
    ),
    "math500": Source(
        repo="HuggingFaceH4/MATH-500",
        file="test.jsonl",
        revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        read=read_plain,
        counts=(500,),
    ),
    "amc23": Source(  # AMC 12 of 2022 and 2023; or those of 2023 alone, from a file that has no others
        repo="AI-MO/aimo-validation-amc",
        file="data/train-00000-of-00001.parquet",
        revision="69d78a4a2c840e82d69af6bc742bda09005f6316",
        read=read_plain,
        counts=(83, 40),
        **_INTEGER,
    ),
    "amc23_40": Source(  # those of 2023 alone
        repo="math-ai/amc23",
        file="test-00000-of-00001.parquet",
        revision="80815d37005feb82cd7f8fbc6901d5d3eff43057",
        read=read_plain,
        counts=(40,),
        **_INTEGER,
    ),
    "gpqa_diamond": Source(
        repo="Idavidrein/gpqa",
        file="gpqa_diamond.csv",
        revision="main",
        read=read_gpqa,
        counts=(198,),
        protected=True,
    ),
    "gsm8k_test": Source(
        repo=_GSM8K[0],
        file="main/test-00000-of-00001.parquet",
        revision=_GSM8K[1],
        read=read_gsm8k,
        counts=(1319,),
        **_INTEGER,
    ),
    "gsm8k_train": Source(
        role="train",
        repo=_GSM8K[0],
        file="main/train-00000-of-00001.parquet",
        revision=_GSM8K[1],
        read=read_gsm8k,
        counts=(7473,),
        **_INTEGER,
    ),
    "dapo_math_17k": Source(
        role="train",
        repo="BytedTsinghua-SIA/DAPO-Math-17k",
        file="data/dapo-math-17k.parquet",
        revision="65877096c24ffa7abc4e4fa5edb95cf3413a5674",
        read=read_verl,
        counts=(17398,),
        notes=dapo_notes,
    ),
}

EMBEDDED: dict[str, Split] = {"embedded_train": "train", "embedded_held_out": "validation"}

# what the command line takes; sets for evaluation first, so that training sets are compared with them
GROUPS: dict[str, tuple[str, ...]] = {name: (name,) for name in (*SOURCES, *EMBEDDED)}
GROUPS["gsm8k"] = ("gsm8k_test", "gsm8k_train")
GROUPS["embedded"] = tuple(EMBEDDED)
GROUPS["all"] = tuple(name for name in (*SOURCES, *EMBEDDED) if name != "amc23_40")  # its problems are in amc23


@dataclass(frozen=True)
class Report:
    """What :func:`prepare` did; ``rows`` is the number of problems plus all that was dropped, by reason."""

    name: str
    path: Path
    origin: str
    rows: int
    problems: list[Problem]
    dropped: dict[str, int]
    notes: list[str]

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.problems):,} problems in {self.path}"]
        lines += [f"  {self.rows:>9,}  rows of {self.origin}"]
        lines += [f"  {-count:>9,}  {reason}" for reason, count in self.dropped.items() if count]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def path_of(name: str, folder: Path = Path("data")) -> Path:
    """Where a prepared set lies: ``folder/NAME.jsonl``, or ``folder/NAME/NAME.jsonl`` if it is protected."""
    protected = name in SOURCES and SOURCES[name].protected
    return folder / name / f"{name}.jsonl" if protected else folder / f"{name}.jsonl"


def ensure(name: str, folder: Path = Path("data")) -> Path:
    """The prepared file of a set, made from the hub where it is missing: of several processes at once by one.

    Raises UserError, with the command for a local copy, if the hub cannot be reached or has something unexpected.
    """
    path = path_of(name, folder)
    if not path.is_file():
        try:
            lock = FileLock(path.with_name(f".lock-{path.name}")).acquire()
        except OSError as error:
            raise _unwritable(name, path, error) from error
        with lock:
            if not path.is_file():
                print(prepare(name, out=folder), flush=True)
    return path


def prepared(role: Literal["train", "evaluation"], folder: Path) -> dict[str, list[Problem]]:
    """The prepared sets of this role that lie in ``folder``, but for the embedded ones, which are disjoint as made."""
    names = [name for name in SOURCES if SOURCES[name].role == role and path_of(name, folder).is_file()]
    return {name: load_problems(str(path_of(name, folder)), split="train").problems for name in names}


def prepare(
    name: str,
    *,
    out: Path = Path("data"),
    local: Path | None = None,
    revision: str | None = None,
    any_count: bool = False,
    apart_from: Mapping[str, Sequence[Problem]] | None = None,
) -> Report:
    """Read, check, and write one set with its ``.meta.json``.

    Args:
        name: A key of ``SOURCES`` or ``EMBEDDED``.
        out: Folder to write to.
        local: File to read instead of the hub's, or a folder that holds it.
        revision: Branch, tag or commit on the hub instead of the one that was checked.
        any_count: Let a set for evaluation have another size than it should.
        apart_from: Sets for evaluation; questions that overlap one of theirs are dropped.

    Raises UserError if the source cannot be had, a row is malformed, or the set has not the expected size.
    """
    if name in EMBEDDED:
        problems = load_problems(PROBLEMS, split=EMBEDDED[name]).problems
        report = Report(name, path_of(name, out), PROBLEMS, len(problems), problems, {}, [])
        _write(report, {"generated": PROBLEMS})
        return report
    if name not in SOURCES:
        raise UserError(f"unknown data set {name!r}: known are {', '.join(GROUPS)}")
    source = SOURCES[name]
    if local is None:
        file, commit = _download(name, source, revision or source.revision, out)
        origin, where = f"{source.repo} at {commit[:12]}", {"hub": source.repo, "revision": commit}
    else:
        file = _find(name, source, local)
        origin, where = file.name, {"local": str(file)}

    problems, rows, dropped, notes = _clean(name, source, file, source.repo if local is None else file.name)
    expected = " or ".join(f"{count:,}" for count in source.counts)
    if len(problems) not in source.counts and source.role == "evaluation":
        found = f"{len(problems):,} problems in {file.name}, but {name} has {expected}"
        if not any_count:
            raise UserError(f"{found}: take a whole copy, or allow it with --any-count")
        notes.append(found)
    elif name == "amc23" and len(problems) == 40:
        notes.append("these are the 40 of 2023; the hub's file has 83, of 2022 and 2023")
    for other, theirs in (apart_from or {}).items():
        overlaps = find_overlaps(problems, theirs)
        taken = {overlap.training.id for overlap in overlaps}
        problems = [problem for problem in problems if problem.id not in taken]
        dropped[f"overlap {other}"] = len(taken)
    if apart_from:
        notes.append(f"decontaminated against {', '.join(apart_from)}")
    report = Report(name, path_of(name, out), origin, rows, problems, dropped, notes)
    with file.open("rb") as opened:
        checksum = hashlib.file_digest(opened, "sha256").hexdigest()
    _write(report, {**where, "file": source.file if local is None else file.name, "sha256": checksum})
    return report


def _clean(name: str, source: Source, file: Path, origin: str) -> tuple[list[Problem], int, dict[str, int], list[str]]:
    """(problems, rows read, dropped by reason, notes) of a file."""
    rows = 0
    as_written: set[str] = set()
    copies: dict[str, list[Problem]] = {}  # by the question up to white space: one for each different answer
    repeats: Counter[str] = Counter()
    rewritten: dict[str, list[str]] = {}  # by what is left of the answer without its digits
    for rows, row in enumerate(read_rows(file), start=1):
        try:
            if not isinstance(row, dict):
                raise ValueError("not an object with named columns")
            problem = source.read(row)
            given = problem.answer.strip()
            answer = source.tidy(given)
            if not re.fullmatch(source.form, answer):
                raise ValueError(f"its answer {answer[:40]!r} does not look like one of {name}")
        except ValueError as error:
            raise UserError(f"{file}, row {rows}: {error}") from error
        if answer != given:
            rewritten.setdefault(re.sub(r"[\d,]+", "", given), []).append(f"{given} -> {answer}")
        as_written.add(problem.question)
        key = " ".join(problem.question.split())
        known = copies.setdefault(key, [])
        if any(answer == copy.answer for copy in known):
            repeats[key] += 1
        else:
            known.append(replace(problem, question=problem.question.strip(), answer=answer))

    dropped = {"repeats": 0, "answers disagree": 0, "options repeat": 0}
    notes = [f"answers rewritten like {alike[0]}: {len(alike)}" for alike in rewritten.values()]
    problems = []
    for key, (problem, *others) in copies.items():
        if others:
            dropped["answers disagree"] += 1 + len(others) + repeats[key]
            continue
        if len(set(problem.options)) < len(problem.options):
            dropped["options repeat"] += 1 + repeats[key]
            continue
        dropped["repeats"] += repeats[key]
        for beginning, official in source.official.items():
            if " ".join(words(problem.question)).startswith(beginning) and problem.answer != official:
                notes.append(f"WRONG ANSWER in this copy to {beginning!r}: {problem.answer}, replaced by {official}")
                problem = replace(problem, answer=official)
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]  # from the text: the same in every copy of a set
        problem = reshuffled(problem, int(digest, 16))
        problems.append(replace(problem, id=f"{name}/{digest}", source=origin))
    if source.role == "train":
        upstream = " or ".join(f"{count:,}" for count in source.counts)
        notes.append(
            f"{len(as_written):,} distinct questions ({len(copies):,} up to white space); upstream: {upstream}"
        )
    return problems, rows, dropped, notes + source.notes(problems)


def _find(name: str, source: Source, place: Path) -> Path:
    """The file that ``--from`` means: in a folder the one called like the set, or like the hub's, or the only one."""
    if not place.is_dir():
        if not place.is_file():
            raise UserError(f"--from {place} does not exist: name a file of {', '.join(SUFFIXES)} or a folder with one")
        return place
    files = sorted(p for p in place.rglob("*") if p.suffix in SUFFIXES and not p.name.endswith(".meta.json"))
    mine = [p for p in files if p.stem == name] or [p for p in files if p.match(source.file)]
    mine = mine or [p for p in files if p.stem not in SOURCES]
    if len(mine) != 1:
        found = ", ".join(p.name for p in mine[:5]) if mine else "none"
        raise UserError(f"--from {place}: which file is {name}? candidates: {found}; name the file itself")
    return mine[0]


def _download(name: str, source: Source, revision: str, out: Path) -> tuple[Path, str]:
    """(file in the hub's cache, commit)."""
    # imported here: start-up that local files do not need
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    place = "" if out == Path("data") else f" --out {out}"
    advice = f"with a copy at hand: python data/prepare.py {name} --from PATH{place}"
    if source.protected:
        page = f"https://huggingface.co/datasets/{source.repo}"
        advice = f"it is gated: accept its terms at {page} and run hf auth login; {advice}"
    try:
        snapshot = Path(
            snapshot_download(source.repo, repo_type="dataset", revision=revision, allow_patterns=[source.file])
        )
    except (OSError, HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{name}: the hub did not give {source.repo} at {revision} ({reason}); {advice}") from error
    if not (snapshot / source.file).is_file():
        raise UserError(f"{name}: {source.repo} at {revision} has no {source.file}; {advice}")
    return snapshot / source.file, snapshot.name


def _write(report: Report, source: dict[str, str]) -> None:
    from aipo.record.checkpoints import write_atomically  # imported here: it brings torch

    path = report.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if report.name in SOURCES and SOURCES[report.name].protected:
            (path.parent / ".gitignore").write_text("*\n")  # wherever the folder lies
            (path.parent / "NOTICE").write_text(NOTICE)
        text = "".join(_line(problem) for problem in report.problems)
        write_atomically(path, text)
        meta = {
            "name": report.name,
            "problems": len(report.problems),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "source": source,
            "rows": report.rows,
            "dropped": report.dropped,
            "notes": report.notes,
        }
        write_atomically(path.with_suffix(".meta.json"), json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise _unwritable(report.name, path, error) from error


def _unwritable(name: str, path: Path, error: OSError) -> UserError:
    role = SOURCES[name].role if name in SOURCES else EMBEDDED[name]
    key = "data.train=" if role == "train" else "evaluate.py --benchmarks "
    return UserError(
        f"{path} cannot be written ({error.strerror}): write it elsewhere with python data/prepare.py {name} --out "
        f"FOLDER, and read it there with {key}{path_of(name, Path('FOLDER'))}"
    )


def _line(problem: Problem) -> str:
    row: dict[str, object] = {key: getattr(problem, key) for key in ("id", "question", "answer", "kind", "source")}
    if problem.options:
        row["options"] = problem.options
    if problem.solution:
        row["solution"] = problem.solution
    return json.dumps(row, ensure_ascii=False) + "\n"
