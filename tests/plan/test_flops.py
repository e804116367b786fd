"""The count of operations against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from aipo.plan.flops import sizes, step_flops


@pytest.mark.parametrize("positions", [1, 5, 12])
def test_matrix_products_of_a_forward_and_backward_pass(positions: int) -> None:
    """Attention is counted as if it were not causal by PyTorch's counter, by halves here."""
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    config._attn_implementation = "eager"
    model, length, rows = LlamaForCausalLM(config), 12, 3
    ids = torch.arange(length).expand(rows, length)  # (B, S)
    with FlopCounterMode(display=False) as counter:
        states = model.model(input_ids=ids).last_hidden_state[:, :positions]  # (B, K, d)
        model.lm_head(states).sum().backward()
    attention = 6.0 * 2 * 32 * rows * length**2  # L q sum s^2, once more
    found = step_flops(sizes(model), [length] * rows, rows * length, rows * positions) + attention
    # norms are no products; the first layer's input has no gradient to the embedding's, which is a lookup
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)
