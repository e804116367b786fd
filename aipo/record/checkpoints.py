"""Checkpoints that are there as a whole or not at all, and what must match before one is resumed.

A checkpoint is a folder ``step-000123``. Every rank writes its share into a temporary folder; rank 0 then adds a
manifest of file sizes and checksums, forces all of it to disk, renames the folder, and moves ``latest`` last. So at
whatever moment a run is killed, ``latest`` names a complete checkpoint. What lies inside is the business of whoever
writes it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import random
import re
import shutil
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aipo import distributed
from aipo.errors import TrainingError, UserError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
STEP = re.compile(r"step-\d+", re.ASCII)
ABANDONED = 3600  # seconds after which a temporary file is one that a kill has left
PIECE = 2**24  # bytes that are read at a time for a checksum


class CheckpointError(TrainingError):
    """A checkpoint could not be written. Raised on every rank; earlier checkpoints are as they were."""


class CheckpointStore:
    """Keeps the last ``keep_last`` checkpoints and the best one by held-out accuracy under ``folder``.

    Args:
        folder: Where checkpoints lie; the same folder for all ranks.
        keep_last: How many of the newest to keep, at least 1.
        rank: Rank of this process; rank 0 does what must be done once.
        first_problem: What went wrong, in words that are the same on every rank: that rank's exception, or None, goes
            in. It is also the barrier: each phase of a save ends with it, so that a failure on one rank is a failure on
            all and nobody waits for ever.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        rank: int = 0,
        first_problem: Callable[[Exception | None], str | None] = distributed.first_problem,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1; got {keep_last}")
        self.folder = Path(folder)
        self._keep_last = keep_last
        self._rank = rank
        self._first_problem = first_problem
        if rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob(TEMPORARY + "*"):
                _delete(left_over)

    def save(self, step: int, write: Callable[[Path], None], *, accuracy: float | None = None) -> Path:
        """Write the checkpoint of ``step`` and return its folder. Called by all ranks together.

        ``write(folder)`` runs on every rank and puts that rank's files there, under names of its own. It must not run a
        collective once it has begun to write: a rank whose disk is full would leave the others waiting in it. Gather
        first, then write.

        ``accuracy`` is the held-out accuracy at this step, if it was measured. A step is saved once: where ``latest``
        already is this step nothing is written, since a run is a function of its config and seed. Raises
        CheckpointError on every rank if any rank failed, with the partial folder removed.
        """
        final = self.folder / f"step-{step:06d}"
        temporary = self.folder / (TEMPORARY + final.name)
        if latest(self.folder) == final:
            return final

        def begin() -> None:
            _delete(final)  # a step that `latest` never came to name: a save killed between two renames
            _delete(temporary)
            temporary.mkdir()

        try:
            self._together(f"step {step}", begin, only_first=True)
            self._together(f"step {step}", lambda: write(temporary))
            self._together(f"step {step}", lambda: self._publish(step, temporary, final, accuracy), only_first=True)
        except CheckpointError:
            if self._rank == 0:  # give the disk back; what cannot be removed now goes at the next save or start
                for partial in {temporary, final} - {latest(self.folder)}:
                    shutil.rmtree(partial, ignore_errors=True)
            raise
        return final

    def oldest_kept(self) -> int:
        """Step of the oldest that is kept for being new; 0 while there are fewer of them than may be."""
        steps = _steps(self.folder)[-self._keep_last :]
        return step_of(steps[0]) if len(steps) == self._keep_last else 0

    def rewind(self, step: int) -> None:
        """Forget every checkpoint after ``step``, from which the run goes on. Called by all ranks together.

        They belong to a future that will be run again; kept, ``latest`` could lead a later resume into the old one.
        """

        def forget() -> None:
            steps = _steps(self.folder)
            kept = [folder for folder in steps if step_of(folder) <= step]
            self._point("latest", kept[-1] if kept else None)
            for folder in steps[len(kept) :]:
                _delete(folder)
            self._tidy()

        self._together(f"the return to step {step}", forget, only_first=True)

    def _publish(self, step: int, temporary: Path, final: Path, accuracy: float | None) -> None:
        seal(temporary, step, accuracy)
        for path in (*temporary.rglob("*"), temporary):
            fsync(path)
        os.replace(temporary, final)
        fsync(self.folder)
        self._point("latest", final)
        self._tidy()

    def _tidy(self) -> None:
        """Point ``best`` at the best one and delete all but it and the last K (the latest is the last of these)."""
        steps = _steps(self.folder)
        best = _best(steps)
        self._point("best", best)
        for folder in steps[: -self._keep_last]:
            if folder != best:
                _delete(folder)

    def _point(self, name: str, target: Path | None) -> None:
        if target is None:
            (self.folder / name).unlink(missing_ok=True)
        else:
            write_atomically(self.folder / name, target.name + "\n")

    def _together(self, what: str, action: Callable[[], object], *, only_first: bool = False) -> None:
        error: Exception | None = None
        if self._rank == 0 or not only_first:
            try:
                action()
            except Exception as caught:  # carried over the barrier below, then raised on every rank
                error = caught
        if problem := self._first_problem(error):
            good = latest(self.folder)
            rest = f"{good} is intact and is the one to resume from" if good else "there is no earlier one"
            raise CheckpointError(f"could not save the checkpoint of {what}: {problem}; {rest}") from error


