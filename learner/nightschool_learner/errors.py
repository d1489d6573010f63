"""The errors of the learner, one tree; the loop turns each into the end of a cycle.

LearnerError
├── NothingToLearnError    the cycle ends `stopped`: too few seeds, too few pairs, no coverage
├── CycleCancelledError    the cycle ends `cancelled`: an operator asked for it
├── StageFailedError       the cycle ends `failed`: a stage cannot go on, and trying again would not help
├── EndpointError          one call to an endpoint failed after its retries: its unit goes without an answer
├── BenchmarkError         a benchmark's data, or what is asked of a run, is not as it must be: the user's mistake
└── ServerGoneError        the server refused or vanished for longer than the learner waits

Any other exception out of a stage also ends the cycle as `failed`; its traceback goes to the log.
"""

from __future__ import annotations


class LearnerError(Exception):
    """Base of everything the learner raises on purpose. The message is shown to operators."""


class NothingToLearnError(LearnerError):
    """There is nothing to learn from: the message names the count, the bound and the setting."""


class CycleCancelledError(LearnerError):
    """An operator cancelled the cycle; the message is their reason."""


class StageFailedError(LearnerError):
    """A stage cannot go on: the message says what, the value, the rule and the remedy."""


class EndpointError(LearnerError):
    """A call to an endpoint failed after its retries: the message names role, model and the last failure."""


class BenchmarkError(LearnerError):
    """A benchmark cannot be run as asked: the message names file, value, rule and remedy."""


class ServerGoneError(LearnerError):
    """No server answered within the time that the learner waits for one."""
