"""Tested as databases are: what is killed, starved or damaged ends as what was not, or says in one line why not.

    python bench/soak.py PART ... [--count N] [--minutes M] [--seed S] [--write]

PART is kills, terms, ranks, disk, readonly, clock, growth, hostile, corruption, data, or all. Without ``--count`` each
is small: all of them take minutes. What runs of the tiny model computed is compared byte by byte with an undisturbed
one (bench/same.py): metrics.jsonl without times, rollouts, weights. ``--write`` adds each row to
bench/results/soak-MACHINE.jsonl, so that what is done at several times counts together, and draws the table of sums
beside it. Exits 1 if anything was not as it should be. Logs are in ``--keep``, with the stacks of a run that hung.
disk and readonly mount a tmpfs, for which one must be root.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aipo.record.jsonl import read_jsonl  # noqa: E402
from bench import faults, wrong_data  # noqa: E402
from bench.growth import EVERY, grown, resources  # noqa: E402
from bench.hostile import through_the_pool  # noqa: E402
from bench.machine import machine, slug  # noqa: E402
from bench.same import contents, difference, make_inputs  # noqa: E402


@dataclass
class Row:
    """What a part of the soak did and found. Rows of a part that did the same add up."""

    part: str
    count: int
    done: str
    tally: dict[str, int] = field(default_factory=dict)  # times, by what was met
    wrong: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)  # commits of what was run

    @property
    def what(self) -> str:
        share = ""
        if "elsewhere" in self.tally and self.count:
            share = f"{1 - self.tally['elsewhere'] / self.count:.0%} inside a phase"
        return "; ".join(filter(None, [self.done, share, ", ".join(f"{key} {n}" for key, n in self.tally.items())]))

    def __str__(self) -> str:
        return f"{self.part:11} {self.count:6}  {self.what}" + "".join(f"\n    WRONG: {each}" for each in self.wrong)


class Bed:
    """A folder for runs, the tiny model, and what an undisturbed run computed, by number of ranks."""

    def __init__(self, work: Path, minutes: float = float("inf")) -> None:
        self.work, self.deadline = work, time.monotonic() + 60 * minutes
        self.inputs = faults.in_child(lambda: make_inputs(work / "inputs"))  # it draws a bar: faults.start
        self.expected: dict[int, dict[str, bytes]] = {}
        self.seconds: dict[int, float] = {}
        self.spans: dict[str, list[float]] = {}

    def start(self, name: str, *keys: str, runs: Path | None = None, **options: object) -> faults.Run:
        arguments = ["--config", "tiny.yaml", "--resume", "auto", *self.inputs, *faults.KEYS]
        arguments += [f"runs={runs or self.work / 'runs'}", f"name={name}", *keys]
        (self.work / "logs").mkdir(exist_ok=True)
        options = {"cache": self.work / "caches" / name, "log": self.log(name)} | options
        return faults.start(arguments, **options)  # type: ignore[arg-type]

    def log(self, name: str) -> Path:
        return self.work / "logs" / f"{name}.txt"

    def reference(self, ranks: int = 1) -> None:
        """Run undisturbed, once."""
        if ranks in self.expected:
            return
        run = self.start(f"undisturbed-{ranks}", ranks=ranks)
        if run.finish() != 0:
            raise SystemExit(f"the undisturbed run failed:\n{self.log(f'undisturbed-{ranks}').read_text()[-3000:]}")
        self.seconds[ranks] = time.monotonic() - run.began
        for phase, seconds in run.spans:
            self.spans.setdefault(phase, []).append(seconds)
        self.expected[ranks] = contents(self.work / "runs" / f"undisturbed-{ranks}")

    def finish(self, name: str, *keys: str, ranks: int = 1, runs: Path | None = None, **options: object) -> list[str]:
        """Resume without disturbance; what is wrong with how it ends."""
        run = self.start(name, *keys, ranks=ranks, runs=runs, **options)
        if (code := run.finish()) != 0:
            return [f"{name}: resumed run {run.hung or f'ended with {code}: {self.last(name)}'}"]
        found = difference(self.expected[ranks], contents((runs or self.work / "runs") / name))
        return [f"{name}: differs from the undisturbed run: {found}"] if found else []

    def last(self, name: str) -> str:
        """Last line that a run said."""
        lines = self.log(name).read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")


def strikes(bed: Bed, draw: random.Random, count: int, part: str, number: int, ranks: int = 1) -> Row:
    """Signals at random moments, most of them aimed at the phase in which fewest landed; runs are resumed, and in the
    end compared."""
    bed.reference(ranks)
    landed: Counter[str] = Counter()
    wrong: list[str] = []
    done = ended = 0
    usual = {signal.SIGKILL: (-9,), signal.SIGTERM: (3, -15, 0)}[signal.Signals(number)]
    while done < count and time.monotonic() < bed.deadline:
        ended += 1
        name = f"{part}-{ended}"
        for start in range(min(count - done, draw.randint(4, 8))):
            run = bed.start(name, ranks=ranks)
            if draw.random() < 0.7:
                # what is labelled stays so: only the first start of a run is sure to be in it
                phases = [phase for phase in bed.spans if start == 0 or phase != "labelling"]
                phase = min(draw.sample(phases, len(phases)), key=lambda each: landed[each])
                reached = run.until(phase, draw.randint(1, max(1, len(bed.spans[phase]) // 2)))
                reached = reached and run.wait(0.8 * draw.random() * draw.choice(bed.spans[phase]))
            else:
                reached = run.wait(draw.random() * bed.seconds[ranks])
            if not reached:
                if (code := run.reap()) != 0:
                    wrong.append(f"{name}: {run.hung or f'ended with {code}: {bed.last(name)}'}")
                break
            rank = draw.randrange(ranks)
            where, left = run.strike(number, rank)
            if (code := run.codes[run.pids[rank]]) not in (*usual, 0):  # 0: it had ended by itself
                wrong.append(f"{name}: ended with {code} of the signal: {bed.last(name)}")
            wrong += [f"{name}: left behind: {process}" for process in left]
            wrong += [f"{name}: {run.hung}"] if run.hung else []
            if code != 0:
                done += 1
                landed.update(set(where) or {"elsewhere"})
        wrong += bed.finish(name, ranks=ranks)
        print(f"  {part}: {done} of {count} {dict(landed)} {wrong}", flush=True)
    tally = {"runs": ended} | {phase: landed[phase] for phase in [*faults.PHASES, "elsewhere"]}
    what = {signal.SIGKILL: "SIGKILLs", signal.SIGTERM: "SIGTERMs"}[signal.Signals(number)]
    of = f" of one of {ranks} ranks" if ranks > 1 else ""
    how = f"{what}{of}; runs resumed after each and compared at the end; begun where they landed (several count each)"
    return Row(part, done, how, tally, wrong)


def kills(bed: Bed, draw: random.Random, count: int) -> Row:
    return strikes(bed, draw, count, "kills", signal.SIGKILL)


def terms(bed: Bed, draw: random.Random, count: int) -> Row:
    return strikes(bed, draw, count, "terms", signal.SIGTERM)


def ranks(bed: Bed, draw: random.Random, count: int) -> Row:
    return strikes(bed, draw, count, "ranks", signal.SIGKILL, ranks=2)


# --- a disk that is full, a folder that cannot be written, a clock that jumps --------------------------------------


def disk(bed: Bed, draw: random.Random, count: int) -> Row:
    """The disk is full from a random moment, or from the begin of a random phase, until the run ends."""
    bed.reference()
    wrong: list[str] = []
    said: Counter[str] = Counter()
    for number in range(1, count + 1):
        name = f"disk-{number}"
        with faults.small_disk(bed.work / "disk") as place:
            run = bed.start(name, runs=place)
            if draw.random() < 0.6:
                phase = draw.choice([p for p in bed.spans if p not in ("sync", "validation")])
                run.until(phase, draw.randint(1, max(1, len(bed.spans[phase]) // 2)))
            else:
                run.wait(draw.random() * bed.seconds[1])
            faults.fill(place, keep=draw.choice([0, 0, 4096, 65536]))
            code = run.finish()
            text = bed.log(name).read_text(errors="replace")
            kind = "finished" if code == 0 else "one-line error" if one_line_error(text) else f"ended with {code}"
            said[kind] += 1
            if kind.startswith("ended"):
                wrong.append(f"{name}: {kind}, no one-line error: {bed.last(name)}")
            (place / "ballast").unlink()
            wrong += bed.finish(name, runs=place)
        print(f"  disk: {number} of {count} {dict(said)} {wrong}", flush=True)
    how = "tmpfs filled at a random moment, with room again resumed and compared"
    return Row("disk", count, how, dict(said), wrong)


def one_line_error(text: str) -> bool:
    """Whether the last thing that a run said is its error, in a line of its own. (That wandb is off comes before it,
    with a traceback of wandb.)"""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "").startswith("error: ")


def readonly(bed: Bed, draw: random.Random, count: int) -> Row:
    """A run folder on a disk that is mounted read-only: before the first start, and after a kill."""
    bed.reference()
    wrong: list[str] = []
    for number in range(1, count + 1):
        name = f"readonly-{number}"
        with faults.small_disk(bed.work / "disk") as place:
            for _ in range(2):
                faults.mount("-o", "remount,ro", place)
                code = bed.start(name, runs=place).finish()
                if code != 2 or not one_line_error(bed.log(name).read_text(errors="replace")):
                    wrong.append(f"{name}: ended with {code}: {bed.last(name)}")
                bed.log(name).unlink()
                faults.mount("-o", "remount,rw", place)
                run = bed.start(name, runs=place)
                if run.wait(draw.uniform(0.3, 0.9) * bed.seconds[1]):
                    run.strike(signal.SIGKILL)
                else:
                    run.reap()
            wrong += bed.finish(name, runs=place)
    how = "starts on a read-only disk refused in one line, resumed with it writable and compared"
    return Row("readonly", 2 * count, how, wrong=wrong)


def clock(bed: Bed, draw: random.Random, count: int) -> Row:
    """``time.time`` jumps by up to a day at every call; half of the runs are killed on the way."""
    bed.reference()
    wrong: list[str] = []
    for number in range(1, count + 1):
        name = f"clock-{number}"
        jump = faults.jumping_clock(draw.randrange(10**6))
        if draw.random() < 0.5:
            run = bed.start(name, inside=jump)
            if run.wait(draw.random() * bed.seconds[1]):
                run.strike(signal.SIGKILL)
            else:
                run.reap()
        wrong += bed.finish(name, inside=jump)
    return Row("clock", count, "runs with a clock that jumps by up to a day at every look, compared", wrong=wrong)


# --- what is damaged ----------------------------------------------------------------------------------------------


def corruption(bed: Bed, draw: random.Random, count: int) -> Row:
    """Of a killed run's newest checkpoint, each file is cut or has a bit flipped; the run is resumed."""
    bed.reference()
    wrong: list[str] = []
    done = 0
    name = "corrupted"
    run = bed.start(name, "checkpoint.keep_last=3")
    if run.until("saving", 3):
        run.wait(10)
    run.strike(signal.SIGKILL)
    kept = bed.work / "kept"
    shutil.copytree(bed.work / "runs" / name, kept, symlinks=True)
    newest = sorted((kept / "checkpoints").glob("step-*"))[-1]
    files = [path.relative_to(kept) for path in sorted(newest.rglob("*")) if path.is_file()]
    files += [Path("checkpoints/latest")]
    for number in range(count):
        file = files[number % len(files)]
        name = f"corrupted-{number}"
        shutil.copytree(kept, bed.work / "runs" / name, symlinks=True)
        wrong_data.damage(bed.work / "runs" / name / file, draw)
        end = bed.finish(name, cache=bed.work / "caches" / "corrupted")
        text = bed.log(name).read_text(errors="replace")
        if missing := unsaid(text, file, newest):
            end.append(f"{name}: {file} was damaged: {missing}")
        wrong += end
        done += 1
        print(f"  corruption: {done} of {count} {wrong}", flush=True)
        if time.monotonic() > bed.deadline:
            break
    how = f"times one of {len(files)} files of a checkpoint cut or a bit flipped: named, an older one taken, compared"
    return Row("corruption", done, how, wrong=wrong)


