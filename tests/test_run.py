"""Bad input: one clear line that names the key or file, before any model loads, exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import train
from aipo.config import load_config
from aipo.errors import UserError
from aipo.inputs import (
    check_inputs,
    check_model,
    describe_data,
    may_go_on,
    missing_data,
    triton_lacks,
    without_effect,
)
from aipo.run import resume_command, run
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"))


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(8)]


def config_with(model: Path, data: Path, *overrides: str):  # type: ignore[no-untyped-def]
    return load_config(
        "tiny.yaml", [f"model.path={model}", f"data.train={data}", f"data.validation={data}", *overrides]
    )


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("aipo.rollout.find_spec", lambda name: None)


def test_good_input(model: Path, tmp_path: Path) -> None:
    inputs = check_inputs(config_with(model, write(tmp_path / "d.jsonl", GOOD), "rollout.engine=hf"), world=2)
    assert len(inputs.problems) == 8
    assert len(inputs.held_out) == 4  # validation.questions


def test_gold_texts_that_are_not_there(model: Path, tmp_path: Path) -> None:
    solved = [row | {"id": f"row {i}", "solution": "It is so."} for i, row in enumerate(GOOD)]
    asks = ["mi.gold_text=solution", "rollout.engine=hf"]
    assert check_inputs(config_with(model, write(tmp_path / "a.jsonl", solved), *asks), world=1).problems[0].solution
    del solved[5]["solution"]
    with pytest.raises(UserError, match=r"row of question 'row 5' has no field 'solution'"):
        check_inputs(config_with(model, write(tmp_path / "b.jsonl", solved), *asks), world=1)
    alike = [row | {"answer": "1"} for row in GOOD]
    asks = ["mi.gold_control=shuffled", "rollout.engine=hf"]
    with pytest.raises(UserError, match=r"mi\.gold_control: shuffled needs questions of different answers"):
        check_inputs(config_with(model, write(tmp_path / "c.jsonl", alike), *asks), world=1)


def test_an_oracle_needs_to_be_told(model: Path, tmp_path: Path) -> None:
    known = [row | {"id": f"row {i}", "critical": [0]} for i, row in enumerate(GOOD)]
    asks = ["mask.score=critical", "rollout.engine=hf"]
    assert check_inputs(config_with(model, write(tmp_path / "a.jsonl", known), *asks), world=1).problems[0].critical
    del known[5]["critical"]
    with pytest.raises(UserError, match=r"mask\.score: critical, and the row of question 'row 5' has no field"):
        check_inputs(config_with(model, write(tmp_path / "b.jsonl", known), *asks), world=1)


def test_what_is_dropped_is_counted(model: Path, tmp_path: Path) -> None:
    rows = [*GOOD, {"question": "long " * 300, "answer": "1"}, GOOD[0], *({"question": "?", "answer": a} for a in "12")]
    inputs = check_inputs(config_with(model, write(tmp_path / "d.jsonl", rows), "rollout.engine=hf"), world=1)
    assert len(inputs.problems) == 8
    assert "1 duplicate" in inputs.notes[0]
    assert "2 conflicting answers" in inputs.notes[0]
    assert "1 longer than 192 tokens" in inputs.notes[0]


@pytest.mark.parametrize(
    ("overrides", "world", "said"),
    [
        (["data.train=nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["model.path=./nowhere/at/all"], 1, "nowhere/at/all"),
        (["rollout.questions_per_step=6"], 4, "not divisible by the 4 processes"),
        (["rollout.questions_per_step=16"], 1, "exceeds the 8 questions"),
        (["data.max_prompt_tokens=2"], 1, "data.max_prompt_tokens"),
        (["mi.layer=2"], 1, "mi.layer: 2 is not a layer"),
        (["rollout.max_tokens=100000"], 1, "exceed the"),
    ],
)
@pytest.mark.usefixtures("without_vllm")
def test_bad_input(model: Path, tmp_path: Path, overrides: list[str], world: int, said: str) -> None:
    """The same words where vLLM, which the config asks for, is not installed."""
    with pytest.raises(UserError, match=said):
        check_inputs(config_with(model, write(tmp_path / "d.jsonl", GOOD), *overrides), world=world)


@pytest.mark.usefixtures("without_vllm")
@pytest.mark.parametrize("row", [{"question": "a"}, {"question": "a", "answer": ""}, {"question": "a", "answer": 3}])
def test_bad_rows_are_numbered(model: Path, tmp_path: Path, row: object) -> None:
    with pytest.raises(UserError, match=r"d\.jsonl.*9.*answer"):
        check_inputs(config_with(model, write(tmp_path / "d.jsonl", [*GOOD, row])), world=1)


@pytest.mark.usefixtures("without_vllm")
def test_model_without_chat_template(tmp_path: Path) -> None:
    bare = make_tiny(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        check_inputs(config_with(bare, write(tmp_path / "d.jsonl", GOOD)), world=1)


def test_flash_attention_that_is_not_installed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aipo.inputs.find_spec", lambda name: None)
    data = write(tmp_path / "d.jsonl", GOOD)
    more = ["model.attention=flash_attention_2", "optim.share_prompts=false", "rollout.engine=hf"]
    with pytest.raises(UserError, match="flash_attention_2 is not installed"):
        check_inputs(config_with(model, data, *more), world=1)


@pytest.mark.usefixtures("without_vllm")
def test_model_that_scales_its_logits(tmp_path: Path) -> None:
    capped = make_tiny(tmp_path / "capped")
    config = json.loads((capped / "config.json").read_text())
    (capped / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 30.0}))
    with pytest.raises(UserError, match="final_logit_softcapping"):
        check_inputs(config_with(capped, write(tmp_path / "d.jsonl", GOOD)), world=1)


@pytest.mark.parametrize("key", ["share_prompts", "packing"])
def test_layers_that_would_carry_one_sequence_into_the_next(model: Path, tmp_path: Path, key: str) -> None:
    layout = [f"optim.{each}={str(each == key).lower()}" for each in ("share_prompts", "packing")]
    config = config_with(model, write(tmp_path / "d.jsonl", GOOD), *layout)
    architecture = AutoConfig.from_pretrained(model)
    check_model(config, architecture)
    architecture.layer_types = ["sliding_attention", "conv"]
    with pytest.raises(UserError, match=f"optim.{key}: .* kind conv"):
        check_model(config, architecture)


@pytest.mark.usefixtures("without_vllm")
def test_engine_that_is_not_installed(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pip install vllm"):
        check_inputs(config_with(model, write(tmp_path / "d.jsonl", GOOD)), world=1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "tiny.yaml", "mask.kapa_start=0.2"], "mask.kappa_start"),
        (["--config", "tiny.yaml", "optim.lr=fast"], "optim.lr"),
        (["--config", "tinny.yaml"], "tiny.yaml"),
    ],
)
def test_exit_code_2_and_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    assert train.main() == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_ctrl_c_outside_the_steps(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(work: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("aipo.distributed.launch", pressed)
    monkeypatch.setattr("train.settle", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "tiny.yaml", f"model.path={model}"])
    assert train.main() == 130
    assert capsys.readouterr().err.strip().startswith("stopped; labels")


def test_under_a_launcher_only_one_rank_shows_the_plan(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "d.jsonl", GOOD)
    keys = [f"model.path={model}", f"data.train={data}", f"data.validation={data}"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "tiny.yaml", *keys, "loss.clip_low=0.1", "--dry-run"])
    for rank, times in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert train.main() == 0
        shown = capsys.readouterr().out
        assert shown.count("data.train: 8 questions") == shown.count("loss.clip_low without effect") == times


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    shown = capsys.readouterr().out
    for key in ("optim.lr", "mask.kappa_start", "curriculum.refresh_every", "rollout.engine"):
        assert f"  {key}  (" in shown


def test_resume_command_keeps_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "a.yaml", "--resume", "none", "seed=3"])
    assert resume_command() == "accelerate launch train.py --config a.yaml seed=3 --resume auto"


def test_resume_command_of_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launcher of many cannot start the others."""
    monkeypatch.setenv("WORLD_SIZE", "32")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert resume_command() == "the same command, and --resume auto"


