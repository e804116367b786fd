"""Write the report of a run or an evaluation:  python -m aipo.report FOLDER [FOLDER ...] [--out FILE]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from aipo.errors import UserError
from aipo.report.evaluation_report import evaluation_report, is_evaluation
from aipo.report.run_report import report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m aipo.report", description=__doc__)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="run folders, or one or two evaluations"
    )
    parser.add_argument("--out", type=Path, help="the file (default: report.html in the first folder)")
    options = parser.parse_args()
    try:
        write = evaluation_report if all(map(is_evaluation, options.folders)) else report
        print(write(options.folders, options.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
