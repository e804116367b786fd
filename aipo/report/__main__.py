"""Write the report of a run or an evaluation:  python -m aipo.report FOLDER [FOLDER ...] [--out FILE]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from aipo.errors import exit_code
from aipo.report.evaluation_report import evaluation_report, is_evaluation
from aipo.report.run_report import report


@exit_code
def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m aipo.report", description=__doc__)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="run folders, or one or two evaluations"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the file (default: report.html in the folder; of several comparison.html in the first)",
    )
    options = parser.parse_args()
    write = evaluation_report if all(map(is_evaluation, options.folders)) else report
    print(write(options.folders, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
