"""The chunked, selected forward and backward pass against plain full logits, one sequence at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from aipo.layout import MicroBatch, filler, micro_batches, pad, shared_prompt_batches, token_grid, unpad
from aipo.model.loading import load_model
from aipo.model.shared_attention import NAME as SHARED
from aipo.policy import Policy, SelectedLogProbs
from tests.tiny import make_tiny

VOCABULARY = 61
TEMPERATURE = 0.7
PROMPTS = [[5, 6, 7], [5, 6, 7, 6, 5, 4, 3], [5], [11] * 6, [5, 6]]  # some begin alike
COMPLETIONS = [[1, 2, 3, 4], [60, 0, 0], [7, 7, 7, 7, 7, 7, 7, 7], [3], [50, 51, 52, 53, 54, 55]]
LENGTHS = torch.tensor([len(c) for c in COMPLETIONS])
GRID = (len(COMPLETIONS), int(LENGTHS.max()))
LAYOUTS: dict[str, dict[str, Any]] = {  # keyword arguments of micro_batches
    "one by one": {"budget": 1, "packing": False},
    "padded": {"budget": 27, "packing": False},
    "packed": {"budget": 20, "packing": True},
    "one packed row": {"budget": 1000, "packing": True},
    "shared prompts": {"budget": 20, "shared": True},
    "one shared row": {"budget": 1000, "shared": True},
}


def laid_out(*, budget: int, packing: bool = False, shared: bool = False) -> list[MicroBatch]:
    if shared:
        return shared_prompt_batches(PROMPTS, COMPLETIONS, budget=budget)
    return micro_batches(PROMPTS, COMPLETIONS, budget=budget, packing=packing)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads only wait for each other on tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llama(tied: bool, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(  # type: ignore[call-arg]
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2 if tied else 4,
            max_position_embeddings=64,
            initializer_range=0.2,
            tie_word_embeddings=tied,
            attn_implementation="sdpa",
        )
    ).train()


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["llama tied", "llama untied", "qwen3"])
def model(request: pytest.FixtureRequest, qwen_folder: Path) -> nn.Module:
    """To look at; a policy takes a copy."""
    if request.param == "qwen3":
        return Qwen3ForCausalLM.from_pretrained(qwen_folder, dtype=torch.float32).train()
    return llama(tied=request.param == "llama tied")


def grid(seed: int) -> Tensor:
    return torch.randn(GRID, generator=torch.Generator().manual_seed(seed))


CHOSEN = grid(1) > 0  # (B, T)
WEIGHTS = grid(2)  # (B, T) of the log-probabilities in the objective, so that each one's gradient counts


def reference(model: nn.Module, chosen: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probabilities and entropies of all tokens (B, T), and the gradient of a weighted sum over chosen ones."""
    logps, entropies = [], []
    for prompt, completion in zip(PROMPTS, COMPLETIONS):
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]  # (t, V)
        log_p = (logits.float() / TEMPERATURE).log_softmax(-1)
        logps.append(log_p[range(len(completion)), completion])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    logp = pad(torch.cat(logps), LENGTHS)
    gradients = torch.autograd.grad((logp * WEIGHTS * chosen).sum(), list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return logp.detach(), pad(torch.cat(entropies).detach(), LENGTHS), dict(zip(names, gradients))


@pytest.fixture(scope="module")
def expected(model: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return reference(model, CHOSEN)


def ours(
    policy: Policy, chosen: Tensor, masked: bool = False, **layout: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same three through micro-batches; zeros where nothing was chosen."""
    policy.zero_grad()
    logp, entropy = torch.zeros(GRID), torch.zeros(GRID)
    for micro in laid_out(**layout):
        if masked:
            sizes = torch.tensor([len(PROMPTS[i]) + len(COMPLETIONS[i]) for i in micro.rows])
            micro = replace(micro, attention_mask=token_grid(sizes, micro.input_ids.shape[1]).long())
        out = policy(micro, select=picked(chosen, micro))
        assert torch.equal(out["mask"], ragged(chosen, micro))
        assert out["logp"].dtype == out["entropy"].dtype == torch.float32
        assert not out["entropy"].requires_grad
        (out["logp"] * ragged(WEIGHTS, micro)[out["mask"]]).sum().backward()
        for values, name in ((logp, "logp"), (entropy, "entropy")):
            flat = torch.zeros(len(micro.targets))
            flat[out["mask"]] = out[name].detach()
            rows = pad(flat, micro.lengths)
            values[micro.rows, : rows.shape[1]] = rows
    return logp, entropy, {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}


def ragged(values: Tensor, micro: MicroBatch) -> Tensor:
    return unpad(values[micro.rows], micro.lengths)  # (N,)


def checkpoint(policy: Policy) -> None:
    model: Any = policy.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def picked(chosen: Tensor, micro: MicroBatch) -> Callable[[Tensor], Tensor]:
    return lambda states: ragged(chosen, micro)


def assert_same(actual: Any, expected: Any, chosen: Tensor) -> None:
    inside = chosen & (torch.arange(GRID[1]) < LENGTHS[:, None])
    torch.testing.assert_close(actual[0], expected[0] * inside, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(actual[1], expected[1] * inside, rtol=1e-4, atol=2e-5)
    assert actual[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        torch.testing.assert_close(actual[2][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max() + 1e-3))


# --- parity with full logits --------------------------------------------------------------------------------------


@pytest.fixture(
    params=[(1, 1000), (5, 1000), (1000, 1000), (5, 2), (1000, 2)], ids="positions {0[0]}, a cache holds {0[1]}".format
)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Positions of a chunk; what a cache holds would never cut a vocabulary as small as this."""
    monkeypatch.setattr("aipo.policy.CACHE_ELEMENTS", request.param[1] * VOCABULARY + 1)
    return request.param[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logp_entropy_and_every_gradient(model: nn.Module, expected: Any, layout: str, chunk: int) -> None:
    policy = Policy(copy.deepcopy(model), temperature=TEMPERATURE, head_chunk=chunk)
    assert_same(ours(policy, CHOSEN, **LAYOUTS[layout]), expected, CHOSEN)


def test_all_tokens_and_gradient_checkpointing(model: nn.Module) -> None:
    chosen = torch.ones(GRID, dtype=torch.bool)
    expected = reference(model, chosen)
    policy = Policy(copy.deepcopy(model), temperature=TEMPERATURE, head_chunk=3)
    checkpoint(policy)
    for layout in ("padded", "packed"):
        assert_same(ours(policy, chosen, **LAYOUTS[layout]), expected, chosen)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_makes_a_mask_over_its_rows(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention takes none, and transformers repeats keys and values where there is one."""
    asked: list[tuple[int, Tensor | None]] = []

    def recorded(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        asked.append((key.shape[1], attn_mask))
        assert (attn_mask is None) == rest.get("is_causal", False) == rest.get("enable_gqa", False)
        return attend(query, key, value, attn_mask, **rest)

    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    monkeypatch.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, SHARED, lambda **call: made.append(sdpa_mask(**call))
    )
    made: list[Tensor | None] = []
    policy = Policy(llama(tied=True), temperature=TEMPERATURE)
    for micro in laid_out(**LAYOUTS[layout]):
        policy(micro)
        assert {groups for groups, _ in asked} == {2}
        if micro.tree is None:
            assert all(mask is None for _, mask in asked)
        asked.clear()
    assert all(mask is None for mask in made)


def others() -> dict[str, Callable[[], nn.Module]]:
    """Decoders with layers that are no plain causal attention: windows, short convolutions, linear attention."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "pad_token_id": None,
    }
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    linear = {f"linear_{key}": 2 for key in ("num_key_heads", "num_value_heads", "conv_kernel_dim")}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 0}
    return {
        "sliding": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes, **windows)),
        "convolution": lambda: Lfm2ForCausalLM(Lfm2Config(**sizes, layer_types=["conv", "full_attention"])),
        "linear": lambda: Qwen3NextForCausalLM(
            Qwen3NextConfig(**sizes, **linear, layer_types=["linear_attention", "full_attention"])
        ),
    }


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("llama", "padded"), ("sliding", "packed"), ("sliding", "shared prompts")]
    + [(kind, "padded") for kind in ("sliding", "convolution", "linear")],
)
def test_padding_needs_no_mask_and_windows_are_kept(kind: str, layout: str) -> None:
    """Nothing of a causal model looks to the right; a mask of the padding says no more."""
    torch.manual_seed(0)
    model = (llama(tied=True) if kind == "llama" else others()[kind]()).train()
    expected = reference(model, CHOSEN)
    policy = Policy(model, temperature=TEMPERATURE)
    assert_same(ours(policy, CHOSEN, **LAYOUTS[layout]), expected, CHOSEN)
    if layout == "padded":
        assert_same(ours(policy, CHOSEN, **LAYOUTS[layout], masked=True), expected, CHOSEN)


