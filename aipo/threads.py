"""CPU threads of a rank: how many, and how they wait. Without torch: OpenMP reads its environment when it is loaded."""

from __future__ import annotations

import os
import sys

from aipo.errors import UserError


def settle() -> None:
    """Set the environment of OpenMP for this rank. Call it before torch is imported."""
    threads, asked = cpu_threads(), os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > threads and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"OMP_NUM_THREADS={asked} exceeds the cores of a rank: {threads} used", file=sys.stderr, flush=True)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Threads that spin while they wait take the core from what else runs there: a verifier, a second rank, a browser.
    # GNU's OpenMP spins for microseconds before it sleeps, as vLLM's many small operations wait no longer than that.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def cpu_threads() -> int:
    """Threads of this rank: its share of the cores that it may run on, or ``OMP_NUM_THREADS`` if that is less.

    A 1 that comes through torchrun or accelerate counts as unset: they export it where the user set nothing. Raises
    UserError if the variable is no number.
    """
    share = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # what follows is for nested regions
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if not asked or (asked == "1" and launched):
        return share
    if not asked.isdecimal() or int(asked) == 0:
        raise UserError(f"OMP_NUM_THREADS={asked}: it must be a number of threads, at least 1")
    return min(int(asked), share)
