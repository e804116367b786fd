"""Adapters against peft's own merge, against the model without them, and by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from aipo.errors import UserError
from aipo.layout import micro_batches
from aipo.model.adapters import adapters_off, add_adapters, alpha_of, merge, originals, residual
from aipo.policy import Policy

RANK, ALPHA = 3, 7.5
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


def plain_model(tied: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Its projections have biases, so that there are parameters beside the weights in an adapted layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    model: PreTrainedModel = LlamaForCausalLM(config).train()
    return model.to(dtype)  # type: ignore[arg-type]


def add(model: nn.Module, targets: Sequence[str] = ("all-linear",), seed: int = 5) -> None:
    add_adapters(model, rank=RANK, alpha=ALPHA, targets=targets, seed=seed)


def move(model: nn.Module) -> None:
    """As training would: B is zero no more."""
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=draw)


def merged(parameters: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    return {name: merge(parts, alpha) for name, parts in originals(parameters)}


def merged_of(model: nn.Module) -> dict[str, Tensor]:
    return merged(dict(model.named_parameters()), alpha_of(model))


def adapted_layers(model: nn.Module) -> set[str]:
    return {name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


# --- where they go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_layers_but_the_head(tied: bool) -> None:
    model = plain_model(tied)
    names = [name for name, _ in model.named_parameters()]
    add(model)
    layers = adapted_layers(model)
    assert {name.rpartition(".")[2] for name in layers} == PROJECTIONS
    assert len(layers) == 2 * len(PROJECTIONS)
    assert [name for name, _ in originals(dict(model.named_parameters()))] == names


def test_chosen_layers() -> None:
    model = plain_model()
    add(model, ["q_proj", "layers.1.mlp.up_proj"])
    first, second = (f"model.layers.{layer}." for layer in (0, 1))
    assert adapted_layers(model) == {
        f"{first}self_attn.q_proj",
        f"{second}self_attn.q_proj",
        f"{second}mlp.up_proj",
    }


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_porj", "proj", "self_attn", ""])
def test_other_targets_are_refused(target: str) -> None:
    with pytest.raises(UserError, match=f"lora.targets: '{target}' is no linear layer .*down_proj, gate_proj"):
        add(plain_model(), ["q_proj", target])


def test_the_start_is_a_function_of_the_seed() -> None:
    def start(seed: int, disturb: bool = False) -> dict[str, Tensor]:
        model = plain_model()
        torch.manual_seed(100 + disturb)
        before = torch.get_rng_state()
        add(model, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return {name: p.detach() for name, p in model.named_parameters() if ".lora_A." in name}

    one, again, other = start(1), start(1, disturb=True), start(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_nothing_changes_at_the_start() -> None:
    model = plain_model()
    before, weights = logits(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    add(model)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in merged_of(model).items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapters_get_gradients(checkpointing: bool) -> None:
    model = plain_model()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    add(model)
    move(model)
    policy = Policy(model, temperature=1.0)
    (micro,) = micro_batches([[5, 6]], [[1, 2, 3]], budget=10, packing=False)
    policy(micro, lambda states: torch.ones(len(states), dtype=torch.bool))["logp"].sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert (parameter.grad is not None) == (".lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


# --- merged -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_merged_weights_are_those_of_peft(tied: bool) -> None:
    model = plain_model(tied)
    peft_model = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=sorted(PROJECTIONS)),  # type: ignore[arg-type]
    )
    add(model)
    move(model)
    theirs = dict(peft_model.get_base_model().named_parameters())
    for name, parameter in model.named_parameters():
        theirs[name].data.copy_(parameter)
    expected = dict(peft_model.merge_and_unload().named_parameters())
    ours = merged_of(model)
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=0, atol=1e-6)
        assert not tensor.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_an_ordinary_model_with_merged_weights_computes_the_same(tied: bool, tmp_path: Path) -> None:
    model = plain_model(tied)
    base = logits(model)
    add(model)
    move(model)
    assert (logits(model) - base).abs().max() > 0.1
    model.save_pretrained(tmp_path, state_dict=merged_of(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not adapted_layers(loaded)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_merge_by_hand() -> None:
    base, down, up = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 10.0]]), torch.tensor([[2.0], [-1.0]])
    assert merge([base, down, up], 0.5).tolist() == [[2.0, 12.0], [2.5, -1.0]]
    assert merge([base], 0.0).data_ptr() == base.data_ptr()


def test_merging_rounds_once() -> None:
    model = plain_model(dtype=torch.bfloat16)
    add(model)
    move(model)
    exact = {name: p.float() for name, p in model.named_parameters()}
    for name, tensor in merged_of(model).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, merged(exact, ALPHA)[name].bfloat16())


def test_a_model_without_adapters_is_itself() -> None:
    model = plain_model()
    assert alpha_of(model) == 0
    for name, tensor in merged_of(model).items():
        assert tensor.data_ptr() == model.get_parameter(name).data_ptr()


# --- off ----------------------------------------------------------------------------------------------------------


def test_off_is_the_model_before() -> None:
    model = plain_model()
    before = logits(model)
    add(model)
    move(model)
    on = logits(model)
    with adapters_off(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), on)
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), on)
    assert not torch.equal(on, before)


def test_off_needs_adapters() -> None:
    with pytest.raises(ValueError, match="LoraLayer"), adapters_off(plain_model()):
        pass


# --- ARCA's weight ------------------------------------------------------------------------------------------------


def test_residual_by_hand() -> None:
    on = torch.tensor([[3.0, 0.0, 4.0], [1.0, 1.0, 1.0], [-2.0, 0.0, 0.5]])
    off = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [-2.0, -6.0, 8.5]])
    assert residual(on, off).tolist() == [5.0, 0.0, 10.0]
    assert residual(on.bfloat16(), off.bfloat16()).dtype == torch.float32
    # squares and differences are float32: in bfloat16 256 + 1 is 256
    wide = torch.tensor([[16.0] + [1.0] * 33], dtype=torch.bfloat16)
    assert residual(wide, torch.zeros_like(wide)).tolist() == [17.0]
    assert residual(on[:0], off[:0]).shape == (0,)


def test_residual_of_a_policy() -> None:
    """Each hidden state against the base model's, by two separate models; 0 at the start."""
    model, base = plain_model(), plain_model()
    (micro,) = micro_batches([[5, 6]], [[1, 2, 3]], budget=10, packing=False)
    add(model)
    policy, untouched = Policy(model, temperature=1.0, layer=0), Policy(base, temperature=1.0, layer=0)
    for moved in (False, True):
        if moved:
            move(model)
        on = policy(micro)["states"]
        with torch.no_grad(), adapters_off(policy):
            weights = residual(on, policy(micro)["states"])
        off = untouched(micro)["states"]
        expected = [sum((a - b) ** 2 for a, b in zip(x, y)) ** 0.5 for x, y in zip(on.tolist(), off.tolist())]
        assert weights.tolist() == pytest.approx(expected, rel=1e-5)
        assert bool((weights > 0.01).all()) == moved
