"""AIPO's config as a run resolves it: every key with where its value comes from.

A new key needs a grade here, and a graded value that changes needs its reason beside it in the YAML.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from aipo.config.reading import CONFIG_FOLDER, Config, keys, load_config

Graded = dict[str, dict[str, Any]]

METHOD: Graded = {
    "paper": {
        "dynamic.enabled": False,
        "branch.enabled": False,
        "reward.rule": "verifier",
        "reward.function": "verifier",
        "reward.signed": False,
        "reward.overlong": 0.0,
        "reward.correctness": 1.0,
        "reward.format": 0.0,
        "reward.length": 0.0,
        "mi.features": "random",
        "mi.normalized": "none",
        "mi.center": True,
        "mi.gold_text": "answer",
        "mi.gold_refresh": "step",
        "mi.gold_control": "none",
        "mask.rule": "threshold",
        "mask.score": "mi",
        "mask.statistic": "mean_std",
        "mask.invert": False,
        "mask.kappa_start": 0.3,
        "mask.kappa_end": 0.1,
        "curriculum.enabled": True,
        "curriculum.t1": 0.3,
        "curriculum.t2": 0.7,
        "curriculum.start": (0.7, 0.25, 0.05),
        "curriculum.end": (0.25, 0.35, 0.4),
        "curriculum.refresh_every": None,
        "advantage.normalize": "none",
        "advantage.mi_blend": "none",
        "advantage.tokens": "none",
        "advantage.drop_constant_groups": "none",
        "loss.clip_low": 0.2,
        "loss.clip_high": 0.28,
        "loss.kl_in": "loss",
        "loss.aggregation": "sequence",
        "loss.ratio": "token",
        "loss.kl_priority": 0.0,
        "loss.entropy_weight": 0.0,
    },
    "not given": {
        "mi.estimator": "coordinate",
        "mi.num_features": 256,
        "mi.sigma": 50.0,
        "mi.layer": -1,
        "mi.normalize": "none",
        "mi.gold_pool": "last",
        "mask.scope": "sequence",
        "mask.kappa_decay_steps": None,
        "curriculum.probe_tokens": 512,
        "curriculum.stall_patience": 3,
        "advantage.baseline": "group",
        "loss.kl_beta": 0.001,
        "loss.truncated": "train",
        "loss.old_policy": "trainer",
    },
    "ours": {
        "mask.kappa_schedule": "combined",
        "curriculum.bucket_by": "quantile",
        "curriculum.quantiles": (0.3333333333333333, 0.6666666666666666),
    },
}
"""of ``configs/methods/aipo.yaml``, which names each: the method, whatever config it goes on"""

SCALE: Graded = {
    "paper": {
        "model.path": "Qwen/Qwen3-8B",
        "data.train": "data/dapo_math_17k.jsonl",
        "data.thinking": True,
        "rollout.samples_per_question": 8,
        "lora.rank": 0,
        "optim.lr": 1e-06,
        "optim.schedule": "constant",
    },
    "not given": {
        "seed": 0,
        "model.dtype": "auto",
        "data.validation": None,
        "data.system": None,
        "data.examples": (),
        "data.suffix": "\nPlease reason step by step, and put your final answer within \\boxed{}.",
        "data.max_prompt_tokens": 2048,
        "rollout.questions_per_step": 128,
        "rollout.max_tokens": 10240,
        "rollout.temperature": 1.0,
        "rollout.top_p": 1.0,
        "rollout.top_k": -1,
        "optim.steps": 500,
        "optim.warmup_steps": 0,
        "optim.betas": (0.9, 0.999),
        "optim.eps": 1e-08,
        "optim.weight_decay": 0.0,
        "optim.max_grad_norm": 1.0,
        "optim.updates_per_batch": 1,
        "sharding.zero_stage": 3,
        "validation.every": 10,
        "validation.questions": None,
        "validation.samples": 4,
        "validation.temperature": 0.6,
        "validation.top_p": 0.95,
        "validation.top_k": 20,
    },
    "ours": {
        "runs": "runs",
        "model.attention": "sdpa",
        "model.gradient_checkpointing": True,
        "model.head_chunk": 1024,
        "rollout.engine": "vllm",
        "rollout.mode": "colocate",
        "rollout.gpu_memory_utilization": 0.5,
        "rollout.importance_correction": "token_truncated",
        "rollout.importance_cap": 2.0,
        "rollout.async_depth": 0,
        "rollout.check_sync": True,
        "rollout.check_every": 50,
        "reward.workers": 2,
        "reward.timeout_s": 5.0,
        "reward.memory_mb": 2048,
        "optim.generated_tokens": None,
        "optim.micro_tokens": 16384,
        "optim.packing": False,
        "optim.share_prompts": False,
        "sharding.offload_optimizer": False,
        "validation.holdout": 256,
        "validation.holdout_seed": 0,
        "validation.watch": ("data/aime24.jsonl",),
        "validation.watch_every": 50,
        "validation.watch_samples": 4,
        "checkpoint.every": 20,
        "checkpoint.keep_last": 2,
        "guards.max_bad_steps": 5,
        "guards.max_gap": 0.5,
        "tracking.wandb": "auto",
        "tracking.project": "aipo",
        "tracking.plot_every": 10,
        "tracking.rollouts_per_step": 4,
        "tracking.tokens_mb": 1024.0,
        "tracking.report": True,
        "tracking.replay": True,
    },
}
"""of ``configs/qwen3_8b.yaml`` and of the schema's defaults: model, data, sampling, AdamW, and how the run is kept"""

