"""What the command asks for, and what it refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aipo.config import load_config
from aipo.config.sections import MIConfig
from aipo.credit.command import check, check_golds, draw, parse
from aipo.credit.frozen import prepare
from aipo.credit.signals import named, readings
from aipo.credit.table import Credit
from aipo.credit.values import Valued
from aipo.errors import UserError
from aipo.problems.problem import Problem
from aipo.record.progress import Progress
from aipo.rollout.base import Completion


def test_only_questions_that_are_asked_for_count_as_mixed(tmp_path: Path) -> None:
    def line(name: str, judged: list[float]) -> str:
        said = [Completion([1], [-0.1], "stop")] * 2
        return json.dumps(Valued(name, said, judged, ["", ""]).row()) + "\n"

    # of an earlier start that asked for more questions
    (tmp_path / "rollouts.jsonl").write_text(line("first", [0.0, 0.0]) + line("second", [0.0, 1.0]))
    options, pool = parse(["--config", "x", "--questions", "1"]), [Problem("first", "1 + 1 =", "2")]
    config = load_config("beds/chain.yaml")
    with pytest.raises(UserError, match="right in 0% of 2 rollouts"), Progress() as progress:
        draw(config, None, pool, options, tmp_path, progress)  # type: ignore[arg-type]
    (tmp_path / "rollouts.jsonl").write_text(line("first", [float("nan")] * 2))  # nothing is known of the model
    with pytest.raises(UserError, match=r"no rollout of 1 questions has a verdict .*timeout_s"), Progress() as progress:
        draw(config, None, pool, options, tmp_path, progress)  # type: ignore[arg-type]


def test_a_wrong_gold_needs_two_answers() -> None:
    one, other = Problem("a", "1 + 1 =", "2"), Problem("b", "1 + 2 =", "3")
    check_golds([one, other], ["entropy", "mi (wrong gold)"])
    check_golds([one, one], ["entropy", "mi"])
    with pytest.raises(UserError, match=r"2, have one answer, and 'mi \(wrong gold\)' needs another: raise --q"):
        check_golds([one, one], ["entropy", "mi (wrong gold)"])


def test_the_bandwidth_between_whole_states_is_the_median() -> None:
    made = dict(readings(MIConfig(sigma=50.0, num_features=256), solutions=False))
    for name, mi in made.items():
        assert mi.sigma == (50.0 if "coordinate" in name else "median"), name
    assert made["mi coordinate random answer"].num_features == 256  # the default reading, as it is
    assert made["mi pointwise random answer"].num_features == 64
    few = dict(readings(MIConfig(features="quadrature", num_features=16), solutions=False))  # as the beds
    assert few["mi coordinate quadrature answer"].num_features == 16
    assert few["mi coordinate random answer"].num_features == 256
    assert few["mi position orthogonal answer"].num_features == 64


def test_no_token_above_its_noise() -> None:
    still = Credit(np.full(5, 0.1), np.full(5, 0.2), np.zeros(5, int), np.zeros(5, int))
    with pytest.raises(UserError, match="no answer of theirs had a verdict"):
        check(still.take(np.array([], int), np.array([], int)), 16)
    with pytest.raises(UserError, match=r"none of 5 tokens .* 0\.10, the median error 0\.20.*--continuations \(16\)"):
        check(still, 16)


def test_values_of_other_weights_are_not_gone_on_with(tmp_path: Path) -> None:
    def made_with(weights: str) -> Any:
        return SimpleNamespace(identity={"seed": 0, "weights of model.path": weights})

    for _ in range(2):
        prepare(tmp_path / "out", made_with("a"), samples=2)
    with pytest.raises(UserError, match=r"other settings made \(weights of model\.path\): give another --out"):
        prepare(tmp_path / "out", made_with("b"), samples=2)
    with pytest.raises(UserError, match=r"other settings made \(samples\)"):
        prepare(tmp_path / "out", made_with("a"), samples=3)


def test_the_signals_that_the_evidence_asks_for_are_there() -> None:
    script = (Path(__file__).parents[2] / "bench" / "evidence.sh").read_text()
    lines = [line for line in script.splitlines() if line.startswith(("mi=", "wrong=", "plain="))]
    shown = 'printf %s "$plain,$mi,$wrong"'
    asked = subprocess.run(
        ["bash", "-c", "\n".join([*lines, shown])], capture_output=True, text=True, check=True
    ).stdout
    problem = Problem("q", "1 + 1 =", "2", critical=(1,))
    assert len(named(load_config("beds/fork.yaml"), [problem], asked.split(","))) == 11 + 2 * 6
