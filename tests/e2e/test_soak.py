"""bench/soak.py in its smallest form, as a user starts it: a few of its disturbances, and nothing wrong."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.e2e.launch import ROOT

pytestmark = pytest.mark.e2e


def test_what_is_disturbed_ends_as_what_was_not(tmp_path: Path) -> None:
    command = [sys.executable, "bench/soak.py", "kills", "corruption", "hostile", "data", "--count", "2"]
    done = processes.run([*command, "--keep", str(tmp_path)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "WRONG" not in done.stdout
    assert re.search(r"^kills +2 ", done.stdout, re.M)
    assert re.search(r"^corruption +2 ", done.stdout, re.M)
    assert re.search(r"^hostile +2 ", done.stdout, re.M)
