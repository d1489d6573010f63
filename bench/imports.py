"""What importing the SDK costs beside grpc and protobuf, milliseconds.

    python bench/imports.py [--quick] [--rounds 20]

Every round is a fresh interpreter with the byte code of an earlier one. The last line is JSON: `sdk_import_ms` is the
median, with the least and the most.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # As a script: its folder's names (logging) must not hide packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import statistics
import subprocess

CODE = (
    "import time, grpc, google.protobuf.message; begun = time.perf_counter(); import nightschool; "
    "print((time.perf_counter() - begun) * 1000)"
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What importing the SDK costs beside grpc.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    found = parser.parse_args()
    rounds = 5 if found.quick else found.rounds
    once = [sys.executable, "-c", CODE]
    subprocess.run(once, check=True, capture_output=True)
    took = sorted(float(subprocess.run(once, check=True, capture_output=True).stdout) for _ in range(rounds))
    print(f"import nightschool: {statistics.median(took):.0f} ms ({took[0]:.0f}-{took[-1]:.0f}, n = {rounds})")
    print(json.dumps({"sdk_import_ms": [round(v, 1) for v in (statistics.median(took), took[0], took[-1])]}))


if __name__ == "__main__":
    main()
