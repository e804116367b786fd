"""The whole command on a bed's own model, through the Hugging Face engine."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from aipo.beds.__main__ import main as make_bed
from aipo.config import Config, load_config
from aipo.credit import gradients
from aipo.credit.command import main
from aipo.credit.frozen import FIXED, build
from aipo.credit.signals import VOCABULARY, all_signals
from aipo.credit.table import WRONG
from aipo.errors import UserError
from aipo.inputs import Inputs, check_inputs
from aipo.layout import token_grid
from aipo.passes import Passes
from aipo.record.jsonl import read_jsonl
from aipo.rollout import Sampling
from aipo.rollouts import Rollouts
from aipo.sharding import Sharded
from aipo.tokens.table import measure

pytestmark = pytest.mark.e2e

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


def test_a_bed_says_how_it_was_made(bed: Path) -> None:
    facts = json.loads((bed / "data" / "beds" / "chain" / "bed.json").read_text())
    made = {"world": "chain", "steps": 4, "fillers": 0, "words": 16, "pretrain_steps": 60, "batch": 64, "seed": 0}
    assert made.items() <= facts.items()


def test_values_signals_and_tables(bed: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(bed)
    monkeypatch.setattr("aipo.distributed.launch", lambda work: work(torch.device("cpu")))
    for count in ("table.RESAMPLES", "table.RESAMPLES_OF_TWINS", "plot.RESAMPLES"):
        monkeypatch.setattr(f"aipo.credit.{count}", 2)  # test_table.py has the intervals
    assert main(["--config", str(CONFIG), *SMALL]) == 0
    text = capsys.readouterr().out
    tokens = pd.read_parquet("out/tokens.parquet")
    first, second = text.split("wrong gold: AUROC")
    assert first.count("\n| ") == tokens.shape[1] - 14 + 2
    assert (tokens["standard error"] == tokens.error).all()
    assert second.count("\n| ") == sum(name.endswith(WRONG) for name in tokens) + 2
    for _, own in tokens.groupby(["question", "sample"]):
        # the changes add up to the reward less the value of the question
        assert own.delta.sum() == pytest.approx(float(own.correct.iloc[0]) - own.value_before.iloc[0])
        assert (own.end.to_numpy()[:-1] == own.start.to_numpy()[1:]).all()
    assert tokens[tokens.critical == 1].delta.abs().mean() > tokens[tokens.critical == 0].delta.abs().mean()
    twin = "mi coordinate quadrature answer"
    assert (tokens[twin] != tokens[twin + WRONG]).any()
    monkeypatch.setattr("aipo.credit.command.plot", lambda *_: None)  # drawn once
    # resumed: the last two questions are lost, one in the middle of its line, and the others stay as they are
    lines = Path("out/values.jsonl").read_text().splitlines(keepends=True)
    Path("out/values.jsonl").write_text("".join(lines[:3]) + lines[3][:50])
    few = "--signals=critical,random"
    assert main(["--config", str(CONFIG), *SMALL, few]) == 0
    again = Path("out/values.jsonl").read_text().splitlines(keepends=True)
    assert again[:3] == lines[:3]
    assert all(0 < sum(line["judged"]) < len(line["judged"]) for line in map(json.loads, again))
    kept = ("question", "cuts", "values")
    for before, after in zip(map(json.loads, lines), map(json.loads, again), strict=True):
        assert [before[key] for key in kept] == [after[key] for key in kept]
    assert main(["--config", str(CONFIG), "--questions", "6", *SMALL[2:], few]) == 0  # one more
    assert Path("out/values.jsonl").read_text().splitlines(keepends=True)[:5] == again
    assert main(["--config", str(CONFIG), *SMALL[:-3], "8", "--out", "out"]) == 2
    assert "other settings made" in capsys.readouterr().err


def test_a_model_that_is_never_right(bed: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(bed)
    monkeypatch.setattr("aipo.distributed.launch", lambda work: work(torch.device("cpu")))
    arguments = ["--config", str(CONFIG), "--questions=2", "--samples=2", "--out=never", "rollout.max_tokens=2"]
    assert main([*arguments, "reward.overlong_buffer=1"]) == 2
    assert "the model is right in 0% of 32 rollouts" in capsys.readouterr().err


def test_a_model_that_is_always_wrong_or_always_right_on_a_question(
    bed: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(bed)
    monkeypatch.setattr("aipo.distributed.launch", lambda work: work(torch.device("cpu")))
    arguments = ["--config", str(CONFIG), "--questions=2", "--samples=1", "--out=unmixed"]
    assert main(arguments) == 2
    assert "none of 16 questions has both right and wrong rollouts" in capsys.readouterr().err


def frozen(*, questions: int, samples: int) -> tuple[Config, Inputs, Sharded, Rollouts]:
    """The bed's model, and judged rollouts of its first training questions."""
    config = load_config(str(CONFIG), FIXED)
    inputs = check_inputs(config, world=1)
    collector, sharded = build(config, inputs, torch.device("cpu"))
    with closing(collector.engine), closing(collector.rewarder):
        drawn = inputs.problems[:questions]
        rollouts = collector.collect(drawn, Sampling.of(config.rollout), samples=samples, stream="test")
        collector.judge(rollouts)
    return config, inputs, sharded, rollouts


