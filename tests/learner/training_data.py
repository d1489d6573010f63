"""Preference pairs for the trainer's tests: sums by tool, and colours of pictures, in the product's file format."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from nightschool_learner.manifest import Hyperparameters, Manifest, ProbePrompt, Result, RunFolder
from nightschool_server.agent.toolcalls import parse_answer, write_call
from nightschool_server.chat import (
    Message,
    ToolSpec,
    assistant,
    canonical_json,
    messages_to_json,
    system,
    template_messages,
    template_tools,
    tool_result,
    user,
)
from PIL import Image

MODEL = Path(__file__).parents[2] / "examples" / "shop" / "model"
CALCULATOR = ToolSpec(
    "calculator",
    "Works out an expression.",
    canonical_json({"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}),
)
SYSTEM = system("You help in a shop.")
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 210)}


def put_blob(blobs: Path, data: bytes) -> str:
    """Keep bytes as the blob store does; their sha256."""
    sha256 = hashlib.sha256(data).hexdigest()
    path = blobs / sha256[:2] / sha256
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return sha256


def picture(colour: str, side: int = 64) -> bytes:
    """A PNG of one colour with a white frame."""
    image = Image.new("RGB", (side, side), "white")
    image.paste(COLOURS[colour], (8, 8, side - 8, side - 8))
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def text_pair(rng: random.Random, *, second_step: bool = False) -> dict[str, Any]:
    """Subtract where the rejected step adds; as a second step, the answer where the rejected invents one."""
    a, b = rng.randint(20, 90), rng.randint(2, 19)
    history: list[Message] = [SYSTEM, user(f"What is left of {a} when {b} are gone?")]
    chosen = write_call("calculator", {"expression": f"{a} - {b}"})
    rejected = write_call("calculator", {"expression": f"{a} + {b}"})
    if second_step:
        history += [assistant(chosen), tool_result(parse_answer(chosen).calls[0], str(a - b))]
        chosen, rejected = str(a - b), str(a * 10)
    return _row(history, chosen, rejected)


def picture_pair(rng: random.Random, blobs: Path, *, colours: tuple[str, str] | None = None) -> dict[str, Any]:
    """The colour of a picture against another one; by chance where they are not given."""
    colour, other = colours or rng.sample(sorted(COLOURS), 2)
    sha256 = put_blob(blobs, picture(colour))
    return _row([SYSTEM, user("Which colour is it?", [sha256])], colour, other)


def anchor(rng: random.Random) -> dict[str, Any]:
    """A sum that is to stay a sum."""
    a, b = rng.randint(20, 90), rng.randint(2, 19)
    row = _row([SYSTEM, user(f"Add {a} and {b} for Anna.")], write_call("calculator", {"expression": f"{a} + {b}"}), "")
    return {"prompt": row["prompt"], "answer": row["chosen"], "tools": row["tools"], "images": [], "step_id": "step_x"}


def _row(history: list[Message], chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt": template_messages(history),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "tools": template_tools([CALCULATOR]),
        "images": [sha256 for message in history for sha256 in message.images],
        "pair_id": f"pair_{abs(hash((chosen, rejected)))}",
    }


def probe_prompts() -> tuple[ProbePrompt, ...]:
    """Two text-only probes."""
    tools = ({"name": CALCULATOR.name, "description": CALCULATOR.description, "parameters": CALCULATOR.parameters},)
    return tuple(
        ProbePrompt(
            messages=messages_to_json((SYSTEM, user(f"What is left of {a} when 7 are gone?"))),
            tools=tools,
            continuation=write_call("calculator", {"expression": f"{a} - 7"}),
        )
        for a in (31, 58)
    )


def make_run(
    folder: Path,
    *,
    num_text: int = 12,
    num_pictures: int = 6,
    seed: int = 3,
    parent: Path | None = None,
    model: Path = MODEL,
    num_anchors: int = 0,
    **wanted: Any,
) -> Manifest:
    """A run folder with pairs, anchors, blobs and manifest.json, ready for the trainer."""
    rng = random.Random(seed)
    output, blobs = folder / "train", folder / "blobs"
    output.mkdir(parents=True)
    rows = [text_pair(rng, second_step=i % 3 == 2) for i in range(num_text)]
    rows += [picture_pair(rng, blobs) for _ in range(num_pictures)]
    rng.shuffle(rows)
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    anchors = folder / "anchors.jsonl"
    anchors.write_text("".join(json.dumps(anchor(rng)) + "\n" for _ in range(num_anchors)))
    manifest = Manifest(
        cycle_id="cycle_test",
        base_model=str(model),
        parent="base" if parent is None else "0001-parent",
        parent_folder=parent,
        pairs_file=pairs,
        pairs_sha256=hashlib.sha256(pairs.read_bytes()).hexdigest(),
        anchors_file=anchors if num_anchors else None,
        anchors_sha256=hashlib.sha256(anchors.read_bytes()).hexdigest() if num_anchors else "",
        blobs=blobs,
        output=output,
        hyperparameters=Hyperparameters(
            **{"learning_rate": 1e-3, "epochs": 2, "batch_size": 4, "checkpoint_steps": 2} | wanted
        ),
        seed=seed,
        nice=0,
        probes=probe_prompts(),
    )
    (output / "manifest.json").write_text(manifest.model_dump_json())
    return manifest


def change_pairs(manifest: Manifest, change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> Manifest:
    """The run with every pair changed by its place in the file."""
    rows = [json.loads(line) for line in manifest.pairs_file.read_text().splitlines()]
    manifest.pairs_file.write_text("".join(json.dumps(change(i, row)) + "\n" for i, row in enumerate(rows)))
    digest = hashlib.sha256(manifest.pairs_file.read_bytes()).hexdigest()
    return rewritten(manifest, pairs_sha256=digest)


def rewritten(manifest: Manifest, **changes: Any) -> Manifest:
    """The run with other values in its manifest."""
    changed = manifest.model_copy(update=changes)
    (manifest.output / "manifest.json").write_text(changed.model_dump_json())
    return changed


LEARNS = {"epochs": 6, "learning_rate": 3e-3}
"""Enough for the tiny model to rank most pairs right."""


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    manifest: Manifest
    folder: RunFolder
    result: Result


def run_trainer(manifest: Manifest) -> subprocess.CompletedProcess[str]:
    """The trainer as the learner starts it."""
    return subprocess.run(
        [sys.executable, "-m", "nightschool_learner.trainer", str(manifest.output / "manifest.json")],
        capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip


def train(folder: Path, **wanted: Any) -> Trained:
    """A run of the trainer from start to end."""
    return finished(make_run(folder, **wanted))


def finished(manifest: Manifest) -> Trained:
    """The run, trained from start to end."""
    done = run_trainer(manifest)
    assert done.returncode == 0, done.stderr
    result = RunFolder(manifest.output).read_result()
    assert result is not None
    return Trained(manifest, RunFolder(manifest.output), result)
