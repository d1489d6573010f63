"""The command line `nightschool`: one module per group of commands, on top of the SDK.

stdout is results, stderr is progress. Exit codes: 0 done, 1 a fault of the server or the network, 2 the user's mistake,
130 interrupted. This package alone imports click and rich.
"""

from __future__ import annotations

from nightschool.cli.adapters import adapters
from nightschool.cli.critic import critic
from nightschool.cli.cycles import cycles
from nightschool.cli.data import forget, tasks
from nightschool.cli.init import init
from nightschool.cli.learner import learner
from nightschool.cli.model import feedback, generate, models, run
from nightschool.cli.pairs import pairs
from nightschool.cli.processes import check, doctor, evaluate, learn, serve, token, train
from nightschool.cli.root import nightschool
from nightschool.cli.status import status

__all__ = ["main", "nightschool"]

for _command in (
    init, check, serve, doctor, learn, train, evaluate, token, status, generate, run, feedback, models,
    adapters, cycles, critic, learner, tasks, pairs, forget,
):  # fmt: skip
    nightschool.add_command(_command)


def main() -> None:
    """The entry point of the `nightschool` script."""
    nightschool.main(prog_name="nightschool")
