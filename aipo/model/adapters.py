"""LoRA through peft (Hu et al., arXiv 2106.09685), and ARCA's token weight: how far the adapters move a hidden state.

An adapted linear layer computes W x + (alpha / rank) B A x with W frozen, A random and B zero at the start. Adapters
are put into the model in place, so its modules, hooks and output stay what they were. Everything outside training
(rollout engine, final model, evaluation) sees ordinary weights: W + (alpha / rank) B A under its Hugging Face name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from aipo.errors import UserError

ADAPTER = "default"  # peft's name of the one adapter
BASE, DOWN, UP = ".base_layer.", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def add_adapters(model: nn.Module, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Freeze ``model`` and give its linear layers adapters, without dropout, which alone are trainable.

    Args:
        model: a transformers causal LM, whole, on the CPU: this comes before it is sharded.
        alpha: what B A is multiplied with, times ``rank``.
        targets: ends of layer names (``q_proj``, ``mlp.up_proj``); ``all-linear`` is all of them but the head.
        seed: of A (on every rank the same); the caller's random state is left alone.

    Raises:
        UserError: if a target is no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model  # seconds that runs without adapters need not wait

    head = model.get_output_embeddings()  # type: ignore[operator]
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    if "all-linear" not in targets:
        ends = tuple(f".{target}" for target in targets)
        for target, end in zip(targets, ends):
            if not any(f".{name}".endswith(end) for name in linear):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
                raise UserError(f"lora.targets: {target!r} is no linear layer that can be adapted: {known}")
        linear = [name for name in linear if f".{name}".endswith(ends)]
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear, lora_dropout=0.0, bias="none")  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(settings, model, ADAPTER)


def alpha_of(model: nn.Module) -> float:
    """The ``alpha`` of a model's adapters; 0 if it has none."""
    settings = getattr(model, "peft_config", None)
    return float(settings[ADAPTER].lora_alpha) if settings else 0.0


def originals(parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """(Hugging Face name, [W] or [W, A, B]) of each parameter that the model had before its adapters, in order.

    ``parameters`` are those of the model or of a checkpoint, with adapters or without.
    """
    for name, tensor in parameters.items():
        layer, adapted, kind = name.partition(BASE)
        if not adapted:
            if not name.endswith((DOWN, UP)):
                yield name, [tensor]
        elif kind == "weight":
            yield f"{layer}.{kind}", [tensor, parameters[layer + DOWN], parameters[layer + UP]]
        else:
            yield f"{layer}.{kind}", [tensor]


def merge(parts: Sequence[Tensor], alpha: float) -> Tensor:
    """[W] -> W itself; [W (out, in), A (rank, in), B (out, rank)] -> W + (alpha / rank) B A, in W's dtype; detached."""
    base, *adapter = (part.detach() for part in parts)
    if not adapter:
        return base
    down, up = adapter
    delta = up.float() @ down.float()  # (out, in)
    return delta.mul_(alpha / len(down)).add_(base).to(base.dtype)


def adapters_off(model: nn.Module) -> AbstractContextManager[None]:
    """Within it the model computes what it did without adapters. For forward passes under ``no_grad``.

    Their output is multiplied by 0 instead of left out: under ZeRO-3 the same modules are called in the same order.
    Raises ValueError if the model has none.
    """
    from peft.helpers import rescale_adapter_scale

    return rescale_adapter_scale(model, 0.0)


def residual(states_on: Tensor, states_off: Tensor) -> Tensor:
    """||h_t(adapters on) - h_t(adapters off)||_2, ARCA's weight of a token before it is normalised.

    (N, d), (N, d) -> (N,) float32. All 0 while B is 0, before the first update.

    It wants ``model.dtype: float32``: bfloat16 rounds two forwards differently by more than young adapters change them.
    In SmolLM2-135M's last layer (states of norm 1300) adapters with |B| = 0.001 make 4.5 and rounding alone 15; the
    ranks of bfloat16 residuals then correlate by 0.2 with the exact ones, at |B| = 0.01 by 0.76.
    """
    return (states_on.float() - states_off.float()).norm(dim=-1)
