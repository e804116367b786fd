"""The plan against models that were really built, traced passes, and sums done by hand."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from aipo.config import CONFIG_FOLDER, Config, load_config
from aipo.errors import UserError
from aipo.layout import micro_batches, shared_prompt_batches
from aipo.model.adapters import add_adapters
from aipo.model.shared_attention import NAME
from aipo.plan.memory import CPU_ENGINE_LIBRARIES, GIB, Model, activation_bytes, head_bytes
from aipo.plan.planner import PUBLISHED, Plan, plan, read_model, render
from aipo.policy import SelectedLogProbs
from aipo.rollout.check import NOISE_ELEMENTS
from tests.tiny import make_tiny

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@pytest.fixture(autouse=True)
def _no_gpu_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def qwen(size: str = "8b", *overrides: str) -> Config:
    return load_config(f"qwen3_{size}.yaml", overrides)


def tiny_config(path: Path, *overrides: str) -> Config:
    """In the dtype that the sums by hand are for, whatever this machine gains from."""
    usual = [f"model.path={path}", "model.dtype=bfloat16", "rollout.max_tokens=64"]
    return load_config("tiny.yaml", [*usual, *overrides])


def printed(made: Plan) -> str:
    console = Console(width=400)
    with console.capture() as capture:
        console.print(render(made))
    return capture.get()


# -- parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_counts_the_parameters_of_a_folder(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny(tmp_path / "model", tied=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()  # a plan loads no weights
    found = read_model(str(folder))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert (found.queries, found.keys, found.qk_norm, found.context) == (128, 64, True, 512)


@pytest.mark.parametrize(
    ("name", "published"),  # exact sums of the tensor sizes, tied ones once
    [
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-14B-Base", 14_768_307_200),
        ("Qwen/Qwen3-32B", 32_762_123_264),
        ("embedded:smollm2-135m", 134_515_008),
    ],
)
def test_built_in_architectures_have_the_right_sizes(name: str, published: int) -> None:
    assert read_model(name).parameters == published
    assert name in PUBLISHED


def test_a_built_in_architecture_is_said_to_be_one() -> None:
    assert "built-in table" in printed(plan(qwen(), 8))


def test_unknown_architecture_without_network_names_the_key() -> None:
    with pytest.raises(UserError, match=r"model\.path nobody/nothing.*config\.json"):
        read_model("nobody/nothing")


# -- memory ------------------------------------------------------------------------------------------------------


def test_zero_3_arithmetic_of_qwen3_8b_on_8_gpus() -> None:
    """P = 8,190,735,360: a shard has P / 8 = 1,023,841,920 parameters."""
    update = plan(qwen(), 8).phases["update"]
    assert update["weights"] == 2_047_683_840  # 2 bytes each
    assert update["gradients"] == 4_095_367_680  # float32 sums
    assert update["optimizer"] == 12_286_103_040  # master and two moments
    assert update["reference model"] == 2_047_683_840
    assert update["gathered weights"] == 2 * 2 * 1_050_000_000  # DeepSpeed's limit of live parameters, two models
    assert "engine weights" not in update  # vLLM sleeps
    # KV cache: 2 x 36 layers x 8 heads x 128 x 2 bytes = 147,456 a token, in what 0.5 of 80 GiB leaves
    left = int(0.5 * 80 * GIB) - 2 * 8_190_735_360 - 3 * GIB
    assert plan(qwen(), 8).phases["rollout"]["KV cache"] == left // 147_456 * 147_456


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(0, 4, 4, 8), (1, 2, 4, 3), (2, 2, 1, 3), (3, 0.5, 1, 3)]
)
def test_bytes_a_parameter_by_stage_on_4_ranks(stage: int, weights: float, gradients: float, optimizer: float) -> None:
    update = plan(qwen("4b", f"sharding.zero_stage={stage}"), 4).phases["update"]
    parameters = 4_022_468_096
    assert update["weights"] == weights * parameters
    assert update["gradients"] == gradients * parameters
    assert update["optimizer"] == optimizer * parameters


def test_offload_and_no_reference_model() -> None:
    made = plan(qwen("8b", "sharding.offload_optimizer=true", "loss.kl_beta=0"), 8)
    assert made.phases["update"]["optimizer"] == made.phases["update"]["gradients"] == 0
    assert "reference model" not in made.phases["update"]
    assert "gradients as a copy" not in made.phases["optimizer step"]
    host = 20 * made.model.parameters / 2**30  # masters, two moments, sums of gradients, and a copy of these: float32
    assert any(f"takes {host:.0f} GiB of host memory" in line for line in made.warnings)


def test_lora_trains_only_the_adapters(tmp_path: Path) -> None:
    """p counted on a model that really got its adapters: 2 layers x rank 4 x (in + out) of each adapted layer."""
    folder = make_tiny(tmp_path / "model")
    for targets in (("all-linear",), ("q_proj", "mlp.up_proj")):
        names = ", ".join(targets)
        config = tiny_config(folder, "lora.rank=4", f"lora.targets=[{names}]", "loss.kl_beta=0")
        model = AutoModelForCausalLM.from_pretrained(folder)
        add_adapters(model, rank=4, alpha=8.0, targets=targets, seed=0)
        adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        made = plan(config, 2)
        assert made.model.trained(config) == adapters
        update = made.phases["update"]
        assert update["gradients"] == 4 * adapters / 2
        assert update["optimizer"] == 12 * adapters / 2
        assert update["gradient bucket"] == 2 * adapters
        assert update["weights"] == pytest.approx(2 * made.model.parameters / 2, abs=2)


def test_positions_take_what_their_gold_states_do() -> None:
    """128 questions over eight ranks, 10,240 positions, 256 features; zscore makes a gold state of each rollout."""
    overrides = ["mi.estimator=position", "mi.sigma=median"]
    made = plan(qwen("1.7b", *overrides), 8, gpu_memory_gb=80)
    assert not made.problems
    assert made.phases["update"]["MI by position"] == 8 * (16 * 10_240 * 256 + 2 * 2**23)
    more = plan(qwen("1.7b", *overrides, "mi.normalize=zscore"), 8, gpu_memory_gb=80).phases["update"]
    assert more["MI by position"] == 8 * (128 * 10_240 * 256 + 2 * 2**23)


def test_a_frozen_head_needs_no_gradient() -> None:
    model = read_model("Qwen/Qwen3-4B")
    matrix, logits = model.vocabulary * model.width, 4096 * model.vocabulary
    assert head_bytes(model, 4096, 2, 2) == 10 * logits + 4 * matrix
    assert head_bytes(model, 4096, 2, 2, block=1024) == 4 * logits + 4 * matrix
    assert head_bytes(model, 4096, 2, 2, trained=False) == 10 * logits


def test_an_engine_on_cpu_and_one_that_draws_ahead_stay_awake(tmp_path: Path) -> None:
    """8B: 147,456 bytes of keys and values a token; a CPU keeps the cache for good, a GPU while it generates."""
    folder = make_tiny(tmp_path / "model")
    cpu = plan(tiny_config(folder), 1)
    token = 2 * 2 * 2 * 32 * 2  # keys and values, layers, heads, head size, bytes
    for phase in cpu.phases.values():
        assert phase["KV cache"] == GIB // 4 // token * token
        assert phase["engine libraries"] == CPU_ENGINE_LIBRARIES
    assert "KV cache" not in plan(qwen(), 8).phases["update"]
    ahead = plan(qwen("8b", "rollout.async_depth=1"), 8).phases
    assert ahead["update"]["KV cache"] == ahead["rollout"]["KV cache"] > 0


def test_what_shares_a_row_pays_for_its_masks_and_keys(tmp_path: Path) -> None:
    """On a CPU each of two layers keeps, in 2 bytes, q numbers more for each token, and for shared prompts keys and
    values of longest / max_tokens tokens; both layers together the masks. Flash attention on a GPU has no masks."""
    folder = make_tiny(tmp_path / "model")

    def activations(*overrides: str, gpu: float | None = None) -> int:
        fixed = ["data.max_prompt_tokens=64", "optim.micro_tokens=512", "model.gradient_checkpointing=false"]
        made = plan(tiny_config(folder, "optim.share_prompts=false", *fixed, *overrides), 1, gpu_memory_gb=gpu)
        return made.phases["update"]["activations"]

    padded, masks, keys = activations(), 2 * 2 * 128, 2 * 2 * 2 * 64 * (128 // 64 - 1)
    packing, sharing, full = "optim.packing=true", "optim.share_prompts=true", "model.dtype=float32"
    assert activations(packing) - padded == 512 * (2 * 2 * 128 + masks)
    assert activations(sharing) - padded == 512 * (2 * 2 * 128 + keys + masks)
    assert activations(gpu=80) == activations(packing, gpu=80) == padded
    assert activations(sharing, gpu=80) - padded == 512 * keys
    assert activations(packing, full, gpu=80) > activations(full, gpu=80)


def test_a_heap_keeps_room_for_several_padded_micro_batches(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model")

    def update(*overrides: str) -> dict[str, int]:
        return plan(tiny_config(folder, *overrides), 1).phases["update"]

    padded = update("optim.share_prompts=false")
    assert padded["activations, freed"] == padded["activations"]
    assert "activations, freed" not in update("optim.share_prompts=false", "optim.micro_tokens=100000")
    assert "activations, freed" not in update("optim.share_prompts=true")


def test_what_an_h100_reserved() -> None:
    """The update of Qwen3-1.7B's shape on one H100, Hugging Face's engine asleep: 40.3 GiB."""
    made = plan(qwen("1.7b", "loss.kl_beta=0", "rollout.engine=hf"), 1, gpu_memory_gb=80)
    assert made.peak("update") / GIB == pytest.approx(40.3, rel=0.05)


def test_the_cache_of_hugging_faces_engine_stays_within_its_share() -> None:
    """Qwen3-1.7B, 28 layers of 8 x 128 keys and values in 2 bytes, 12,288 tokens: 1.31 GiB a sequence, weights 3.2."""
    for share, rows in ((0.5, 28), (0.9, 52)):
        config = qwen("1.7b", "rollout.engine=hf", f"rollout.gpu_memory_utilization={share}")
        made = plan(config, 1, gpu_memory_gb=80)
        assert made.phases["rollout"]["KV cache"] == rows * 12_288 * 2 * 28 * 8 * 128 * 2
        assert made.phases["rollout"]["KV cache"] + made.phases["rollout"]["engine weights"] <= share * 80 * GIB


def test_what_comes_before_the_first_step_fits_where_the_steps_do() -> None:
    """32B on 32 GPUs of 80 GiB: a noisy copy of the 151,936 x 5,120 head, in 2 bytes, beside weights that just fit."""
    made = plan(qwen("32b"), 32, gpu_memory_gb=80)
    matrix = 151_936 * 5_120
    check, sync, labelling, update = (made.phases[p] for p in ("sync check", "sync", "labelling", "update"))
    assert check["noisy copy"] == 2 * matrix + 4 * NOISE_ELEMENTS
    assert check["gathered weights"] == 2 * matrix
    assert check["engine weights"] == sync["engine weights"]
    assert made.peak("sync check") == made.peak("sync") + 4 * NOISE_ELEMENTS < made.capacity
    assert not {"KV cache", "engine weights"} & labelling.keys()  # it sleeps
    assert made.peak("labelling") < made.peak("update")
    assert labelling["gathered weights"] == update["gathered weights"] / 2  # without the reference
    assert (
        not {"sync check", "labelling"}
        & plan(qwen("8b", "rollout.check_sync=false", "curriculum.enabled=false"), 8).phases.keys()
    )
    masters = plan(qwen("4b", "sharding.zero_stage=0"), 4).phases["sync check"]  # float32, cast for the engine
    assert masters["noisy copy"] == 6 * 151_936 * 2_560 + 4 * NOISE_ELEMENTS
    assert "gathered weights" not in masters


def test_branching_reads_beside_an_engine_that_is_awake() -> None:
    made = plan(qwen("8b", "branch.enabled=true"), 8).phases
    assert made["branching"]["KV cache"] == made["rollout"]["KV cache"] > 0
    assert 0 < made["branching"]["activations"] == made["labelling"]["activations"] < made["update"]["activations"]
    assert plan(qwen("8b", "rollout.async_depth=1"), 8).phases["sync"]["KV cache"] > 0  # so is one that draws ahead


@given(st.sampled_from(["1.7b", "4b", "8b"]), st.integers(0, 5))
@settings(max_examples=6, deadline=None)
def test_more_gpus_never_need_more_each_under_zero_3(size: str, power: int) -> None:
    few, many = plan(qwen(size), 2**power), plan(qwen(size), 2 ** (power + 1))
    for phase in few.phases:
        assert many.peak(phase) <= few.peak(phase)


class PeakBytes(TorchDispatchMode):
    """Largest sum of the storages that were made under it and were alive at the same time."""

    def __init__(self, *existing: torch.Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in existing}
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self.known or id(storage) in self.alive:
                continue
            self.alive[id(storage)] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, id(storage))
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def traced(config: PretrainedConfig, dtype: torch.dtype, checkpointing: bool, rows: int, row: int) -> int:
    """Peak bytes above weights and gradients of a real forward and backward pass of the decoder."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return pass_bytes(model, input_ids=torch.zeros(rows, row, dtype=torch.long))