@pytest.mark.parametrize("packing", [False, True])
def test_nothing_selected_still_reaches_every_parameter(packing: bool) -> None:
    policy = Policy(llama(tied=False), temperature=TEMPERATURE)
    for micro in (micro_batches(PROMPTS, COMPLETIONS, budget=1000, packing=packing)[0], filler()):
        policy.zero_grad()
        out = policy(micro, select=lambda states: torch.zeros(len(states), dtype=torch.bool))
        assert out["logp"].shape == out["entropy"].shape == (0,)
        out["logp"].sum().backward()
        for name, parameter in policy.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad == 0).all(), name


def test_head_runs_once_a_forward_whatever_is_selected() -> None:
    policy = Policy(llama(tied=False), temperature=TEMPERATURE, head_chunk=2)
    calls: list[int] = []
    policy.model.lm_head.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    (micro,) = micro_batches(PROMPTS, COMPLETIONS, budget=1000, packing=True)
    for count in (0, 1, 22):
        policy(micro, select=lambda states, count=count: torch.arange(len(states)) < count)
    assert len(calls) == 3
    policy(micro)
    assert len(calls) == 3  # hidden states alone need no head


def test_generation_still_sees_the_plain_head() -> None:
    model = llama(tied=True)
    ids = torch.tensor([PROMPTS[1]])
    expected = model(input_ids=ids).logits
    Policy(model, temperature=TEMPERATURE)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_bfloat16_stays_within_its_noise() -> None:
    expected_logp, expected_entropy, expected_gradients = reference(llama(tied=False), CHOSEN)
    policy = Policy(llama(tied=False).bfloat16(), temperature=TEMPERATURE, head_chunk=4)
    logp, entropy, gradients = ours(policy, CHOSEN, **LAYOUTS["packed"])
    inside = CHOSEN & (torch.arange(GRID[1]) < LENGTHS[:, None])
    torch.testing.assert_close(logp, expected_logp * inside, rtol=0, atol=0.1)
    torch.testing.assert_close(entropy, expected_entropy * inside, rtol=0, atol=0.1)
    for name, gradient in expected_gradients.items():
        assert gradients[name].dtype == torch.bfloat16
        assert torch.cosine_similarity(gradients[name].float().flatten(), gradient.flatten(), 0) > 0.99, name


