"""The verifier: what counts as the answer, what counts as equal, and what hostile answers cannot do."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aipo.problems.problem import Problem
from aipo.verify import FunctionError, Verdict, Verifier, is_correct
from aipo.verify.answers import MAX_CHARS
from tests.processes import Guard, run

pytestmark = pytest.mark.slow  # workers start, and are killed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=2, timeout=20.0, memory_mb=512) as pool:
        yield pool


def until(holds: Callable[[], bool], guard: Guard) -> None:
    """Wait for what a process is to bring about, as long as it does something."""
    while not holds():
        guard.check()
        time.sleep(0.01)


def boxed(answer: str) -> str:
    return rf"The answer is \boxed{{{answer}}}."


# --- what is correct (what is an answer: test_answers.py; what is equal: test_equality.py)


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        (r"\frac{1}{2}", "0.5", True),
        ("105263157894736848", "105263157894736849", False),  # equal as floats
        ("2\\sqrt{3}", r"\sqrt{12}", True),
        ("(1, 2)", r"\{1, 2\}", False),
        ("2516_8", "2516_{8}", True),
        ("2516_8", "2516_7", False),
        ("x=5", "5", True),
        ("18", r"18\%", False),
    ],
)
def test_a_boxed_answer_is_correct_if_it_equals_the_gold_answer(
    verifier: Verifier, gold: str, answer: str, equal: bool
) -> None:
    assert verifier.submit(gold, boxed(answer)).result() is (Verdict.CORRECT if equal else Verdict.WRONG)
    assert verifier.submit(rf"\boxed{{{gold}}}", f"Answer: ${answer}$").result().correct is equal


def test_lenient_accepts_an_answer_that_is_not_marked(verifier: Verifier) -> None:
    response = r"So we get $\sqrt{12}$."
    assert verifier.submit(r"2\sqrt{3}", response).result() is Verdict.NO_ANSWER
    assert verifier.submit(r"2\sqrt{3}", response, lenient=True).result() is Verdict.CORRECT
    assert is_correct("12", "it is 12", lenient=True)
    assert not is_correct("12", "it is 12")


def test_choices_are_letters() -> None:
    assert is_correct("B", "Answer: (B)", kind="choice")
    assert is_correct("(B)", r"\boxed{\text{B}}", kind="choice")
    assert not is_correct("C", "Answer: (B)", kind="choice")
    with pytest.raises(ValueError, match="kind must be 'math' or 'choice', not 'maths'"):
        is_correct("5", boxed("5"), kind="maths")


def test_no_gold_is_matched_by_nothing() -> None:
    assert not is_correct("", "")
    assert not is_correct("", boxed(""))
    assert not is_correct("", boxed("5"))


def in_order(verifier: Verifier, items: list[tuple[str, str, str]]) -> list[Verdict]:
    return [future.result() for future in [verifier.submit(*item) for item in items]]


def test_verdicts_do_not_depend_on_order_or_company(verifier: Verifier) -> None:
    items = [
        (gold, boxed(answer), "math")
        for gold in ("0.5", "x^2", r"\sqrt{8}", "(1,3)")
        for answer in (r"\frac12", "x x", r"2\sqrt{2}", "(3/3,3)", r"\frac{", "((((")
    ]
    verdicts = in_order(verifier, items)
    assert sum(verdict.correct for verdict in verdicts) == 4
    with Verifier(1, timeout=20.0) as other:
        assert in_order(other, items[::-1]) == verdicts[::-1]
        assert [other.submit(*item).result() for item in items] == verdicts
        assert in_order(other, items * 3) == verdicts * 3


def test_one_answer_is_judged_once_while_it_is_under_way_and_then_remembered() -> None:
    with Verifier(1, timeout=20.0) as pool:
        futures = [pool.submit(r"\sqrt{8}", boxed(r"2\sqrt{2}")) for _ in range(50)]
        assert pool._jobs.qsize() <= 1
        assert [future.result() for future in futures] == [Verdict.CORRECT] * 50
        assert pool.submit(r"\sqrt{8}", boxed(r"2\sqrt{2}")).done()
        assert not pool.submit(r"\sqrt{8}", boxed(r"2\sqrt{3}")).result().correct
        victims = [pool.submit("5", BOMB, timeout=0.3) for _ in range(3)]
        assert [victim.result() for victim in victims] == [Verdict.TIMED_OUT] * 3
        assert pool.submit("5", BOMB, timeout=0.2).done()  # it was given CPU time, however busy the machine
        assert pool.submit("5", "5").result() is Verdict.NO_ANSWER
        assert not pool.submit("5", BOMB, timeout=0.4).done()


# --- what hostile answers cannot do

BOMB = boxed(r"\sum_{n=1}^{10^9} n!")  # would never end, and nothing about its text gives it away


def test_an_answer_that_takes_too_long_is_refused_and_the_next_one_is_not() -> None:
    with Verifier(1, timeout=20.0) as pool:
        for answer in (r"\sum_{n=1}^{10^9} n!", r"\prod_{n=1}^{10^9} (n!)!"):
            assert pool.submit("x", boxed("x + 0")).result() is Verdict.CORRECT
            worker = pool._workers[0]
            assert worker is not None
            assert pool.submit("5", boxed(answer), timeout=0.3).result() is Verdict.TIMED_OUT
            assert worker.process.poll() == -signal.SIGPROF
        assert pool.submit("x", boxed("0 + x")).result() is Verdict.CORRECT


def test_a_worker_starts_where_an_answer_would_wait_for_it() -> None:
    with Verifier(3, timeout=20.0) as pool:
        for answer in ("x + 0", "0 + x"):
            assert pool.submit("x", boxed(answer)).result() is Verdict.CORRECT
        first, *others = pool._workers
        assert first is not None
        assert others == [None, None]
        busy = pool.submit("5", BOMB)
        assert pool.submit("x", boxed("2x - x")).result() is Verdict.CORRECT
        assert not busy.done()
        assert pool._workers[0] is first
        assert isinstance(pool._workers[1], type(first))
        assert pool._workers[2] is None


def test_a_worker_that_dies_costs_one_answer_if_busy_and_none_if_idle() -> None:
    with Verifier(1, timeout=20.0) as pool:
        assert pool.submit("x", boxed("x + 0")).result().correct
        busy = pool._workers[0]
        assert busy is not None
        victim = pool.submit("5", BOMB)
        bystander = pool.submit("x", boxed("0 + x"))
        until(victim.running, Guard(busy.process.pid))
        os.kill(busy.process.pid, signal.SIGKILL)
        assert victim.result() is Verdict.KILLED
        assert bystander.result() is Verdict.CORRECT
        idle = pool._workers[0]
        assert idle is not None
        assert idle is not busy
        os.kill(idle.process.pid, signal.SIGKILL)
        idle.process.wait()
        assert pool.submit("x", boxed("2x - x")).result() is Verdict.CORRECT


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_worker_is_capped() -> None:
    def peak(pool: Verifier) -> float:
        worker = pool._workers[0]
        assert worker is not None
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmPeak"))

    with Verifier(1, timeout=20.0) as pool:
        assert pool.submit("x", boxed("x + 0")).result().correct
        most = int(peak(pool)) + 12  # two workers differ by 1; the list below takes ever longer for a MiB
    with Verifier(1, timeout=60.0, memory_mb=most) as pool:
        assert pool.submit("x", boxed("x + 0")).result().correct
        assert peak(pool) <= most
        hog = pool.submit("5", boxed(r"\sum_{n=1}^{10^{8}} x^{n^2}"))  # a list of so many terms
        assert hog.result() is Verdict.KILLED
        assert pool.submit("x", boxed("0 + x")).result() is Verdict.CORRECT


def test_nothing_is_executed(verifier: Verifier, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    code = f"open({str(mark)!r}, 'w')"
    shell = f"__import__('os').system('touch {mark}')"
    for attack in (code, shell, f"exec({code!r})", rf"\text{{{code}}}", f"1+{code}"):
        assert not verifier.submit("5", boxed(attack)).result().correct
        assert not verifier.submit(attack, boxed("5")).result().correct
        assert not verifier.submit("5", f"Answer: {attack}").result().correct
    assert not mark.exists()


@pytest.mark.parametrize(
    "answer",
    [
        "7" * 200_000,
        "(" * 5000,
        "(" * 15 + "6" + ")" * 15,
        r"\sqrt{" * 300 + "5" + "}" * 300,
        "\x00\x07\ud800",
        "1/0",
        r"\infty",
        r"\begin{pmatrix}" + "&".join("x" * 400) + r"\end{pmatrix}",
        "{" * 20,
        "}" * 20,
        "5" + " " * (2 * MAX_CHARS) + "6",
    ],
    ids=lambda answer: ascii(answer[:10]),
)
def test_nonsense_is_wrong(verifier: Verifier, answer: str) -> None:
    assert not verifier.submit("5", boxed(answer)).result().correct
    assert not verifier.submit(answer, boxed("5")).result().correct


SNIPPETS = [*"0123456789+-^!_{}()[]\\,.=%$ix", r"\frac", r"\sqrt"]


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=30) | st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join))
def test_no_exception_leaves_the_verifier(verifier: Verifier, answer: str) -> None:
    for response in (answer, boxed(answer), "Answer: " + answer):
        assert isinstance(verifier.submit("5", response, timeout=2.0).result(), Verdict)
        assert isinstance(verifier.submit(answer, boxed("5"), timeout=2.0).result(), Verdict)


# --- the pool as a guest in somebody's process


def test_closing_is_quick_with_work_in_flight_and_final() -> None:
    pool = Verifier(1, timeout=600.0)
    assert pool.submit("x", boxed("0 + x")).result().correct
    worker = pool._workers[0]
    assert worker is not None
    running, queued = pool.submit("5", BOMB), pool.submit("5", boxed(r"\sum_{n=1}^{10^8} n!"))
    until(running.running, Guard(worker.process.pid))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    pool.close()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 60  # seconds of CPU time: it did not wait for the 600
    assert queued.cancelled() or queued.exception() is not None
    assert running.done()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("x", boxed("x + 0"))
    pool.close()


def test_workers_hold_neither_torch_nor_the_callers_main_module() -> None:
    # What a worker has imported when it is ready, asked of a process that did the same.
    code = "import sys, aipo.verify.worker, aipo.verify.equality; print(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "sympy" in done.stdout.split()
    assert not {"torch", "transformers", "vllm", "numpy", "multiprocessing.spawn"} & set(done.stdout.split())
    done = subprocess.run(
        [sys.executable, "-P", "-c", code.replace(", aipo.verify.equality", "")],
        capture_output=True,
        text=True,
        check=True,
        env=env,
    )
    assert not {"torch", "sympy", "math_verify"} & set(done.stdout.split())


SCRIPT = r"""
from aipo.verify import is_correct
print("imported", __name__)
print(is_correct("x", r"\boxed{x + 0}"), is_correct("x", r"\boxed{x + 1}"))
"""


@pytest.mark.parametrize("how", ["script", "stdin", "-c"])
def test_works_without_a_main_guard_silently_and_exits(how: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = {"script": [str(script)], "stdin": [], "-c": ["-c", SCRIPT]}[how]
    done = run(
        [sys.executable, *arguments],
        stdin=SCRIPT if how == "stdin" else "",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "imported __main__\nTrue False\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signal")
def test_a_busy_worker_dies_with_its_trainer_but_not_of_ctrl_c() -> None:
    code = (
        "from aipo.verify import Verifier; pool = Verifier(1, 600.0); pool.submit('x', r'\\boxed{x+0}').result();"
        "print(pool._workers[0].process.pid, flush=True); pool.submit('5', r'\\boxed{\\sum_{n=1}^{10^9} n!}').result()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    assert trainer.stdout is not None
    worker = Path("/proc") / trainer.stdout.readline().strip()
    for polite in (signal.SIGINT, signal.SIGTERM):
        os.kill(int(worker.name), polite)
    time.sleep(0.2)
    assert running(worker)
    guard = Guard(int(worker.name), most=60.0)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    until(lambda: not running(worker), guard)


def running(process: Path) -> bool:
    """Whether it exists and is no zombie (nobody may be there to reap an orphan)."""
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_forked_child_gets_workers_of_its_own() -> None:
    assert is_correct("x", boxed("x + 0"))
    child = os.fork()
    if child == 0:
        os._exit(0 if is_correct("x", boxed("0 + x")) else 1)
    guard = Guard(child)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        guard.check()
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == 0


GRADERS = """
import subprocess, sys, time

