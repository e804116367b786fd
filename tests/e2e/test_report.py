"""The report that a run writes at its end, in a real browser."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet
import pytest

from aipo.problems.embedded import embedded_model
from tests.e2e.launch import train
from tests.e2e.test_browser import walk_through
from tests.report.browser import Page, browser
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e


def look_at(page: Page, path: Path) -> None:
    """On a desk and on a phone: everything can be pressed, nothing sticks out, and the console is silent."""
    for name, width, dark in (("desk", 1280, False), ("phone", 390, True)):
        page.open(path, width=width, dark=dark)
        assert page.run("document.documentElement.scrollWidth") <= width
        walk_through(page)
        assert page.picture(path.with_name(f"{name}.png"), whole=True).stat().st_size > 20_000
    assert page.problems == []


def test_a_run_ends_with_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "AIPO_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "digits.jsonl"
    data.write_text("".join(json.dumps({"question": f"{a} + 1", "answer": str(a + 1)}) + "\n" for a in range(8)))
    keys = {"model.path": make_tiny(tmp_path / "model", scale=0.15), "data.train": data, "data.validation": data}
    keys |= {"runs": tmp_path, "name": "run", "rollout.engine": "hf", "model.dtype": "float32", "optim.steps": "6"}
    printed = train("--config", "tiny.yaml", *(f"{key}={value}" for key, value in keys.items()))
    path = tmp_path / "run" / "report.html"
    assert f"report: {path}" in printed
    rows = pyarrow.parquet.read_table(tmp_path / "run" / "rollouts" / "step-000006.parquet").to_pylist()
    assert len(rows) == 16
    assert len(rows[0]["mi"]) == len(rows[0]["kl"]) == len(rows[0]["tokens"])
    with browser(tmp_path / "profile") as page:
        look_at(page, path)


def test_the_embedded_default_ends_with_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M through vLLM and ZeRO-3, the default config but for its size."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "smollm2-135m-instruct").symlink_to(embedded_model())
    monkeypatch.setitem(os.environ, "AIPO_CACHE", str(cache))
    keys = {"runs": tmp_path, "name": "run", "data.train": "[{path: embedded:chain_sum, rows: 24}]"}
    keys |= {
        "rollout.questions_per_step": "8",
        "optim.steps": "2",
        "validation.questions": "8",
        "validation.samples": "2",
        "tracking.wandb": "disabled",
    }
    train("--config", "smollm2_135m.yaml", *(f"{key}={value}" for key, value in keys.items()))
    path = tmp_path / "run" / "report.html"
    assert path.stat().st_size < 5_000_000
    rows = pyarrow.parquet.read_table(tmp_path / "run" / "rollouts" / "step-000002.parquet").to_pylist()
    assert {row["bucket"] for row in rows} <= {"easy", "medium", "hard"}
    with browser(tmp_path / "profile") as page:
        look_at(page, path)
        assert page.run("source().groups.some((each) => each.bucket === 'easy')")
        assert "easy" in page.run("[...document.querySelectorAll('#selected h4')].map((each) => each.textContent)")
