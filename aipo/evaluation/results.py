"""From completions to a table: the numbers of each benchmark, gains over a baseline, and comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aipo.errors import UserError
from aipo.evaluation.benchmarks import Benchmark
from aipo.evaluation.scoring import Row
from aipo.metrics import (
    Difference,
    accuracy_summary,
    avg_at_k,
    maj_at_k,
    paired_bootstrap,
    pass_at_k,
    trained_share,
    training_efficiency,
)
from aipo.record.checkpoints import flatten, write_atomically
from aipo.record.jsonl import read_jsonl
from aipo.verify import Verdict
from aipo.verify.answers import normal_form

FEWEST = 6  # problems: resamples of fewer that all point one way are no evidence
Scores = dict[str, list[int]]  # problem id -> 1 or 0 for each sample


@dataclass(frozen=True)
class Result:
    """One benchmark. Shares and accuracies in [0, 1], length in tokens."""

    accuracy: float  # avg@k
    low: float  # its 95 % bootstrap interval over problems
    high: float
    problems: int
    samples: int  # k
    pass_at: dict[str, float]  # "1" .. "k"
    majority: float  # maj@k
    length: float
    truncated: float
    no_answer: float
    timed_out: float
    killed: float
    fingerprint: str  # of the whole set of questions
    correct: Scores

    @property
    def ids(self) -> list[str]:
        return list(self.correct)


Results = dict[str, Result]  # by benchmark


def summarize(benchmark: Benchmark, rows: Sequence[Row], samples: int) -> Result:
    """The first ``samples`` completions of each problem, in numbers. UserError where one is missing."""
    by_key = {(row["id"], row["sample"]): row for row in rows}
    try:
        table = [[by_key[problem.id, sample] for sample in range(samples)] for problem in benchmark.problems]
    except KeyError as error:
        raise UserError(
            f"{benchmark.name}: no completion of (problem, sample) {error}: run the command again"
        ) from None
    correct = [[int(row["correct"]) for row in group] for group in table]
    every = [row for group in table for row in group]
    accuracy = accuracy_summary(correct)

    def share(key: str, value: str) -> float:
        return sum(row[key] == value for row in every) / len(every)

    return Result(
        accuracy=accuracy.value,
        low=accuracy.low,
        high=accuracy.high,
        problems=len(table),
        samples=samples,
        pass_at={str(k): pass_at_k(correct, k) for k in range(1, samples + 1)},
        majority=maj_at_k([[_vote(row) for row in group] for group in table], correct),
        length=sum(row["tokens"] for row in every) / len(every),
        truncated=share("finish_reason", "length"),
        no_answer=share("verdict", Verdict.NO_ANSWER.value),
        timed_out=share("verdict", Verdict.TIMED_OUT.value),
        killed=share("verdict", Verdict.KILLED.value),
        fingerprint=benchmark.fingerprint,
        correct={problem.id: marks for problem, marks in zip(benchmark.problems, correct)},
    )


def _vote(row: Row) -> str | None:
    """What a sample votes for: the gold if it is right, else its answer's normal form; or an option.

    So all right answers are one, however they are written; wrong ones only where their normal forms agree.
    """
    if row["answer"] is None:
        return None
    if "option" in row:
        return None if row["option"] is None else str(row["option"])
    return normal_form(row["gold"] if row["correct"] else row["answer"])


@dataclass(frozen=True)
class Gain:
    """Against the frozen backbone: MAG in points, OTF in percent, TES = MAG / (OTF / 100)."""

    mag: float
    otf: float | None
    tes: float | None


def gains(results: Results, baseline: Results, otf: float | None) -> dict[str, Gain]:
    """Per benchmark, on the problems of both, and ``average`` over benchmarks. ``otf`` in percent."""
    shared = paired_scores(baseline, results)
    mags = {name: 100 * (sum(ours) - sum(theirs)) / len(ours) for name, (theirs, ours) in shared.items()}
    if len(shared) > 1:
        mags["average"] = sum(mags.values()) / len(shared)
    return {name: Gain(mag, otf, training_efficiency(mag, otf) if otf else None) for name, mag in mags.items()}


def otf_of_run(run: Path) -> float | None:
    """OTF of a run in percent; None where its metrics do not say."""
    share = trained_share(read_jsonl(run / "metrics.jsonl"))
    return None if share is None else 100 * share


def average(results: Results) -> float:
    """Mean avg@k over benchmarks, each counting once."""
    return sum(result.accuracy for result in results.values()) / len(results)


def result_rows(results: Results, gained: Mapping[str, Gain] | None = None) -> tuple[list[str], list[list[str]]]:
    """Column names and cells of the table that users see."""
    ks = sorted({result.samples for result in results.values()})
    k = str(ks[0]) if len(ks) == 1 else "k"
    shown = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < ks[0]] + [ks[0]]
    columns = ["benchmark", "problems", f"avg@{k}", "95 %", *(f"pass@{n}" for n in shown), f"maj@{k}"]
    columns += ["tokens", "truncated", "no answer"]
    cells = []
    for name, r in results.items():
        interval = f"[{100 * r.low:.1f}, {100 * r.high:.1f}]"
        passes = [percent(r.pass_at[str(n)]) for n in shown]
        line = [name, str(r.problems), percent(r.accuracy), interval, *passes, percent(r.majority)]
        cells.append([*line, f"{r.length:.0f}", percent(r.truncated), percent(r.no_answer)])
    if len(results) > 1:
        cells.append(["average", "", percent(average(results)), *[""] * (len(columns) - 3)])
    if gained:
        columns += ["MAG", "OTF", "TES"]
        for line in cells:
            gain = gained.get(line[0])
            line += [
                f"{gain.mag:+.2f}" if gain else "",
                f"{gain.otf:.2f} %" if gain and gain.otf else "",
                f"{gain.tes:.1f}" if gain and gain.tes is not None else "",
            ]
    return columns, cells


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def make_console() -> Console:
    """As wide as the terminal; in a file wide enough for every table."""
    console = Console()
    if not console.is_terminal:
        console.width = 200
    return console


def show(columns: Sequence[str], cells: Sequence[Sequence[str]], title: str, console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")  # no figure is cut off
    for line in cells:
        table.add_row(*line)
    console.print(table)


def markdown(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1), *cells]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def save_results(
    folder: Path, content: Mapping[str, Any], results: Results, gained: Mapping[str, Gain] | None = None
) -> Path:
    """``results.json``, from which :func:`load_results` reads the results again, and ``results.md``."""
    path = folder / "results.json"
    if path.is_file():  # what an earlier call evaluated here stays, where this one did less of it, or nothing
        kept = {name: old for name, old in load_results(path).results.items() if _larger(old, results.get(name))}
        results = {**results, **kept}
    document = {
        **content,
        "average": average(results),
        "benchmarks": {name: asdict(result) for name, result in results.items()},
    }
    if gained:
        document["gains"] = {name: asdict(gain) for name, gain in gained.items()}
    write_atomically(folder / "results.json", json.dumps(document, indent=1) + "\n")
    write_atomically(folder / "results.md", markdown(*result_rows(results, gained)))
    return folder / "results.json"


def _larger(old: Result, new: Result | None) -> bool:
    """Whether ``old`` has all that ``new`` has, and more: else the newer one counts, as on the screen."""
    if new is None:
        return True
    as_much = old.problems >= new.problems and old.samples >= new.samples
    more = old.problems > new.problems or old.samples > new.samples
    return old.fingerprint == new.fingerprint and as_much and more


@dataclass(frozen=True)
class Evaluation:
    model: str
    settings: dict[str, Any]
    results: Results


def load_results(path: Path) -> Evaluation:
    """Read what :func:`save_results` wrote. UserError where it is not such a file."""
    if path.is_dir():
        path = path / "results.json"
    try:
        content = json.loads(path.read_text())
        results = {name: Result(**result) for name, result in content["benchmarks"].items()}
        return Evaluation(content["model"], content["settings"], results)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give a results.json that evaluate.py wrote"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no results.json of evaluate.py ({type(error).__name__}: {error})") from None


def settings_differ(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Settings that should be equal before two results are compared, but are not; the model may differ."""
    left, right = flatten(a), flatten(b)
    keys = sorted(k for k in left.keys() | right.keys() if k not in ("model", "files") and left.get(k) != right.get(k))
    return [f"{key}: {left.get(key)!r:.80} and {right.get(key)!r:.80}" for key in keys]


