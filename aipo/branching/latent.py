"""Train the latent of IIB-LPO on rollouts of the policy itself, cut where it hesitated.

python -m aipo.branching.latent --config CONFIG --out FILE [--model MODEL] [--steps N]
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from aipo.branching.branches import kept_tokens
from aipo.branching.cvae import HIDDEN, LATENT, Latents, explained, fit
from aipo.config import Config, load_config
from aipo.errors import UserError, exit_code
from aipo.inputs import Inputs, check_inputs
from aipo.model.export import find_model
from aipo.model.precision import choose, this_device
from aipo.record.progress import Progress
from aipo.rollout import HfEngine, Request, Sampling, make_engine
from aipo.rollout.collect import request_seed


def collect_pairs(
    config: Config, inputs: Inputs, *, questions: int, samples: int, seed: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Rollouts of the model itself, each cut at one of its most surprising tokens -> x, y (n, width).

    It is cut as ``branch`` says, by the surprisal, which every engine reports.
    """
    rollout = config.rollout
    options: dict[str, Any] = {
        "max_model_len": config.data.max_prompt_tokens + rollout.max_tokens,
        "end_token_ids": sorted(inputs.prompter.end_ids),
        "dtype": config.model.dtype,
    }
    chosen = torch.randperm(len(inputs.problems), generator=torch.Generator().manual_seed(seed))[:questions]
    requests = [
        Request(
            inputs.prompter.encode(problem.question, problem.origin), request_seed(seed, "latent", problem.id, sample)
        )
        for problem in (inputs.problems[i] for i in chosen.tolist())
        for sample in range(samples)
    ]
    engine = make_engine(rollout.engine, inputs.model_path, **options)
    sampling = Sampling.of(rollout)
    with progress.task("rollouts", len(requests)) as task:
        completions = engine.generate(requests, sampling, on_done=lambda *_: task.advance())
    engine.close()

    states = HfEngine(inputs.model_path, **options)
    sequences = [[*r.prompt_ids, *c.token_ids] for r, c in zip(requests, completions)]
    cuts = [
        len(request.prompt_ids) + kept_tokens([-p for p in completion.logprobs], config.branch, seed=request.seed)
        for request, completion in zip(requests, completions)
    ]
    means, block = [], 256
    with progress.task("embeddings", len(sequences)) as task:
        for start in range(0, len(sequences), block):
            means.append(states.mean_states(sequences[start : start + block], cuts[start : start + block]))
            task.advance(len(means[-1]))
    x, y = torch.cat(means).unbind(1)
    return x, y


@exit_code
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m aipo.branching.latent", description="Train the CVAE of IIB-LPO.")
    parser.add_argument("--config", required=True, help="of the run that will use it: model, data and sampling")
    parser.add_argument("--model", help="another model than the config's: hub id, folder, or a run of ours")
    parser.add_argument("--out", required=True, help="checkpoint to write, for branch.latent_path")
    parser.add_argument("--questions", type=int, default=512, help="training questions to sample from (512)")
    parser.add_argument("--samples", type=int, default=8, help="rollouts a question (8)")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (2000)")
    parser.add_argument("--batch", type=int, default=256, help="pairs a step (256)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam (1e-3)")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help=f"width of the MLPs ({HIDDEN})")
    parser.add_argument("--latent", type=int, default=LATENT, help=f"size of z ({LATENT})")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args(arguments))
    return 0


def train(args: argparse.Namespace) -> None:
    """From rollouts to a checkpoint; a tenth of the pairs is kept out to say what was learned."""
    if min(args.questions * args.samples // 10, args.steps, args.batch, args.hidden, args.latent) < 1:
        raise UserError("--steps, --batch, --hidden and --latent must be 1 or more, --questions * --samples 10 or more")
    config = load_config(args.config, [f"model.path={find_model(args.model).path}"] if args.model else [])
    precision = choose(config.model.dtype, this_device())
    config = precision.settle(config)
    inputs = check_inputs(config, world=1)
    latents = Latents(
        AutoConfig.from_pretrained(inputs.model_path), hidden=args.hidden, latent=args.latent, seed=args.seed
    )
    cvae = latents.cvae
    with Progress() as progress:
        for line in precision.lines:
            progress.say(line)
        x, y = collect_pairs(
            config, inputs, questions=args.questions, samples=args.samples, seed=args.seed, progress=progress
        )
        out = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed)) < len(x) // 10  # (n,)
        with progress.task("training", args.steps) as task:

            def report(step: int, reconstruction: float, kl: float) -> None:
                task.advance()
                if step % max(args.steps // 10, 1) == 0:
                    progress.say(f"step {step}/{args.steps} · reconstruction {reconstruction:.2f} · KL {kl:.2f} nats")

            fit(cvae, x[~out], y[~out], steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed, report=report)
        x, y = x[out], y[out]
        with torch.no_grad():
            posterior, prior = cvae.posterior(x, y)[0], cvae.prior(x)[0]
        size = cvae.sample(x, range(len(x))).square().mean().sqrt()
        progress.say(
            f"of {len(x)} held-out continuations the posterior's mean explains {explained(cvae, x, y, posterior):.1%}, "
            f"the prior's {explained(cvae, x, y, prior):.1%}; the coordinates of a drawn z are about {size:.2f}"
        )
        latents.save(args.out, model=config.model.path)
        progress.say(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main())
