"""Generates the Python code of the wire beside its `.proto` files.

python proto/generate.py            write it
python proto/generate.py --check    exit 1 where what is committed differs
"""

from __future__ import annotations

import argparse
import filecmp
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
WIRE = Path("nightschool_proto/v1")


def generate(target: Path) -> None:
    """Write the generated modules and their type stubs below `target`."""
    import grpc_tools
    from grpc_tools import protoc

    # protoc starts the mypy plugins by name: they lie beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    protos = sorted(str(path.relative_to(ROOT)) for path in (ROOT / WIRE).glob("*.proto"))
    code = protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *outputs, *protos])
    if code != 0:
        raise SystemExit(code)


def stale(target: Path) -> list[str]:
    """Names of the generated files that differ from, or are missing in, the committed ones."""
    fresh = sorted((target / WIRE).iterdir())
    committed = ROOT / WIRE
    return [f.name for f in fresh if not _same(f, committed / f.name)]


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def main() -> None:
    """Generate, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare with what is committed")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        differing = stale(Path(folder))
    if differing:
        sys.exit(f"generated code is out of date: {', '.join(differing)}; run `make proto`")


if __name__ == "__main__":
    main()
