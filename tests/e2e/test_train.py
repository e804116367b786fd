"""train.py as a user starts it: two ranks with ZeRO-3 and vLLM, killed and resumed runs, signals, bad input."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aipo.model.export import find_model
from tests.e2e.launch import ACCELERATE, ROOT, command, metrics, train, two_vllm
from tests.processes import Guard
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e

STEPS = 24


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Labels of these runs do not go to the user's cache; the embedded model is not needed here."""
    os.environ["AIPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with tied embeddings, sharp enough that a stale weight would show."""
    return make_tiny(tmp_path_factory.mktemp("model"), scale=0.15)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions whose answer is a digit, so that a random model is right now and then."""
    path = tmp_path_factory.mktemp("data") / "digits.jsonl"
    rows = [{"question": f"{a} + {b}", "answer": str((a + b) % 10)} for a in range(3) for b in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(model: Path, data: Path, runs: Path, name: str, *more: str) -> list[str]:
    """Plain Hugging Face rollouts in float32: a completion does not depend on its company, so runs can be compared."""
    keys = {"model.path": model, "data.train": data, "data.validation": data, "runs": runs, "name": name}
    fixed = ["rollout.engine=hf", "model.dtype=float32", "reward.correctness=0.5", "reward.length=0.5"]
    fixed += [f"optim.steps={STEPS}", "rollout.max_tokens=12", "curriculum.refresh_every=2"]
    fixed += ["rollout.check_every=5"]  # what is asked of the engine between steps changes nothing
    return ["--config", "tiny.yaml", *(f"{k}={v}" for k, v in keys.items()), *fixed, *more]


@pytest.fixture(scope="module")
def undisturbed(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    runs = tmp_path_factory.mktemp("runs")
    printed = train(*arguments(model, data, runs, "undisturbed"), launcher=ACCELERATE)
    return runs / "undisturbed", printed


def test_run_folder_explains_itself(undisturbed: tuple[Path, str], model: Path) -> None:
    folder, printed = undisturbed
    for name in ("config.yaml", "versions.json", "git.json", "command.txt", "curves/curves.png", "summary.md"):
        assert (folder / name).stat().st_size > 0, name
    lines = metrics(folder, timed=True)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    for key in ("reward/mean", "mask/otf", "mask/kappa", "mi/mean", "mi/skew", "loss/kl", "policy/entropy"):
        assert isinstance(lines[1][key], float), key
    assert 0 < lines[1]["mask/otf"] < 1
    assert lines[1]["mask/kappa"] == pytest.approx(0.3)
    assert lines[-1]["mask/kappa"] < 0.3
    assert lines[1]["loss/kl"] == pytest.approx(0, abs=1e-6)  # the policy still is the initial model
    assert lines[-1]["loss/kl"] > 1e-6
    assert lines[1]["mismatch/gap"] < 1e-4  # both sides are float32 here
    for phase in ("rollout", "reward", "forward", "mi", "backward", "optimizer", "sync"):
        assert lines[1][f"time/{phase}_s"] > 0
    rows = [json.loads(line) for line in (folder / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert len(row["tokens"]) == len(row["mi"]) == len(row["mask"]) > 0
        assert all((m == 1) <= (mi is not None) for m, mi in zip(row["mask"], row["mi"]))
    assert "held-out accuracy before" in printed
    assert f"step {STEPS}/{STEPS}" in printed
    assert "ETA" in printed


def test_final_model_is_plain_hugging_face(undisturbed: tuple[Path, str], model: Path) -> None:
    final = AutoModelForCausalLM.from_pretrained(undisturbed[0] / "final", dtype=torch.float32)
    initial = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(undisturbed[0] / "final").chat_template
    moved = [name for name, p in final.named_parameters() if not torch.equal(p, initial.get_parameter(name))]
    assert len(moved) > 10
    assert final.lm_head.weight is final.model.embed_tokens.weight
    assert_exported(undisturbed[0])


def assert_exported(run: Path) -> None:
    """evaluate.py takes a run folder for its final model and a checkpoint for the weights saved in it."""
    assert find_model(str(run)).path == find_model(str(run / "final")).path == str(run / "final")
    final = AutoModelForCausalLM.from_pretrained(run / "final", dtype=torch.float32)
    checkpoint = find_model(str(run / "checkpoints" / "latest"))
    assert checkpoint.name == f"{run.name}-step-{STEPS:06d}"
    exported = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    for name, parameter in final.named_parameters():
        assert torch.equal(exported.get_parameter(name), parameter), name
    assert AutoTokenizer.from_pretrained(checkpoint.path).chat_template
    assert find_model(str(run / "checkpoints" / f"step-{STEPS:06d}")).path == checkpoint.path


def test_two_ranks_do_what_one_does(undisturbed: tuple[Path, str], model: Path, data: Path, tmp_path: Path) -> None:
    """Per-request seeds: the same questions and completions, half of them on each rank, one gradient."""
    train(*arguments(model, data, tmp_path, "two", "checkpoint.every=24"), ranks=2)
    for one, two in zip(metrics(undisturbed[0])[:3], metrics(tmp_path / "two")[:3], strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            if key != "mask/wrong_gold_iou":  # the wrong gold is that of another question of the rank
                assert two[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    assert metrics(tmp_path / "two")[1]["rollout/questions"] == 4
    assert_exported(tmp_path / "two")


def test_killed_at_any_moment_and_resumed(
    undisturbed: tuple[Path, str], model: Path, data: Path, tmp_path: Path
) -> None:
    """SIGKILL at random moments and inside a save, SIGTERM once: in the end nothing shows of it."""
    folder = tmp_path / "killed"
    resumed = [*arguments(model, data, tmp_path, "killed"), "--resume", "auto"]
    started = command(*resumed, launcher=ACCELERATE)
    draw = random.Random(0)
    for way in ("anywhere", "inside a save", "signal"):
        process = subprocess.Popen(
            started, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        if way == "inside a save":
            wait_for(lambda: list((folder / "checkpoints").glob(".tmp-*")), process)
        else:
            before = len(metrics(folder)) if (folder / "metrics.jsonl").exists() else 0
            wait_for(lambda before=before: reached(folder, before + 1), process)
            time.sleep(0.3 * draw.random())
        if way == "signal":
            os.killpg(process.pid, signal.SIGTERM)
            printed = process.communicate()[0]
            assert "go on with: accelerate launch train.py --config tiny.yaml" in printed, printed[-3000:]
            assert "--resume auto" in printed
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    printed = train(*resumed, launcher=ACCELERATE)
    assert "resumed after step" in printed
    assert metrics(folder) == metrics(undisturbed[0])
    for file in (folder / "final").glob("*.safetensors"):
        assert file.read_bytes() == (undisturbed[0] / "final" / file.name).read_bytes()
    # labels were made once and are reused: a run of the same model, data and settings does not label again
    assert "labelling" not in printed


def test_killed_between_a_batch_and_its_step(model: Path, data: Path, tmp_path: Path) -> None:
    """With a batch drawn ahead, a checkpoint holds it: the resumed run trains on the same rollouts. It also holds the
    statistics of all tokens scored so far, and how many were generated, by which the run ends a step early."""
    ahead = ["rollout.async_depth=1", "optim.steps=6", "curriculum.refresh_every=null"]
    ahead += ["mask.scope=running", "optim.generated_tokens=800"]
    train(*arguments(model, data, tmp_path, "whole", *ahead))
    assert len(metrics(tmp_path / "whole")) < 1 + 6
    resumed = [*arguments(model, data, tmp_path, "killed", *ahead), "--resume", "auto"]
    process = subprocess.Popen(
        command(*resumed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(lambda: reached(tmp_path / "killed", 3), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "resumed after step" in train(*resumed)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    for file in (tmp_path / "killed" / "final").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "whole" / "final" / file.name).read_bytes()


def test_resuming_another_run_is_refused(undisturbed: tuple[Path, str], model: Path, data: Path) -> None:
    runs = undisturbed[0].parent
    printed = train(
        *arguments(model, data, runs, "undisturbed", "optim.lr=5e-4", "--resume", "auto"),
        launcher=ACCELERATE,
        expect=1,  # 2 from train.py, which accelerate turns into 1
    )
    assert "optim.lr is 0.001 in the checkpoint and 0.0005 here" in printed
    printed = train(*arguments(model, data, runs, "undisturbed"), expect=2)
    assert "exists already" in printed


@two_vllm
def test_two_ranks_zero3_and_vllm(model: Path, data: Path, tmp_path: Path) -> None:
    """The real stack: each rank its ZeRO-3 shard and its own vLLM; the start-up check of the weight sync is on."""
    small = ["rollout.engine=vllm", "model.dtype=bfloat16", "optim.steps=2", "optim.updates_per_batch=2"]
    printed = train(*arguments(model, data, tmp_path, "vllm", *small), ranks=2)
    assert "weight sync checked" in printed
    lines = metrics(tmp_path / "vllm")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[1]["rollout/questions"] == 4
    assert 0 < lines[2]["mismatch/gap"] < 0.2  # bfloat16 on both sides, after an update
    assert (tmp_path / "vllm" / "final" / "model.safetensors").exists()


def reached(folder: Path, lines: int) -> bool:
    file = folder / "metrics.jsonl"
    return file.exists() and file.read_text().count("\n") >= lines + 1


def wait_for(condition, process: subprocess.Popen[str]) -> None:  # type: ignore[no-untyped-def]
    guard = Guard(process.pid)
    while not condition():
        assert process.poll() is None, process.communicate()[0][-5000:]
        guard.check()
        time.sleep(0.002)


def test_a_resumed_run_keeps_the_dtype_that_auto_chose(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun where oneDNN is held to AVX2, which has no bfloat16, and gone on with where it is not."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a GPU would have it
    few = ["model.dtype=auto", "optim.steps=2", "curriculum.enabled=false", "curriculum.refresh_every=null"]
    few += ["sharding.zero_stage=0", "rollout.engine=hf"]
    small = arguments(model, data, tmp_path, "moved", *few)
    with monkeypatch.context() as old_machine:
        old_machine.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        assert "model.dtype: float32 (auto: this CPU has no instructions for bfloat16)" in train(*small)
    assert "\n  dtype: float32\n" in (tmp_path / "moved" / "config.yaml").read_text()
    printed = train(*small, "--resume", "auto")
    assert "model.dtype: float32 (auto: as the run began that is resumed)" in printed
    refused = train(*small, "model.dtype=bfloat16", "--resume", "auto", expect=2)
    assert 'model.dtype is "float32" in the checkpoint and "bfloat16" here' in refused