def starts_another(problem, completion):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(completion, "w").write(str(child.pid))
    while True:
        pass

def quotes(problem, completion):
    return float(problem.question == completion)

NUMBER = 3
"""


def test_functions_of_the_user_are_called_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "graders_of_pool.py").write_text(GRADERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    problem = Problem("1", "\ud800 é \x00 \u2028", "5")
    with Verifier(1, timeout=20.0) as pool:
        calls = [pool.call("graders_of_pool:quotes", problem, text) for text in (problem.question, "x", "x")]
        assert [call.result() for call in calls] == [1.0, 0.0, 0.0]
        pool.check("graders_of_pool:quotes")
        for name, says in (
            ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
            ("graders_of_pool:f", "AttributeError: module 'graders_of_pool' has no attribute 'f'"),
            ("graders_of_pool:NUMBER", "TypeError: NUMBER is not a function but int"),
        ):
            with pytest.raises(FunctionError, match=re.escape(says)):
                pool.check(name)
            assert isinstance(pool.call(name, problem, "x").exception(), FunctionError)
        pid = tmp_path / "pid"
        assert pool.submit("x", boxed("x + 0")).result() is Verdict.CORRECT
        hangs = pool.call("graders_of_pool:starts_another", problem, str(pid))
        worker = pool._workers[0]
        assert worker is not None
        until(lambda: pid.exists() and pid.read_text() != "", Guard(worker.process.pid))
        other = Path("/proc") / pid.read_text()
        assert running(other)
        guard = Guard(int(other.name), most=60.0)
    assert hangs.done()
    until(lambda: not running(other), guard)  # it goes with the worker that started it


def test_a_broken_installation_is_an_error_and_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aipo.verify.pool.sys.executable", "/bin/false")
    with Verifier(1) as pool, pytest.raises(RuntimeError, match="did not start"):
        pool.submit("x", boxed("x + 0")).result()
