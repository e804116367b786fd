"""What a forward and backward pass costs in floating-point operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from aipo.model.loading import attention_widths


def step_flops(model: dict[str, int], lengths: Sequence[int], tokens: int, positions: int) -> float:
    """FLOPs of forward and backward: 6 (P tokens + V d positions) + 6 L q sum of squared lengths.

    P are the parameters without embedding and head, ``positions`` where the head is used, L the layers and q the
    width of a layer's queries. (Causal attention: half of 4 q s^2 forward, twice that backward.) What is recomputed
    does not count. The backward pass alone is two thirds, whatever the lengths.
    """
    head = model["vocabulary"] * model["width"]
    attention = model["layers"] * model["queries"] * sum(length**2 for length in lengths)
    return 6.0 * (model["body"] * tokens + head * positions + attention)


def sizes(model: nn.Module) -> dict[str, int]:
    """What :func:`step_flops` wants to know."""
    config: Any = model.config
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight  # type: ignore[operator]
    ends = {id(embedding): embedding.numel(), id(head): head.numel()}
    return {
        "body": sum(p.numel() for p in model.parameters()) - sum(ends.values()),
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "queries": attention_widths(config)[0],
    }
