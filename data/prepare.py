"""Fetch data sets, check them, and write them as data/NAME.jsonl:  python data/prepare.py NAME... [--from PATH]"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, its own folder is there instead

from aipo.errors import UserError
from aipo.problems.contamination import find_overlaps
from aipo.problems.datasets import Problem, stem
from aipo.problems.sources import GROUPS, SOURCES, prepare, prepared

EXAMPLES = """\
names: {names}

examples:
  python data/prepare.py aime24 math500                        from the Hugging Face hub
  python data/prepare.py amc23 --from downloads/amc.parquet    from a file: parquet, JSON, JSONL or CSV
  python data/prepare.py all --from downloads                  from a folder with files called like the sets
  python data/prepare.py dapo_math_17k --decontaminate         without what overlaps the evaluation sets in data/

amc23 has the 83 problems of 2022 and 2023 (40 where the file has those of 2023 alone), amc23_40 those of 2023.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="data/prepare.py",
        description=__doc__,
        epilog=EXAMPLES.format(names=", ".join(GROUPS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="sets to prepare, or all")
    parser.add_argument("--from", dest="local", type=Path, metavar="PATH", help="local file or folder, not the hub")
    parser.add_argument("--revision", help="commit, tag or branch on the hub (default: the one that was checked)")
    beside = Path.cwd() == Path(__file__).resolve().parent  # started in data/ itself
    folder = Path("." if beside else "data")
    parser.add_argument("--out", type=Path, default=folder, help="folder to write to (default: data)")
    parser.add_argument(
        "--any-count", action="store_true", help="let an evaluation set have another size than it should"
    )
    parser.add_argument(
        "--decontaminate",
        action="store_true",
        help="drop training questions that overlap an evaluation set present in the folder written to",
    )
    return parser.parse_args(arguments)


def expand(names: Sequence[str]) -> list[str]:
    """Groups to their sets, each once, sets for evaluation first."""
    for name in names:
        if name not in GROUPS:
            near = difflib.get_close_matches(name, GROUPS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown data set {name!r}: {hint}known are {', '.join(GROUPS)}")
    chosen = {each for name in names for each in GROUPS[name]}
    return [name for name in GROUPS if name in chosen]


def is_training(name: str) -> bool:
    return name in SOURCES and SOURCES[name].role == "train"


def report_contamination(
    training: Mapping[str, Sequence[Problem]], evaluation: Mapping[str, Sequence[Problem]], fresh: set[str]
) -> None:
    """A line for each pair of a training and an evaluation set of which one is fresh, and the worst of each pair."""
    pairs = [(train, name) for train in training for name in evaluation if {train, name} & fresh]
    if pairs:
        print("contamination: evaluation questions with half or more of their 8-grams in one training question")
    for train, name in pairs:
        overlaps = find_overlaps(training[train], evaluation[name])
        theirs = {overlap.evaluation.id for overlap in overlaps}
        same = {overlap.evaluation.id for overlap in overlaps if overlap.same_answer}
        ours = {overlap.training.id for overlap in overlaps}
        print(
            f"  {name:<12} in {train:<13}  {len(theirs):>4} of {len(evaluation[name]):>5,}, {len(same)} with the same "
            f"answer; {len(ours)} training questions"
        )
        for overlap in sorted(overlaps, key=lambda overlap: -overlap.share)[:3]:
            print(f"    {overlap.share:.0%} of {overlap.evaluation.id} in {overlap.training.id}")
            if not SOURCES[name].protected:
                for problem in (overlap.evaluation, overlap.training):
                    print(f"      {' '.join(stem(problem).split())[:90]} ... [{problem.answer[:20]}]")


def main() -> int:
    arguments = parse()
    failed = False
    fresh: set[str] = set()
    try:
        names = expand(arguments.names)
        if arguments.decontaminate and not any(map(is_training, names)):
            raise UserError("--decontaminate needs a training set to drop questions from: dapo_math_17k or gsm8k")
        if len(names) > 1 and (arguments.revision or (arguments.local and arguments.local.is_file())):
            raise UserError(f"--revision, and --from with a file, go with one set: one of {', '.join(names)}")
        for name in names:
            apart_from = {}
            if arguments.decontaminate and is_training(name):
                apart_from = prepared("evaluation", arguments.out)
                if not apart_from:
                    raise UserError(f"--decontaminate: no evaluation set in {arguments.out}: prepare those first")
            try:
                report = prepare(
                    name,
                    out=arguments.out,
                    local=arguments.local,
                    revision=arguments.revision,
                    any_count=arguments.any_count,
                    apart_from=apart_from,
                )
            except UserError as error:  # the other sets can still be had
                failed = True
                print(f"error: {error}", file=sys.stderr, flush=True)
            else:
                fresh.add(name)
                print(report, flush=True)
        report_contamination(prepared("train", arguments.out), prepared("evaluation", arguments.out), fresh)
    except UserError as error:
        failed = True
        print(f"error: {error}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
