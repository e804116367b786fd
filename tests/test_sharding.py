"""The plain backend against AdamW written out, the learning rate by hand; DeepSpeed itself runs in tests/e2e."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from aipo import distributed
from aipo.config import Config, load_config
from aipo.layout import filler, micro_batches
from aipo.model.adapters import add_adapters
from aipo.policy import Policy
from aipo.sharding import Plain, deepspeed_config, learning_rate, shard, whole_size

CPU = torch.device("cpu")
SETTINGS = ["sharding.zero_stage=0", "model.dtype=float32", "optim.betas=[0.8,0.9]", "optim.weight_decay=0.1"]
PROMPTS = [[5, 6, 7], [9, 8], [1]]
COMPLETIONS = [[1, 2, 3, 4], [12, 0, 0], [7, 7]]


def config_with(*overrides: str) -> Config:
    return load_config("base", [*SETTINGS, *overrides])


def plain(*overrides: str, tied: bool = False, adapters: bool = False) -> Plain:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=13,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            initializer_range=0.3,
            tie_word_embeddings=tied,
        )
    ).train()
    if adapters:
        add_adapters(model, rank=2, alpha=3.0, targets=["all-linear"], seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # else A would have no gradient
                parameter.data.normal_(0, 0.2)
    sharded = shard(Policy(model, temperature=0.9), config_with(*overrides), CPU)
    assert isinstance(sharded, Plain)
    return sharded


def loss_of(sharded: Plain, row: int) -> Tensor:
    """Minus the sum of one row's log-probabilities, in a micro-batch of its own."""
    (micro,) = micro_batches([PROMPTS[row]], [COMPLETIONS[row]], budget=100, packing=False)
    return -sharded.forward(micro, select=lambda states: torch.ones(len(states), dtype=torch.bool))["logp"].sum()


def copies(sharded: Plain) -> list[Tensor]:
    return [p.detach().clone() for p in sharded.policy.parameters()]


def gradient_of_sum(sharded: Plain, rows: list[int]) -> list[Tensor]:
    parameters = list(sharded.policy.parameters())
    return list(torch.autograd.grad(sum((loss_of(sharded, row) for row in rows), torch.zeros(())), parameters))


