"""The guard of the other tests: what idles for ever and what works for ever is killed, with its children."""

from __future__ import annotations

import re
import sys
import time

import psutil
import pytest

from tests import processes
from tests.processes import Hung, run

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {work!r}])
print("child", child.pid, flush=True)
child.wait()
"""


def test_what_ends_is_returned() -> None:
    done = run([sys.executable, "-c", "print(input()); exit(3)"], stdin="said\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("work", "least", "within", "most"),
    [("import time; time.sleep(1000)", 5.0, 1.0, 100.0), ("while True: pass", 0.0, 100.0, 0.5)],
    ids=["idle", "endless"],
)
@pytest.mark.slow
def test_what_does_not_end_is_killed(
    work: str, least: float, within: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"EVERY": 0.05, "LEAST": least, "WITHIN": within, "MOST": most}.items():
        monkeypatch.setattr(processes, name, value)
    with pytest.raises(Hung, match="s of CPU time") as caught:
        run([sys.executable, "-c", PARENT.format(work=work)])
    if printed := re.search(r"child (\d+)", str(caught.value)):  # not if it was that slow to start
        child = int(printed[1])
        end = time.monotonic() + 60
        while alive(child):  # the signal is on its way
            assert time.monotonic() < end
            time.sleep(0.01)
