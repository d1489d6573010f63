"""A process for the kill -9 test of the request log: `python -m tests.server.log_child HOME`.

Writes records and feedback, prints `response_id feedback_id` once both are acknowledged, and offers lines in between.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from nightschool_server.home import Home
from nightschool_server.store.request_log import Feedback, RequestLog
from nightschool_server.store.store import Store

from tests.server.log_records import record


async def main(path: Path) -> None:
    log = RequestLog(Store.open(Home(path)), 1000)
    number = 0
    while True:
        number += 1
        for extra in range(5):
            log.offer(record(f"offered_{number}_{extra}"))
        name = f"written_{number}"
        await log.write(record(name, request_id=name, images={"x": b"image %d" % number}))
        feedback_id = await log.feedback(Feedback(name, "alice", good=False, request_id=name))
        print(name, feedback_id, flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
