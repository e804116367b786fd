"""Lines of JSON that a kill cannot spoil: a line counts once it has its end, and one without is dropped at the next
start."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from aipo.errors import UserError


class JsonlLog:
    """Appends lines to a file.

    Args:
        keep: which of the lines that are there stay: all up to the first that it is false of.
        durable: whether :meth:`flush` also survives the machine's end, not only the process's.
    """

    def __init__(
        self, path: Path, *, keep: Callable[[dict[str, Any]], bool] = lambda line: True, durable: bool = True
    ) -> None:
        self.path, self._durable = path, durable
        if path.exists():
            end = 0
            for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
                if not line.endswith(b"\n") or not keep(_read(line, path, number)):
                    break
                end += len(line)
            os.truncate(path, end)
        self._file = path.open("a", encoding="utf-8")

    def append(self, *lines: Mapping[str, Any]) -> None:
        for line in lines:
            self._file.write(to_line(line))
        self._file.flush()
        if self._durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a file that may be being written, or may not be there."""
    return list(iterate_jsonl(path))


def iterate_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The same, of which one line at a time is in memory."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn by a kill, or still being written
            if not line.strip():
                continue
            yield _read(line, path, number)


def _read(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, row {number} is damaged ({error}): delete that row or the file") from error


def to_line(row: Mapping[str, Any]) -> str:
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null. Tensors become numbers or lists."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
