"""python -m aipo.credit: see :mod:`aipo.credit.command`."""

from __future__ import annotations

import sys

from aipo.errors import exit_code
from aipo.threads import settle


@exit_code
def main() -> int:
    settle()  # before torch is imported
    from aipo.credit import command

    return command.main()


if __name__ == "__main__":
    sys.exit(main())