def test_a_pass_without_gradient_has_one_layer_at_a_time() -> None:
    config = Qwen3Config(vocab_size=32, num_hidden_layers=3, **SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.zeros(2, 64, dtype=torch.long)
    with PeakBytes(*model.parameters()) as memory, torch.no_grad():
        model.base_model(ids, use_cache=False)
    planned = activation_bytes(model_of(config), 128, residual=2, compute=2, checkpointing=True, gradient=False)
    assert planned == pytest.approx(memory.peak, rel=0.15)


def pass_bytes(model: Any, **inputs: Any) -> int:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with PeakBytes(*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)) as memory:
        model.base_model(**inputs, use_cache=False).last_hidden_state.sum().backward()
    return memory.peak


def model_of(config: PretrainedConfig) -> Model:
    qwen3 = isinstance(config, Qwen3Config)
    return Model("", 0, config.num_hidden_layers, 128, 384, 128, 64, qwen3, config.vocab_size, 512, True)


@pytest.mark.parametrize("kind", [Qwen3Config, LlamaConfig])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_a_traced_pass(
    kind: type[Qwen3Config] | type[LlamaConfig], dtype: torch.dtype, checkpointing: bool
) -> None:
    config = kind(vocab_size=32, num_hidden_layers=3, **SHAPE)
    rows, row = 2, 64
    estimate = activation_bytes(
        model_of(config),
        rows * row,
        residual=dtype.itemsize,
        compute=dtype.itemsize,
        checkpointing=checkpointing,
    )
    assert estimate == pytest.approx(traced(config, dtype, checkpointing, rows, row), rel=0.15)