def shared_problems(a: Mapping[str, Result | Benchmark], b: Mapping[str, Result | Benchmark]) -> dict[str, list[str]]:
    """Ids of the problems that both have, by benchmark. UserError where there is none, or sets of one name differ."""
    shared: dict[str, list[str]] = {}
    for name in (name for name in a if name in b):
        if a[name].fingerprint != b[name].fingerprint:
            raise UserError(f"{name} has other questions in the two evaluations: evaluate both on the same file")
        theirs = set(b[name].ids)
        if ids := [i for i in a[name].ids if i in theirs]:
            shared[name] = ids
    if not shared:
        raise UserError(
            f"the two evaluations have no problem in common ({', '.join(a)}; {', '.join(b)}): evaluate both on the "
            "same benchmarks"
        )
    return shared


def paired_scores(a: Results, b: Results) -> dict[str, tuple[list[float], list[float]]]:
    """avg@k of each problem of :func:`shared_problems`, by benchmark."""
    pairs = {}
    for name, ids in shared_problems(a, b).items():
        left, right = ([avg_at_k([side[name].correct[i]]) for i in ids] for side in (a, b))
        pairs[name] = (left, right)
    return pairs


def compare(a: Results, b: Results) -> dict[str, Difference]:
    """b - a for each benchmark of both, on the problems of both; ``all problems`` pools them. UserError for none."""
    pairs = paired_scores(a, b)
    if len(pairs) > 1:
        every_a, every_b = ([score for pair in pairs.values() for score in pair[side]] for side in (0, 1))
        pairs["all problems"] = (every_a, every_b)
    return {name: paired_bootstrap(*pair) for name, pair in pairs.items()}


