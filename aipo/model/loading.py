"""Out of a model's folder: what is known before its weights are, and the model that is trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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


SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def skeleton(architecture: Any, *, key: str, name: str) -> Any:
    """The model without storage (on the meta device); UserError unless it is what :class:`~aipo.policy.Policy` takes:
    a text-only causal LM whose decoder has ``layers``, and with a linear head."""
    problem = ""
    if architecture.get_text_config() is not architecture:
        problem = "is a model of several modalities: give a text model"
    elif missing := [size for size in (*SIZES, "max_position_embeddings") if getattr(architecture, size, None) is None]:
        problem = f"({architecture.model_type}) has no {missing[0]} in its config"
    else:
        try:
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(architecture)
        except ValueError as error:
            problem = f"({architecture.model_type}) is no causal LM: {str(error).strip().splitlines()[0]}"
        else:
            if hasattr(model.base_model, "layers") and isinstance(model.get_output_embeddings(), nn.Linear):
                return model
            problem = f"({architecture.model_type}) is no decoder with layers and a linear head"
    raise UserError(f"{key}: {name} {problem}; Llama, Qwen, Mistral and models built like them can be trained")


def load_model(path: str, *, dtype: torch.dtype, attention: str, gradient_checkpointing: bool) -> nn.Module:
    """A causal LM ready for training, in ``dtype``, without dropout or router noise, whatever its config says: rollouts
    are drawn without, so with it the policy that is trained would be another one."""
    architecture = AutoConfig.from_pretrained(path)
    _silence(architecture)
    model = AutoModelForCausalLM.from_pretrained(path, config=architecture, dtype=dtype, attn_implementation=attention)
    for module in model.modules():  # rates that are not of the config
        _silence(module)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _silence(owner: Any) -> None:
    """Set every rate of dropout or noise to 0 in a config, with those inside it, or in a module."""
    for name, value in list(vars(owner).items()):
        if isinstance(value, PretrainedConfig):
            _silence(value)
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(owner, name, 0.0)


def save_model(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, state: dict[str, torch.Tensor] | None = None
) -> None:
    """A Hugging Face folder that holds the weights, or ``state`` in their place.

    The generation config is written as it was read: transformers refuses to save some that are published, such as
    ``temperature`` beside ``do_sample: false``.
    """
    generation, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.generation_config = generation
    generation.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)


def check_weights(path: str, *, key: str) -> None:
    """UserError unless all weights of a local folder are there and whole; what is on the hub is not looked at."""
    folder = Path(path)
    if not folder.is_dir():
        return
    files = {file.name for pattern in ("*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern)}
    index = folder / "model.safetensors.index.json"
    wanted = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    if missing := sorted(wanted - files):
        raise UserError(f"{key}: {folder / missing[0]} is missing: fetch the model again")
    if not files:
        raise UserError(f"{key}: {folder} has no weights (*.safetensors or pytorch_model*.bin): fetch the model again")
    for file in sorted(folder / name for name in files if name.endswith(".safetensors")):
        try:
            with safe_open(file, framework="pt"):  # reads the header and compares it with the size
                pass
        except SafetensorError as error:
            raise UserError(
                f"{key}: {file} is no whole file of weights ({error}): fetch it again, or run git lfs pull where it is "
                "a pointer of git-lfs"
            ) from None


def weights_digest(path: str, architecture: PretrainedConfig) -> str:
    """Other weights, another digest: of names, shapes and sizes, and of values at three places of every tensor.

    It reads little, so a change of a few values in the middle of a tensor can escape it; a training step cannot. For a
    model on the hub it is the commit.
    """
    folder, digest, sample = Path(path), hashlib.sha256(), 64  # bytes
    if not folder.is_dir():
        return str(getattr(architecture, "_commit_hash", None))
    for saved in sorted((*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))):
        size = saved.stat().st_size
        digest.update(f"{saved.name} {size}".encode())
        with saved.open("rb") as file:
            if saved.suffix == ".safetensors":
                length = int.from_bytes(file.read(8), "little")
                header = file.read(length)
                digest.update(header)
                tensors = json.loads(header)
                tensors.pop("__metadata__", None)
                spans = [tensor["data_offsets"] for tensor in tensors.values()]
                begun = 8 + length
            else:
                cuts = [size * at // 1000 for at in range(1001)]
                spans, begun = list(pairwise(cuts)), 0
            for start, end in sorted(spans):
                for at in (start, (start + end) // 2, end - sample):
                    file.seek(begun + max(at, start))
                    digest.update(file.read(min(sample, end - start)))
    return digest.hexdigest()


def attention_widths(config: Any) -> tuple[int, int]:
    """Width of all queries of a layer, and of all its keys: heads times head size."""
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head
