"""`python -m nightschool_server`."""

from __future__ import annotations

import sys


def run() -> int:
    """The command line, or one sentence where the server's packages are missing."""
    try:
        from nightschool_server.main import main
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nightschool"):
            raise
        print(f"nightschool: {error.name} is not installed: pip install 'nightschool[server]'", file=sys.stderr)  # noqa: T201
        return 2
    return main()


if __name__ == "__main__":
    raise SystemExit(run())
