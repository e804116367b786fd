"""The guard of the other tests: what idles for ever and what works for ever is killed, with its children."""

from __future__ import annotations

import os
import sys

import psutil
import pytest

from tests import processes
from tests.processes import Hung, run

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; {work}'])"


def test_what_ends_is_returned() -> None:
    done = run([sys.executable, "-c", "print(input()); exit(3)"], stdin="said\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "")


@pytest.mark.parametrize(
    ("work", "within", "most"), [("time.sleep(1000)", 1.0, 100.0), ("all(i == 0 for i in iter(int, 1))", 100.0, 0.5)]
)
def test_what_does_not_end_is_killed(work: str, within: float, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"EVERY": 0.05, "WITHIN": within, "LEAST": 5.0 if within < 100 else 0.0}.items():
        monkeypatch.setattr(processes, name, value)
    monkeypatch.setattr(processes.Guard.__init__, "__kwdefaults__", {"most": most})
    with pytest.raises(Hung, match="s of CPU time"):
        run([sys.executable, "-c", PARENT.format(work=work)])
    assert not psutil.Process(os.getpid()).children()
