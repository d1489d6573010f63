"""Sampling through the server: the learner as one more caller, behind every live request.

Owns the connection of a cycle to the server of its home, the waiting for a server that is away or a learner
that is paused, and the seeds of all sampling. Every request is PRACTICE (it runs when no live request waits),
NO_LOG (what the learner samples never becomes a seed), and pinned to an adapter by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from nightschool_proto.v1 import agent_pb2, content_pb2

from nightschool import AsyncClient
from nightschool_learner.errors import CycleCancelledError, ServerGoneError
from nightschool_learner.stages import Cycle
from nightschool_server.chat import Message, ToolSpec, canonical_json
from nightschool_server.engine import Sampling, TopLogprob
from nightschool_server.home import Home
from nightschool_server.wire_replies import messages_to_proto

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0


def derive_seed(cycle_seed: int, *what: str | int) -> int:
    """A seed for one use within a cycle: 48 bits of a hash, so that no two uses share a stream."""
    digest = hashlib.sha256(canonical_json([cycle_seed, *what]).encode()).digest()
    return int.from_bytes(digest[:6], "big")
