"""train.py whose last rank fails:  failing_worker.py forward|reward|save ARGUMENTS"""

from __future__ import annotations

import os
import sys
from typing import Any

import train
from aipo.reward import Rewarder
from aipo.selection import Selection
from aipo.sharding import DeepSpeed

PLACES: dict[str, tuple[type, str]] = {
    "forward": (Selection, "__call__"),  # inside the policy's forward, between two gatherings of ZeRO-3
    "reward": (Rewarder, "collect"),
    "save": (DeepSpeed, "save"),  # before DeepSpeed's own barrier, where the other rank then waits
}


def main() -> int:
    where = sys.argv.pop(1)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"broken in the {where}")

    if os.environ["RANK"] == "1":
        setattr(*PLACES[where], broken)
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
