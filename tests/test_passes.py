"""Whether the layouts of several sequences in one row are refused where a model cannot take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aipo.config import load_config
from aipo.errors import UserError
from aipo.model import shared_attention
from aipo.passes import Passes
from aipo.policy import make_policy
from aipo.sharding import shard

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11] * 3, [5, 6, 7, 3, 2, 1] * 2, [40, 41, 42, 43, 44, 45, 46, 47]]
LAYOUTS = {
    "packing": ["optim.packing=true", "optim.share_prompts=false"],
    "share_prompts": ["optim.share_prompts=true"],
    "padded": ["optim.packing=false", "optim.share_prompts=false"],
}


def sliding() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))


def recurrent() -> PreTrainedModel:
    return Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]))


def passes(model: PreTrainedModel, folder: Path, layout: str) -> Passes:
    model.save_pretrained(folder)
    keys = [f"model.path={folder}", "model.dtype=float32", "sharding.zero_stage=0", "rollout.max_tokens=24"]
    config = load_config("tiny.yaml", [*keys, "reward.overlong_buffer=4", *LAYOUTS[layout]])
    cpu = torch.device("cpu")
    return Passes(config, shard(make_policy(config, str(folder)), config, cpu), None, cpu)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_window_is_kept_in_every_layout(layout: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert passes(sliding(), tmp_path, layout).check_layout(PROMPTS) < 1e-5


@pytest.mark.parametrize("layout", ["packing", "share_prompts"])
def test_a_window_that_only_the_mask_has_is_refused(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose attention tells nobody of its window: a tree has no mask, and a config says nothing of it."""
    torch.manual_seed(0)
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        shared_attention.NAME,
        lambda *tensors, sliding_window=None, **others: shared_attention.forward(*tensors, **others),
    )
    made = passes(sliding(), tmp_path, layout)
    assert made.layout_gap(PROMPTS) > 0.1
    with pytest.raises(UserError, match=f"optim.{layout}: .*set optim.{layout}: false"):
        made.check_layout(PROMPTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_that_runs_on_is_refused(layout: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = passes(recurrent(), tmp_path, layout)
    if layout == "padded":
        assert made.check_layout(PROMPTS) == 0.0
    else:
        with pytest.raises(UserError, match=f"optim.{layout}: .* differ by 0.* nats.*set optim.{layout}: false"):
            made.check_layout(PROMPTS)
