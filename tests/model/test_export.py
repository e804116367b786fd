"""Which model a name means. What is written for a checkpoint is compared in tests/e2e/test_train.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from aipo.config import dump_config, load_config
from aipo.errors import UserError
from aipo.model.export import find_model
from aipo.model.loading import load_model
from aipo.policy import Policy
from aipo.record.checkpoints import CheckpointStore, seal
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """A run folder with a checkpoint of plain PyTorch, whose weights are the model's plus one."""
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        dump_config(load_config("tiny.yaml", [f"model.path={model}", "model.dtype=bfloat16"]))
    )
    loaded = load_model(str(model), dtype=torch.float32, attention="sdpa", gradient_checkpointing=False)
    policy = Policy(loaded, temperature=1.0, layer=-1, head_chunk=64)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    store = CheckpointStore(folder / "checkpoints", keep_last=2)
    store.save(
        3, lambda to: torch.save({"policy": policy.state_dict(), "optimizer": {}}, to / "plain.pt"), accuracy=0.5
    )
    return folder


def test_a_checkpoint_by_its_names(run: Path, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    names = [run, run / "checkpoints" / "latest", run / "checkpoints" / "best", run / "checkpoints" / "step-000003"]
    found = [find_model(str(name)) for name in names]
    assert {each.path for each in found} == {str(run / "exported" / "step-000003")}
    assert found[0].name == "first-step-000003"
    assert found[0].run == run
    assert found[0].config is not None
    assert found[0].config.rollout.max_tokens == 16
    exported = AutoModelForCausalLM.from_pretrained(found[0].path, dtype=torch.bfloat16)
    initial = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, parameter in initial.named_parameters():
        assert torch.equal(exported.get_parameter(name), (parameter + 1).bfloat16()), name


def test_a_final_model_comes_before_checkpoints(run: Path, model: Path) -> None:
    (run / "final").symlink_to(model)
    assert find_model(str(run)).path == str(run / "final")
    assert find_model(str(run)).name == "first"
    assert find_model(str(run / "checkpoints" / "latest")).path == str(run / "exported" / "step-000003")


def test_a_run_whose_checkpoints_were_removed_is_still_one(run: Path, model: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "final").symlink_to(model)
    for spec in (run, run / "final"):
        found = find_model(str(spec))
        assert (found.name, found.path, found.run) == ("first", str(run / "final"), run)
        assert found.config is not None
    with pytest.raises(UserError, match=r"step-000003 is not a complete checkpoint"):
        find_model(str(run / "checkpoints" / "step-000003"))
    (run / "final").unlink()
    (run / "final").mkdir()  # of a save that was cut off
    with pytest.raises(UserError, match="neither a final model nor a checkpoint"):
        find_model(str(run))


def test_a_run_that_cannot_be_written_is_named(run: Path) -> None:
    (run / "exported").write_text("a file in the way")
    with pytest.raises(UserError, match=r"first/exported, .*step-000003.* cannot be written \(File exists\): make"):
        find_model(str(run))


def test_folders_and_hub_ids(model: Path) -> None:
    assert find_model(str(model)).path == str(model)
    assert find_model(str(model)).run is None
    hub = find_model("Qwen/Qwen3-8B")
    assert (hub.name, hub.path) == ("Qwen3-8B", "Qwen/Qwen3-8B")
    with pytest.raises(UserError, match="neither an existing folder nor a hub id"):
        find_model("no/such/model")


def test_nothing_to_load_is_said(run: Path, model: Path) -> None:
    checkpoint = run / "checkpoints" / "step-000003"
    (checkpoint / "plain.pt").unlink()
    with pytest.raises(UserError, match=r"not a complete checkpoint: .*plain\.pt is missing"):
        find_model(str(checkpoint))
    with pytest.raises(UserError, match="not a complete checkpoint"):
        find_model(str(run / "checkpoints" / "step-000099"))
    (run / "checkpoints" / "latest").unlink()
    with pytest.raises(UserError, match="neither a final model nor a checkpoint"):
        find_model(str(run))


def test_another_models_checkpoint_is_refused(run: Path) -> None:
    folder = run / "checkpoints" / "step-000003"
    torch.save({"policy": {"model.other": torch.zeros(1)}}, folder / "plain.pt")
    seal(folder, 3, None)
    with pytest.raises(UserError, match="does not belong to"):
        find_model(str(run))