def norm_of(gradients: list[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


class AdamW:
    """Loshchilov and Hutter, algorithm 2, in float64."""

    def __init__(self, parameters: list[Tensor], betas: tuple[float, float], eps: float, decay: float) -> None:
        self.parameters = [p.double() for p in parameters]
        self.first, self.second = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.betas, self.eps, self.decay, self.steps = betas, eps, decay, 0

    def step(self, gradients: list[Tensor], lr: float) -> None:
        self.steps += 1
        (b1, b2), t = self.betas, self.steps
        for p, m, v, g in zip(self.parameters, self.first, self.second, gradients):
            p -= lr * self.decay * p
            m.copy_(b1 * m + (1 - b1) * g)
            v.copy_(b2 * v + (1 - b2) * g**2)
            p -= lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)


# --- a step -------------------------------------------------------------------------------------------------------


def test_the_size_of_a_weight_is_that_of_the_whole() -> None:
    shard_of_six, adapter = torch.zeros(0), torch.zeros(2, 2)
    shard_of_six.ds_numel = 6  # type: ignore[attr-defined]  # as ZeRO-3 leaves it
    assert whole_size([shard_of_six, adapter]) == 10


@pytest.mark.parametrize("max_norm", [1e6, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("tied", [False, True])
def test_steps_are_adamw_on_the_summed_gradient_over_the_denominator(max_norm: float, tied: bool) -> None:
    sharded = plain(f"optim.max_grad_norm={max_norm}", tied=tied)
    reference = AdamW(copies(sharded), (0.8, 0.9), 1e-8, 0.1)
    for rows, denominator, lr in (([0, 1, 2], 9.0, 1e-2), ([2, 0], 2.0, 3e-3)):
        gradients = [g.double() / denominator for g in gradient_of_sum(sharded, rows)]
        norm = norm_of(gradients)
        assert norm > 0.5  # the clipped case does clip
        reference.step([g * min(1.0, max_norm / (norm + 1e-6)) for g in gradients], lr)
        for row in rows:
            sharded.backward(loss_of(sharded, row))
        assert sharded.step(denominator, lr) == pytest.approx(norm, rel=1e-5)  # before clipping
        for actual, expected in zip(copies(sharded), reference.parameters):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_filler_changes_nothing() -> None:
    outcomes = []
    for fillers in (0, 2):
        sharded = plain()
        sharded.backward(loss_of(sharded, 0))
        for _ in range(fillers):
            out = sharded.forward(filler(), select=lambda states: torch.ones(len(states), dtype=torch.bool))
            sharded.backward(out["logp"].sum())
        outcomes.append((sharded.step(4.0, 1e-2), copies(sharded)))
    assert outcomes[0][0] == outcomes[1][0]
    assert all(torch.equal(a, b) for a, b in zip(outcomes[0][1], outcomes[1][1]))


def test_a_parameter_without_gradient_is_no_obstacle() -> None:
    sharded = plain("optim.weight_decay=0")
    before = copies(sharded)
    assert sharded.step(1.0, 1e-2) == 0
    assert all(torch.equal(a, b) for a, b in zip(copies(sharded), before))


# --- what is not finite -------------------------------------------------------------------------------------------


def nan_loss(sharded: Plain) -> Tensor:
    return loss_of(sharded, 1) * math.nan


def infinite_loss(sharded: Plain) -> Tensor:
    """Its own gradient is finite: only poisoning the loss reveals it."""
    return loss_of(sharded, 1) + math.inf


def finite_loss_with_nan_gradient(sharded: Plain) -> Tensor:
    loss = loss_of(sharded, 1)
    return loss + (loss - loss.detach()).abs().sqrt()  # derivative of the root at 0: 0 * inf


@pytest.mark.parametrize("bad", [nan_loss, infinite_loss, finite_loss_with_nan_gradient])
def test_a_bad_micro_batch_skips_the_step_and_leaves_no_trace(bad: Any) -> None:
    sharded, undisturbed = plain(), plain()
    before = copies(sharded)
    loss = bad(sharded)
    assert math.isfinite(loss.detach()) == (bad is finite_loss_with_nan_gradient)
    sharded.backward(loss_of(sharded, 0))
    sharded.backward(loss)
    sharded.backward(loss_of(sharded, 2))
    assert not math.isfinite(sharded.step(3.0, 1e-2))
    assert all(torch.equal(a, b) for a, b in zip(copies(sharded), before))
    for s in (sharded, undisturbed):  # neither gradient nor moments remember it
        s.backward(loss_of(s, 0))
        assert math.isfinite(s.step(1.0, 1e-2))
    assert all(torch.equal(a, b) for a, b in zip(copies(sharded), copies(undisturbed)))
    assert not any(torch.equal(a, b) for a, b in zip(copies(sharded), before))


def test_poison_leaves_a_finite_loss_alone() -> None:
    sharded = plain()
    loss = torch.tensor(3.0, requires_grad=True)
    assert sharded.poison(loss) is loss
    for value in (math.inf, -math.inf, math.nan):
        leaf = torch.tensor(2.0, requires_grad=True)
        poisoned = sharded.poison(leaf + value)
        poisoned.backward()
        assert poisoned.isnan()
        assert leaf.grad is not None
        assert leaf.grad.isnan()


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_full_parameters_are_those_of_hugging_face(tied: bool) -> None:
    sharded = plain(tied=tied)
    given = dict(sharded.full_parameters())
    model: nn.Module = sharded.policy.model
    assert given.keys() == dict(model.named_parameters()).keys()
    assert ("lm_head.weight" in given) == (not tied)
    for name, value in model.named_parameters():
        assert torch.equal(given[name], value)
        assert not given[name].requires_grad


def test_save_and_load_continue_exactly(tmp_path: Path) -> None:
    def update(sharded: Plain, row: int) -> None:
        sharded.backward(loss_of(sharded, row))
        sharded.step(1.0, 1e-2)

    first, second = plain(), plain()
    update(first, 0)
    first.save(tmp_path)
    second.load(tmp_path)
    for sharded in (first, second):
        update(sharded, 1)
    assert all(torch.equal(a, b) for a, b in zip(copies(first), copies(second)))


def test_bfloat16_computes_in_it_and_keeps_float32_weights() -> None:
    exact, rough = plain(), plain("model.dtype=bfloat16")
    losses = [loss_of(s, 0) for s in (exact, rough)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)
    assert losses[0].item() != losses[1].item()
    for sharded, loss in zip((exact, rough), losses):
        sharded.backward(loss)
    for a, b in zip(exact.policy.parameters(), rough.policy.parameters()):
        assert b.dtype == torch.float32
        assert a.grad is not None
        assert b.grad is not None
        assert torch.cosine_similarity(a.grad.flatten(), b.grad.flatten(), 0) > 0.98


# --- adapters -----------------------------------------------------------------------------------------------------


def test_a_step_trains_adapters_alone() -> None:
    """Norm, clipping, decay and moments are AdamW's over adapters; frozen weights stay to the last bit."""
    sharded = plain("optim.max_grad_norm=0.5", adapters=True)
    trained = [p for p in sharded.policy.parameters() if p.requires_grad]
    frozen = [(p, p.detach().clone()) for p in sharded.policy.parameters() if not p.requires_grad]
    reference = AdamW([p.detach().clone() for p in trained], (0.8, 0.9), 1e-8, 0.1)
    for rows, denominator in (([0, 1, 2], 9.0), ([2, 0], 2.0)):
        loss = sum((loss_of(sharded, row) for row in rows), torch.zeros(()))
        gradients = [g.double() / denominator for g in torch.autograd.grad(loss, trained)]
        norm = norm_of(gradients)
        assert norm > 0.5
        reference.step([g * 0.5 / (norm + 1e-6) for g in gradients], 1e-2)
        for row in rows:
            sharded.backward(loss_of(sharded, row))
        assert sharded.step(denominator, 1e-2) == pytest.approx(norm, rel=1e-5)
        for actual, expected in zip(trained, reference.parameters):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(parameter, before) for parameter, before in frozen)
    assert len(sharded.optimizer.state) == len(trained) == 2 * 14


def test_a_bad_micro_batch_leaves_adapters_alone() -> None:
    sharded = plain(adapters=True)
    before = copies(sharded)
    sharded.backward(infinite_loss(sharded))
    assert not math.isfinite(sharded.step(1.0, 1e-2))
    assert all(torch.equal(a, b) for a, b in zip(copies(sharded), before))


@pytest.mark.parametrize("tied", [False, True])
def test_full_parameters_have_adapters_merged(tied: bool) -> None:
    base, sharded = plain(tied=tied), plain(tied=tied, adapters=True)
    given, original = dict(sharded.full_parameters()), dict(base.policy.model.named_parameters())
    assert list(given) == list(original)
    model = sharded.policy.model
    for name, value in original.items():
        layer = name.removesuffix(".weight")
        if "_proj" not in name:
            assert torch.equal(given[name], value)
            continue
        up, down = (model.get_parameter(f"{layer}.lora_{x}.default.weight") for x in "BA")
        torch.testing.assert_close(given[name], (value + 3.0 / 2 * up @ down).detach(), rtol=0, atol=1e-6)
        assert not torch.equal(given[name], value)


def test_adapters_save_and_load(tmp_path: Path) -> None:
    """With the frozen weights, which the loading model need not share; the exported ones are merged."""
    from aipo.model.export import weights

    first, second = plain(adapters=True), plain(adapters=True)
    with torch.no_grad():
        for parameter in second.policy.parameters():
            parameter.mul_(0.5)
    first.backward(loss_of(first, 0))
    first.step(1.0, 1e-2)
    first.save(tmp_path)
    second.load(tmp_path)
    saved = weights(tmp_path, 3.0)
    assert all(torch.equal(saved[name], tensor) for name, tensor in first.full_parameters())
    for sharded in (first, second):
        sharded.backward(loss_of(sharded, 1))
        sharded.step(1.0, 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(copies(first), copies(second)))


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    ],
)
def test_learning_rate_by_hand(schedule: str, expected: list[float]) -> None:
    config = config_with("optim.lr=1e-3", "optim.steps=6", "optim.warmup_steps=2", f"optim.schedule={schedule}")
    assert [learning_rate(step, config) / 1e-3 for step in range(6)] == pytest.approx(expected, rel=1e-6)


