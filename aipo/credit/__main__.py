"""python -m aipo.credit: see :mod:`aipo.credit.command`."""

from __future__ import annotations

import sys

from aipo.errors import UserError
from aipo.threads import settle


def main() -> int:
    try:
        settle()  # before torch is imported
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from aipo.credit import command

    return command.main()


if __name__ == "__main__":
    sys.exit(main())