UNREAD = {
    "rollout.server_url",
    "rollout.server_timeout_s",
    "rollout.kv_cache_gb",
    "dynamic.by",
    "dynamic.factor",
    "dynamic.max_tries",
    "dynamic.on_exhausted",
    "branch.base",
    "branch.total",
    "branch.signal",
    "branch.fraction",
    "branch.pick",
    "branch.cut",
    "branch.skip",
    "branch.rounds",
    "branch.beta",
    "branch.latent",
    "branch.latent_path",
    "branch.latent_scale",
    "branch.latent_half_life",
    "reward.continuations",
    "reward.overlong_buffer",
    "mi.epsilon",
    "mi.ema_decay",
    "mi.warmup_steps",
    "mask.decay",
    "mask.tau",
    "mask.fraction",
    "mask.prefix_start",
    "mask.prefix_step",
    "mask.prefix_end",
    "mask.quadrant",
    "mask.shortest",
    "mask.reweight",
    "curriculum.buckets",
    "advantage.tail",
    "loss.gate_positive",
    "loss.gate_negative",
    "loss.divergence",
    "loss.kl_certainty",
    "rollout.importance_floor",
    "curriculum.cuts",
    "advantage.mi_weight",
    "advantage.alpha",
    "advantage.information_weight",
    "advantage.beta",
    "advantage.information",
    "advantage.signed",
    "advantage.token_norm",
    "advantage.phi",
    "advantage.stride",
    "advantage.layers",
    "advantage.strength",
    "advantage.favour",
    "lora.alpha",
    "lora.targets",
}
"""keys of rules that AIPO does not choose"""


def value(config: Config, key: str) -> Any:
    section, dot, leaf = key.rpartition(".")
    return getattr(getattr(config, section) if dot else config, leaf)


def test_every_resolved_key_has_one_grade() -> None:
    graded = [key for table in (METHOD, SCALE) for values in table.values() for key in values]
    assert len(graded) == len(set(graded))
    assert not UNREAD & set(graded)
    assert {*graded, *UNREAD, "name"} == {key for key, _ in keys()}


@pytest.mark.parametrize("table", [METHOD, SCALE], ids=["method", "scale"])
def test_what_a_grade_stands_for_is_what_a_run_at_the_scale_of_the_paper_has(table: Graded) -> None:
    config = load_config("qwen3_8b", method="aipo")
    expected = {key: each for values in table.values() for key, each in values.items()}
    assert {key: value(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("config", "method"),
    [("methods/aipo.yaml", None), ("smollm2_135m", "aipo"), ("base", "aipo"), ("qwen3_1.7b", None), ("qwen3_4b", None)],
)
def test_the_method_is_the_same_on_every_config(config: str, method: str | None) -> None:
    resolved = load_config(config, method=method)
    for values in METHOD.values():
        assert {key: value(resolved, key) for key in values} == values


def test_the_file_names_every_key_with_its_grade() -> None:
    """``key: value  # grade``: nothing of the method is inherited, and no comment says otherwise than this test."""
    said, section = dict[str, str](), ""
    for line in (CONFIG_FOLDER / "methods" / "aipo.yaml").read_text().splitlines():
        if header := re.fullmatch(r"(\w+):", line):
            section = header[1]
        elif entry := re.match(r"  (\w+): .*?  # (paper|not given|ours)\b", line):
            said[f"{section}.{entry[1]}"] = entry[2]
    assert said == {key: grade for grade, values in METHOD.items() for key in values}
