"""The Triton kernel against PyTorch. Without a GPU Triton interprets it, in a process that is told so at its start."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.slow
pytest.importorskip("triton", reason="Triton is not installed: GPU scores take plain PyTorch there")

CHECK = """
import torch
from aipo import mi
from aipo.mi_kernels import chebyshev_products, squared_norms

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
# tokens of each factor, coordinates, columns, polynomials and outliers that fill no tile, one tile, or several
for spans, d, r, count, o in (
    ([(0, 1)], 2, 1, 2, 0),
    ([(1, 5), (0, 17), (2, 1)], 37, 13, 23, 3),
    ([(0, 32)], 32, 16, 2, 33),
    ([(2, 3), (0, 3)], 70, 29, 34, 1),
    ([(1, 3)], 32, 70, 9, 2),
    ([(0, 2)], 5, 3, 1, 5),
):
    c = sum(length for _, length in spans)
    x = (2 * torch.rand(c, d) - 1) * torch.rand(c, 1)
    x[:, 0], x[0, 1], x[-1, 0] = 0, 1, -1
    factors = torch.randn(3, d, r)
    features = mi.FourierFeatures.draw("random", 1, 70, 0)
    phi = mi.Expansion(features.frequency[0], features.phase, features.amplitude, torch.randn(70, count).double())
    which = torch.tensor([gold for gold, length in spans for _ in range(length)])
    far, outer = 50 * torch.randn(c, o), torch.randn(3, o, r)
    for first in (0, 1):
        found = chebyshev_products(x.to(device), first, count, factors.to(device), spans)
        expected = mi._chebyshev_products(x.double(), first, count, factors.double(), spans)
        assert found.shape == expected.shape == (c, count - first, r)
        scale = float(factors.norm(dim=1).max())
        torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=2e-6 * scale)
        arguments = [part.float().to(device) for part in (expected, far, outer)]
        there = phi.to(arguments[0])
        waves = there.frequency, there.phase, there.amplitude
        norms = squared_norms(*arguments, which.to(device), there.series[:, first:], waves)
        plain = mi._squared_norms(expected, far.double(), outer[which].double(), phi, first)
        torch.testing.assert_close(norms.cpu().double(), plain, rtol=3e-5, atol=1e-9)
"""


def test_products_equal_those_of_plain_pytorch():
    environment = os.environ if torch.cuda.is_available() else os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: elsewhere scores take plain PyTorch")
def test_scores_on_a_gpu_equal_those_on_the_cpu():
    from aipo.config.sections import MIConfig
    from aipo.scorer import TokenScorer

    torch.manual_seed(0)
    lengths = torch.tensor([50, 3, 1, 20] * 8)
    hidden, gold = 20 * torch.randn(int(lengths.sum()), 300), 20 * torch.randn(len(lengths), 300)
    hidden[:, :3] *= 40
    gold[::2, 5:9] *= 40  # so that the gold states need different columns
    gold[::3] = gold[0]
    on_cpu = TokenScorer(MIConfig()).score(hidden, gold, lengths)
    on_gpu = TokenScorer(MIConfig()).score(hidden.cuda(), gold.cuda(), lengths.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-5 * float(on_cpu.max()))