def unsaid(text: str, file: Path, newest: Path) -> str:
    """What a resumed run does not say of a file of its ``newest`` checkpoint, or beside it, that was damaged."""
    if not any("damaged" in line and file.name in line for line in text.splitlines()):
        return "no line says so"
    resumed = re.search(r"^resumed after step (\d+)", text, re.M)
    if newest.name in file.parts and not (resumed and int(resumed[1]) < int(newest.name.removeprefix("step-"))):
        return "no older checkpoint was taken"
    return "traceback" if "Traceback" in text else ""


def data(bed: Bed, draw: random.Random, count: int) -> Row:
    """Each way in which a JSONL or Parquet file or a hub folder can be wrong: one line that names the file and row."""
    tried, wrong = faults.in_child(lambda: wrong_data.everything(bed.work / "data", draw, count))  # pyarrow's threads
    how = "files and folders of data with a fault: one line, with file and row"
    return Row("data", sum(tried.values()), how, tried, wrong)


# --- what grows, what is hostile ----------------------------------------------------------------------------------


def growth(bed: Bed, draw: random.Random, count: int) -> Row:
    """``count`` steps or as many as there is time for, with a checkpoint, a validation and a plot every ten."""
    name = "growth"
    run = bed.start(name, f"optim.steps={count}", *(f"{key}=10" for key in EVERY), "tracking.wandb=disabled")
    folder, process = bed.work / "runs" / name, psutil.Process(run.pids[0])
    seen: list[dict[str, float]] = []
    lines = 0
    stopped = False
    while run.listen(0.02):
        if not stopped and time.monotonic() > bed.deadline:
            stopped = True
            os.kill(run.pids[0], signal.SIGTERM)
        with suppress(OSError, psutil.Error):
            size = (folder / "metrics.jsonl").stat().st_size
            if size != lines:
                lines = size
                seen.append(resources(process, folder))
    if (code := run.reap()) != (3 if stopped else 0):
        return Row(name, 0, "", wrong=[f"ended with {code}: {bed.last(name)}"])
    (bed.work / "growth.jsonl").write_text("".join(json.dumps(each) + "\n" for each in seen))
    steps = read_jsonl(folder / "metrics.jsonl")[-1]["step"]  # two that end at once are seen once
    told, wrong = grown(seen, steps)
    return Row(name, steps, f"steps of one run, second eighth to last quarter: {told}", wrong=wrong)


