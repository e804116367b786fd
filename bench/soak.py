"""Tested as databases are: what is killed, starved or damaged ends as what was not, or says in one line why not.

    python bench/soak.py PART ... [--count N] [--minutes M] [--seed S] [--write]

PART is kills, terms, ranks, disk, readonly, clock, growth, hostile, corruption, data, or all. Without ``--count`` each
is small: all of them take minutes. What runs of the tiny model computed is compared byte by byte with an undisturbed
one (bench/same.py): metrics.jsonl without times, rollouts, weights. ``--write`` puts the rows, in place of those
of the same parts, into bench/results/soak-MACHINE.md. Exits 1 if anything was not as it should
be; logs are in ``--keep``.
disk and readonly mount a tmpfs, for which one must be root.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import faults  # noqa: E402
from bench.hostile import through_the_pool  # noqa: E402
from bench.machine import machine, slug  # noqa: E402
from bench.same import contents, difference, make_inputs  # noqa: E402


@dataclass
class Row:
    """What a part of the soak did and found."""

    part: str
    count: int
    done: str
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.part:11} {self.count:6}  {self.done}" + "".join(f"\n    WRONG: {each}" for each in self.wrong)


class Bed:
    """A folder for runs, the tiny model, and what an undisturbed run computed, by number of ranks."""

    def __init__(self, work: Path, minutes: float = float("inf")) -> None:
        self.work, self.deadline = work, time.monotonic() + 60 * minutes
        self.inputs = faults.in_child(lambda: make_inputs(work / "inputs"))  # it starts a thread, for its progress bar
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
        code = self.start(name, *keys, ranks=ranks, runs=runs, **options).finish()
        if code != 0:
            return [f"{name}: resumed run ended with {code}: {self.last(name)}"]
        found = difference(self.expected[ranks], contents((runs or self.work / "runs") / name))
        return [f"{name}: differs from the undisturbed run: {found}"] if found else []

    def last(self, name: str) -> str:
        """Last line that a run said."""
        lines = self.log(name).read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")


def strikes(bed: Bed, draw: random.Random, count: int, part: str, number: int, ranks: int = 1) -> Row:
    """Signals at random moments, half of them aimed at a phase; runs are resumed, and in the end compared."""
    bed.reference(ranks)
    landed: Counter[str] = Counter()
    wrong: list[str] = []
    done = ended = 0
    usual = {signal.SIGKILL: (-9,), signal.SIGTERM: (3, -15, 0)}[signal.Signals(number)]
    while done < count and time.monotonic() < bed.deadline:
        ended += 1
        name = f"{part}-{ended}"
        for _ in range(min(count - done, draw.randint(4, 8))):
            run = bed.start(name, ranks=ranks)
            if draw.random() < 0.6:
                phase = draw.choice([*bed.spans])
                reached = run.until(phase, draw.randint(1, max(1, len(bed.spans[phase]) // 2)))
                reached = reached and run.wait(0.8 * draw.random() * draw.choice(bed.spans[phase]))
            else:
                reached = run.wait(draw.random() * bed.seconds[ranks])
            if not reached:
                if (code := run.reap()) != 0:
                    wrong.append(f"{name}: ended with {code}: {bed.last(name)}")
                break
            rank = draw.randrange(ranks)
            where, left = run.strike(number, rank)
            if (code := run.codes[run.pids[rank]]) not in (*usual, 0):  # 0: it had ended by itself
                wrong.append(f"{name}: ended with {code} of the signal: {bed.last(name)}")
            wrong += [f"{name}: left behind: {process}" for process in left]
            if code != 0:
                done += 1
                landed.update(set(where) or {"elsewhere"})
        wrong += bed.finish(name, ranks=ranks)
        print(f"  {part}: {done} of {count} {dict(landed)} {wrong}", flush=True)
    phases = ", ".join(f"{phase} {landed[phase]}" for phase in [*faults.PHASES, "elsewhere"] if landed[phase])
    return Row(part, done, f"{ended} runs, resumed after each, compared at the end; landed in {phases}", wrong)


def kills(bed: Bed, draw: random.Random, count: int) -> Row:
    return strikes(bed, draw, count, "kills", signal.SIGKILL)


def terms(bed: Bed, draw: random.Random, count: int) -> Row:
    return strikes(bed, draw, count, "terms", signal.SIGTERM)


def ranks(bed: Bed, draw: random.Random, count: int) -> Row:
    return strikes(bed, draw, count, "ranks", signal.SIGKILL, ranks=2)


# --- a disk that is full, a folder that cannot be written, a clock that jumps --------------------------------------


@contextmanager
def small_disk(bed: Bed, megabytes: int = 64) -> Iterator[Path]:
    """A tmpfs, which root may mount."""
    place = bed.work / "disk"
    place.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", place)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def disk(bed: Bed, draw: random.Random, count: int) -> Row:
    """The disk is full from a random moment, or from the begin of a random phase, until the run ends."""
    bed.reference()
    wrong: list[str] = []
    said: Counter[str] = Counter()
    for number in range(1, count + 1):
        name = f"disk-{number}"
        with small_disk(bed) as place:
            run = bed.start(name, runs=place)
            if draw.random() < 0.6:
                phase = draw.choice([p for p in bed.spans if p not in ("sync", "validation")])
                run.until(phase, draw.randint(1, max(1, len(bed.spans[phase]) // 2)))
            else:
                run.wait(draw.random() * bed.seconds[1])
            fill(place, keep=draw.choice([0, 0, 4096, 65536]))
            code = run.finish()
            text = bed.log(name).read_text(errors="replace")
            kind = "finished" if code == 0 else "one-line error" if one_line_error(text) else f"ended with {code}"
            said[kind] += 1
            if kind.startswith("ended"):
                wrong.append(f"{name}: {kind}, no one-line error: {bed.last(name)}")
            (place / "ballast").unlink()
            wrong += bed.finish(name, runs=place)
        print(f"  disk: {number} of {count} {dict(said)} {wrong}", flush=True)
    how = ", ".join(f"{kind} {times}" for kind, times in said.items())
    return Row("disk", count, f"tmpfs filled at a random moment: {how}; with room again resumed and compared", wrong)


def fill(place: Path, *, keep: int) -> None:
    """Write until nothing goes in any more, then give back ``keep`` bytes."""
    path = place / "ballast"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError:
            pass
        file.truncate(max(file.tell() - keep, 0))


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
        with small_disk(bed) as place:
            for _ in range(2):
                mount("-o", "remount,ro", place)
                code = bed.start(name, runs=place).finish()
                if code != 2 or not one_line_error(bed.log(name).read_text(errors="replace")):
                    wrong.append(f"{name}: ended with {code}: {bed.last(name)}")
                bed.log(name).unlink()
                mount("-o", "remount,rw", place)
                run = bed.start(name, runs=place)
                if run.wait(draw.uniform(0.3, 0.9) * bed.seconds[1]):
                    run.strike(signal.SIGKILL)
                else:
                    run.reap()
            wrong += bed.finish(name, runs=place)
    how = "starts on a read-only disk refused in one line, resumed with it writable and compared"
    return Row("readonly", 2 * count, how, wrong)


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
    return Row("clock", count, "runs with a clock that jumps by up to a day at every look, compared", wrong)


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
        damage_file(bed.work / "runs" / name / file, draw)
        end = bed.finish(name, cache=bed.work / "caches" / "corrupted")
        text = bed.log(name).read_text(errors="replace")
        if not any(file.name in line for line in text.splitlines()):
            end.append(f"{name}: {file} was damaged, and no line says so")
        elif "Traceback" in text:
            end.append(f"{name}: {file} was damaged: traceback")
        wrong += end
        done += 1
        print(f"  corruption: {done} of {count} {wrong}", flush=True)
        if time.monotonic() > bed.deadline:
            break
    how = f"times one of {len(files)} files of a checkpoint cut or a bit flipped: named, an older one taken, compared"
    return Row("corruption", done, how, wrong)


def damage_file(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if draw.random() < 0.5 or not content:
        content = content[: draw.randrange(max(len(content), 1))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def data(bed: Bed, draw: random.Random, count: int) -> Row:
    """Each way in which a JSONL file can be wrong, at a random row: one line that names the file and the row."""
    from aipo.errors import UserError
    from aipo.problems.datasets import load_problems

    wrong: list[str] = []
    count = max(count, len(BROKEN_ROWS))  # every kind at least once
    path = bed.work / "data" / "wrong.jsonl"
    path.parent.mkdir(exist_ok=True)
    for number in range(count):
        kind, (broken, named) = list(BROKEN_ROWS.items())[number % len(BROKEN_ROWS)]
        rows = [json.dumps({"question": f"{i} + 1", "answer": str(i + 1), "id": str(i)}).encode() for i in range(9)]
        at = draw.randrange(1, len(rows))
        rows[at] = broken
        path.write_bytes(b"".join(row + draw.choice([b"\n", b"\r\n"]) for row in rows))
        try:
            load_problems(str(path), split="train")
            wrong.append(f"data: {kind}: accepted")
        except UserError as error:
            text = str(error)
            of_row = not named or str(at + 1) in re.findall(r"\d+", text.replace(str(path), ""))
            if "\n" in text or str(path) not in text or not of_row:
                wrong.append(f"data: {kind}: {text}")
        except Exception as error:
            wrong.append(f"data: {kind}: {type(error).__name__}: {error}")
    for kind, content in WHOLE_FILES.items():
        path.unlink()
        path.write_bytes(content)
        try:
            load_problems(str(path), split="train")
            wrong.append(f"data: {kind}: accepted")
        except UserError as error:
            if "\n" in str(error) or str(path) not in str(error):
                wrong.append(f"data: {kind}: {error}")
        except Exception as error:
            wrong.append(f"data: {kind}: {type(error).__name__}: {error}")
    kinds = len(BROKEN_ROWS) + len(WHOLE_FILES)
    return Row("data", count + len(WHOLE_FILES), f"JSONL files with {kinds} kinds of fault: one line, file, row", wrong)


def row_with(**fields: object) -> bytes:
    return json.dumps({"question": "1 + 1", "answer": "2"} | fields).encode()


BROKEN_ROWS: dict[str, tuple[bytes, bool]] = {  # and whether the row must be named
    "cut": (b'{"question": "1 + 1", "ans', True),
    "no JSON": (b"1 + 1 = 2", True),
    "two objects": (row_with() + row_with(), True),
    "a list": (b'["1 + 1", "2"]', True),
    "a number": (b"17", True),
    "null": (b"null", True),
    "a string": (b'"1 + 1"', True),
    "no answer": (b'{"question": "1 + 1"}', True),
    "no question": (b'{"answer": "2"}', True),
    "an empty object": (b"{}", True),
    "empty answer": (row_with(answer=""), True),
    "blank question": (row_with(question=" \t "), True),
    "answer is a number": (row_with(answer=2), True),
    "answer is null": (row_with(answer=None), True),
    "answer is a list": (row_with(answer=["2"]), True),
    "question is an object": (row_with(question={"text": "1 + 1"}), True),
    "kind unknown": (row_with(kind="maths"), True),
    "kind a number": (row_with(kind=1), True),
    "options of a sum": (row_with(options=["1", "2"]), True),
    "options a string": (row_with(kind="choice", options="12"), True),
    "options alike": (row_with(kind="choice", answer="A", options=["1", "1"]), True),
    "options not in the question": (row_with(kind="choice", answer="A", options=["1", "2"]), True),
    "half a surrogate": (row_with(question="\ud800"), True),
    "half a surrogate in a key": (row_with(**{"\udfff": 1}), True),
    "id a list": (row_with(id=[1]), True),
    "id taken": (row_with(question="another", id="0"), True),
    "source a number": (row_with(source=1), True),
    "solution a list": (row_with(solution=["1"]), True),
    "NUL": (b'{"question": "1\x00", "answer": "2"}', True),
    "Latin-1": ('{"question": "né", "answer": "2"}'.encode("latin-1"), False),
    "deep": (b'{"question": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", True),
    "digits": (b'{"question": "1", "answer": ' + b"9" * 5000 + b"}", True),
}
WHOLE_FILES = {
    "empty": b"",
    "blank lines": b"\n \n\n",
    "UTF-16": '{"question": "1", "answer": "2"}'.encode("utf-16"),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(20),
    "one array": b'[{"question": "1", "answer": "2"}]',
    "CSV": b"question,answer\n1 + 1,2\n",
}


# --- what grows, what is hostile ----------------------------------------------------------------------------------

BOUNDS = {"RSS": 48 * 2**20, "shared memory": 0, "file handles": 2, "threads": 1, "folder": 16 * 2**10}
"""Growth from the first quarter of a run to its last: bytes, number; of the folder bytes a step."""


def growth(bed: Bed, draw: random.Random, count: int) -> Row:
    """``count`` steps, with a checkpoint, a validation and a plot every ten."""
    name = "growth"
    run = bed.start(name, f"optim.steps={count}", *(f"{key}=10" for key in EVERY), "tracking.wandb=disabled")
    folder, process = bed.work / "runs" / name, psutil.Process(run.pids[0])
    seen: list[dict[str, float]] = []
    lines = 0
    while run.listen(0.02):
        with suppress(OSError, psutil.Error):
            size = (folder / "metrics.jsonl").stat().st_size
            if size != lines:
                lines = size
                seen.append(resources(process, folder))
    if code := run.reap():
        return Row(name, 0, "", [f"ended with {code}: {bed.last(name)}"])
    quarter = len(seen) // 4
    first, last = seen[quarter // 2 : quarter], seen[-quarter:]
    wrong, told = [], []
    for key, bound in BOUNDS.items():
        more = statistics.median(s[key] for s in last) - statistics.median(s[key] for s in first)
        if key == "folder":
            more /= count * 5 / 8 * 1.1  # steps between the two medians
        if more > bound:
            wrong.append(f"growth: {key} grew by {more:.0f}, bound {bound}")
        told.append(f"{key} {more / 2**20:+.1f} MiB" if key in ("RSS", "shared memory") else f"{key} {more:+.0f}")
    return Row(name, count, f"steps, first quarter to last: {', '.join(told)} bytes a step", wrong)


EVERY = ("checkpoint.every", "validation.every", "tracking.plot_every")


def resources(process: psutil.Process, folder: Path) -> dict[str, float]:
    status = Path(f"/proc/{process.pid}/status").read_text()
    shared = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssShmem"))
    files = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    return {
        "RSS": process.memory_info().rss,
        "shared memory": shared * 1024,
        "file handles": process.num_fds(),
        "threads": process.num_threads(),
        "folder": sum(files),
    }


def hostile(bed: Bed, draw: random.Random, count: int) -> Row:
    """Hostile answers through the pool of a run, which ends as one without them."""
    bed.reference()
    name, report = "hostile", bed.work / "hostile.json"
    inside = through_the_pool(count, draw.randrange(10**6), bed.work / "trap", report, submissions=130)
    keys = ("reward.timeout_s=1", "reward.workers=2", "tracking.wandb=disabled")
    wrong = bed.finish(name, *keys, inside=inside)
    found = json.loads(report.read_text())
    verdicts = found["verdicts"]
    if verdicts.get("correct") or sum(verdicts.values()) != count:
        wrong.append(f"hostile: verdicts {verdicts}")
    if found["honest"] != ["correct", "wrong"] or found["workers"] != 2:
        wrong.append(f"hostile: afterwards {found['workers']} workers, which say {found['honest']}")
    wrong += [f"hostile: {key}: {found[key]}" for key in ("files", "connections", "below", "other") if found[key]]
    how = f"hostile answers while training: {verdicts}; no file, process, connection; rewards as without"
    return Row(name, count, how, wrong)


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
    "data": (data, 0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"], metavar="PART")
    parser.add_argument("--count", type=int, help="strikes, faults, steps or answers; default: few")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no disturbance begins later than this")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--keep", type=Path, help="folder in which runs and logs stay")
    parser.add_argument("--write", action="store_true", help="add the rows to the table of this machine")
    arguments = parser.parse_args()
    faults.load()
    print(f"seed {arguments.seed}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        bed = Bed((arguments.keep or Path(temporary)).resolve(), arguments.minutes)
        for part in [*PARTS] if "all" in arguments.parts else arguments.parts:
            run, few = PARTS[part]
            began = time.monotonic()
            row = run(
                bed, random.Random(f"{arguments.seed} {part}"), few if arguments.count is None else arguments.count
            )
            row.done += f" ({time.monotonic() - began:.0f} s)"
            print(row, flush=True)
            rows.append(row)
    if arguments.write:
        write(rows)
    return int(any(row.wrong for row in rows))


def write(rows: list[Row]) -> None:
    """Put the rows into the table of this machine, in place of those of the same parts."""
    path = ROOT / "bench" / "results" / f"soak-{slug()}.md"
    lines = path.read_text().splitlines() if path.exists() else []
    kept = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    kept |= {row.part: f"| {row.part} | {row.count} | {row.done} | {len(row.wrong)} |" for row in rows}
    table = [kept[part] for part in PARTS if part in kept]
    head = [f"# bench/soak.py on {machine()}", "", "| part | times | what | wrong |", "|---|---|---|---|"]
    path.write_text("\n".join([*head, *table]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
