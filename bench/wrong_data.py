"""Each way in which a file or folder of data can be wrong, and whether one line says so; for bench/soak.py."""

from __future__ import annotations

import datetime
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

from aipo.errors import UserError
from aipo.problems.datasets import load_problems

ROWS = 9


def everything(folder: Path, draw: random.Random, count: int) -> tuple[dict[str, int], list[str]]:
    """Every kind of fault once, and ``count`` Parquet files that are cut or have bits flipped.

    Returns how many were tried of each form, and what was not said as it should be.
    """
    tried: Counter[str] = Counter()
    wrong = []
    for form, faults in (("JSONL", jsonl), ("Parquet", parquet), ("hub folder", folders)):
        for number, (kind, path, named) in enumerate(faults(folder / form.replace(" ", "-"), draw)):
            tried[form] += 1
            if found := complaint(path, named):
                wrong.append(f"data: {form} {number}, {kind}: {found}")
    path = folder / "damaged.parquet"
    for _ in range(count):
        tried["damaged Parquet"] += 1
        write_parquet(path, QUESTIONS, answer=[str(number) for number in range(ROWS)])
        damage(path, draw)
        if found := complaint(path, [path.name], may_pass=True):
            wrong.append(f"data: damaged Parquet: {found}")
    return dict(tried), wrong


def complaint(path: Path, named: list[str], *, may_pass: bool = False) -> str:
    """What is wrong with what is said of this path: it must be one line with these words."""
    try:
        load_problems(str(path), split="train")
    except UserError as error:
        text = str(error)
        words = re.findall(r"\w+", text.replace(str(path), path.name))
        missing = [word for word in named if word not in text and word not in words]
        return f"not in one line: {text}" if "\n" in text else f"does not name {missing}: {text}" if missing else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if may_pass else "accepted"