def hostile(bed: Bed, draw: random.Random, count: int) -> Row:
    """Hostile answers through the pools of runs, a thousand each, which end as one without them."""
    bed.reference()
    tally: Counter[str] = Counter()
    wrong: list[str] = []
    while (done := sum(tally.values())) < count and time.monotonic() < bed.deadline:
        name = f"hostile-{done}"
        report, few = bed.work / f"{name}.json", min(1000, count - done)
        inside = through_the_pool(few, draw.randrange(10**6), bed.work / "traps" / name, report, submissions=130)
        keys = ("reward.timeout_s=1", "reward.workers=2", "tracking.wandb=disabled")
        wrong += bed.finish(name, *keys, inside=inside)
        found = json.loads(report.read_text())
        tally.update(found["verdicts"])
        if tally["correct"] or sum(found["verdicts"].values()) != few:
            wrong.append(f"{name}: verdicts {found['verdicts']}")
        if found["honest"] != ["correct", "wrong"] or found["workers"] != found["started"]:
            alive = f"{found['workers']} of {found['started']}"
            wrong.append(f"{name}: afterwards {alive} workers live, which say {found['honest']}")
        wrong += [f"{name}: {key}: {found[key]}" for key in ("files", "connections", "below", "other") if found[key]]
        print(f"  hostile: {sum(tally.values())} of {count} {dict(tally)} {wrong}", flush=True)
    how = "hostile answers while training; no file, process, connection; rewards as without"
    return Row("hostile", sum(tally.values()), how, dict(tally), wrong)


