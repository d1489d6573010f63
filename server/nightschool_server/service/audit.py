"""The audit trail of what operators do beside adapters (whose trail `adapters/rows.py` writes): one row an act."""

from __future__ import annotations

import logging
import sqlite3
import time

log = logging.getLogger(__name__)


def audit(db: sqlite3.Connection, actor: str, action: str, subject: str, reason: str) -> None:
    """Write who did what to what, and why, in the caller's transaction."""
    db.execute(
        "INSERT INTO events (at, actor, action, subject, reason) VALUES (?, ?, ?, ?, ?)",
        (time.time(), actor, action, subject, reason),
    )
    log.info("event=%s actor=%s subject=%s", action, actor, subject)
