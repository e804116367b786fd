"""Every method's YAML trains the tiny model through the real stack, on one vLLM engine; some on two ZeRO-3 ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from aipo.config import CONFIG_FOLDER
from tests import processes
from tests.e2e.launch import ROOT, metrics, train
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e

METHODS = sorted(path.stem for path in (CONFIG_FOLDER / "methods").glob("*.yaml"))
AHEAD, QUADRANT = "aipo+rollout.async_depth=1", "dapo_ft+mask.rule=quadrant"
GROWING = "pppo+validation.every=1+mask.prefix_start=0.4+mask.prefix_step=0.3+mask.prefix_end=0.6"
MORE_AHEAD = [
    "dapo+rollout.async_depth=1",
    "pppo+rollout.async_depth=1",
    "iib_lpo+rollout.async_depth=1+branch.signal=logprob+branch.base=2+branch.total=4+branch.rounds=1",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, with a strong row for the end token: of 48 groups of four completions none has one length, so rewards
    differ whatever the rounding. With a row half as strong 19 had."""
    path = make_tiny(tmp_path_factory.mktemp("model"), scale=0.15, tied=False)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] *= 4
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.jsonl"
    rows = [{"question": f"{a} + {b}", "answer": str((a + b) % 10)} for a in range(3) for b in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def runs(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | {"AIPO_CACHE": str(tmp_path_factory.mktemp("cache"))}
    command = [sys.executable, "tests/e2e/methods_worker.py", str(model), str(data), str(folder)]
    command += [*METHODS, AHEAD, *MORE_AHEAD, QUADRANT, GROWING]
    done = processes.run(command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("method", [*METHODS, AHEAD, *MORE_AHEAD, QUADRANT, GROWING])
def test_a_method_trains(method: str, runs: Path, model: Path) -> None:
    lines = metrics(runs / method)
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert 0 < line["mask/otf"] <= 1
        assert line["loss/skipped_steps"] == 0
        assert all(value is not None for value in line.values()), line
    if method.startswith("pppo"):
        return  # it rewards right answers alone, and a random model has none
    assert any(line["policy/grad_norm"] > 0 for line in lines[1:])
    final = AutoModelForCausalLM.from_pretrained(runs / method / "final", dtype=torch.float32)
    initial = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    moved = [name for name, p in final.named_parameters() if not torch.equal(p, initial.get_parameter(name))]
    assert len(moved) > 5
    assert {name for name, _ in final.named_parameters()} == {name for name, _ in initial.named_parameters()}


def test_a_batch_drawn_ahead_is_one_update_old(runs: Path) -> None:
    on_policy, ahead = metrics(runs / "aipo"), metrics(runs / AHEAD)
    same = [key for key in on_policy[1] if not key.startswith(("time/", "speed/", "curriculum/"))]
    assert {key: ahead[1][key] for key in same} == {key: on_policy[1][key] for key in same}  # nothing was updated yet
    assert ahead[2]["mismatch/gap"] > 2 * on_policy[2]["mismatch/gap"]


def last(runs: Path, method: str) -> dict[str, Any]:
    return metrics(runs / method)[-1]


def test_what_each_rule_leaves_in_the_log(runs: Path) -> None:
    """The methods differ by what their names stand for."""
    assert last(runs, "grpo")["mask/otf"] == last(runs, "dr_grpo")["mask/otf"] == 1
    assert 0 < last(runs, "aipo")["mask/otf"] < 0.6
    first = metrics(runs / "random_mask")[1]  # a step later completions may be shorter
    assert 0.2 < first["mask/otf"] < 0.45  # a fraction of 0.32, at least one token a completion
    assert 0.05 < last(runs, "pppo")["mask/otf"] < 0.35  # its prefixes
    assert last(runs, "pppo")["mask/cost_share"] < 0.05  # continuations are generated too
    assert [line["mask/prefix"] for line in metrics(runs / GROWING)[1:]] == [0.4, 0.6]  # nothing right is a stall
    assert last(runs, "dapo")["dynamic/tries"] >= 1
    assert "dynamic/tries" not in last(runs, "grpo")
    assert last(runs, "intuitor")["reward/trained"] != last(runs, "intuitor")["reward/correct"]
    assert "loss/kl" in last(runs, "prioritized_kl")
    assert "loss/kl" not in last(runs, "cispo")


def test_two_ranks(model: Path, data: Path, tmp_path: Path) -> None:
    """ZeRO-3 on two ranks: uneven batches after dynamic sampling, a batch-wide entropy mask, and LoRA weights."""
    keys = {"model.path": model, "data.train": data, "data.validation": data, "runs": tmp_path, "dynamic.by": "reward"}
    fixed = [
        "rollout.engine=hf",
        "reward.correctness=0.5",
        "reward.length=0.5",
        "reward.overlong_buffer=15",
        "optim.steps=1",
        "curriculum.enabled=false",
    ]
    for method in ("dapo_ft", "arca", "iapo", "pppo"):
        arguments = [f"{k}={v}" for k, v in keys.items()] + fixed + [f"name={method}"]
        if method in ("arca", "iapo"):
            arguments.append("dynamic.enabled=false")
        train("--config", "tiny.yaml", "--method", method, *arguments, ranks=2)
        line = last(tmp_path, method)
        assert line["policy/grad_norm"] > 0 or method == "pppo"
        assert line["loss/skipped_steps"] == 0


def test_two_ranks_draw_ahead(model: Path, data: Path, tmp_path: Path) -> None:
    """Dynamic sampling speaks between ranks while their training does, and finds the same each time."""
    keys = {"model.path": model, "data.train": data, "data.validation": data, "runs": tmp_path, "dynamic.by": "reward"}
    fixed = ["rollout.engine=hf", "reward.correctness=0.5", "reward.length=0.5", "reward.overlong_buffer=15"]
    fixed += ["optim.steps=4", "rollout.async_depth=1", "mask.rule=random"]
    arguments = [f"{k}={v}" for k, v in keys.items()] + fixed
    for name in ("one", "two"):
        train("--config", "tiny.yaml", "--method", "dapo", *arguments, f"name={name}", ranks=2)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    assert all(line["dynamic/tries"] >= 1 for line in metrics(tmp_path / "one")[1:])


def test_branches_with_latents(model: Path, data: Path, tmp_path: Path) -> None:
    """The CVAE is trained on rollouts of the policy itself, then changes the branches of runs."""
    config, latents = tmp_path / "small.yaml", tmp_path / "latents.pt"
    files = {
        "data": {"train": str(data), "validation": str(data)},
        "model": {"path": str(model)},
        "runs": str(tmp_path),
    }
    config.write_text(yaml.safe_dump({"base": "tiny.yaml", **files, "rollout": {"engine": "hf"}}))
    command = [sys.executable, "-m", "aipo.branching.latent", "--config", str(config), "--out", str(latents)]
    command += ["--questions", "12", "--samples", "4", "--steps", "20", "--batch", "16"]
    done = processes.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "held-out continuations" in done.stdout
    for latent in ("norm_kv", "residual"):
        keys = {"name": latent, "branch.latent": latent, "branch.latent_path": latents, "branch.base": 2}
        keys |= {"branch.total": 6, "branch.rounds": 2, "optim.steps": 1}
        keys |= {"reward.rule": "certainty"}  # a real number: no two rollouts have the same, so there is a gradient
        train("--config", str(config), "--method", "iib_lpo", *(f"{k}={v}" for k, v in keys.items()))
        line = last(tmp_path, latent)
        assert line["policy/grad_norm"] > 0
        assert line["mask/cost_share"] < line["mask/otf"]  # the filter dropped some