def damage(path: Path, draw: random.Random) -> None:
    """Cut a file anywhere, or flip a bit of it."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.5 or not content:
        content = content[: draw.randrange(max(len(content), 1))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


Faults = list[tuple[str, Path, list[str]]]
"""kind, path, and what the line about it must name"""


def jsonl(folder: Path, draw: random.Random) -> Faults:
    folder.mkdir(parents=True)
    found: Faults = []
    for number, (kind, (broken, names_row)) in enumerate(BROKEN_ROWS.items()):
        rows = [row_with(question=f"{i} + 1", answer=str(i + 1), id=str(i)) for i in range(ROWS)]
        at = draw.randrange(1, ROWS)
        rows[at] = broken
        path = folder / f"row-{number}.jsonl"
        path.write_bytes(b"".join(row + draw.choice([b"\n", b"\r\n"]) for row in rows))
        found.append((kind, path, [path.name, f"row {at + 1}"] if names_row else [path.name]))
    for number, (kind, content) in enumerate(WHOLE_FILES.items()):
        path = folder / f"file-{number}.jsonl"
        path.write_bytes(content)
        found.append((kind, path, [path.name]))
    return found


def parquet(folder: Path, draw: random.Random) -> Faults:
    folder.mkdir(parents=True)
    found: Faults = []
    for number, (kind, (columns, row)) in enumerate(broken_columns().items()):
        path = folder / f"columns-{number}.parquet"
        write_parquet(path, **({"question": QUESTIONS, "answer": ANSWERS} | columns))
        found.append((kind, path, [path.name, f"row {row}"] if row else [path.name]))
    for number, (kind, content) in enumerate(WHOLE_FILES.items()):
        path = folder / f"file-{number}.parquet"
        path.write_bytes(content)
        found.append((kind, path, [path.name]))
    return found


QUESTIONS = [f"{i} + 1" for i in range(ROWS)]
ANSWERS = [str(i + 1) for i in range(ROWS)]


def write_parquet(path: Path, question: Any, **columns: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"question": question, **columns}), path)


def broken_columns() -> dict[str, tuple[dict[str, Any], int]]:
    """Columns by kind of fault, and the row that must be named (0: none)."""
    import pyarrow as pa

    def text(content: bytes) -> Any:
        """A column with bytes that are called text, in row 2."""
        ends = [0, 1, 1 + len(content)]
        offsets = b"".join(min(ends[min(i, 2)], ends[2]).to_bytes(4, "little") for i in range(ROWS + 1))
        return pa.Array.from_buffers(pa.string(), ROWS, [None, pa.py_buffer(offsets), pa.py_buffer(b"1" + content)])

    def second(value: Any) -> list[Any]:
        return [ANSWERS[0], value, *ANSWERS[2:]]

    many = {
        "null": (second(None), 2), "blank": (second(" \t"), 2), "all null": (pa.nulls(ROWS), 1),
        "float": ([1.0] * ROWS, 1), "bool": ([True] * ROWS, 1), "list": ([["1"]] * ROWS, 1),
        "struct": ([{"x": 1}] * ROWS, 1), "bytes": ([b"1"] * ROWS, 1), "date": ([datetime.date(2020, 1, 1)] * ROWS, 1),
        "duration": (pa.array([1] * ROWS, pa.duration("ns")), 1),
        "time zone of nowhere": (pa.array([0] * ROWS, pa.timestamp("us", tz="Mars/Base")), 1),
        "map": (pa.array([[("a", 1)]] * ROWS, pa.map_(pa.string(), pa.int64())), 0),
        "no UTF-8": (text(b"\xff\xfe"), 2), "half a surrogate": (text(b"\xed\xa0\x80"), 2),
    }  # fmt: skip
    choice = {"answer": ["A"] * ROWS, "kind": ["choice"] * ROWS}
    return {
        **{f"answer: {kind}": ({"answer": column}, row) for kind, (column, row) in many.items()},
        "another column is no UTF-8": ({"note": text(b"\xff")}, 2),
        "another column has a far date": ({"day": pa.array([0, *[10**9] * (ROWS - 1)], pa.date32())}, 2),
        "another column has a far time": ({"time": pa.array([0, *[2**61] * (ROWS - 1)], pa.timestamp("ms"))}, 2),
        "question: null": ({"question": [QUESTIONS[0], None, *QUESTIONS[2:]]}, 2),
        "kind unknown": ({"kind": ["math", "poem", *["math"] * (ROWS - 2)]}, 2),
        "id a float": ({"id": [1.5] * ROWS}, 1),
        "id taken": ({"id": ["1"] * ROWS}, 2),
        "options a string": (choice | {"options": ["12"] * ROWS}, 1),
        "options with null": (choice | {"options": [["1", None]] * ROWS}, 1),
        "no rows": ({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}, 0),
    }


def folders(folder: Path, draw: random.Random) -> Faults:
    found: Faults = []
    good, bad = row_with() + b"\n", b'{"question":\n'
    first, second = "data/train-00000-of-00002", "data/train-00001-of-00002"
    kinds: dict[str, tuple[dict[str, bytes | dict[str, Any]], list[str]]] = {
        "empty": ({}, []),
        "README alone": ({"README.md": b"# A set"}, []),
        "CSV": ({"train.csv": b"question,answer\n1,2\n"}, ["train.csv"]),
        "text": ({"train.txt": b"1"}, ["train.txt"]),
        "Arrow": ({"train.arrow": b"ARROW1"}, ["train.arrow"]),
        "saved by the library": ({"state.json": b"{}", "data-00000-of-00001.arrow": b""}, ["arrow"]),
        "pictures": ({"train/a.png": b"x"}, ["a.png"]),
        "a zip that is none": ({"train.zip": b"PK\x03\x04"}, []),
        "gzip": ({"train.jsonl.gz": b"\x1f\x8b"}, ["train.jsonl.gz"]),
        "a script": ({"wrong.py": b"raise SystemExit", "train.jsonl": good}, []),
        "no such split": ({"test.jsonl": good}, ["test"]),
        "a row": ({"train.jsonl": good + bad}, ["train.jsonl", "row 2"]),
        "an array": ({"train.json": b"[" + good + b"]"}, ["train.json", "row 1"]),
        "a pointer of LFS": ({"train.parquet": b"version https://git-lfs.github.com/spec/v1\n"}, ["train.parquet"]),
        "one of two is empty": ({f"{first}.jsonl": good, f"{second}.parquet": b""}, [f"{second}.parquet"]),
        "one of two has other columns": (
            {f"{first}.parquet": {"question": ["q"], "answer": ["1"]}, f"{second}.parquet": {"question": ["r"]}},
            [f"{second}.parquet", "row 1"],
        ),
        "one of two has other types": (
            {f"{first}.parquet": {"question": ["q"], "answer": ["1"]}}
            | {f"{second}.parquet": {"question": ["r"], "answer": [1.5]}},
            [f"{second}.parquet", "row 1"],
        ),
    }
    for kind, header in {
        "no YAML": "configs: [", "a list": "- a\n- b", "configs a number": "configs: 3",
        "features a number": "dataset_info:\n  features: 7",
        "a file that is not there": "configs:\n- config_name: a\n  data_files: nothere.jsonl",
        "the name of a split": 'configs:\n- config_name: a\n  data_files:\n  - split: "a b"\n    path: train.jsonl',
        "two subsets": "configs:\n- config_name: a\n  data_files: train.jsonl\n"
        "- config_name: b\n  data_files: train.jsonl",
    }.items():  # fmt: skip
        kinds[f"README: {kind}"] = ({"README.md": f"---\n{header}\n---\n".encode(), "train.jsonl": good}, [])
    for number, (kind, (files, named)) in enumerate(kinds.items()):
        path = folder / f"set-{number}" / "wrong"
        path.mkdir(parents=True)
        for name, content in files.items():
            (path / name).parent.mkdir(exist_ok=True)
            if isinstance(content, dict):
                write_parquet(path / name, **content)
            else:
                (path / name).write_bytes(content)
        found.append((kind, path, ["wrong", *named]))
    link = folder / "dangling"
    link.mkdir()
    (link / "train.jsonl").symlink_to(folder / "nowhere")
    return [*found, ("a link to nowhere", link, [link.name])]


def row_with(**fields: object) -> bytes:
    return json.dumps({"question": "1 + 1", "answer": "2"} | fields).encode()


BROKEN_ROWS: dict[str, tuple[bytes, bool]] = {  # and whether the row must be named
    "cut": (b'{"question": "1 + 1", "ans', True),
    "no JSON": (b"1 + 1 = 2", True),
    "two objects": (row_with() + row_with(), True),
    "a list": (b'["1 + 1", "2"]', True),
    "a number": (b"17", True),
    "null": (b"null", True),
    "a string": (b'"1 + 1"', True),
    "no answer": (b'{"question": "1 + 1"}', True),
    "no question": (b'{"answer": "2"}', True),
    "an empty object": (b"{}", True),
    "empty answer": (row_with(answer=""), True),
    "blank question": (row_with(question=" \t "), True),
    "answer is a number": (row_with(answer=2), True),
    "answer is null": (row_with(answer=None), True),
    "answer is a list": (row_with(answer=["2"]), True),
    "question is an object": (row_with(question={"text": "1 + 1"}), True),
    "kind unknown": (row_with(kind="maths"), True),
    "kind a number": (row_with(kind=1), True),
    "options of a sum": (row_with(options=["1", "2"]), True),
    "options a string": (row_with(kind="choice", options="12"), True),
    "options alike": (row_with(kind="choice", answer="A", options=["1", "1"]), True),
    "options not in the question": (row_with(kind="choice", answer="A", options=["1", "2"]), True),
    "half a surrogate": (row_with(question="\ud800"), True),
    "half a surrogate in a key": (row_with(**{"\udfff": 1}), True),
    "id a list": (row_with(id=[1]), True),
    "id taken": (row_with(question="another", id="0"), True),
    "source a number": (row_with(source=1), True),
    "solution a list": (row_with(solution=["1"]), True),
    "NUL": (b'{"question": "1\x00", "answer": "2"}', True),
    "Latin-1": ('{"question": "né", "answer": "2"}'.encode("latin-1"), False),
    "deep": (b'{"question": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", True),
    "digits": (b'{"question": "1", "answer": ' + b"9" * 5000 + b"}", True),
}
WHOLE_FILES = {
    "empty": b"",
    "blank lines": b"\n \n\n",
    "UTF-16": '{"question": "1", "answer": "2"}'.encode("utf-16"),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(20),
    "one array": b'[{"question": "1", "answer": "2"}]',
    "CSV": b"question,answer\n1 + 1,2\n",
}
