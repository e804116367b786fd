"""evaluate.py as a user starts it: vLLM on the embedded model, killed and resumed, interventions, two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launch import ROOT, evaluate, evaluation
from tests.processes import Guard
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_killed_resumed_and_shown_again(tmp_path: Path) -> None:
    """The embedded model on its held-out sums and on a choice file, without and with high-MI tokens."""
    choices = tmp_path / "colours.jsonl"
    options = ["red", "green", "blue"]
    stem = "What colour is grass?\n\nA) red\nB) green\nC) blue"
    choices.write_text(
        json.dumps({"question": stem, "answer": "B", "kind": "choice", "options": options})
        + "\n"
        + json.dumps(
            {"question": stem.replace("grass", "the sky"), "answer": "C", "kind": "choice", "options": options}
        )
    )
    out = tmp_path / "out"
    arguments = [
        "--config",
        "smollm2_135m.yaml",
        "--avg2",
        "--benchmarks",
        f"embedded,{choices}",
        "--limit",
        "12",
        "--out",
        str(out),
    ]
    arguments += ["--temperature", "1.0", "--intervene", "both", "--tokens", "The,is", "--case", "any"]

    killed = subprocess.Popen(evaluation(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    part = out / "rank-0" / "embedded.jsonl"
    guard = Guard(killed.pid)
    while not part.is_file() or part.read_bytes().count(b"\n") < 5:
        assert killed.poll() is None, killed.stdout.read()[-4000:].decode() if killed.stdout else ""
        guard.check()
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = part.read_bytes()
    kept = before[: before.rfind(b"\n") + 1].decode().splitlines()
    assert 5 <= len(kept) < 28

    printed = evaluate(*arguments)
    assert ": 28 completions of at most 48 tokens" in printed
    for name in ("embedded", "colours"):
        for folder in (out, out / "drop", out / "force"):
            found = rows(folder / f"{name}.jsonl")
            count = {"embedded": 12, "colours": 2}[name]
            assert len({(r["id"], r["sample"]) for r in found}) == len(found) == 2 * count
    again = (out / "embedded.jsonl").read_text().splitlines()
    assert set(kept) <= set(again) | set((out / "colours.jsonl").read_text().splitlines())

    results = json.loads((out / "results.json").read_text())
    embedded = results["benchmarks"]["embedded"]
    marks = [r["correct"] for r in rows(out / "embedded.jsonl")]
    assert embedded["accuracy"] == pytest.approx(sum(marks) / len(marks))
    assert 0 < embedded["accuracy"] < 1
    assert embedded["pass_at"]["1"] == pytest.approx(embedded["accuracy"])
    assert embedded["low"] <= embedded["accuracy"] <= embedded["high"]
    assert results["settings"]["sampling"]["max_tokens"] == 48  # the embedded config's
    said = {r["question"] for r in rows(out / "colours.jsonl")}
    assert said <= {q for q in said if q.startswith(("What colour is grass?", "What colour is the sky?"))}

    # interventions: no dropped word in any completion, a word of the set where it is likely
    dropped = [r["completion"] for r in rows(out / "drop" / "embedded.jsonl")]
    assert not any(word in text.split() for text in dropped for word in ("The", "is", "the"))
    usual = [r["completion"] for r in rows(out / "embedded.jsonl")]
    assert sum(text.count("The") for text in usual) > 0
    (table,) = out.glob("interventions-*.md")
    assert "| benchmark | baseline | drop | drop - baseline |" in table.read_text()
    assert table.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    shown = evaluate(*arguments)
    assert "building the engine" not in shown  # nothing to draw, so no model is loaded
    assert "avg@2" in shown
    compared = evaluate("--compare", str(out / "results.json"), str(out / "drop" / "results.json"))
    assert "b - a" in compared
    assert "not the same setting, sampling.intervention" in compared
    clash = evaluate(*arguments, "--seed", "1", expect=2)
    assert "seed was 0, is 1" in clash
    assert "Traceback" not in clash


def test_two_ranks_draw_what_one_draws(tmp_path: Path) -> None:
    """A tiny model in float32 with Hugging Face generation, where completions do not depend on their company."""
    model = make_tiny(tmp_path / "model", scale=0.15)
    questions = tmp_path / "digits.jsonl"
    made = [{"question": f"{a} + {b}", "answer": str((a + b) % 10)} for a in range(3) for b in range(3)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in made))
    arguments = ["--model", str(model), "--benchmarks", str(questions), "--avg", "3", "--engine", "hf"]
    arguments += ["--dtype", "float32", "--max-tokens", "8", "--temperature", "1.0"]
    evaluate(*arguments, "--out", str(tmp_path / "one"))
    printed = evaluate(*arguments, "--out", str(tmp_path / "two"), ranks=2)
    assert printed.count("avg@3") == 1  # rank 0 speaks
    one, two = (rows(tmp_path / name / "digits.jsonl") for name in ("one", "two"))
    assert len(one) == 27
    assert one == two
    assert not list((tmp_path / "two").glob("rank-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmarks", "mathh500"], "mathh500 is unknown: did you mean math500"),
        (["--model", "no/such/model", "--benchmarks", "embedded"], "neither an existing folder nor a hub id"),
        (["--benchmarks", "embedded", "--max-tokens", "9000"], "--max-tokens 9000"),
        (["--benchmarks", "embedded", "--out", "README.md"], "README.md cannot be written"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    printed = evaluate(*arguments, expect=2)
    assert message in printed
    assert "Traceback" not in printed
    assert os.linesep.join(line for line in printed.splitlines() if "error:" in line).count("error:") == 1
