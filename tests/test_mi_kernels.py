"""The Triton kernel against PyTorch. Without a GPU Triton interprets it, in a process that is told so at its start."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: GPU scores take plain PyTorch there")

CHECK = """
import torch
from aipo.mi import chebyshev
from aipo.mi_kernels import chebyshev_products

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
# tokens, coordinates, columns and polynomials that fill no tile, one tile, or several
for c, d, r, count in ((1, 2, 1, 2), (5, 37, 13, 23), (128, 32, 16, 2), (9, 70, 29, 30), (3, 32, 70, 23), (2, 5, 3, 1)):
    x = (2 * torch.rand(c, d) - 1) * torch.rand(c, 1)
    x[:, 0], x[0, 1], x[-1, 0] = 0, 1, -1
    factor = torch.randn(d, r)
    for first in (0, 1):
        found = chebyshev_products(x.to(device), first, count, factor.to(device)).cpu().double()
        expected = chebyshev(x.double(), count)[first:] @ factor.double()
        assert found.shape == expected.shape == (count - first, c, r)
        scale = factor.norm(dim=0).max()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(scale))
"""


def test_products_equal_those_of_plain_pytorch():
    environment = os.environ if torch.cuda.is_available() else os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: elsewhere scores take plain PyTorch")
def test_scores_on_a_gpu_equal_those_on_the_cpu():
    from aipo.mi import coordinate_scores

    torch.manual_seed(0)
    hidden, gold = 20 * torch.randn(50, 300), 20 * torch.randn(300)
    hidden[:, :3] *= 40
    on_cpu = coordinate_scores(hidden, gold, num_features=256, sigma=50.0)
    on_gpu = coordinate_scores(hidden.cuda(), gold.cuda(), num_features=256, sigma=50.0)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-5 * float(on_cpu.max()))
