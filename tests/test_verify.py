"""The verifier: what counts as the answer, what counts as equal, and what hostile answers cannot do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aipo.verify import MAX_CHARS, Verdict, Verifier, extract_answer, is_correct

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=2, timeout=20.0, memory_mb=512) as pool:
        yield pool


def boxed(answer: str) -> str:
    return rf"The answer is \boxed{{{answer}}}."


# --- what is the answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{3} no, \boxed{5}", "5"),
        (r"\boxed{3} no, \boxed{5", None),  # truncated: the earlier box was not meant
        (r"\boxed {5}", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{ $5$ }", "5"),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        ("5", None),
        ("", None),
        ("First\n**Answer: 5**\n", "5"),
        ("Answer: 3\nFinal answer: $5$.", "5"),
        ("Answer: 3\n" + boxed("5"), "5"),
        (boxed("5") + "\nAnswer: 3", "5"),
        (r"<think>\boxed{3}</think> \boxed{5}", "5"),
        (r"<think>\boxed{3}</think> I do not know", None),
        (r"thought of \boxed{3}</think> \boxed{5}", "5"),  # <think> stood in the prompt
        (r"<think> \boxed{5}", None),
        (r"<think>a</think> \boxed{5} <think> hm", None),
    ],
)
def test_the_last_complete_box_behind_the_thinking_block_is_the_answer(response: str, answer: str | None) -> None:
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("Answer: B", "B"),
        ("Answer: A\nno\nAnswer: B", "B"),
        ("**Answer: (B)**", "B"),
        ("Answer: B) 4.2 eV", "B"),
        ("Answer: b", "B"),
        ("Answer: $B$", "B"),
        (r"Answer: \boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\textbf{(B)}}", "B"),
        ("Answer: A\n" + boxed("B"), "B"),
        (boxed("A") + "\nAnswer: B", "B"),
        ("Answer: Because", None),
        ("Answer: a triangle", None),
        (r"\boxed{\alpha}", None),
        ("B", None),
        ("<think>Answer: B", None),
    ],
)
def test_a_choice_is_the_last_letter_on_an_answer_line_or_in_a_box(response: str, letter: str | None) -> None:
    assert extract_answer(response, "choice") == letter
    assert is_correct("B", response, kind="choice") == (letter == "B")
    assert is_correct("(B)", response, kind="choice") == (letter == "B")
    assert not is_correct("C", response, kind="choice")


@pytest.mark.parametrize("kind", ["math", "choice"])
@pytest.mark.parametrize(
    "unit", [r"\boxed{", "}", "{", "\\", "answer:", "*", "<think>", "Answer: \n", r"\boxed ", "\\a", "("]
)
def test_extraction_stays_linear(unit: str, kind: str) -> None:
    extract_answer(unit * 200_000, kind)  # seconds if quadratic: the suite would not end


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="kind must be 'math' or 'choice', not 'maths'"):
        is_correct("5", boxed("5"), kind="maths")


# --- what is equal


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "5"),
        ("-7", "-007"),
        ("0", "-0"),
        ("105263157894736848", "105263157894736848"),
        ("1000", "1,000"),
        (r"\frac{1}{2}", "0.5"),
        (r"\boxed{\frac12}", r"\frac{2}{4}"),
        ("$2\\sqrt{3}$", r"\sqrt{12}"),
        ("5", "x = 5"),
        (r"\text{Monday}", "Monday"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        ("(1, 2)", r"\left(1, 2\right)"),
        (r"50\%", r"50 \%"),
        ("2516_8", "2516_{8}"),
    ],
)
def test_equal_answers(verifier: Verifier, gold: str, answer: str) -> None:
    assert verifier.submit(gold, boxed(answer)).result() is Verdict.CORRECT


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "6"),
        ("5", "-5"),
        ("105263157894736848", "105263157894736849"),  # equal as floats
        ("1" * 5000, "1" * 4999 + "2"),
        ("18", r"18\%"),
        ("10", r"1000\%"),
        (r"50\%", "0.5"),
        ("(1, 2)", r"\{1, 2\}"),
        ("(1, 2)", "(2, 1)"),
        ("[0, 1]", "(0, 1)"),
        ("2516_8", "2516_7"),
        (r"\text{Monday}", "Tuesday"),
        ("2", "2 or 3"),
        (r"\frac{1}{3}", "0.33"),
    ],
)
def test_different_answers(verifier: Verifier, gold: str, answer: str) -> None:
    assert verifier.submit(gold, boxed(answer)).result() is Verdict.WRONG


def test_no_gold_is_matched_by_nothing() -> None:
    assert not is_correct("", "")
    assert not is_correct("", boxed(""))
    assert not is_correct("", boxed("5"))


def test_verdicts_do_not_depend_on_order_or_company(verifier: Verifier) -> None:
    items = [
        (gold, boxed(answer), "math")
        for gold in ("0.5", "x^2", r"\sqrt{8}", "(1,3)")
        for answer in (r"\frac12", "x x", r"2\sqrt{2}", "(1,3)", r"\frac{", "((((")
    ]
    verdicts = verifier.verify_all(items)
    assert verifier.verify_all(items[::-1]) == verdicts[::-1]
    assert sum(verdict.correct for verdict in verdicts) == 4


def test_stats_count_every_verdict() -> None:
    with Verifier(1) as pool:
        pool.verify_all([("0.5", boxed(r"\frac12"), "math"), ("5", boxed("6"), "math"), ("5", "5", "math")])
        assert pool.stats == {Verdict.CORRECT: 1, Verdict.WRONG: 1, Verdict.NO_ANSWER: 1}


# --- what hostile answers cannot do

TOWER = boxed("9^{9^{9^{9}}}")


def test_an_answer_that_takes_too_long_is_refused_and_the_next_one_is_not() -> None:
    with Verifier(1, timeout=20.0) as pool:
        for answer in ("9^{9^{9^{9}}}", "((9!)!)!", r"\sum_{n=1}^{10^9} n!"):  # none of them would ever end
            assert pool.submit("0.5", boxed("1/2")).result() is Verdict.CORRECT
            worker = pool._workers[0]
            assert worker is not None
            assert pool.submit("5", boxed(answer), timeout=0.3).result() is Verdict.TIMED_OUT
            assert worker.process.poll() == -signal.SIGKILL
        assert pool.submit("0.5", boxed("1/2")).result() is Verdict.CORRECT
        assert pool.stats == {Verdict.CORRECT: 4, Verdict.TIMED_OUT: 3}


def test_a_worker_that_dies_costs_one_answer_if_busy_and_none_if_idle() -> None:
    with Verifier(1, timeout=20.0) as pool:
        assert pool.submit("0.5", boxed("1/2")).result().correct
        busy = pool._workers[0]
        assert busy is not None
        victim = pool.submit("5", TOWER)
        bystander = pool.submit("0.5", boxed("2/4"))
        while not victim.running():
            time.sleep(0.01)
        os.kill(busy.process.pid, signal.SIGKILL)
        assert victim.result() is Verdict.KILLED
        assert bystander.result() is Verdict.CORRECT
        idle = pool._workers[0]
        assert idle is not None
        assert idle is not busy
        os.kill(idle.process.pid, signal.SIGKILL)
        idle.process.wait()
        assert pool.submit("0.5", boxed("3/6")).result() is Verdict.CORRECT
        assert pool.stats == {Verdict.CORRECT: 3, Verdict.KILLED: 1}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_worker_is_capped() -> None:
    with Verifier(1, timeout=20.0, memory_mb=128) as pool:
        assert pool.submit("0.5", boxed("1/2")).result().correct
        worker = pool._workers[0]
        assert worker is not None
        peaks = []
        bomb = pool.submit("x", boxed("2^{2^{33}}"), timeout=4.0)  # a gigabyte
        while not bomb.done():
            try:
                status = Path(f"/proc/{worker.process.pid}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                break
            peaks += [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmPeak")]
            time.sleep(0.01)
        assert not bomb.result().correct
        assert max(peaks) <= 128 * 1024
        assert pool.submit("0.5", boxed("1/2")).result() is Verdict.CORRECT


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
    running, queued = pool.submit("5", TOWER), pool.submit("5", boxed("8^{9^{9^{9}}}"))
    while not running.running():
        time.sleep(0.01)
    closing = threading.Thread(target=pool.close)
    closing.start()
    closing.join(timeout=30)
    assert not closing.is_alive()
    assert queued.cancelled() or queued.exception() is not None
    assert running.done()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("0.5", boxed("1/2"))
    pool.close()


def test_workers_hold_neither_torch_nor_the_callers_main_module() -> None:
    import aipo.verify

    code = f"import sys, runpy; runpy.run_path({aipo.verify.__file__!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "aipo", "sympy", "math_verify"} & set(done.stdout.split())


SCRIPT = r"""
from aipo.verify import is_correct
print("imported", __name__)
print(is_correct("0.5", r"\boxed{1/2}"), is_correct("0.5", r"\boxed{1/3}"))
"""


@pytest.mark.parametrize("how", ["script", "stdin", "-c"])
def test_works_without_a_main_guard_silently_and_exits(how: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = {"script": [str(script)], "stdin": [], "-c": ["-c", SCRIPT]}[how]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=SCRIPT if how == "stdin" else "",
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "imported __main__\nTrue False\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signal")
def test_a_busy_worker_dies_with_its_trainer_but_not_of_ctrl_c() -> None:
    code = (
        "from aipo.verify import Verifier; pool = Verifier(1, 600.0); pool.submit('1/2', r'\\boxed{0.5}').result();"
        "print(pool._workers[0].process.pid, flush=True); pool.submit('5', r'\\boxed{9^{9^{9^9}}}').result()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    assert trainer.stdout is not None
    worker = Path("/proc") / trainer.stdout.readline().strip()
    for polite in (signal.SIGINT, signal.SIGTERM):
        os.kill(int(worker.name), polite)
    time.sleep(0.2)
    assert running(worker)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    for _ in range(200):
        if not running(worker):
            break
        time.sleep(0.05)
    assert not running(worker)


def running(process: Path) -> bool:
    """Whether it exists and is no zombie (nobody may be there to reap an orphan)."""
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_forked_child_gets_workers_of_its_own() -> None:
    assert is_correct("0.5", boxed("1/2"))
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a hang is a failure, not a stuck suite
        os._exit(0 if is_correct("0.5", boxed(r"\frac{5}{10}")) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_broken_installation_is_an_error_and_not_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aipo.verify.sys.executable", "/bin/false")
    with Verifier(1) as pool, pytest.raises(RuntimeError, match="did not start"):
        pool.submit("0.5", boxed("1/2")).result()