# --- hidden states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_are_the_raw_residual_stream(model: nn.Module, layout: str, checkpointing: bool) -> None:
    policies = {layer: Policy(copy.deepcopy(model), temperature=TEMPERATURE, layer=layer) for layer in (0, -1)}
    if checkpointing:
        for policy in policies.values():
            checkpoint(policy)
    seen = 0
    for micro in laid_out(**LAYOUTS[layout]):
        first, last = (policies[layer](micro)["states"].split(micro.lengths.tolist()) for layer in (0, -1))
        for i, row in enumerate(micro.rows.tolist()):
            ids = torch.tensor([[*PROMPTS[row], *COMPLETIONS[row]]])
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
            predicting = slice(len(PROMPTS[row]) - 1, -1)  # the state at t - 1 predicts token t
            torch.testing.assert_close(first[i], hidden[1][0, predicting].detach(), rtol=1e-4, atol=1e-5)
            normed = model.base_model.norm(last[i])  # type: ignore[operator]
            torch.testing.assert_close(normed, hidden[-1][0, predicting], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(last[i], hidden[-1][0, predicting], rtol=0.1)  # raw, not normed
            assert not last[i].requires_grad
            seen += 1
    assert seen == len(PROMPTS)


def test_select_sees_the_states_of_the_same_forward() -> None:
    policy = Policy(llama(tied=True), temperature=TEMPERATURE, layer=1)
    (micro,) = micro_batches(PROMPTS, COMPLETIONS, budget=1000, packing=False)
    seen: list[Tensor] = []

    def select(states: Tensor) -> Tensor:
        seen.append(states)
        return states[:, 0] > 0

    passes: list[int] = []
    policy.probed_layer.register_forward_hook(lambda *_: passes.append(1))
    out = policy(micro, select=select)
    assert len(passes) == 1
    assert (
        len(policy.probed_layer._forward_hooks) == 1
    )  # ours; the policy's own is gone, or the backward pass would run it
    assert torch.equal(seen[0], policy(micro)["states"])
    assert torch.equal(out["mask"], seen[0][:, 0] > 0)
    assert 0 < len(out["logp"]) == int(out["mask"].sum()) < len(seen[0])


# --- SelectedLogProbs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize(("count", "chunk"), [(0, 4), (1, 4), (7, 3), (8, 4), (9, 100)])
def test_selected_logprobs_against_float64(bias: bool, entropy_gradient: bool, count: int, chunk: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(count, 6), torch.randn(19, 6), *([torch.randn(19)] if bias else [])]
    targets = torch.randint(19, (count,))
    upstream = torch.randn(2, count) * torch.tensor([[1.0], [1.0 if entropy_gradient else 0.0]])

    leaves = [t.clone().requires_grad_() for t in inputs]
    with_bias = leaves if bias else [*leaves, None]
    logp, entropy = SelectedLogProbs.apply(*with_bias, targets, TEMPERATURE, chunk, entropy_gradient)
    assert entropy.requires_grad == entropy_gradient
    gradients = torch.autograd.grad((logp * upstream[0] + entropy * upstream[1]).sum(), leaves)

    exact = [t.double().requires_grad_() for t in inputs]
    logits = (exact[0] @ exact[1].T + (exact[2] if bias else 0)) / TEMPERATURE
    log_p = logits.log_softmax(-1)
    expected = log_p[torch.arange(count), targets]
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-6)
    exact_entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=1e-5)
    total = (expected * upstream[0].double() + exact_entropy * upstream[1].double()).sum()
    for actual, wanted in zip(gradients, torch.autograd.grad(total, exact)):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_the_whole_vocabulary_says(model: nn.Module, chunk: int) -> None:
    """Entropy, KL(uniform || p) as INTUITOR's eq. has it, and so on, at every token and without a gradient."""
    policy = Policy(copy.deepcopy(model), temperature=TEMPERATURE, head_chunk=chunk)
    for micro in laid_out(packing=False, budget=60):
        out = policy(micro, full=True)
        states = policy.model.base_model(  # type: ignore[operator]
            input_ids=micro.input_ids, attention_mask=micro.attention_mask, position_ids=micro.position_ids
        ).last_hidden_state.flatten(0, 1)[micro.predictors]
        head = policy.model.get_output_embeddings()  # type: ignore[operator]
        p = (states @ head.weight.T / TEMPERATURE).double().softmax(-1)  # (N, V)
        uniform = 1 / p.shape[1]
        slow_entropy = torch.stack([-(row * row.log()).sum() for row in p])
        slow_certainty = torch.stack([sum(uniform * (uniform / each).log() for each in row) for row in p])
        torch.testing.assert_close(out["entropy"].double(), slow_entropy, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out["certainty"].double(), slow_certainty, rtol=1e-4, atol=1e-5)
        steps = torch.eye(p.shape[1], dtype=torch.float64)[micro.targets] - p  # (N, V) d log p / d logits at T = 1
        torch.testing.assert_close(out["energy"].double(), steps.square().sum(1), rtol=1e-4, atol=1e-6)
        slow_logp = torch.stack([row[target].log() for row, target in zip(p, micro.targets)])
        slow_largest = torch.tensor([math.log(max(row)) for row in p.tolist()], dtype=torch.float64)
        torch.testing.assert_close(out["logp"].double(), slow_logp, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out["largest"].double(), slow_largest, rtol=1e-4, atol=1e-5)
        two = [sorted(row.tolist(), reverse=True)[:2] for row in p]
        gaps = torch.tensor([math.log(first / second) for first, second in two], dtype=torch.float64)
        torch.testing.assert_close(out["gap"].double(), gaps, rtol=1e-4, atol=1e-5)
        assert not out["entropy"].requires_grad
        assert torch.equal(out["states"], policy(micro)["states"])
        chosen = torch.arange(len(micro.targets)) % 3 == 0  # (N,)
        some = policy(micro, lambda _, chosen=chosen: chosen, full=True)
        assert torch.equal(some.pop("mask"), chosen)
        for name, values in some.items():
            torch.testing.assert_close(values, out[name][chosen], msg=name)


