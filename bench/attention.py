"""What attention costs in a layer, by how the sequences of a micro-batch are laid out:  python bench/attention.py

Forward and backward pass of the attention function alone, in bfloat16: rows padded to the longest with a mask over each
(as transformers makes it of a 2-d mask), without a mask (as aipo/policy.py has them), packed into one row, and one
prompt with as many completions (aipo/model/shared_attention.py). Heads are those of SmolLM2-135M, on a GPU of
Qwen3-1.7B. TFLOP/s count causal attention within sequences, without padding. --out writes the table to a file.
"""

from __future__ import annotations

import argparse
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from aipo.evaluation.results import markdown
from aipo.model.shared_attention import Tree, forward
from aipo.plan.planner import PUBLISHED
from bench.machine import machine
from bench.measure import Clock, matmul_peak, median

PROMPT = 1 / 8  # of the longest sequence, where a prompt is shared


@dataclass
class Layout:
    rows: int  # b
    width: int  # s
    pairs: float  # of tokens that see each other
    mask: Tensor | None = None  # (b, 1, s, s) bool
    tree: Tree | None = None


def layouts(rows: int, longest: int, device: torch.device) -> dict[str, Layout]:
    """Of sequences from ``longest`` down to about three quarters of it."""
    lengths = [longest - longest * i // (4 * rows) for i in range(rows)]
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    token = torch.arange(longest, device=device)  # (s,)
    real = token < torch.tensor(lengths, device=device)[:, None]  # (b, s)
    mask = (token <= token[:, None]) & real[:, None, None]  # (b, 1, s, s)
    prompt = int(PROMPT * longest)
    segments = [prompt, *(n - prompt for n in lengths)]
    shared = pairs - (rows - 1) * prompt * (prompt + 1) / 2
    return {
        "padded, with a mask": Layout(rows, longest, pairs, mask=mask),
        "padded": Layout(rows, longest, pairs),
        "packed": Layout(1, sum(lengths), pairs, tree=Tree(lengths, [None] * rows).to(device)),
        "a prompt once": Layout(1, sum(segments), shared, tree=Tree(segments, [None, *[0] * rows]).to(device)),
    }


def timed(layout: Layout, heads: int, groups: int, size: int, repeats: int) -> float:
    """Median seconds of a forward and backward pass."""
    module = nn.Module()
    module.num_key_value_groups = heads // groups  # type: ignore[assignment]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(layout.rows, layout.width, each, size, device=device, dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for each in (heads, groups, groups)
    )
    upstream = torch.randn(layout.rows, layout.width, heads, size, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(1 + repeats):
        clock = Clock()
        with clock("pass"):
            out, _ = forward(module, query, key, value, layout.mask, tree=layout.tree)  # (b, s, heads, h)
            torch.autograd.grad(out, (query, key, value), upstream)
        seconds.append(clock.seconds["pass"])
    return median(seconds[1:])


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-1.7B" if cuda else "embedded:smollm2-135m")
    cases = "8x2048,4x4096,2x8192,2x12288" if cuda else "16x150,4x600"
    parser.add_argument("--cases", default=cases, help=f"rows x longest sequence, by comma (default: {cases})")
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5)
    parser.add_argument("--out", type=Path, help="where the table goes")
    arguments = parser.parse_args()
    device, shape = torch.device("cuda" if cuda else "cpu"), PUBLISHED[arguments.model]
    heads, groups, size = (shape[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    cells = []
    for case in arguments.cases.split(","):
        rows, longest = map(int, case.split("x"))
        masked = 0.0
        for name, layout in layouts(rows, longest, device).items():
            seconds = timed(layout, heads, groups, size, arguments.repeats)
            masked = masked or seconds
            # 4 h FLOPs for each pair and head forward, 2.5 times that backward, scores made again
            rate = 3.5 * 4 * heads * size * layout.pairs / seconds
            cells.append(
                [f"{rows} × {longest:,}", name, f"{1e3 * seconds:.2f}", f"{seconds / masked:.2f}", f"{rate / 1e12:.3g}"]
            )
    peak = matmul_peak(device) / 1e12
    text = f"""# Attention in a layer

{machine()}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {version("torch")}. {heads}
heads, {groups} of keys and values, of {size}; fastest bfloat16 product of square matrices: {peak:.2f} TFLOP/s.

{markdown(["sequences", "layout", "ms", "ratio to a mask", "TFLOP/s"], cells)}"""
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
