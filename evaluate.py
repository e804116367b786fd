"""Score a model:  python evaluate.py --avg32 [--model MODEL] [--benchmarks aime24,math500,...]"""

from __future__ import annotations

import os
import sys
import warnings

from aipo.errors import UserError, exit_code
from aipo.evaluation.options import parse
from aipo.startup import imports
from aipo.threads import settle


def spread(gpus: int) -> None:
    """Become a launcher that starts this command once a GPU."""
    import torch

    from aipo.distributed import refuse_unusable_gpu

    if gpus > torch.cuda.device_count():
        refuse_unusable_gpu()
        raise UserError(f"--gpus {gpus}: this machine has {torch.cuda.device_count()}")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    os.execv(sys.executable, [sys.executable, *launcher, __file__, *sys.argv[1:]])  # which has a RANK then


@exit_code
def main() -> int:
    options = parse()
    try:
        if options.compare:
            from aipo.evaluation.results import print_comparison

            print_comparison(*options.compare)
            return 0
        if options.gpus and "RANK" not in os.environ:
            spread(options.gpus)
        settle()
        warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.dist", category=FutureWarning)
        with imports():
            from aipo import distributed
            from aipo.evaluation.benchmarking import run

        return distributed.launch(lambda _: run(options))
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