@pytest.mark.parametrize("packing", [False, True])
def test_activations_of_several_sequences_in_a_row(packing: bool) -> None:
    """A prompt of 64 tokens and 8 completions, of which 32 are in the row: each reads 96 keys."""
    config = LlamaConfig(vocab_size=32, num_hidden_layers=3, **SHAPE)
    prompts, completions = [[1] * 64] * 8, [[2] * 33] * 8
    if packing:
        (micro,) = micro_batches(prompts, completions, budget=1000, packing=True)
    else:
        (micro,) = shared_prompt_batches(prompts, completions, budget=1000)
    tokens = micro.input_ids.numel()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=NAME).train()
    measured = pass_bytes(
        model,
        input_ids=micro.input_ids,
        attention_mask=torch.empty(1, 1, 0, 0),
        position_ids=micro.position_ids,
        tree=micro.tree,
    )
    reads = 1.0 if packing else (64 + 8 * 96) / tokens
    estimate = activation_bytes(
        model_of(config), tokens, residual=2, compute=2, checkpointing=False, reads=reads, row=97 if packing else 96
    )
    assert estimate == pytest.approx(measured, rel=0.15)


def test_head_is_that_of_a_traced_pass() -> None:
    vocabulary, width, chunk, count = 4096, 64, 128, 300
    hidden = torch.randn(count, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(count, dtype=torch.long)
    with PeakBytes(hidden, weight) as memory:
        logp, _ = SelectedLogProbs.apply(hidden, weight, None, targets, 1.0, chunk, False)
        logp.sum().backward()
    model = Model("", 0, 1, width, 0, 0, 0, False, vocabulary, 0, True)
    assert head_bytes(model, chunk, 2, 2) == pytest.approx(memory.peak, rel=0.15)


# -- verdicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["1.7b", "4b", "8b"])
def test_the_shipped_configs_fit_on_8_gpus_of_80_gb(size: str) -> None:
    made = plan(qwen(size), 8)
    assert made.problems == []
    assert made.device == "GPU"
    assert "fits" in printed(made)


@pytest.mark.parametrize(
    ("overrides", "gpus", "phase", "keys"),
    [
        (["sharding.zero_stage=1"], 8, "update", ["sharding.zero_stage: 3"]),
        ([], 1, "optimizer step", ["sharding.offload_optimizer: true"]),
        (["rollout.gpu_memory_utilization=0.9"], 8, "rollout", ["rollout.gpu_memory_utilization"]),
        (["model.gradient_checkpointing=false"], 8, "update", ["model.gradient_checkpointing: true"]),
        (["optim.micro_tokens=262144"], 8, "update", ["optim.micro_tokens"]),
    ],
)
def test_what_does_not_fit_is_said_with_the_key(overrides: list[str], gpus: int, phase: str, keys: list[str]) -> None:
    made = plan(qwen("8b", *overrides), gpus)
    (problem,) = [line for line in made.problems if line.startswith(phase)]
    assert all(key in problem for key in keys)
    assert f"does not fit: {problem}" in printed(made)


def test_a_cache_too_small_for_one_sequence_is_a_problem(tmp_path: Path) -> None:
    made = plan(tiny_config(make_tiny(tmp_path / "model"), "rollout.kv_cache_gb=0.0001"), 1)
    assert any("rollout.kv_cache_gb" in line for line in made.problems)


def test_context_of_the_model_is_a_limit(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model")
    with pytest.raises(UserError, match=r"data\.max_prompt_tokens.*rollout\.max_tokens.*512 tokens"):
        plan(tiny_config(folder, "data.max_prompt_tokens=449"), 1)
    plan(tiny_config(folder, "data.max_prompt_tokens=448"), 1)


def test_ranks_must_divide_the_batch() -> None:
    with pytest.raises(UserError, match="questions_per_step"):
        plan(qwen(), 7)
    with pytest.raises(UserError, match="--gpus"):
        plan(qwen(), 0)


def test_small_models_without_a_gpu_are_planned_for_main_memory(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "model")
    on_cpu, on_gpu = plan(tiny_config(folder), 2), plan(tiny_config(folder), 2, gpu_memory_gb=24)
    assert (on_cpu.device, on_gpu.device, on_gpu.capacity) == ("CPU", "GPU", 24 * GIB)
    assert on_cpu.phases["update"]["engine weights"] > 0  # nothing sleeps on a CPU


def test_token_plan_of_qwen3_8b() -> None:
    tokens = plan(qwen(), 8).tokens
    assert tokens["questions a step"] == "128, 16 a rank"
    assert tokens["rollouts a step"] == "1024, 128 a rank"
    assert tokens["tokens a step, at most"].startswith("12,582,912,")  # 1024 x (2048 + 10240)
    assert tokens["micro-batches an update"].startswith("at most 128 a rank, 64 ")  # one full sequence in each


# -- configs -----------------------------------------------------------------------------------------------------


def test_ablations_change_one_section() -> None:
    files = sorted((CONFIG_FOLDER / "ablations").glob("*.yaml"))
    assert len(files) > 10
    for file in files:
        base = load_config(yaml.safe_load(file.read_text())["base"]).model_dump()
        changed = load_config(str(file)).model_dump()
        sections = {key for key in base if changed[key] != base[key]} - {"name"}
        assert len(sections) == (0 if file.stem == "kappa_0.3" else 1), file  # 0.3 is the default
