"""Rows of a source, by the ``datasets`` library: a JSONL or Parquet file, a folder laid out as on the hub, a hub set.

Every file is read by itself and in order, so that what is wrong with a row is said with file and number. JSON is read a
line at a time, as text: the library's own reader guesses a type for a whole column, which changes numbers and says of a
row that does not fit neither where nor what.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

from aipo.config.data import Source
from aipo.errors import UserError

HUB = "hub:"
CHUNK = 2**16  # characters read at a time: of text that is not UTF-8, as many rows may lie before the one named
BATCH = 1000  # rows of Parquet read at a time
JSON_SUFFIXES = (".jsonl", ".json")
NO_VALUE = (UnicodeDecodeError, OverflowError, KeyError)
"""What pyarrow raises of text that is none, of dates that Python does not have, and of time zones that nobody has."""

Found = tuple[str, int, Any, bool]
"""file, row from 1, what stands there, and whether its columns have types (a number then has kept its digits)"""


def rows_of(source: Source) -> Iterator[Found]:
    """The first ``source.rows`` rows that are not blank. Raises ``UserError`` for what cannot be read."""
    return islice(_every_row(source), source.rows)


def _every_row(source: Source) -> Iterator[Found]:
    for file, place in _files(source):
        yield from _parquet(file, place) if file.endswith(".parquet") else _jsonl(file, place)


def _files(source: Source) -> list[tuple[str, str]]:
    """The files of a source: what they are called, and where they are read from (``streaming``: on the hub)."""
    path = os.path.expanduser(source.path)
    if os.path.isfile(path):
        return [(path, path)]
    if not source.path.startswith(HUB) and not os.path.isdir(path):
        raise UserError(
            f"data file {source.path} does not exist: put a JSONL file there, one object a line with question and "
            f"answer, or name a hub set as {HUB}OWNER/NAME"
        )
    datasets = _library()
    place = source.path.removeprefix(HUB) if source.path.startswith(HUB) else os.path.realpath(path)
    try:
        found = datasets.load_dataset_builder(place, name=source.subset, revision=source.revision).config.data_files
    except Exception as error:  # of all kinds: not there, not reached, no such subset, a README or a zip that is none
        raise UserError(f"{source.path} cannot be read as a set of the hub ({_reason(error)})") from error
    if source.split not in (found or {}):
        there = ", ".join(map(str, found or {})) or "none"
        raise UserError(f"{source.path} has no split {source.split!r} (there: {there}): set split to one of them")
    files = [str(file) for file in found[source.split]]
    if odd := [file for file in files if not file.endswith((".parquet", *JSON_SUFFIXES))]:
        raise UserError(f"{source.path}: {odd[0]} is neither Parquet nor JSONL: convert the set, or name a part of it")
    places = files
    if source.path.startswith(HUB) and not source.streaming:
        with _readable(source.path, "a set of the hub"):
            places = datasets.DownloadManager().download(files)
    return list(zip(files, places, strict=True))


def _parquet(file: str, place: str) -> Iterator[Found]:
    row = 0
    try:
        with _readable(file, "Parquet"):
            for row, content in enumerate(_stream("parquet", place, batch_size=BATCH), start=1):
                yield file, row, content, True
    except NO_VALUE as error:  # somewhere in the batch after that row: once more, one by one
        with suppress(*NO_VALUE):
            for row, _ in enumerate(_stream("parquet", place, batch_size=1), start=1):  # noqa: B007
                pass
        raise UserError(
            f"{file}, row {row + 1}: holds a value that cannot be read ({_reason(error)}); mend it or remove its column"
        ) from error


def _jsonl(file: str, place: str) -> Iterator[Found]:
    row = 0
    try:
        with _readable(file, "JSONL"):
            for row, line in enumerate(_stream("text", place, encoding="utf-8-sig", chunksize=CHUNK), start=1):
                if line["text"].strip():
                    yield file, row, _decoded(line["text"], f"{file}, row {row}"), False
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text after row {row} ({error.reason}): it must be JSONL") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that stands twice, the json module would keep the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"{twice} stands twice")
    return found


def _decoded(line: str, where: str) -> Any:
    try:
        content = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # the latter of brackets in brackets without end
        raise UserError(f"{where}: not JSON ({error}); write one JSON object a line") from error
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # an escape that JSON allows and no text can hold
        raise UserError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is no character; mend it") from None
    return content


def _stream(form: str, place: str, **options: Any) -> Any:
    """Rows as they are read, without a copy in the library's cache."""
    where = place if "://" in place else glob.escape(place)
    return _library().load_dataset(form, data_files=[where], split="train", streaming=True, **options)


def _library() -> Any:
    import datasets  # imported here: half a second that the embedded problems do not need

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else it asks the hub, and waits for it, at every file from here
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said once, by us
    return datasets


@contextmanager
def _readable(file: str, form: str) -> Iterator[None]:
    try:
        yield
    except NO_VALUE:
        raise
    except (OSError, ValueError) as error:  # of pyarrow too
        raise UserError(f"{file} cannot be read as {form} ({_reason(error)}): is it whole?") from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
