"""`nightschool pairs label`: people say which of two candidates is better, at a terminal or in a file.

Owns the command line, the questions and the answers; what is offered and kept is `labels.py`'s. Exit codes: 0 done,
2 the user's mistake.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TextIO

from nightschool_server.errors import ConfigError, FailedPreconditionError, InvalidRequestError
from nightschool_server.home import Home
from nightschool_server.store.store import Store

from nightschool_learner.gold import Better
from nightschool_learner.labels import Offer, insert_label, offers

USER_MISTAKE = 2
KEYS: dict[str, Better] = {"a": "a", "b": "b", "=": "tie"}
ASK = "better? a, b, = (neither), s (skip), q (quit): "

EXAMPLE = """example:
  nightschool pairs label --num 30
  nightschool pairs label --export blind.jsonl     then fill in "better" (a, b or tie) in each line, and
  nightschool pairs label --file blind.jsonl
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Label pairs. Returns the exit code."""
    options = _parser().parse_args(arguments)
    home = Home(options.home.expanduser().absolute())
    try:
        with closing(Store.open(home, migrate=False)) as store:
            print(_act(store, options))  # noqa: T201
    except (ConfigError, FailedPreconditionError, InvalidRequestError, OSError) as error:
        print(f"nightschool pairs label: {error}", file=sys.stderr)  # noqa: T201
        return USER_MISTAKE
    return 0


def _act(store: Store, options: argparse.Namespace) -> str:
    if options.file is not None:
        return f"{take_file(store, options.file, options.by)} labels kept"
    open_offers = offers(store, options.by, options.cycle)[: options.num]
    if options.export is not None:
        text = "".join(json.dumps(offer.to_json(), ensure_ascii=False) + "\n" for offer in open_offers)
        options.export.write_text(text, encoding="utf-8")
        return f"{len(open_offers)} pairs in {options.export}"
    if not sys.stdin.isatty():
        raise InvalidRequestError("file", "stdin is no terminal: give --file, or --export to get one to fill in")
    return f"{ask_all(store, open_offers, options.by, input, sys.stdout)} labels kept"


def take_file(store: Store, path: Path, labelled_by: str) -> int:
    """Keep the labels of a file; lines whose `better` is empty are left out. Returns how many.

    Raises InvalidRequestError with line and rule, before anything is kept.
    """
    found: list[tuple[str, Better]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            offer_id, better = value["id"], value["better"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InvalidRequestError("file", f"{path}, line {number}: {error!r}; it needs id and better") from error
        if better == "":
            continue
        if better not in KEYS.values():
            raise InvalidRequestError("file", f"{path}, line {number}: better is {better!r}; it must be a, b or tie")
        found.append((str(offer_id), better))
    for offer_id, better in found:
        insert_label(store, offer_id, better, labelled_by)
    return len(found)


def ask_all(store: Store, asked: Sequence[Offer], labelled_by: str, read: Callable[[str], str], out: TextIO) -> int:
    """Show every pair and keep what is said; until `q`, the end of input or the last one. Returns how many."""
    num_kept = 0
    for number, offer in enumerate(asked, start=1):
        out.write(f"\n--- {number} of {len(asked)} ---\n{shown(offer)}\n")
        while True:
            try:
                said = read(ASK).strip().lower()
            except EOFError:
                return num_kept
            if said == "q":
                return num_kept
            if said == "s":
                break
            if said in KEYS:
                insert_label(store, offer.id, KEYS[said], labelled_by)
                num_kept += 1
                break
    return num_kept


def shown(offer: Offer) -> str:
    """A pair as a person reads it. Control characters of what a model wrote stay out of the terminal."""
    parts = [f"task: {offer.task}", *(f"picture: {sha256}" for sha256 in offer.images), *offer.history]
    for side, view in (("a", offer.a), ("b", offer.b)):
        parts.append(f"[{side}] {view.action}")
        parts.append(f"    gave: {view.observation}" if view.observation else "    (final answer)")
    return "".join(c if c.isprintable() or c == "\n" else " " for c in "\n".join(parts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nightschool pairs label",
        description="Say which of two candidates is better; both are shown blind, in an order by chance.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--home", type=Path, required=True, help="the server's home folder")
    parser.add_argument("--cycle", default="", metavar="ID", help="only pairs of one cycle")
    parser.add_argument("--num", type=int, default=50, metavar="N", help="at most so many pairs")
    parser.add_argument("--by", default="operator", metavar="NAME", help="who labels")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the pairs to FILE instead of asking")
    parser.add_argument("--file", type=Path, metavar="FILE", help="take labels from FILE instead of asking")
    return parser


if __name__ == "__main__":
    sys.exit(main())
