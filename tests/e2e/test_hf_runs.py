"""Whole runs in this process through the Hugging Face engine: what is watched, mixed, lost or fails on the way."""

from __future__ import annotations

import errno
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from aipo.config import load_config
from aipo.errors import TrainingError, UserError
from aipo.inputs import check_inputs
from aipo.model.export import model_stamp
from aipo.record.checkpoints import damage, resolve
from aipo.record.jsonl import read_jsonl
from aipo.rollout import HfEngine
from aipo.run import run
from tests.test_run import GOOD, config_with, write
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model"))


def test_an_engine_that_loses_its_weights_stops_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the sync after step 3 on, one projection of the engine holds noise: the check after step 4 sees it.

    The engine sleeps as on a GPU, where nothing of its weights is left.
    """
    syncs = 0

    class Faulty(HfEngine):
        def sync(self, weights) -> None:  # type: ignore[no-untyped-def]
            nonlocal syncs
            super().sync(weights)
            syncs += 1
            # 2 of the check at the start, 3 that wake it for labels, validation and step 3, and those after each step
            if syncs >= 2 + 3 + 3:
                torch.nn.init.normal_(self._model.model.layers[1].mlp.down_proj.weight)

        def sleep(self) -> None:
            self.asleep = True
            for weight in self._model.parameters():
                torch.nn.init.zeros_(weight)

    monkeypatch.setattr("aipo.rollout.HfEngine", Faulty)
    monkeypatch.setenv("AIPO_CACHE", str(tmp_path))  # for the labels
    more = ["rollout.engine=hf", "model.dtype=float32", "sharding.zero_stage=0"]
    more += ["loss.kl_beta=0", "validation.every=9", "rollout.check_every=2", "checkpoint.every=9"]
    config = config_with(model, write(tmp_path / "d.jsonl", GOOD), *more, f"runs={tmp_path}", "optim.steps=5")
    with pytest.raises(TrainingError, match=r"after step 4 .* up to 2 steps .*step-000004.*--resume auto"):
        run(config, device=torch.device("cpu"))
    assert damage(config.folder / "checkpoints" / "step-000004") is None
    assert resolve(config.folder / "checkpoints", "auto") == config.folder / "checkpoints" / "step-000004"
    assert [line["step"] for line in read_jsonl(config.folder / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    monkeypatch.undo()  # the engine of a new process is sound
    assert run(config, resume="auto", device=torch.device("cpu"))


MIXED = """
data:
  train:
    - {path: PLACE/easy.jsonl, weight: 3, suffix: " Box it."}
    - path: PLACE/hard.parquet
      weight: 1
      columns: {question: problem, answer: solved}
      reward: {function: graders_of_run:long}
  validation: null
validation:
  holdout: 4
  every: 2
  watch:
    - PLACE/easy.jsonl
    - {path: PLACE/hard.parquet, columns: {question: problem, answer: solved}, samples: 3, every: 3}