def test_every_signal_is_made_as_alone(bed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared passes change nothing: each is the same when it is the only one, and the measures too."""
    monkeypatch.chdir(bed)
    config, inputs, sharded, rollouts = frozen(questions=4, samples=2)
    passes = Passes(config, sharded, inputs.prompter, torch.device("cpu"))
    context = (passes, inputs.problems, rollouts)
    together = {name: make() for name, make in all_signals(*context).items()}
    assert {"gap", "entropy", "attention", "information", "position (early)", "random"} <= together.keys()
    assert len([name for name in together if name.startswith("mi ")]) == 2 * 3 * (3 * 2 + 2 + 2)
    for name in ("mi coordinate random cca boxed", "mi position orthogonal answer" + WRONG):
        torch.testing.assert_close(all_signals(*context, only=[name])[name](), together[name], equal_nan=True)
    for name in VOCABULARY:
        alone = measure({name}, passes, passes.batches_of(rollouts), rollouts)[0][name]
        torch.testing.assert_close(together[name], alone, equal_nan=True)


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
    found = [row for line in read_jsonl(Path("gradients/cosines.jsonl")) for row in line["rows"]]
    assert all(0 < row["cost"] <= 1 for row in found)
    # one that is killed goes on: the last batch is lost, in the middle of its line
    first, second = Path("gradients/cosines.jsonl").read_text().splitlines(keepends=True)
    Path("gradients/cosines.jsonl").write_text(first + second[:40])
    assert gradients.main([*arguments, "--budgets=0.2,0.8"]) == 0
    again = [row for line in read_jsonl(Path("gradients/cosines.jsonl")) for row in line["rows"]]
    assert again[: len(found) // 2] == found[: len(found) // 2]
    for before, after in zip(found, again, strict=True):
        assert after["cosine"] == pytest.approx(before["cosine"], abs=1e-4)
    assert capsys.readouterr().out
    assert gradients.main([*arguments, "--times=2"]) == 2
    assert gradients.main([*arguments, "--budgets=0.2,2"]) == 2
    assert "--budgets: '0.2,2' is no list of shares" in capsys.readouterr().err
    assert gradients.main([*arguments, "--budgets=0.5"]) == 2  # not mixed with what other settings made
    assert "that other settings made" in capsys.readouterr().err
    with pytest.raises(UserError, match="nonsense unknown"):
        gradients.run(*gradient_arguments([*arguments[:-2], "--signals=nonsense", "--out=other"]))


def gradient_arguments(arguments: list[str]) -> tuple[Any, ...]:
    options = gradients.parse(arguments)
    return gradients.configured(options), options, Path(options.out), torch.device("cpu")


def test_gradients_add_up_and_cost_what_they_read(bed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sum m A log pi by autograd over single sequences; and no selection costs more than all tokens."""
    monkeypatch.chdir(bed)
    config, inputs, sharded, rollouts = frozen(questions=2, samples=3)
    rollouts.rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    every = token_grid(rollouts.lengths, int(rollouts.lengths.max()))  # (B, T)
    mask = every & (torch.rand(every.shape, generator=torch.Generator().manual_seed(0)) < 0.4)
    passes = Passes(config, sharded, inputs.prompter, torch.device("cpu"))
    found = gradients.gradient(passes, rollouts, mask)
    advantages = [2 / 3, -1 / 3, -1 / 3, -2 / 3, 1 / 3, 1 / 3]
    model, total = sharded.policy.model, torch.tensor(0.0)
    for row, (prompt, own) in enumerate(zip(rollouts.each_prompt, rollouts.each_completion)):
        logits = model(input_ids=torch.tensor([[*prompt, *own]])).logits[0]  # (S, V)
        for t, token in enumerate(own):
            if mask[row, t]:
                total = total + advantages[row] * logits[len(prompt) + t - 1].log_softmax(-1)[token]
    slow = torch.autograd.grad(total, list(model.parameters()))
    torch.testing.assert_close(found, torch.cat([each.flatten() for each in slow]), rtol=1e-3, atol=1e-5)
    few = gradients.cost({"body": 10, "vocabulary": 3, "width": 2, "layers": 1, "queries": 2}, rollouts, mask)
    read, squares = 0, 0
    for row, prompt in enumerate(rollouts.each_prompt):
        end = max([t + 1 for t in range(mask.shape[1]) if mask[row, t]], default=0)
        read += (len(prompt) + end) * (end > 0)
        squares += (len(prompt) + end) ** 2 * (end > 0)
    assert few == pytest.approx(4 * (10 * read + 6 * int(mask.sum()) + 2 * squares))