def test_a_cache_that_cannot_hold_labels(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AIPO_CACHE", str(tmp_path / "file"))
    config = config_with(model, write(tmp_path / "d.jsonl", GOOD), "rollout.engine=hf", f"runs={tmp_path}", "name=x")
    with pytest.raises(UserError, match=r"labels of their questions, cannot be written.*AIPO_CACHE"):
        run(config, device=torch.device("cpu"))
    assert not (tmp_path / "x").exists()
    check_inputs(config, world=1)  # as a run that goes on, a replay or a credit, which label nothing


def test_latents_that_nothing_is_drawn_with_may_be_gone(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", GOOD)
    config = config_with(model, data, "rollout.engine=hf", "branch.latent_path=gone.pt")
    assert "latents" not in check_inputs(config, world=1).identity


def test_what_an_error_says_to_change_may_change(model: Path, tmp_path: Path) -> None:
    """Dynamic sampling that found too few questions: raise max_tries, or on_exhausted: continue, and resume."""
    data = write(tmp_path / "d.jsonl", GOOD)
    saved, mended, other = (
        check_inputs(config_with(model, data, "rollout.engine=hf", *more), world=1).identity
        for more in ([], ["dynamic.max_tries=20", "dynamic.on_exhausted=continue"], ["dynamic.factor=5"])
    )
    may_go_on(saved, mended)
    with pytest.raises(UserError, match=r"dynamic\.factor is"):
        may_go_on(saved, other)
    with pytest.raises(UserError, match=r"dynamic\.max_tries is"):  # steps may have gone on with what there was
        may_go_on(mended, saved)
    may_go_on(saved | {"latents": "of a file that nothing was drawn with"}, saved)


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/some/home")
    assert load_config("tiny.yaml", ["runs=~/runs", "name=x"]).folder == Path("/some/home/runs/x")


@pytest.mark.usefixtures("without_vllm")
def test_held_out_training_questions(model: Path, tmp_path: Path) -> None:
    rows = [{"question": f"number{i} + 1", "answer": str(i + 1)} for i in range(12)]
    data = write(tmp_path / "d.jsonl", list(rows))
    config = config_with(model, data, "data.validation=null", "validation.holdout=5", "rollout.engine=hf")
    inputs = check_inputs(config, world=1)
    assert (len(inputs.problems), len(inputs.held_out)) == (7, 4)  # validation.questions
    assert not {p.id for p in inputs.problems} & {p.id for p in inputs.held_out}
    assert "validation: 5 of the training questions, held out; 7 are left" in inputs.notes[-1]
    with pytest.raises(UserError, match="two are b: give them names"):
        config_with(model, data, "validation.watch=[a/b.jsonl, c/b.jsonl]")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["loss.clip_high=0.3"], "loss.clip_high without effect"),
        (["loss.clip_low=0.1", "loss.ratio=sequence"], "loss.clip_low, loss.ratio without effect"),
        (["loss.clip_high=0.3", "optim.updates_per_batch=2"], None),
        (["loss.ratio=tv_mask", "loss.divergence=0.1"], "loss.ratio, loss.divergence without effect"),
        (["loss.ratio=tv_mask", "loss.old_policy=engine", "rollout.importance_correction=none"], None),
        (["loss.kl_beta=0.1"], None),
        (["reward.rule=certainty", "reward.correctness=0.8", "reward.length=0.2"], "reward.length without effect"),
    ],
)
def test_what_cannot_bite_is_named(overrides: list[str], named: str | None) -> None:
    said = without_effect(load_config("tiny.yaml", overrides))
    assert [named is not None and named in line for line in said] == ([True] if named else [])


def test_a_dry_run_counts_what_is_there_and_names_what_is_not(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", list(GOOD))
    config = config_with(model, data, "validation.watch=[nowhere.jsonl, 'hub:x/y']")
    said = describe_data(config)
    assert f"data.train: 8 questions from {data}" in said
    missing = missing_data(config)
    assert any(line.startswith("validation.watch nowhere: nowhere.jsonl is not there yet") for line in missing)
    assert "validation.watch y: hub:x/y is fetched when the run starts" in missing
    mix = ["data.train=[{path: nowhere.jsonl}, {path: embedded:chain_sum}]"]
    config = config_with(model, data, *mix)
    said = missing_data(config) + describe_data(config)  # sources are compared: one alone is not counted
    assert [line.partition(":")[0] for line in said] == ["data.train nowhere", "data.validation"]


def test_what_triton_compiles_with_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    assert "no C compiler" in (triton_lacks() or "")
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    assert "no Python.h" in (triton_lacks() or "")
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    assert triton_lacks() is None
