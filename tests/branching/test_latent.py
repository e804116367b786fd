"""The CVAE against slow references, its checkpoint, and its training script."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from transformers import AutoConfig

from aipo.branching.cvae import CVAE, Latents, explained, fit, gaussian_kl, load_latents
from aipo.branching.latent import main
from aipo.config.sections import BranchConfig
from aipo.errors import UserError
from aipo.rollout import HfEngine, Request
from tests.tiny import make_tiny

WIDTH, LATENT = 5, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def architecture(folder):
    return AutoConfig.from_pretrained(folder)


def small(seed: int = 0) -> CVAE:
    torch.manual_seed(seed)
    return CVAE(WIDTH, hidden=7, latent=LATENT).double()


def slow_mlp(net, values: list[float]) -> list[float]:
    """Linear, ReLU, linear, ReLU, linear, one number at a time."""
    for number, layer in enumerate([net[0], net[2], net[4]]):
        values = [
            sum(w * v for w, v in zip(row, values)) + b for row, b in zip(layer.weight.tolist(), layer.bias.tolist())
        ]
        if number < 2:
            values = [max(v, 0.0) for v in values]
    return values


def slow_loss(cvae: CVAE, x, y, noise) -> tuple[float, float]:
    """The negative ELBO of each pair from its definition; means over the pairs."""
    reconstructions, kls = [], []
    for xi, yi, e in zip(x.tolist(), y.tolist(), noise.tolist()):
        (mx, sx), (my, sy) = cvae.scale_x.tolist(), cvae.scale_y.tolist()
        xs = [(v - m) / s for v, m, s in zip(xi, mx, sx)]
        ys = [(v - m) / s for v, m, s in zip(yi, my, sy)]
        q, p = slow_mlp(cvae.posterior_net, xs + ys), slow_mlp(cvae.prior_net, xs)
        z = [q[k] + math.exp(q[LATENT + k]) ** 0.5 * e[k] for k in range(LATENT)]
        decoded = slow_mlp(cvae.decoder, xs + z)
        reconstructions.append(sum((a - b) ** 2 for a, b in zip(decoded, ys)) / 2)
        kl = 0.0
        for k in range(LATENT):
            mean_q, var_q, mean_p, var_p = q[k], math.exp(q[LATENT + k]), p[k], math.exp(p[LATENT + k])
            kl += math.log(math.sqrt(var_p / var_q)) + (var_q + (mean_q - mean_p) ** 2) / (2 * var_p) - 0.5
        kls.append(kl)
    return sum(reconstructions) / len(x), sum(kls) / len(x)


def test_loss_equals_the_slow_reference_in_value_and_gradient():
    cvae = small()
    x, y, noise = (
        torch.randn(4, WIDTH).double() * 3 + 1,
        torch.randn(4, WIDTH).double(),
        torch.randn(4, LATENT).double(),
    )
    cvae.set_scale(x, y)
    reconstruction, kl = cvae.loss(x, y, noise)
    expected = slow_loss(cvae, x, y, noise)
    assert (reconstruction.item(), kl.item()) == pytest.approx(expected, abs=1e-9)
    (reconstruction + kl).backward()
    step = 1e-5
    for parameter in cvae.parameters():
        flat, index = parameter.data.view(-1), random.Random(0).randrange(parameter.numel())
        value, around = flat[index].item(), []
        for sign in (1, -1):
            flat[index] = value + sign * step
            around.append(sum(slow_loss(cvae, x, y, noise)))
        flat[index] = value
        assert parameter.grad.view(-1)[index].item() == pytest.approx((around[0] - around[1]) / (2 * step), abs=1e-6)


def test_kl_equals_torch_distributions():
    q, p = (tuple(torch.randn(2, 6, 4).double().unbind()) for _ in range(2))
    normal = [torch.distributions.Normal(mean, (log / 2).exp()) for mean, log in (q, p)]
    torch.testing.assert_close(gaussian_kl(q, p), torch.distributions.kl_divergence(*normal).sum(-1))
    assert gaussian_kl(q, q).abs().max() < 1e-12


def test_samples_follow_the_prior_and_their_own_seed():
    cvae = small()
    x = torch.randn(2, WIDTH).double()
    mean, log_variance = cvae.prior(x)
    both = torch.stack([cvae.sample(x, [seed, seed + 10**6]) for seed in range(4000)])  # (4000, 2, latent)
    torch.testing.assert_close(both.mean(0), mean.detach(), atol=0.1, rtol=0)
    torch.testing.assert_close(both.var(0), log_variance.exp().detach(), atol=0.2, rtol=0)
    torch.testing.assert_close(cvae.sample(x[1:], [7]), cvae.sample(x, [3, 7])[1:])
    assert cvae.sample(x[:0], []).shape == (0, LATENT)


@pytest.mark.slow
def test_learns_a_conditional_task():
    """y lies on one of two branches, which x does not say: the mean of p(y | x) is between them, z must choose."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 8, generator=generator) * 5 + 2
    side = torch.randint(0, 2, (600, 1), generator=generator) * 2.0 - 1
    y = 3 * side + x @ torch.randn(8, 8, generator=generator) * 0.1 + 0.1 * torch.randn(600, 8, generator=generator)
    torch.manual_seed(0)
    cvae = CVAE(8, hidden=32, latent=4)
    losses = []
    fit(cvae, x[:500], y[:500], steps=400, batch=128, lr=5e-3, report=lambda step, *parts: losses.append(parts))
    assert len(losses) == 400
    assert sum(losses[-1]) < 0.5 * sum(losses[0])
    x, y = x[500:], y[500:]
    with torch.no_grad():
        posterior = explained(cvae, x, y, cvae.posterior(x, y)[0])
        prior = explained(cvae, x, y, cvae.prior(x)[0])
    assert posterior > 0.85  # the mean explains 0
    assert posterior > prior + 0.3
    # drawn from the prior, one prefix goes both ways
    ways = cvae.decode(x[:1].expand(200, -1), cvae.sample(x[:1].expand(200, -1), range(200))).mean(-1)
    assert 20 < (ways > ways.mean()).sum() < 180


