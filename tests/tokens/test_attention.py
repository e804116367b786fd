"""Entropies of attention rows against the weights that eager attention returns, one sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aipo.layout import MicroBatch, filler, micro_batches, shared_prompt_batches
from aipo.policy import Policy
from aipo.tokens.attention import AttentionEntropy, attention_weights, row_entropy

PROMPTS = [[5, 6, 7], [5, 6, 7, 6, 5, 4, 3], [5], [11] * 6, [5, 6, 7]]
COMPLETIONS = [[1, 2, 3, 4], [30, 0, 0], [7, 7, 7, 7, 7, 7, 7, 7], [3], [20, 21, 22, 23, 24, 25]]
LAYOUTS = {
    "one by one": micro_batches(PROMPTS, COMPLETIONS, budget=1, packing=False),
    "padded": micro_batches(PROMPTS, COMPLETIONS, budget=1000, packing=False),
    "packed": micro_batches(PROMPTS, COMPLETIONS, budget=1000, packing=True),
    "shared prompts": shared_prompt_batches(PROMPTS, COMPLETIONS, budget=1000),
}
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,  # grouped: three heads share their keys
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,  # sharp attention, far from uniform
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads only wait for each other on tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def varlen_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As flash attention: is given no (s, s) mask, and tells packed sequences apart by their positions."""
    assert attention_mask is None or attention_mask.dim() == 2
    size = query.shape[2]
    starts = (kwargs["position_ids"] == 0).cumsum(1)  # (r or 1, s)
    mask = (starts[:, :, None] == starts[:, None, :]) & torch.ones(size, size, dtype=torch.bool).tril()
    if window := kwargs.get("sliding_window"):
        mask = mask.triu(1 - window)
    return sdpa_attention_forward(module, query, key, value, mask[:, None], scaling=kwargs["scaling"])


AttentionInterface.register("varlen", varlen_attention)


def make(kind: str, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    settings = SIZES | {"attn_implementation": attention}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**settings))
    if kind == "sliding":
        settings |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return Qwen3ForCausalLM(Qwen3Config(**settings))


def reference(kind: str, layers: tuple[int, ...]) -> list[list[float]]:
    """Mean over heads of chosen layers of the entropy of the row / log(context length), by loops."""
    model = make(kind, "eager")
    out = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS):
        with torch.no_grad():
            attentions = model(input_ids=torch.tensor([prompt + completion]), output_attentions=True).attentions
        values = []
        for t in range(len(completion)):
            row, normalised = len(prompt) + t - 1, []
            for layer in layers:
                for weights in attentions[layer][0, :, row].double().tolist():  # of one head
                    context = sum(w > 0 for w in weights)
                    assert context == row + 1 or kind == "sliding"
                    entropy = -sum(w * math.log(w) for w in weights if w > 0)
                    normalised.append(entropy / math.log(context) if context > 1 else 0.0)
            values.append(sum(normalised) / len(normalised))
        out.append(values)
    return out


def check(policy: Policy, layout: list[MicroBatch], expected: list[list[float]], **settings: Any) -> None:
    for micro in layout:
        with AttentionEntropy(policy, micro.predictors, **settings) as attention:
            policy(micro)
        assert attention.entropy.dtype == torch.float32
        assert not attention.entropy.requires_grad
        wanted = torch.tensor([v for row in micro.rows.tolist() for v in expected[row]])
        torch.testing.assert_close(attention.entropy, wanted, atol=1e-5, rtol=0)


# --- against eager attention --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layers", [(-1,), (0, 2)])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rows_are_those_of_eager_attention(kind: str, layers: tuple[int, ...], layout: str) -> None:
    policy = Policy(make(kind, "sdpa"), temperature=1.0)
    expected = reference(kind, layers)
    for chunk in (1, 3, 64):
        check(policy, LAYOUTS[layout], expected, layers=layers, chunk=chunk)
    assert len({round(v, 3) for row in expected for v in row}) > 15  # the rows do differ


@pytest.mark.parametrize(
    ("kind", "attention", "layout"),
    [
        ("qwen3", "eager", "padded"),
        ("qwen3", "eager", "one by one"),
        ("qwen3", "varlen", "padded"),
        ("qwen3", "varlen", "packed"),
        ("sliding", "sdpa", "padded"),
        ("sliding", "sdpa", "packed"),
        ("sliding", "sdpa", "shared prompts"),
        ("sliding", "varlen", "packed"),
    ],
)
def test_other_attention(kind: str, attention: str, layout: str) -> None:
    """No mask, additive masks, windows."""
    policy = Policy(make(kind, attention), temperature=1.0)
    layers = (0, 1, 2)
    check(policy, LAYOUTS[layout], reference(kind, layers), layers=layers, chunk=3)


def test_row_entropy_by_hand() -> None:
    query, key = torch.zeros(3, 2, 4), torch.zeros(1, 4, 4)
    query[1, :, 0] = key[0, 2, 0] = 100.0  # the second row looks at the third key only
    visible = torch.tensor([[True] * 4, [True] * 4, [True, False, False, False]])
    assert row_entropy(query, key, visible, 1.0).tolist() == [1, 0, 0]
    query[2, 0, 0], query[2, 1, 0] = 0.0, 0.01 * math.log(3)  # of two heads one is uniform, one 1/6 1/6 3/6 1/6
    thirds = (3 * math.log(6) / 6 + math.log(2) / 2) / math.log(4)
    torch.testing.assert_close(row_entropy(query, key, visible | True, 1.0)[2], torch.tensor((1 + thirds) / 2))


