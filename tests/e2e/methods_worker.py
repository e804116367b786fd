"""Two steps of every method on one vLLM engine: methods_worker.py MODEL DATA RUNS [METHOD[+key=value...] ...]"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from aipo import distributed

device = distributed.start()

from aipo import run as runs  # noqa: E402
from aipo.config import load_config  # noqa: E402

ENGINE: list[Any] = []


def shared_engine(kind: str, path: str, **options: Any) -> Any:
    """The first engine serves all methods: they have the same model and lengths, and every start syncs all weights."""
    if not ENGINE:
        ENGINE.append(runs.make_engine_itself(kind, path, **options))  # type: ignore[attr-defined]
        ENGINE[0].shut, ENGINE[0].close = ENGINE[0].close, lambda: None
    return ENGINE[0]


runs.make_engine_itself, runs.make_engine = runs.make_engine, shared_engine  # type: ignore[attr-defined, assignment]


def main(model: str, data: str, folder: str, methods: list[str]) -> None:
    for name in methods:
        method, *more = name.split("+")
        fixed = {"model.path": model, "data.train": data, "data.validation": data, "runs": folder, "name": name}
        fixed |= {"optim.steps": "2", "validation.every": "2", "checkpoint.every": "2", "rollout.check_sync": "false"}
        # a random model is seldom right: lengths make rewards differ
        fixed |= {
            "reward.correctness": "0.5",
            "reward.length": "0.5",
            "dynamic.by": "reward",
            "reward.overlong_buffer": "15",
        }
        config = load_config("tiny.yaml", [*(f"{k}={v}" for k, v in fixed.items()), *more], method=method)
        print(f"== {name}", flush=True)
        assert runs.run(config, device=device)
    ENGINE[0].shut()
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:4], sys.argv[4:])
    os._exit(0)  # vLLM's threads may outlive the engine