"""


def test_a_run_on_a_mix_of_sources(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIPO_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "graders_of_run.py").write_text("def long(problem, text):\n    return 2.0 if problem.answer else 0\n")
    write(tmp_path / "easy.jsonl", [{"question": f"easy{i} + 1", "answer": str(i + 1)} for i in range(20)])
    hard = {"problem": [f"hard{i} + 1" for i in range(20)], "solved": list(range(1, 21))}
    pyarrow.parquet.write_table(pyarrow.table(hard), tmp_path / "hard.parquet")
    (tmp_path / "mixed.yaml").write_text("base: tiny.yaml\n" + MIXED.replace("PLACE", str(tmp_path)))
    more = [f"model.path={model}", f"runs={tmp_path}", "rollout.engine=hf", "model.dtype=float32"]
    more += [
        "sharding.zero_stage=0",
        "loss.kl_beta=0",
        "validation.watch_every=2",
        "tracking.rollouts_per_step=16",
        "reward.workers=1",
    ]
    more += ["curriculum.buckets=within", "mask.rule=all"]
    config = load_config(str(tmp_path / "mixed.yaml"), more)
    inputs = check_inputs(config, world=1)
    assert len(inputs.problems) + len(inputs.held_out) == 40
    asked = inputs.prompter.tokenizer.decode(inputs.prompter.encode("easy1 + 1", "easy"))
    assert "easy1 + 1 Box it." in asked
    assert run(config, device=torch.device("cpu"))
    lines = read_jsonl(config.folder / "metrics.jsonl")
    assert [sorted({key.split("/")[1] for key in line if key.startswith("watch/")}) for line in lines] == [
        ["easy", "hard"],
        [],
        ["easy"],
        ["hard"],
        ["easy", "hard"],
    ]
    assert all(line["watch/hard/accuracy"] == 0 for line in lines if "watch/hard/accuracy" in line)  # by the verifier
    rollouts = [row for file in sorted(config.folder.glob("rollouts/*.jsonl")) for row in read_jsonl(file)]
    by_source = {name: [row for row in rollouts if row["question"].startswith(name)] for name in ("easy", "hard")}
    assert len(by_source["easy"]) == 3 * len(by_source["hard"]) == 3 * 16
    assert {row["reward"] for row in by_source["hard"]} == {2.0}
    assert all((line["source/easy/share"], line["source/hard/share"]) == (0.75, 0.25) for line in lines[1:])
    assert all(line["source/hard/correct"] == 1 for line in lines[1:])  # 1 or more
    with pytest.raises(UserError, match=r"reward\.function: nowhere:f cannot be imported \(ModuleNotFoundError"):
        check_inputs(load_config(str(tmp_path / "mixed.yaml"), [*more, "reward.function=nowhere:f"]), world=1)
    # the same command again shows the table, and changes nothing that an evaluation or a campaign goes by
    final, summary = config.folder / "final", (config.folder / "summary.json").read_text()
    stamp = model_stamp(str(final))
    assert run(config, resume="auto", device=torch.device("cpu"))
    assert (config.folder / "summary.json").read_text() == summary
    assert model_stamp(str(final)) == stamp
    (tmp_path / "good").symlink_to(config.folder / "checkpoints" / "step-000004")  # a name that says no step
    again = load_config(str(tmp_path / "mixed.yaml"), [*more, "name=again"])
    assert run(again, resume=str(tmp_path / "good"), device=torch.device("cpu"))
    assert (again.folder / "final").is_dir()
    earlier = min(config.folder.glob("checkpoints/step-*"))  # from which steps are made again, and so the model
    assert earlier.name < "step-000004"
    assert run(config, resume=str(earlier), device=torch.device("cpu"))
    assert model_stamp(str(final)) != stamp


def test_what_is_watched_changes_no_other_number(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIPO_CACHE", str(tmp_path))  # for the labels
    rows = [*({"question": f"number{i} + 1", "answer": str(i + 1)} for i in range(12)), GOOD[1]]
    data, bench = write(tmp_path / "d.jsonl", list(rows)), write(tmp_path / "bench.jsonl", list(GOOD))
    more = ["rollout.engine=hf", "model.dtype=float32", "sharding.zero_stage=0", "loss.kl_beta=0", f"runs={tmp_path}"]
    more += ["validation.every=2", "optim.steps=3", "reward.rule=certainty", "mask.kappa_schedule=plateau"]
    more += ["data.validation=null", "validation.holdout=4", "curriculum.stall_patience=1"]
    found, done = [], list[str]()
    for what in ("generate", "sleep", "sync"):
        original = getattr(HfEngine, what)
        monkeypatch.setattr(HfEngine, what, lambda *a, _w=what, _o=original, **k: done.append(_w) or _o(*a, **k))
    for name, watch in (("without", []), ("with", [f"validation.watch=[{bench}]", "validation.watch_every=1"])):
        config = config_with(model, data, *more, *watch, f"name={name}")
        assert run(config, device=torch.device("cpu"))
        found.append(read_jsonl(config.folder / "metrics.jsonl"))
    without, watching = found
    assert [sorted(k for k in line if k.startswith("watch/")) for line in without] == [[]] * 4
    assert all(0 <= line["watch/bench/accuracy"] <= 1 for line in watching)
    for one, two in zip(without, watching, strict=True):
        same = [key for key in two if not key.startswith(("watch/", "time/", "speed/"))]
        assert {key: two[key] for key in same} == {
            key: one[key] for key in one if not key.startswith(("time/", "speed/"))
        }
    assert any(line["policy/grad_norm"] > 0 for line in watching[1:])  # or nothing could have differed
    assert ("generate", "sync") not in pairwise(done)  # weights that come beside a GPU's KV cache may not fit


def test_a_report_that_fails_takes_nothing_from_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AIPO_CACHE", str(tmp_path))  # for the labels

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("aipo.run.report", full)
    more = ["rollout.engine=hf", "model.dtype=float32", "sharding.zero_stage=0", "loss.kl_beta=0", "optim.steps=1"]
    config = config_with(model, write(tmp_path / "d.jsonl", GOOD), *more, f"runs={tmp_path}", "name=run")
    assert run(config, device=torch.device("cpu"))
    again = f"again: python -m aipo.report {config.folder}"
    assert f"error: no report (OSError: [Errno 28] No space left on device); {again}" in capsys.readouterr().out
    assert (config.folder / "final" / "model.safetensors").is_file()