def test_gradient_of_the_head_is_summed_in_float32() -> None:
    """512 chunks of one position: a bfloat16 sum would stop growing."""
    torch.manual_seed(0)
    hidden, weight = torch.ones(512, 4).bfloat16(), torch.zeros(2, 4).bfloat16().requires_grad_()
    logp, _ = SelectedLogProbs.apply(hidden, weight, None, torch.zeros(512, dtype=torch.long), 1.0, 1, False)
    logp.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[256.0] * 4, [-256.0] * 4]  # (1 - 1/2) * 512


def test_the_backward_pass_recomputes_in_the_precision_of_the_forward_pass() -> None:
    """Logits around 300, whose bfloat16 neighbours are 2 apart: in float32 the softmax would be another one."""
    torch.manual_seed(0)
    hidden, weight = 5 + 0.1 * torch.randn(9, 64), (1 + 0.05 * torch.randn(19, 64)).requires_grad_()
    hidden.requires_grad_()
    bias, targets = torch.zeros(19, requires_grad=True), torch.randint(19, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        logp, _ = SelectedLogProbs.apply(hidden, weight, bias, targets, TEMPERATURE, 4, False)
        exact = (F.linear(hidden, weight, bias).float() / TEMPERATURE).log_softmax(-1)[torch.arange(9), targets]
    torch.testing.assert_close(logp, exact)
    leaves = [hidden, weight, bias]
    for actual, wanted in zip(torch.autograd.grad(logp.sum(), leaves), torch.autograd.grad(exact.sum(), leaves)):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


def test_logits_never_exceed_one_chunk() -> None:
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == 97:
                    self.rows = max(self.rows, len(tensor))
            return out

    hidden, weight = torch.randn(50, 4, requires_grad=True), torch.randn(97, 4, requires_grad=True)
    with Largest() as largest:
        logp, _ = SelectedLogProbs.apply(hidden, weight, None, torch.randint(97, (50,)), 1.0, 8, False)
        logp.sum().backward()
    assert largest.rows == 8


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_load_model(qwen_folder: Path, checkpointing: bool) -> None:
    model: Any = load_model(
        str(qwen_folder), dtype=torch.bfloat16, attention="eager", gradient_checkpointing=checkpointing
    )
    assert model.training
    assert model.is_gradient_checkpointing == checkpointing
    assert model.config._attn_implementation == "eager"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