def test_learning_rate_without_warmup_starts_full() -> None:
    config = config_with("optim.steps=4", "optim.schedule=linear")
    assert [learning_rate(s, config) / config.optim.lr for s in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])


def test_deepspeed_config() -> None:
    zero3 = deepspeed_config(config_with("sharding.zero_stage=3", "optim.max_grad_norm=0.7", "model.dtype=bfloat16"))
    assert zero3["zero_optimization"]["stage"] == 3
    assert "offload_optimizer" not in zero3["zero_optimization"]
    assert zero3["gradient_clipping"] == 0.7
    assert zero3["bf16"]["enabled"]
    assert zero3["data_types"]["grad_accum_dtype"] == "fp32"
    assert not {"optimizer", "scheduler"} & zero3.keys()  # both are ours
    offloaded = deepspeed_config(config_with("sharding.zero_stage=2", "sharding.offload_optimizer=true"))
    assert offloaded["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert not offloaded["bf16"]["enabled"]
    assert "stage3_gather_16bit_weights_on_model_save" not in offloaded["zero_optimization"]


# --- a single process needs no group ------------------------------------------------------------------------------


def test_one_process_reduces_and_gathers_to_itself() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    tensor = torch.tensor([1.0, 2.0])
    for op in ("sum", "max"):
        assert torch.equal(distributed.all_reduce(tensor, op), tensor)
    assert torch.equal(distributed.gather(tensor), tensor)
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    assert distributed.agree_max(3) == 3
    assert distributed.all_true(True)
    assert not distributed.all_true(False)
    distributed.stop()
