"""Out of a model's folder: what is known before its weights are, and the model that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from aipo.errors import UserError


@dataclass(frozen=True)
class Folder:
    """A model without its weights."""

    architecture: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig | None  # a model need not have one


def read_folder(path: str, *, key: str, name: str) -> Folder:
    """Config and tokenizer of a local folder or hub id; UserError, naming ``key`` and what it said, where they fail."""
    try:
        architecture: Any = AutoConfig.from_pretrained(path)
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}: cannot load config and tokenizer of {name}: {reason}") from None
    try:
        generation = GenerationConfig.from_pretrained(path)
    except OSError:
        generation = None
    return Folder(architecture, tokenizer, generation)


def load_model(path: str, *, dtype: torch.dtype, attention: str, gradient_checkpointing: bool) -> nn.Module:
    """A causal LM ready for training, in ``dtype``, without dropout."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()
