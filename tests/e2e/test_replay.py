"""Steps of real runs, run again from their record."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from aipo.errors import UserError
from aipo.record.batches import recorded_steps
from aipo.record.checkpoints import seal
from aipo.replay import Settings, replay
from tests import processes
from tests.e2e.launch import ROOT, train
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e

CPU = torch.device("cpu")
Run = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """The runs too: a GPU's numbers are not those of a CPU bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four steps with a checkpoint after the second and the fourth."""
    folder = tmp_path_factory.mktemp("replay")
    os.environ["AIPO_CACHE"] = str(folder / "cache")
    model, data = make_tiny(folder / "model", scale=0.15), folder / "digits.jsonl"
    rows = [{"question": f"{a} + {b}", "answer": str((a + b) % 10)} for a in range(3) for b in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(name: str, *more: str, ranks: int = 1) -> Path:
        keys = {"model.path": model, "data.train": data, "data.validation": data, "runs": folder, "name": name}
        fixed = ["rollout.engine=hf", "model.dtype=float32", "reward.rule=certainty"]  # which always varies
        fixed += ["rollout.max_tokens=12", "validation.every=4", "curriculum.enabled=false"]
        train("--config", "tiny.yaml", *(f"{k}={v}" for k, v in keys.items()), *fixed, *more, ranks=ranks)
        return folder / name

    return made


@pytest.fixture(scope="module")
def plain(make: Run) -> Path:
    return make("plain", "sharding.zero_stage=0", "checkpoint.keep_last=3", "optim.updates_per_batch=2")


def copied(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "copy"))


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_step_is_what_it_was_bit_for_bit(plain: Path, step: int) -> None:
    """From the initial model, through a step, from a checkpoint, and through a step from one."""
    found = replay(plain, step, CPU)
    assert found.same
    assert found.start == (0 if step < 3 else 2)
    assert found.logged.keys() == found.replayed.keys()
    assert found.replayed["policy/grad_norm"] > 1e-3
    assert found.mask_iou == 1
    assert 0 < int(found.mask_logged.sum()) < found.mask_logged.numel()


def test_other_micro_batches_make_rounding(plain: Path) -> None:
    found = replay(plain, 3, CPU, Settings(micro_tokens=48))
    assert found.config.optim.micro_tokens == 48
    assert found.replayed["policy/grad_norm"] == pytest.approx(found.logged["policy/grad_norm"], rel=1e-5)
    assert found.mask_iou == 1


def test_another_dtype_makes_more(plain: Path) -> None:
    found = replay(plain, 3, CPU, Settings(dtype="bfloat16"))
    was, now = found.logged["policy/grad_norm"], found.replayed["policy/grad_norm"]
    assert was is not None
    assert 1e-4 < abs(now / was - 1) < 0.3


def test_other_weights_show(plain: Path, tmp_path: Path) -> None:
    run = copied(plain, tmp_path)
    path = run / "checkpoints" / "step-000002" / "plain.pt"
    state = torch.load(path, weights_only=True)
    draw = torch.Generator().manual_seed(0)
    for weight in state["policy"].values():
        weight += 0.03 * torch.randn(weight.shape, generator=draw)
    torch.save(state, path)
    seal(path.parent, 2, None)  # or its checksum would say that it is damaged
    found = replay(run, 3, CPU)
    assert not found.same
    assert found.mask_iou < 1
    # what is the same is so bit for bit; how far apart others come is a matter of luck
    assert found.replayed["policy/grad_norm"] != pytest.approx(found.logged["policy/grad_norm"], rel=1e-5)


def test_a_step_gone_bad_is_seen(plain: Path, tmp_path: Path) -> None:
    run = copied(plain, tmp_path)
    path = run / "checkpoints" / "step-000002" / "plain.pt"
    state = torch.load(path, weights_only=True)
    state["policy"]["model.model.norm.weight"].fill_(float("nan"))  # behind the states: the masks stay
    torch.save(state, path)
    seal(path.parent, 2, None)
    (run / "replay").rename(run / "bad_steps")
    found = replay(run, 3, CPU)
    assert found.replayed["loss/skipped_steps"] == 2  # both updates of the batch
    assert found.logged["loss/skipped_steps"] == 0


def test_what_cannot_be_replayed_is_said(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 9 of .* was not kept: those that can be are 1-4"):
        replay(plain, 9, CPU)
    with pytest.raises(UserError, match="no run folder"):
        replay(tmp_path, 1, CPU)
    run = copied(plain, tmp_path)
    (run / "replay" / "step-000003-rank-0.pt").unlink()
    with pytest.raises(UserError, match=r"step 4 .* on these settings: those that can be are 1-2"):
        replay(run, 4, CPU)
    (run / "checkpoints" / "step-000002" / "plain.pt").write_bytes(b"half")
    (run / "replay" / "step-000002-rank-0.pt").unlink()
    with pytest.raises(UserError, match=r"those that can be are 1$"):
        replay(run, 4, CPU)
    identity = run / "checkpoints" / "step-000004" / "identity.json"
    identity.write_text(identity.read_text().replace('"world_size": 1', '"world_size": 3'))
    seal(identity.parent, 4, None)
    (run / "replay" / "step-000001-rank-0.pt").rename(run / "replay" / "step-000005-rank-0.pt")
    with pytest.raises(
        UserError, match=r"replay of .*copy: the checkpoint belongs to another run: world_size is 3 in the checkpoint"
    ):
        replay(run, 5, CPU)


def command(run: Path, step: int, *more: str, expect: int = 0) -> str:
    line = [sys.executable, "-m", "aipo.replay", str(run), "--step", str(step), *more]
    done = processes.run(line, cwd=ROOT, env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def test_one_process_with_zero_3(make: Run) -> None:
    run = make("zero")
    assert recorded_steps(run) == {3, 4}  # since the oldest of two checkpoints
    printed = command(run, 4)
    assert "bit for bit what the run logged" in printed
    assert "step 4 from the checkpoint of step 2 through step 3: one process, float32, ZeRO 3" in printed
    assert "without DeepSpeed" in command(run, 3, "--zero", "0")
    assert "step 4 of" in (said := command(run, 4, "--zero", "0", expect=2))
    assert said.strip().endswith("those that can be are 3")


def test_two_processes_with_zero_3(make: Run) -> None:
    """Their shards are put together; the same batch on one process gives the same numbers up to rounding."""
    run = make("two", ranks=2)
    found = replay(run, 3, CPU)
    assert found.world_size == 2
    assert found.mask_iou == 1
    assert found.replayed["policy/grad_norm"] > 1e-3
    for name, value in found.logged.items():
        assert found.replayed[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_nothing_is_kept_where_nothing_should_be(make: Run) -> None:
    run = make("none", "tracking.replay=false", "sharding.zero_stage=0", "optim.steps=1")
    with pytest.raises(UserError, match="none can be"):
        replay(run, 1, CPU)
