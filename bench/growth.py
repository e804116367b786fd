"""What a run holds after each step, and what of it grew; for bench/soak.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

EVERY = ("checkpoint.every", "validation.every", "tracking.plot_every")
BOUNDS = {"RSS": 16 * 2**20, "shared memory": 0, "file handles": 2, "threads": 1, "folder": 16 * 2**10}
"""Growth that is borne (:func:`grown`): bytes, number; of the folder bytes a step."""
WARM_STEPS = 50  # in which a run comes to its size
WARM = {"RSS": 32 * 2**20, "folder": 32 * 2**10}
"""What is borne besides while it does: libraries are read in, the first completions are long, the plots are new."""


def resources(process: psutil.Process, folder: Path) -> dict[str, float]:
    status = Path(f"/proc/{process.pid}/status").read_text()
    shared = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssShmem"))
    files = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    return {
        "RSS": process.memory_info().rss,
        "shared memory": shared * 1024,
        "file handles": process.num_fds(),
        "threads": process.num_threads(),
        "folder": sum(files),
    }


def grown(seen: Sequence[Mapping[str, float]], steps: int) -> tuple[str, list[str]]:
    """What grew over so many steps, beside its bound, and what did by more.

    From the median of the second eighth, behind what is made at the start, to that of the last quarter.
    """
    quarter = len(seen) // 4
    first, last = seen[quarter // 2 : quarter], seen[-quarter:]
    wrong, told = [], []
    for key, bound in BOUNDS.items():
        more = statistics.median(s[key] for s in last) - statistics.median(s[key] for s in first)
        if key == "folder":
            more /= steps * 11 / 16  # between the two medians, at 3/16 and 14/16
        if steps / 8 < WARM_STEPS:
            bound += WARM.get(key, 0)
        if more > bound:
            wrong.append(f"growth: {key} grew by {more:.0f}, bound {bound}")
        unit, form, of = (2**20, ".1f", " MiB") if key in ("RSS", "shared memory") else (1, ".0f", "")
        of = " bytes a step" if key == "folder" else of
        told.append(f"{key} {more / unit:+{form}}{of} (bound {bound / unit:.0f})")
    return ", ".join(told), wrong