def test_fit_is_reproducible():
    x, y = torch.randn(40, WIDTH), torch.randn(40, WIDTH)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        cvae = CVAE(WIDTH, hidden=7, latent=LATENT)
        torch.manual_seed(random.randrange(1000))  # training does not touch the global generator
        fit(cvae, x, y, steps=5, batch=8, seed=3)
        states.append(torch.cat([p.flatten() for p in cvae.parameters()]))
    assert torch.equal(*states)


def test_checkpoint_comes_back(architecture, tmp_path):
    latents = Latents(architecture, hidden=16, latent=8, seed=4)
    latents.cvae.set_scale(torch.randn(9, 64), torch.randn(9, 64))
    path = tmp_path / "sub" / "latent.pt"
    latents.save(path, model="tiny")
    before = torch.get_rng_state()
    again = load_latents(path, architecture)
    assert torch.equal(before, torch.get_rng_state())
    for name, value in latents.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert [f.name for f in path.parent.iterdir()] == ["latent.pt"]


def test_checkpoints_that_do_not_fit(architecture, tmp_path):
    path = tmp_path / "latent.pt"
    with pytest.raises(UserError, match=r"there is no .*latent\.pt: train one"):
        load_latents(path, architecture)
    Latents(architecture, hidden=16, latent=8).save(path, model="tiny")
    other = copy.deepcopy(architecture)
    other.vocab_size = 999
    with pytest.raises(UserError, match=r"belongs to tiny, with vocabulary 320 \(here 999\)"):
        load_latents(path, other)
    for content in (b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is not a checkpoint of aipo\.branching\.latent"):
            load_latents(path, architecture)
    torch.save({"model": "x"}, path)
    with pytest.raises(UserError, match=r"is not a checkpoint of aipo\.branching\.latent \('fits'\)"):
        load_latents(path, architecture)


def test_injection_draws_one_latent_a_branch(folder, architecture):
    latents = Latents(architecture, hidden=16, latent=8)
    engine = HfEngine(folder, max_model_len=64, end_token_ids=[2], dtype="float32")
    branch = BranchConfig(latent="residual", latent_scale=0.5, latent_half_life=4.0)
    requests = [Request([5, 6, 7], 1), Request([5, 6, 7], 2), Request([8, 9], 1)]
    injection = latents.injection(engine, requests, branch)
    assert injection.z.shape == (3, 8)
    assert not torch.equal(injection.z[0], injection.z[1])  # one prefix, two seeds
    alone = latents.injection(engine, requests[2:], branch)
    torch.testing.assert_close(alone.z[0], injection.z[2])
    expected = engine.mean_states([[5, 6, 7]], [3])[:, 0]
    mean, log_variance = latents.cvae.prior(expected)
    noise = torch.randn(8, generator=torch.Generator().manual_seed(1 ^ 0x5DEECE66D))
    torch.testing.assert_close(injection.z[0], (mean + (log_variance / 2).exp() * noise)[0].detach())


@pytest.mark.slow
def test_script_trains_on_the_model_itself(folder, tmp_path, capsys):
    config, out = tmp_path / "latent.yaml", tmp_path / "latent.pt"
    config.write_text(
        f"base: tiny.yaml\nname: latent\nmodel: {{path: {folder}, dtype: float32}}\nrollout: {{engine: hf}}\n"
    )
    arguments = ["--config", str(config), "--out", str(out), "--questions", "4", "--samples", "5", "--steps", "20"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "step 20/20 · reconstruction" in printed
    assert "held-out continuations" in printed
    assert load_latents(out, AutoConfig.from_pretrained(folder)).sizes == {"hidden": 256, "latent": 128}
    assert main([*arguments[:4], "--questions", "1", "--samples", "1"]) == 2
    assert "must be 1 or more" in capsys.readouterr().err
