"""Which tests need a sandbox, and whether this machine has one."""

from __future__ import annotations

import asyncio

import pytest
from nightschool_server.config.code import CodeConfig
from nightschool_server.errors import FailedPreconditionError
from nightschool_server.sandbox.proof import prove
from nightschool_server.sandbox.sandbox import Sandbox


def _missing() -> str:
    """Why there is no sandbox here; empty where there is one."""
    try:
        asyncio.run(prove(Sandbox(CodeConfig())))
    except FailedPreconditionError as error:
        return str(error)
    return ""


MISSING = _missing()
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=MISSING or "there is a sandbox")
