"""How the learner's processes step back behind serving: their niceness, where it counts.

Linux divides the processor among sessions first (autogroups) and applies niceness only within one: measured on one core
against a busy parent, a child of niceness 10 gets 13% of the time in its parent's session and 52% in a session of its
own. So the learner's children are groups of processes in its session, never sessions.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

AUTOGROUP = Path("/proc/self/autogroup")


def be_nice(niceness: int) -> None:
    """Have this process and what it starts run at `niceness`, 0 to 19; one that is nicer already stays as it is.

    A leader of a session (a learner that a service manager started) lowers its whole session's share, too.
    """
    niceness = os.nice(max(0, niceness - os.nice(0)))
    if os.getsid(0) == os.getpid() and AUTOGROUP.exists():
        # Refused where the kernel was asked a moment ago; the niceness within the session holds anyway.
        with contextlib.suppress(OSError):
            AUTOGROUP.write_text(str(niceness))
