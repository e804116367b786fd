"""The latent of IIB-LPO (arXiv 2601.05870): a small CVAE of how a rollout may go on.

The prior p(z | prefix) says in which ways a rollout may go on from there; a branch draws one z, and
:mod:`aipo.rollout.injection` lets its tokens be generated under it. :mod:`aipo.branching.latent` trains it.

What the sources leave open, and what we do: embeddings are means of the policy's own last hidden states (the authors
use a DeBERTa on the texts); the decoder is a Gaussian of unit variance on standardised embeddings. The authors' code
has prior and posterior swapped in the KL; here it is KL(posterior || prior).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from aipo.config.sections import BranchConfig
from aipo.errors import UserError
from aipo.rollout.base import Request
from aipo.rollout.injection import Injection, Projections

if TYPE_CHECKING:
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

    def injection(self, engine: HfEngine, requests: Sequence[Request], branch: BranchConfig) -> Injection:
        """A latent from the prior for the request of each branch, whose prompt is question and prefix."""
        prompts = [request.prompt_ids for request in requests]
        x = engine.mean_states(prompts, [len(prompt) for prompt in prompts])[:, 0]  # (B, width)
        # the engine draws its tokens from `seed` itself: the same numbers must not choose both
        z = self.cvae.sample(x, [request.seed ^ 0x5DEECE66D for request in requests])  # (B, latent)
        assert branch.latent != "none"
        return Injection(branch.latent, self.projections, z, branch.latent_scale, branch.latent_half_life)

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