def comparison_rows(differences: Mapping[str, Difference]) -> tuple[list[str], list[list[str]]]:
    columns = ["benchmark", "problems", "a", "b", "b - a", "95 %", "p", "verdict"]
    cells = []
    for name, d in differences.items():
        verdict = "no difference shown" if not d.real else "b is better" if d.value > 0 else "a is better"
        if d.problems < FEWEST:
            verdict = "too few problems"
        interval = f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
        line = [name, str(d.problems), percent(d.a), percent(d.b), f"{100 * d.value:+.1f}", interval]
        cells.append([*line, f"{d.p:.4f}", verdict])
    return columns, cells


def print_comparison(a: Path, b: Path) -> None:
    """Two results.json side by side, with a warning of every other setting that differs."""
    left, right = load_results(a), load_results(b)
    console = make_console()
    console.print(f"a: {left.model} ({a})\nb: {right.model} ({b})", markup=False, highlight=False, soft_wrap=True)
    for line in settings_differ(left.settings, right.settings):
        console.print(f"note: not the same setting, {line}", markup=False, highlight=False, soft_wrap=True)
    differences = compare(left.results, right.results)
    show(*comparison_rows(differences), "paired bootstrap over problems", console)


def intervention_rows(variants: Mapping[str, Results]) -> tuple[list[str], list[list[str]]]:
    """Figure 3 of the paper as a table: accuracy of each benchmark under each variant, with the paired difference."""
    base = variants["baseline"]
    names = [name for name in variants if name != "baseline"]
    columns = ["benchmark", "baseline", *(column for name in names for column in (name, f"{name} - baseline", "95 %"))]
    cells = []
    differences = {name: compare(base, variants[name]) for name in names}
    for benchmark in differences[names[0]]:
        line = [benchmark, percent(differences[names[0]][benchmark].a)]
        for name in names:
            d = differences[name][benchmark]
            line += [percent(d.b), f"{100 * d.value:+.1f}", f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}]"]
        cells.append(line)
    return columns, cells
