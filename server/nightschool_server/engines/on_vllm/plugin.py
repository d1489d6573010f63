"""What vLLM finds of nightschool through its plugin entry points, in every process of the engine.

`vllm.platform_plugins` asks which platform runs; on a plain CPU the answer is ours, whose LoRA is right in mixed
batches (`grouped.py`). `vllm.general_plugins` runs in each process of the engine; it ends the process when the server
is gone, which a killed server cannot do itself. Both do nothing unless a nightschool server started the engine.
Imports nothing: entry points are looked at by every program that uses vLLM.
"""

from __future__ import annotations

import os
import threading
import time

SERVER_PID_VARIABLE = "NIGHTSCHOOL_VLLM_SERVER_PID"
"""Set by the server for the engine's processes: its pid."""

_PLAIN_CPU = "vllm.platforms.cpu.CpuPlatform"
_POLL_S = 1.0


def platform() -> str | None:
    """The platform class to take, None for vLLM's own choice."""
    if SERVER_PID_VARIABLE not in os.environ:
        return None
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() != _PLAIN_CPU:
        return None
    return "nightschool_server.engines.on_vllm.platform.GroupedCpuPlatform"


def guard() -> None:
    """End this process soon after the server that it belongs to has ended."""
    server = int(os.environ.get(SERVER_PID_VARIABLE, "0"))
    if server and server != os.getpid():
        threading.Thread(target=_watch, args=(server,), name="nightschool-guard", daemon=True).start()


def _watch(server: int) -> None:
    while _lives(server):
        time.sleep(_POLL_S)
    os._exit(1)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