# --- a guest in the forward pass ----------------------------------------------------------------------------------


def test_training_forward_with_checkpointing_is_unchanged() -> None:
    """Same gradients, rows looked at once, and the attention function is put back."""
    model = make("qwen3", "sdpa").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    policy, (micro,) = Policy(model, temperature=1.0), LAYOUTS["shared prompts"]

    def gradients(watch: bool) -> list[Tensor]:
        policy.zero_grad()
        if watch:
            with AttentionEntropy(policy, micro.predictors) as attention:
                out = policy(micro, lambda states: torch.ones(len(states), dtype=torch.bool))
            kept = attention.entropy
        else:
            out = policy(micro, lambda states: torch.ones(len(states), dtype=torch.bool))
        out["logp"].square().sum().backward()
        if watch:  # the layers ran again
            assert torch.equal(attention.entropy, kept)
        return [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    for watched, plain in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(watched, plain)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_put_back_after_an_error(attention: str) -> None:
    model = make("qwen3", attention)
    before = dict(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(KeyError), AttentionEntropy(model, torch.tensor([0])):
        raise KeyError
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_only_its_own_model_and_the_last_forward_count() -> None:
    policy, other = Policy(make("qwen3", "sdpa"), temperature=1.0), make("llama", "sdpa")
    first, second = LAYOUTS["one by one"][:2]
    with AttentionEntropy(policy, second.predictors) as attention:
        policy(second)
        kept = attention.entropy
        policy(second)
        other(input_ids=torch.tensor([[1, 2, 3]]))
    assert torch.equal(attention.entropy, kept)
    assert len(attention.entropy) != len(first.predictors)


def test_filler_has_no_rows() -> None:
    policy, micro = Policy(make("qwen3", "sdpa"), temperature=1.0), filler()
    with AttentionEntropy(policy, micro.predictors) as attention:
        policy(micro)
    assert attention.entropy.shape == (0,)


def test_refused() -> None:
    model = make("qwen3", "sdpa")
    for layers in [(3,), (-4,), ()]:
        with pytest.raises(ValueError, match="with 3 of them"):
            AttentionEntropy(model, torch.tensor([0]), layers=layers)
    with AttentionEntropy(model, torch.tensor([0])) as attention, pytest.raises(RuntimeError, match="no forward"):
        _ = attention.entropy


class Largest(TorchDispatchMode):
    """Elements of the largest floating-point tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor) and value.is_floating_point():
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("packing", [False, True])
def test_memory_is_that_of_a_chunk_of_rows(packing: bool) -> None:
    heads, size, chunk = 6, 400, 50
    tokens = [i % 40 for i in range(size - 3)]
    (micro,) = micro_batches([[1, 2, 3]] * 2, [tokens] * 2, budget=10_000, packing=packing)
    policy = Policy(make("qwen3", "sdpa"), temperature=1.0)
    with torch.no_grad(), Largest() as plain:
        policy(micro)
    with torch.no_grad(), Largest() as watched, AttentionEntropy(policy, micro.predictors, chunk=chunk):
        policy(micro)
    width = micro.input_ids.shape[1]  # twice as long if packed
    assert watched.elements <= max(plain.elements, heads * chunk * width)
    assert watched.elements < heads * width * width / 4


# --- weights ------------------------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    """Entropies .2 and .4 are one standard deviation from their mean."""
    entropy = torch.tensor([[0.2, 0.4, torch.nan], [0.5, 0.5, 0.5]])
    weights = attention_weights(entropy, torch.tensor([3, 2]), strength=2.0)
    low, high = 2 / (1 + math.exp(-2)), 2 / (1 + math.exp(2))
    torch.testing.assert_close(weights, torch.tensor([[low, high, 1], [1, 1, 1]]).double(), atol=1e-6, rtol=0)
    explorers = attention_weights(entropy, torch.tensor([3, 2]), strength=2.0, favour="explorers")
    torch.testing.assert_close(explorers, 2 - weights)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12),
    st.floats(0, 5),
    st.sampled_from(["anchors", "explorers"]),
)
def test_weights_follow_the_entropy(values: list[float], strength: float, favour: str) -> None:
    entropy = torch.tensor([values])
    weights = attention_weights(entropy, torch.tensor([len(values)]), strength=strength, favour=favour)
    assert ((weights > 0) & (weights < 2)).all()
    ordered = weights[0, entropy[0].argsort(stable=True, descending=favour == "anchors")]
    assert (ordered.diff() >= 0).all()
    if strength == 0:
        assert (weights == 1).all()


@pytest.mark.parametrize(("favour", "strength"), [("both", 1.0), ("anchors", -1.0)])
def test_weights_refused(favour: str, strength: float) -> None:
    with pytest.raises(ValueError, match="unknown favour"):
        attention_weights(torch.zeros(1, 2), torch.tensor([2]), strength=strength, favour=favour)
