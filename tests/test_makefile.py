"""What make does before it installs anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("here", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_an_environment_of_another_kind_of_machine_is_not_removed(tmp_path: Path, here: str, other: str) -> None:
    """A login node without a GPU shares the folder with the nodes that have them."""
    for name in ("Makefile", "requirements.txt", "requirements-cpu.txt", "requirements-common.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    stamp = tmp_path / ".venv" / f"installed-{other}-123"
    stamp.touch()
    done = subprocess.run(
        ["make", f"DEVICE={here}", "setup"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"make DEVICE={other} ..." in done.stderr
    assert stamp.exists()