def latest(folder: Path) -> Path | None:
    """The checkpoint that ``latest`` in ``folder`` names, or None; with a warning where it names none."""
    pointer = Path(folder) / "latest"
    if not pointer.exists():
        return None
    name = pointer.read_bytes().decode(errors="replace").strip()
    if STEP.fullmatch(name) and (Path(folder) / name).is_dir():
        return Path(folder) / name
    log.warning("%s is damaged: it says %r, which is no checkpoint there", pointer, name[:80])
    return None


def resolve(folder: Path, spec: str) -> Path | None:
    """The checkpoint to resume from, or None to start afresh.

    ``spec`` is ``none``, ``auto`` (the latest one in ``folder``, or the newest complete one before it if that is
    damaged, with a warning), or the path of a step folder. Raises UserError where the path is no checkpoint or a
    damaged one, and where ``auto`` finds only damaged ones.
    """
    if spec == "none":
        return None
    if spec != "auto":
        if problem := damage(Path(spec)):
            raise UserError(f"--resume {spec}: not a complete checkpoint: {problem}")
        return Path(spec)
    newest = latest(folder)  # later folders are of a save that was killed before it ended, or of a forgotten future
    candidates = [step for step in _steps(folder) if newest is None or step_of(step) <= step_of(newest)]
    for candidate in reversed(candidates):
        problem = damage(candidate)
        if problem is None:
            return candidate
        log.warning("checkpoint %s is damaged (%s); looking for an earlier one", candidate, problem)
    if newest or candidates:
        raise UserError(f"--resume auto: every checkpoint in {folder} is damaged; start afresh with another run folder")
    return None


def seal(folder: Path, step: int, accuracy: float | None) -> None:
    """Write the manifest of a folder with all its files in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, sum_]
        for path, sum_ in zip(paths, _checksums(paths), strict=True)
    }
    content = {"step": step, "accuracy": accuracy, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content | {"crc32": _own_checksum(content)}, indent=1))


def damage(checkpoint: Path, *, read: bool = True) -> str | None:
    """What is wrong with a step folder by its manifest, or None if it is complete.

    ``read`` also compares the checksum of what is in each file, for which all of it is read.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        return f"{checkpoint} has no {MANIFEST}"
    try:
        content = manifest(checkpoint)
        files = content["files"]
        intact = content.pop("crc32") == _own_checksum(content)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path} cannot be read"
    if not intact:
        return f"{path} is not as it was written"
    for name, (size, _) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, not {size}"
    if read:
        for (name, (_, written)), found in zip(files.items(), _checksums([checkpoint / name for name in files])):
            if found != written:
                return f"{checkpoint / name} is not as it was written"
    return None


