"""Answers that a policy must not gain by, sent through the verifier's pool of a run in training; for bench/soak.py."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil

from aipo.verify import Verifier

GOLD = "42"
CODE = (
    "__import__('os').system('touch {file}')", "open('{file}','w').write('1')", "exec('import os; os.fork()')",
    "eval(compile('open(\"{file}\",\"w\")','','exec'))", "__import__('urllib.request').request.urlopen('{url}')",
    "\\input{{{file}}}", "\\write18{{touch {file}}}", "\\immediate\\openout1={file}", "\\url{{{url}}}",
    "[x for x in ().__class__.__bases__[0].__subclasses__()]", "lambda: open('{file}','w')", "`touch {file}`",
    "$(touch {file})", "; touch {file}", "| curl {url}", "Symbol('x').__init__.__globals__", "sympify('{file}')",
)  # fmt: skip
LARGE = (
    "{{" * 400 + "1" + "}}" * 400, "(" * 500 + "{n}" + ")" * 500, "\\frac{{1}}{{" * 90 + "{n}" + "}}" * 90,
    "{n}" * 900, "\\sqrt{{" * 60 + "{n}" + "}}" * 60, "+".join(["x_{{{n}}}"] * 300), "\x00\x07\x1b[2J{n}",
    "\u202e24{n}\ufeff", "\\text{{" + "a" * 5000 + "}}", "{n}" + "\\boxed{{" * 200, "\\left(" * 150 + "{n}",
    "{n}e{n}", "0x{n}", "\\{{" + ",".join("{n}" for _ in range(400)) + "\\}}", "1" + "0" * 4000 + "{n}",
)  # fmt: skip
BOMBS = (
    "9^{{9^{{9^{{{n}}}}}}}",
    "{n}!!!!!!",
    "(x+y+z)^{{{n}00000}}",
    "\\binom{{10^{{{n}}}}}{{5}}",
    "\\sqrt[{n}]{{7}}^{{{n}^9}}",
)


def answers(draw: random.Random, count: int, file: Path, url: str) -> Iterator[str]:
    """Boxed, none of them 42; one in 250 is built to take for ever."""
    for number in range(count):
        kinds = BOMBS if number % 250 == 249 else CODE if draw.random() < 0.6 else LARGE
        text = draw.choice(kinds).format(file=f"{file}-{number}", url=f"{url}/{number}", n=draw.randrange(43, 10**6))
        yield f"\\boxed{{{text}}}"


class Trap:
    """What nothing may touch: a folder for files, a port for connections, and the children of the run."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.connections = folder, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            self.socket.accept()
            self.connections += 1


def through_the_pool(count: int, seed: int, folder: Path, report: Path, submissions: int) -> Callable[[], None]:
    """For :func:`bench.faults.start`: ``count`` hostile answers, some before each of ``submissions`` honest ones.

    When the run closes, ``report`` holds what came of them.
    """

    def install() -> None:
        import aipo.run
        from aipo.reward import Rewarder

        trap = Trap(folder)
        texts = answers(random.Random(seed), count, folder / "made", trap.url)
        verdicts: list[Future[Any]] = []
        submit, close = Rewarder.submit, aipo.run.close

        def with_others(self: Rewarder, *rollout: Any) -> Any:
            for _, text in zip(range(-(-count // submissions)), texts):
                verdicts.append(self.verifier.submit(GOLD, text, "math"))
            return submit(self, *rollout)

        def and_report(trainer: Any) -> None:
            verifier = trainer.collector.rewarder.verifier
            verdicts.extend(verifier.submit(GOLD, text, "math") for text in texts)  # what is left
            counts = Counter(each.result().value for each in verdicts)
            honest = [verifier.submit("x^2-1", text, "math").result().value for text in HONEST]
            started = len(verifier._threads)  # as many as answers ever waited at once
            until = time.monotonic() + 60
            while len(workers := alive(verifier)) < started and time.monotonic() < until:
                time.sleep(0.05)  # one that was killed is being replaced
            children = psutil.Process().children()
            below = [each.name() for worker in workers for each in psutil.Process(worker).children(recursive=True)]
            mine = [each.cmdline()[:5] for each in children if each.pid not in workers]
            content = {"verdicts": counts, "honest": honest, "below": below, "other": mine}
            content |= {"workers": len(workers), "started": started}
            content |= {"files": [path.name for path in folder.iterdir()], "connections": trap.connections}
            report.write_text(json.dumps(content))
            close(trainer)

        Rewarder.submit = with_others  # type: ignore[method-assign]
        aipo.run.close = and_report

    return install


def alive(verifier: Verifier) -> list[int]:
    """Process numbers of the workers that live."""
    return [each.process.pid for each in list(verifier._workers) if each and each.process.poll() is None]


HONEST = ("\\boxed{(x-1)(x+1)}", "\\boxed{x^2}")
