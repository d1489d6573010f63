"""The proof at start that slots give what the model itself gives.

Runs the model once as transformers would (sdpa, no cache, its own processor) and once through slots in
ragged chunks, two sequences in one batch, and compares logits. A model whose layers need more than keys,
values and positions (bidirectional image tokens, per-layer inputs, other attention) is refused here,
before it serves a wrong answer.
"""

from __future__ import annotations

import hashlib
import inspect
import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage

from nightschool_server.chat import user
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.engines import attention
from nightschool_server.engines.delivery import Mailbox
from nightschool_server.engines.loading import LoadedModel
from nightschool_server.engines.rendering import Rendered
from nightschool_server.engines.runner import Runner
from nightschool_server.engines.sequences import Chunk, Job, Sequence
from nightschool_server.errors import ModelFormatError, NightschoolError

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}
"""Largest relative difference of the logits, as a norm."""
_SENTENCE = "Which of these seven things is red, and how many are left?"
_NUM_READ = 6


def switch_to_slots(loaded: LoadedModel, runner: Runner) -> None:
    """Compare, and leave the model on slot attention. Raises ModelFormatError where the two ways differ."""
    prompts = [loaded.renderer.render(prompt) for prompt in _prompts(loaded)]
    with torch.inference_mode():
        expected = [_plain_logits(loaded, rendered) for rendered in prompts]
        implementation = {loaded.text_config_key: attention.NAME} if loaded.text_config_key else attention.NAME
        loaded.parts.model.set_attn_implementation(implementation)
        try:
            actual = _slot_logits(runner, prompts)
        except NightschoolError:
            raise
        except Exception as error:
            raise ModelFormatError(
                f"model {loaded.info.name!r} does not run on slot attention ({type(error).__name__}: {error}): "
                "use another model or the vLLM engine"
            ) from error
    for one, other in zip(expected, actual, strict=True):
        difference = float((one - other).norm() / one.norm())
        if not difference <= _TOLERANCE[loaded.parts.dtype]:
            raise ModelFormatError(
                f"model {loaded.info.name!r} gives other logits on slot attention (relative difference "
                f"{difference:.1e}, at most {_TOLERANCE[loaded.parts.dtype]:.0e}): its layers need more than keys, "
                "values and positions; use another model or the vLLM engine"
            )


def _prompts(loaded: LoadedModel) -> list[Prompt]:
    prompts = [Prompt((user(_SENTENCE),)), Prompt((user("Hello"),))]
    if loaded.info.accepts_images:
        data = _picture()
        name = hashlib.sha256(data).hexdigest()
        prompts[0] = Prompt((user(_SENTENCE, [name]),), images={name: data})
    return prompts


def _picture() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (72, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _plain_logits(loaded: LoadedModel, rendered: Rendered) -> torch.Tensor:
    """Logits [_NUM_READ, vocabulary] of the last positions, from the model's own forward over the whole prompt."""
    model, device = loaded.parts.model, loaded.parts.device
    inputs: dict[str, Any] = {"input_ids": torch.tensor(rendered.token_ids)[None]}
    if rendered.pictures:
        for name in {name for picture in rendered.pictures for name in picture.inputs}:
            inputs[name] = torch.cat([picture.inputs[name] for picture in rendered.pictures])
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            inputs["mm_token_type_ids"] = torch.tensor((rendered.keys < 0).astype(np.int64))[None]
        _check_tokens(loaded, rendered.token_ids)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    output = model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False)
    logits: torch.Tensor = output.logits[0, -_NUM_READ:].float()
    return logits


def _check_tokens(loaded: LoadedModel, token_ids: NDArray[np.int64]) -> None:
    """The spliced prompt must be what the model's whole processor makes of it."""
    if loaded.processor is None:
        return
    prompt = _prompts(loaded)[0]
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _SENTENCE}]}]
    text = loaded.tokenizer.apply_chat_template(
        conversation,
        chat_template=getattr(loaded.processor, "chat_template", None) or loaded.tokenizer.chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )
    image = PillowImage.open(io.BytesIO(next(iter(prompt.images.values()))))
    whole = loaded.processor(text=[text], images=[image], return_tensors="np", add_special_tokens=False)["input_ids"][0]
    if whole.tolist() != token_ids.tolist():
        raise ModelFormatError(
            f"model {loaded.info.name!r}: its processor writes a prompt with an image differently than this engine "
            f"({len(whole)} tokens against {len(token_ids)}): use another model or the vLLM engine"
        )


def _slot_logits(runner: Runner, prompts: list[Rendered]) -> list[torch.Tensor]:
    """The same logits through slots: in chunks of 5, then 1, then 7 tokens, and so on, all prompts together."""
    sequences: list[Sequence] = []
    for slot, rendered in enumerate(prompts):
        # The last tokens of the prompt are scored as a continuation, so that their logits are read.
        cut = len(rendered.token_ids) - _NUM_READ
        start = Rendered(rendered.token_ids[: cut + 1], rendered.keys[: cut + 1], rendered.pictures)
        if rendered.positions is not None:
            start = Rendered(start.token_ids, start.keys, start.pictures, rendered.positions[:, : cut + 1],
                             rendered.position_delta)  # fmt: skip
        following = np.concatenate([rendered.token_ids[cut + 1 :], rendered.token_ids[:1]])
        job = Job("self-test", start, Sampling(), 0, 0, Mailbox(), 0, continuation=following)
        if job.needs_vision:
            runner.see(job)
        job.sequences[0].slot = slot
        sequences.append(job.sequences[0])
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    sizes = [5, 1, 7, 1]
    while any(s.num_computed < s.num_to_compute for s in sequences):
        chunks = [
            Chunk(s, s.num_computed, min(s.num_to_compute, s.num_computed + sizes[(len(logits[i]) + i) % 4]))
            for i, s in enumerate(sequences)
            if s.num_computed < s.num_to_compute
        ]
        read = runner.logits(chunks).float()
        for chunk in chunks:
            count = chunk.end - chunk.first_logit
            index = sequences.index(chunk.sequence)
            logits[index].append(read[:count])
            read = read[count:]
            chunk.sequence.scores.extend([0.0] * count)
            chunk.sequence.num_computed = chunk.end
    return [torch.cat(parts) for parts in logits]