def _checksums(paths: Sequence[Path]) -> list[int]:
    """CRC-32 of each file, several at a time: zlib lets go of the interpreter."""

    def of(path: Path) -> int:
        value = 0
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                value = zlib.crc32(piece, value)
        return value

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(of, paths))


def _own_checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def manifest(checkpoint: Path) -> dict[str, Any]:
    """``step``, held-out ``accuracy`` (or None) and ``files`` (name to bytes and CRC-32) of a checkpoint."""
    return json.loads((checkpoint / MANIFEST).read_text())


def _steps(folder: Path) -> list[Path]:
    """Step folders, oldest first."""
    return sorted((path for path in Path(folder).glob("step-*") if STEP.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Of a checkpoint, ``step-000012``, or of another file that a step left: its name may go on."""
    return int(re.split("[-.]", path.name)[1])


def _best(checkpoints: list[Path]) -> Path | None:
    """Highest accuracy, the earliest of equals; None while nothing was measured."""
    measured = {c: manifest(c)["accuracy"] for c in checkpoints if damage(c, read=False) is None}
    return max((c for c, a in measured.items() if a is not None), key=lambda c: measured[c], default=None)


def _delete(path: Path) -> None:
    """Remove a folder or file; a folder first loses its name, so that half of one never looks like a whole."""
    if not path.exists():
        return
    if path.is_dir():
        doomed = path.with_name(TEMPORARY + "delete-" + path.name.removeprefix(TEMPORARY))
        if doomed != path:
            _delete(doomed)
            os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink()


def fsync(path: Path) -> None:
    """Wait until a file or a folder's names are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader, or a crash, sees the old content or the new, never a part.

    Of several processes that write one file at once each has a temporary file of its own, and the last one wins.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)
    for other in path.parent.glob(f"{TEMPORARY}*{glob.escape(path.name)}"):
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > ABANDONED:
                other.unlink()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to dotted keys: ``{"a": {"b": 1}}`` to ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def digest(value: Any) -> str:
    """16 hex digits of what JSON makes of a value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def run_identity(config: Mapping[str, Any], *, may_change: Collection[str], **facts: Any) -> dict[str, Any]:
    """What a resumed run must share with the checkpoint it goes on from, as a flat JSON-ready dict.

    ``config`` is the resolved config; ``may_change`` are the dotted keys or sections (``tracking``,
    ``checkpoint.keep_last``) that do not alter what is computed; ``facts`` are things outside the config, such as the
    world size and a fingerprint of the data.
    """
    free = tuple(f"{key}." for key in may_change)
    kept = {key: value for key, value in flatten(config).items() if not f"{key}.".startswith(free)}
    return json.loads(json.dumps(kept | facts))  # tuples become lists, as they are in the saved copy


def compare_identity(saved: Mapping[str, Any], current: Mapping[str, Any], *, wanted: str = "--resume") -> None:
    """Raise UserError naming every key in which a checkpoint and the run that wants to use it differ.

    ``wanted`` is for what it is wanted, as the message begins.
    """
    absent = object()

    def show(value: Any) -> str:
        return "absent" if value is absent else json.dumps(value)

    differences = [
        f"{key} is {show(was)} in the checkpoint and {show(now)} here"
        for key in sorted(saved.keys() | current.keys())
        if (was := saved.get(key, absent)) != (now := current.get(key, absent))
    ]
    if differences:
        raise UserError(f"{wanted}: the checkpoint belongs to another run: {'; '.join(differences)}")


def rng_state() -> dict[str, Any]:
    """The random state of this process (Python, NumPy, torch, and torch on the current CUDA device).

    Made of plain types and tensors: ``torch.load(..., weights_only=True)`` reads it back.
    """
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`rng_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
