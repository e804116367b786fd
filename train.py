"""Train a model:  accelerate launch train.py --config qwen3_8b.yaml [--resume auto] [--dry-run] [key.path=value ...]"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

from aipo.config import Config, dump_config, help_keys, help_sources, load_config
from aipo.errors import UserError, tell_launcher
from aipo.startup import imports, legible
from aipo.threads import settle


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        epilog=f"keys, for YAML and key.path=value:\n{help_keys()}\n\nof a source:\n{help_sources()}".replace(
            "%", "%%"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file; a name without a folder is looked up in configs/")
    parser.add_argument(
        "--method", metavar="NAME", help="keys of configs/methods/NAME.yaml on top of the config's: --method dapo"
    )
    parser.add_argument(
        "--resume",
        default="none",
        metavar="auto|PATH|none",
        help="go on from the newest checkpoint of the run folder, from this one, or start afresh (default)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, load no weights")
    parser.add_argument("--gpus", type=int, help="GPUs that --dry-run plans for (default: those here, or 1)")
    parser.add_argument(
        "--gpu-memory-gb",
        type=float,
        default=None,
        help="memory of one GPU for --dry-run (default: this one's, else 80)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override keys of the config")
    return parser.parse_intermixed_args(arguments)


def dry_run(config: Config, arguments: argparse.Namespace) -> int:
    """Print the resolved config, what the data holds, and the plan; 2 if it does not fit."""
    import torch

    from aipo.evaluation.results import make_console
    from aipo.inputs import check_functions, describe_data, missing_data, without_effect
    from aipo.plan.planner import plan, render

    print(dump_config(config))
    check_functions(config)
    for line in (*describe_data(config), *without_effect(config)):
        print(line)
    gpus = (torch.cuda.device_count() or 1) if arguments.gpus is None else arguments.gpus
    made = plan(config, gpus, gpu_memory_gb=arguments.gpu_memory_gb)
    make_console().print(render(made))
    for line in missing_data(config):  # last: else it stands above the tables
        print(line)
    return 2 if made.problems else 0


def main() -> int:
    legible()
    arguments = parse()
    rank = int(os.environ.get("RANK", "0"))
    if arguments.dry_run and rank > 0:  # rank 0 says it
        return 0
    try:
        config = load_config(arguments.config, arguments.overrides, method=arguments.method)
        if arguments.dry_run:
            return dry_run(config, arguments)
        settle()
        warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.dist", category=FutureWarning)
        with imports():  # torch and all that: only once the config is known to be right
            from aipo import distributed
            from aipo.run import run

        return distributed.launch(lambda device: 0 if run(config, resume=arguments.resume, device=device) else 3)
    except UserError as error:
        tell_launcher(f"error: {error}")
        print(f"rank {rank}: error: {error}" if rank else f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:  # outside the steps, which end with a checkpoint: aipo.run.signals
        if rank == 0:
            print("\nstopped; labels that are done are kept, and --resume auto goes on", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
