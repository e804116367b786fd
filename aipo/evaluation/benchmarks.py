"""What is evaluated: the five benchmarks of the paper, the embedded held-out set, or any JSONL file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aipo.errors import UserError
from aipo.problems.datasets import LETTERS, Loaded, Problem, fingerprint, load_problems, reshuffled
from aipo.problems.embedded import PROBLEMS
from aipo.problems.sources import ensure
from aipo.rollout.collect import request_seed

PAPER = ("aime24", "aime25", "math500", "amc23", "gpqa_diamond")
ALIASES = {"gpqa": "gpqa_diamond", "math": "math500", "amc": "amc23"}
EMBEDDED = "embedded"

MATH_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."  # Qwen3's own advice
CHOICE_SUFFIX = (
    "\n\nPlease reason step by step. The last line of your reply must be of the form 'Answer: LETTER' "
    "(without quotes), where LETTER is that of the right option."
)


@dataclass(frozen=True)
class Item:
    """One completion to draw: sample number ``sample`` of ``problem``, whose options are in this sample's order."""

    benchmark: str
    problem: Problem
    sample: int
    seed: int
    original: Problem  # with its options in the file's order
    text_stays_here: bool  # neither question nor completion may be written to a file

    def option_of(self, letter: str | None) -> int | None:
        """Which option of the file a letter of this sample stands for; None for a letter without one."""
        place = -1 if letter is None else LETTERS.find(letter)
        if not 0 <= place < len(self.problem.options):
            return None
        return self.original.options.index(self.problem.options[place])

    @property
    def key(self) -> tuple[str, str, int]:
        return self.benchmark, self.problem.id, self.sample


@dataclass(frozen=True)
class Benchmark:
    """Named problems. ``fingerprint`` is of the whole set, also where only its first ``limit`` are asked."""

    name: str
    problems: list[Problem]
    fingerprint: str

    @property
    def ids(self) -> list[str]:
        return [problem.id for problem in self.problems]

    def items(self, samples: int, seed: int) -> list[Item]:
        """``samples`` items of each problem, with seeds that depend on nothing but their arguments."""
        return [
            Item(
                self.name,
                self._in_order(problem, sample, seed),
                sample,
                request_seed(seed, f"evaluate {self.name}", problem.id, sample),
                original=problem,
                # by its name as well: a copy of the file may have ids of its own
                text_stays_here=self.name == "gpqa_diamond" or problem.protected,
            )
            for problem in self.problems
            for sample in range(samples)
        ]

    def _in_order(self, problem: Problem, sample: int, seed: int) -> Problem:
        """Options are shuffled afresh for each sample: models prefer some letters."""
        if not problem.options:
            return problem
        return reshuffled(problem, request_seed(seed, f"options {self.name}", problem.id, sample))


def load_benchmarks(
    specs: Sequence[str], *, limit: int | None = None, say: Callable[[str], None] = print
) -> list[Benchmark]:
    """Load benchmarks by name, ``embedded``, or path of a JSONL file with ``question`` and ``answer``.

    What is not prepared yet is fetched from the hub. Raises UserError for unknown names, two of one name, and
    everything that :func:`~aipo.problems.datasets.load_problems` and :func:`~aipo.problems.sources.ensure` find.
    """
    benchmarks: dict[str, Benchmark] = {}
    for spec in specs:
        name, loaded = _load(spec)
        if name in benchmarks:
            raise UserError(f"--benchmarks: {name} is named twice; leave one out, or rename a file")
        if count := sum(loaded.dropped.values()):
            reasons = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in loaded.dropped.items() if n)
            say(f"{name}: {count} rows dropped ({reasons})")
        benchmarks[name] = Benchmark(name, loaded.problems[:limit], fingerprint(loaded.problems))
    return list(benchmarks.values())


def _load(spec: str) -> tuple[str, Loaded]:
    if spec == EMBEDDED:
        return EMBEDDED, load_problems(PROBLEMS, split="validation")
    name = ALIASES.get(spec, spec)
    if name in PAPER:
        return name, load_problems(str(ensure(name)), split="validation")
    path = Path(spec).expanduser()
    if path.suffix == ".jsonl" or path.is_file():
        return path.stem, load_problems(spec, split="validation")
    known = [*PAPER, EMBEDDED]
    near = difflib.get_close_matches(spec, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--benchmarks: {spec} is unknown: {hint}known are {', '.join(known)} and paths of JSONL files")
