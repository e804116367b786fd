"""The whole command on a bed's own model, through the Hugging Face engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from aipo.beds.__main__ import main as make_bed
from aipo.credit import gradients
from aipo.credit.__main__ import main
from aipo.credit.signals import WRONG
from aipo.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs" / "beds" / "chain.yaml"
SMALL = ["--questions", "5", "--samples", "6", "--continuations", "16", "--out", "out"]


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four results and no filler; it has learned to answer, hardly to add."""
    folder = tmp_path_factory.mktemp("bed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["--steps=4", "--fillers=0", "--pretrain-steps=60", "--batch=64"]
        assert make_bed(["chain", *arguments]) == 0
    return folder


def test_values_signals_and_tables(bed: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(bed)
    monkeypatch.setattr("aipo.distributed.launch", lambda work: work(torch.device("cpu")))
    monkeypatch.setattr("aipo.credit.table.RESAMPLES", 2)  # test_table.py has the intervals
    assert main(["--config", str(CONFIG), *SMALL]) == 0
    text = capsys.readouterr().out
    tokens = pd.read_parquet("out/tokens.parquet")
    assert text.count("\n| ") == tokens.shape[1] - 13 + 2
    for _, own in tokens.groupby(["question", "sample"]):
        # the changes add up to the reward less the value of the question
        assert own.delta.sum() == pytest.approx(float(own.correct.iloc[0]) - own.value_before.iloc[0])
        assert (own.end.to_numpy()[:-1] == own.start.to_numpy()[1:]).all()
    assert tokens[tokens.critical == 1].delta.abs().mean() > tokens[tokens.critical == 0].delta.abs().mean()
    twin = "mi coordinate quadrature answer"
    assert (tokens[twin] != tokens[twin + WRONG]).any()
    # resumed: the last two questions are lost, one in the middle of its line, and the others stay as they are
    lines = Path("out/values.jsonl").read_text().splitlines(keepends=True)
    Path("out/values.jsonl").write_text("".join(lines[:3]) + lines[3][:50])
    assert main(["--config", str(CONFIG), *SMALL]) == 0
    again = Path("out/values.jsonl").read_text().splitlines(keepends=True)
    assert again[:3] == lines[:3]
    kept = ("question", "cuts", "values")
    for before, after in zip(map(json.loads, lines), map(json.loads, again), strict=True):
        assert [before[key] for key in kept] == [after[key] for key in kept]
    assert main(["--config", str(CONFIG), *SMALL[:-3], "8", "--out", "out"]) == 2
    assert "other settings made" in capsys.readouterr().err


def test_a_model_that_is_never_right(bed: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(bed)
    monkeypatch.setattr("aipo.distributed.launch", lambda work: work(torch.device("cpu")))
    arguments = ["--config", str(CONFIG), "--questions=2", "--samples=2", "--out=never", "rollout.max_tokens=2"]
    assert main([*arguments, "reward.overlong_buffer=1"]) == 2
    assert "the model is right in 0% of 4 rollouts" in capsys.readouterr().err


def test_gradients(bed: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(bed)
    monkeypatch.setattr("aipo.distributed.launch", lambda work: work(torch.device("cpu")))
    arguments = [
        "--config",
        str(CONFIG),
        "--questions=4",
        "--batches=2",
        "--signals=critical,random",
        "--out=gradients",
    ]
    assert gradients.main([*arguments, "--budgets=0.2,0.8"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert {line.split(" | ")[0].strip("| ") for line in lines[1:]} >= {"all tokens", "critical", "random, lowest"}
    assert gradients.main([*arguments, "--times=2"]) == 2
    assert gradients.main([*arguments, "--budgets=0.5"]) == 2  # not mixed with what other settings made
    assert "that other settings made" in capsys.readouterr().err
    with pytest.raises(UserError, match="nonsense unknown"):
        gradients.run(*gradient_arguments([*arguments[:-2], "--signals=nonsense", "--out=other"]))


def gradient_arguments(arguments: list[str]) -> tuple[Any, ...]:
    options = gradients.parse(arguments)
    return gradients.configured(options), options, Path(options.out), torch.device("cpu")
