"""The latent of IIB-LPO (arXiv 2601.05870; METHODS section 9): a small CVAE of how a rollout may go on.

    python -m aipo.branching.latent --config CONFIG --out FILE [--model MODEL] [--steps N]

trains it on rollouts of the policy itself, cut where it hesitated. The prior p(z | prefix) then says in which ways a
rollout may go on from there; a branch draws one z, and :mod:`aipo.rollout.injection` lets its tokens be generated
under it.

What the sources leave open, and what we do: embeddings are means of the policy's own last hidden states (the authors
use a DeBERTa on the texts); the decoder is a Gaussian of unit variance on standardised embeddings; a rollout is cut
by its surprisal, which every engine reports. The authors' code has prior and posterior swapped in the KL; here it is
KL(posterior || prior).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from aipo.errors import UserError
from aipo.rollout.injection import Injection, Projections, Rule

if TYPE_CHECKING:
    from aipo.record.progress import Progress
    from aipo.rollout.hf import HfEngine

HIDDEN, LATENT = 256, 128

Gaussian = tuple[Tensor, Tensor]
"""Mean and log-variance, both (B, latent)"""


# -- the CVAE --------------------------------------------------------------------------------------------------------


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three linear layers."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class CVAE(nn.Module):
    """Embeddings of a prefix x and of its continuation y, both (B, width): p(z | x), q(z | x, y), p(y | x, z).

    Args:
        width: of an embedding, the model's hidden size.
    """

    scale_x: Tensor  # (2, width): mean and standard deviation
    scale_y: Tensor

    def __init__(self, width: int, *, hidden: int = HIDDEN, latent: int = LATENT) -> None:
        super().__init__()
        self.latent = latent
        self.prior_net = mlp(width, hidden, 2 * latent)
        self.posterior_net = mlp(2 * width, hidden, 2 * latent)
        self.decoder = mlp(width + latent, hidden, width)
        for name in ("scale_x", "scale_y"):
            self.register_buffer(name, torch.stack([torch.zeros(width), torch.ones(width)]))

    def set_scale(self, x: Tensor, y: Tensor) -> None:
        """Standardise from now on with the mean and standard deviation of each coordinate of these (n, width)."""
        for scale, values in ((self.scale_x, x), (self.scale_y, y)):
            scale.copy_(torch.stack([values.mean(0), values.std(0).clamp(min=1e-6)]))

    def prior(self, x: Tensor) -> Gaussian:
        mean, log_variance = self.prior_net(_standardise(x, self.scale_x)).chunk(2, dim=-1)
        return mean, log_variance

    def posterior(self, x: Tensor, y: Tensor) -> Gaussian:
        both = torch.cat([_standardise(x, self.scale_x), _standardise(y, self.scale_y)], dim=-1)  # (B, 2 * width)
        mean, log_variance = self.posterior_net(both).chunk(2, dim=-1)
        return mean, log_variance

    def decode(self, x: Tensor, z: Tensor) -> Tensor:
        """Mean of p(y | x, z), standardised. (B, width)"""
        return self.decoder(torch.cat([_standardise(x, self.scale_x), z], dim=-1))

    def loss(self, x: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of the negative ELBO, in nats a pair up to a constant: 1/2 |y - y'|^2 and KL(q || p).

        Args:
            noise: (B, latent) standard normal; z = mean + exp(log-variance / 2) * noise.
        """
        posterior = self.posterior(x, y)
        decoded = self.decode(x, _draw(posterior, noise))  # (B, width)
        reconstruction = 0.5 * (decoded - _standardise(y, self.scale_y)).square().sum(-1)  # (B,)
        return reconstruction.mean(), gaussian_kl(posterior, self.prior(x)).mean()

    @torch.no_grad()
    def sample(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        """One z from the prior of each x (B, width), by its own seed. (B, latent)"""
        prior = self.prior(x)
        noise = [torch.randn(self.latent, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return _draw(prior, torch.stack(noise).to(x.device)) if noise else prior[0]


def _standardise(values: Tensor, scale: Tensor) -> Tensor:
    return (values - scale[0]) / scale[1]


def _draw(gaussian: Gaussian, noise: Tensor) -> Tensor:
    return gaussian[0] + (0.5 * gaussian[1]).exp() * noise


def gaussian_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) of diagonal Gaussians, in nats. (B,)"""
    (mean_q, log_q), (mean_p, log_p) = q, p
    return 0.5 * (log_p - log_q + ((mean_q - mean_p).square() + log_q.exp()) / log_p.exp() - 1).sum(-1)


# -- the checkpoint --------------------------------------------------------------------------------------------------


def dimensions(config: PretrainedConfig) -> dict[str, Any]:
    """What a checkpoint must share with the model that it serves."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "architecture": config.model_type,
        "hidden size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "width of keys": head * config.num_key_value_heads,
        "vocabulary": config.vocab_size,
    }


class Latents(nn.Module):
    """CVAE and projections of one model: what a checkpoint holds."""

    def __init__(self, config: PretrainedConfig, *, hidden: int = HIDDEN, latent: int = LATENT, seed: int = 0) -> None:
        super().__init__()
        self.fits, self.sizes = dimensions(config), {"hidden": hidden, "latent": latent}
        width, layers, kv_width = (self.fits[key] for key in ("hidden size", "layers", "width of keys"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.cvae = CVAE(width, hidden=hidden, latent=latent)
            self.projections = Projections(width, layers, kv_width, latent)

    def injection(
        self,
        engine: HfEngine,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        rule: Rule,
        scale: float,
        half_life: float | None,
    ) -> Injection:
        """A latent from the prior for each branch; ``prompts`` are question and prefix, ``seeds`` those of the
        requests."""
        x = engine.mean_states(prompts, [len(prompt) for prompt in prompts])[:, 0]  # (B, width)
        # the engine draws its tokens from `seed` itself: the same numbers must not choose both
        z = self.cvae.sample(x, [seed ^ 0x5DEECE66D for seed in seeds])  # (B, latent)
        return Injection(rule, self.projections, z, scale, half_life)

    def save(self, path: str | Path, *, model: str) -> None:
        """Write the checkpoint, whole or not at all. ``model`` names the model it was trained on."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}")
        torch.save({"model": model, "fits": self.fits, "sizes": self.sizes, "state": self.state_dict()}, temporary)
        temporary.rename(path)


def load_latents(path: str | Path, config: PretrainedConfig) -> Latents:
    """Read a checkpoint for the model of ``config``.

    Raises UserError if there is none, if it is damaged or something else, or if it belongs to another model.
    """
    again = "train one with python -m aipo.branching.latent --config CONFIG --out FILE"
    if not Path(path).is_file():
        raise UserError(f"branch.latent_path: there is no {path}: {again}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        name, fits, sizes, state = (saved[key] for key in ("model", "fits", "sizes", "state"))
        if wrong := {key: fits[key] for key, value in dimensions(config).items() if fits[key] != value}:
            here = ", ".join(f"{key} {value} (here {dimensions(config)[key]})" for key, value in wrong.items())
            raise UserError(f"branch.latent_path: {path} belongs to {name}, with {here}: {again}")
        latents = Latents(config, **sizes)
        latents.load_state_dict(state)
    except UserError:
        raise
    except Exception as error:  # whatever torch.load makes of a file that is not one of ours
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"branch.latent_path: {path} is not a checkpoint of aipo.branching.latent ({reason}): {again}"
        ) from None
    return latents.eval()


# -- training --------------------------------------------------------------------------------------------------------


def fit(
    cvae: CVAE,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    batch: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
    report: Callable[[int, float, float], None] = lambda step, reconstruction, kl: None,
) -> None:
    """Maximise the ELBO of the pairs x, y (n, width) with Adam on random batches; ``report`` gets both losses."""
    cvae.set_scale(x, y)
    optimizer = torch.optim.Adam(cvae.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (min(batch, len(x)),), generator=generator)  # (b,)
        noise = torch.randn(len(rows), cvae.latent, generator=generator)  # (b, latent)
        reconstruction, kl = cvae.loss(x[rows], y[rows], noise)
        optimizer.zero_grad()
        (reconstruction + kl).backward()
        nn.utils.clip_grad_norm_(cvae.parameters(), 10.0)  # a KL with tiny variances can explode early
        optimizer.step()
        report(step, float(reconstruction.detach()), float(kl.detach()))


def explained(cvae: CVAE, x: Tensor, y: Tensor, z: Tensor) -> float:
    """Share of the standardised y's square that decoding z explains; 0 is what their mean does, 1 is perfect."""
    with torch.no_grad():
        target = _standardise(y, cvae.scale_y)
        return 1 - float((cvae.decode(x, z) - target).square().sum() / target.square().sum())


def collect_pairs(
    config: Any, inputs: Any, *, questions: int, samples: int, seed: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Rollouts of the model itself, each cut at one of its most surprising tokens -> x, y (n, width).

    ``config`` and ``inputs`` are those of :mod:`aipo.run`.
    """
    from aipo.branching.branches import branch_point
    from aipo.rollout import HfEngine, Request, Sampling, make_engine
    from aipo.rollout.collect import request_seed

    rollout = config.rollout
    options = {
        "max_model_len": config.data.max_prompt_tokens + rollout.max_tokens,
        "end_token_ids": sorted(inputs.prompter.end_ids),
        "dtype": config.model.dtype,
    }
    chosen = torch.randperm(len(inputs.problems), generator=torch.Generator().manual_seed(seed))[:questions]
    requests = [
        Request(inputs.prompter.encode(problem.question), request_seed(seed, "latent", problem.id, sample))
        for problem in (inputs.problems[i] for i in chosen.tolist())
        for sample in range(samples)
    ]
    engine = make_engine(rollout.engine, inputs.model_path, **options)
    sampling = Sampling(rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    with progress.task("rollouts", len(requests)) as task:
        completions = engine.generate(requests, sampling, on_done=lambda *_: task.advance())
    engine.close()

    states = HfEngine(inputs.model_path, **options)
    sequences = [[*r.prompt_ids, *c.token_ids] for r, c in zip(requests, completions)]
    cuts = [
        len(request.prompt_ids) + branch_point([-p for p in completion.logprobs], seed=request.seed)
        for request, completion in zip(requests, completions)
    ]
    means, block = [], 256
    with progress.task("embeddings", len(sequences)) as task:
        for start in range(0, len(sequences), block):
            means.append(states.mean_states(sequences[start : start + block], cuts[start : start + block]))
            task.advance(len(means[-1]))
    x, y = torch.cat(means).unbind(1)
    return x, y


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
    args = parser.parse_args(arguments)
    try:
        train(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(args: argparse.Namespace) -> None:
    """From rollouts to a checkpoint; a tenth of the pairs is kept out to say what was learned."""
    from transformers import AutoConfig

    from aipo.config import load_config
    from aipo.model.export import find_model
    from aipo.model.precision import choose, this_device
    from aipo.record.progress import Progress
    from aipo.run import check_inputs

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
