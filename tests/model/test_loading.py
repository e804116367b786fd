"""What a published folder may say, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Starcoder2Config,
    ViTConfig,
)

from aipo.errors import UserError
from aipo.model.loading import check_weights, load_model, save_model, skeleton, weights_digest
from tests.tiny import make_tiny

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
OTHERS = [
    Starcoder2Config(
        **SIZES, num_key_value_heads=1, attention_dropout=0.5, residual_dropout=0.5, embedding_dropout=0.5
    ),
    GPTNeoXConfig(**SIZES, hidden_dropout=0.5, attention_dropout=0.5),
    MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=2, router_jitter_noise=0.5, attention_dropout=0.5),
]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.model_type)
def test_what_is_trained_is_what_samples(config: PretrainedConfig, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    noisy = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    model = load_model(str(tmp_path), dtype=torch.float32, attention="sdpa", gradient_checkpointing=False)
    with torch.no_grad():
        expected = noisy.eval()(input_ids=ids).logits
        assert not torch.allclose(noisy.train()(input_ids=ids).logits, expected, atol=1e-3)  # this config does say it
        torch.testing.assert_close(model(input_ids=ids).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "said"),
    [
        (GPT2Config(n_embd=32, n_layer=1, n_head=2), "gpt2. has no intermediate_size"),
        (GPT2Config(n_embd=32, n_layer=1, n_head=2, intermediate_size=8), "gpt2. is no decoder with layers"),
        (Gemma3Config(), "several modalities"),
        (Qwen2_5_VLConfig(), "several modalities"),
        (ViTConfig(vocab_size=1, max_position_embeddings=1), "vit. is no causal LM: Unrecognized"),
    ],
    ids=["gpt2", "gpt2 with sizes", "gemma3", "qwen2.5 vl", "vit"],
)
def test_models_of_another_kind_are_refused(config: PretrainedConfig, said: str) -> None:
    with pytest.raises(UserError, match=f"^model.path: mine .*{said}[^\n]*$"):
        skeleton(config, key="model.path", name="mine")


def test_a_generation_config_that_transformers_would_not_save(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model")
    said = {"do_sample": False, "temperature": 0.6, "top_p": 0.95, "eos_token_id": [2, 0]}
    (folder / "generation_config.json").write_text(json.dumps(said))
    model = load_model(str(folder), dtype=torch.float32, attention="sdpa", gradient_checkpointing=False)
    save_model(model, AutoTokenizer.from_pretrained(folder), tmp_path / "final")
    again = GenerationConfig.from_pretrained(tmp_path / "final")
    assert not again.do_sample
    assert all(getattr(again, key) == said[key] for key in ("temperature", "top_p", "eos_token_id"))


@pytest.mark.parametrize("safe", [True, False])
def test_other_weights_have_another_digest(tmp_path: Path, safe: bool) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(make_tiny(tmp_path / "a"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}

    def digest(name: str, state: dict[str, torch.Tensor]) -> str:
        (tmp_path / name).mkdir()
        if safe:
            save_file(state, tmp_path / name / "model.safetensors")
        else:
            torch.save(state, tmp_path / name / "pytorch_model.bin")
        return weights_digest(str(tmp_path / name), model.config)

    first = digest("first", state)
    assert digest("same", state) == first
    for i, name in enumerate(state):
        others = state | {name: state[name] * 1.01}
        assert digest(f"other {i}", others) != first, name
    key, value = next((k, v) for k, v in state.items() if v.ndim == 2)
    assert digest("shape", state | {key: value.reshape(-1)}) != first
    assert weights_digest("some/model", model.config) == "None"


def test_weights_that_are_missing_or_cut_are_named(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model")
    check_weights(str(folder), key="model.path")
    check_weights("Qwen/Qwen3-8B", key="model.path")  # not here: nothing to look at
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    whole = weights.read_bytes()
    for content in (b"", b"version https://git-lfs.github.com/spec/v1", whole[:-8]):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.path: .*model\.safetensors is no whole file .* git lfs pull"):
            check_weights(str(folder), key="model.path")
    weights.write_bytes(whole)
    index.write_text('{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}')
    with pytest.raises(UserError, match=r"model-2\.safetensors is missing"):
        check_weights(str(folder), key="model.path")
    index.unlink()
    weights.unlink()
    with pytest.raises(UserError, match="has no weights"):
        check_weights(str(folder), key="model.path")
