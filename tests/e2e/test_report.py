"""The report that a run writes at its end, in a real browser."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.e2e.launch import train
from tests.report.browser import browser
from tests.report.test_browser import walk_through
from tests.tiny import make_tiny

pytestmark = pytest.mark.e2e


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
        for width, dark in ((1280, False), (390, True)):
            page.open(path, width=width, dark=dark)
            walk_through(page)
        assert page.problems == []