PARTS: dict[str, tuple[Callable[[Bed, random.Random, int], Row], int]] = {  # and the count of the small form
    "kills": (kills, 6),
    "terms": (terms, 3),
    "ranks": (ranks, 2),
    "disk": (disk, 2),
    "readonly": (readonly, 1),
    "clock": (clock, 1),
    "corruption": (corruption, 3),
    "growth": (growth, 24),
    "hostile": (hostile, 300),
    "data": (data, 30),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"], metavar="PART")
    parser.add_argument("--count", type=int, help="strikes, faults, steps or answers; default: few")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no disturbance begins later than this")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--keep", type=Path, help="folder in which runs and logs stay")
    parser.add_argument("--write", action="store_true", help="add what was done to the table of this machine")
    arguments = parser.parse_args()
    code = commit()  # before the checkout can change
    faults.load()
    print(f"seed {arguments.seed}, code {code}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        bed = Bed((arguments.keep or Path(temporary)).resolve(), arguments.minutes)
        for part in [*PARTS] if "all" in arguments.parts else arguments.parts:
            run, few = PARTS[part]
            count = few if arguments.count is None else arguments.count
            row = replace(run(bed, random.Random(f"{arguments.seed} {part}"), count), code=[code])
            print(row, flush=True)
            if arguments.write:
                record(row)
            rows.append(row)
    return int(any(row.wrong for row in rows))


def commit() -> str:
    """Commit of this checkout; with a + where something but results differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", "-C", ROOT, *arguments], text=True).strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def record(row: Row) -> None:
    """Put a row behind those of this machine, and draw the table of their sums."""
    path = ROOT / "bench" / "results" / f"soak-{slug()}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")
    rows = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    path.with_suffix(".md").write_text(f"# bench/soak.py on {machine()}\n\n{table(rows)}\n{CODE}\n", encoding="utf-8")


CODE = "Code is the commit that was run, + with changes; by: one not noted, before that commit, which has the result."


def table(rows: Iterable[Row]) -> str:
    """Markdown: a line for each thing done, its rows added up, then what was wrong."""
    sums: dict[tuple[str, str], Row] = {}
    for one in rows:
        total = sums.setdefault((one.part, one.done), Row(one.part, 0, one.done))
        total.count += one.count
        total.tally |= {key: total.tally.get(key, 0) + times for key, times in one.tally.items()}
        total.wrong += one.wrong
        total.code += [commit for commit in one.code if commit not in total.code]
    lines = ["| part | times | what | wrong | code |", "|---|---|---|---|---|"]
    for each in sorted(sums.values(), key=lambda each: [*PARTS].index(each.part)):
        lines.append(f"| {each.part} | {each.count:,} | {each.what} | {len(each.wrong)} | {' '.join(each.code)} |")
    if found := [wrong for each in sums.values() for wrong in each.wrong]:
        lines += ["", "What was wrong:", "", *(f"- {wrong}" for wrong in found)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
