"""The slow exact reference: transformers' own `generate`, one request at a time, peft for adapters.

It renders with the tokenizer's template and the model's own processor, and shares no code with the
engine but the chat types.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nightschool_server.chat import template_messages, template_tools
from nightschool_server.engine import BASE, Prompt
from peft import PeftModel
from PIL import Image as PillowImage
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Idefics3Processor,
    Qwen2VLImageProcessorPil,
)


class Reference:
    """One model folder, with adapters by name."""

    def __init__(self, folder: Path, adapters: Mapping[str, Path] | None = None) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._idefics3 = (folder / "processor_config.json").exists()
        self._qwen2_vl = (folder / "preprocessor_config.json").exists()
        auto = AutoModelForImageTextToText if self._idefics3 or self._qwen2_vl else AutoModelForCausalLM
        self.model: Any = auto.from_pretrained(folder).eval()
        for name, path in (adapters or {}).items():
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(path, adapter_name=name)
            else:
                self.model = PeftModel.from_pretrained(self.model, path, adapter_name=name)
        self.model.eval()
        self._processor = Idefics3Processor.from_pretrained(folder) if self._idefics3 else None
        self._known: dict[str, list[int]] = {}

    @property
    def sees(self) -> bool:
        """Whether the model takes images."""
        return self._idefics3 or self._qwen2_vl

    @property
    def image_mark(self) -> str:
        """What the template writes for an image, and the processor replaces."""
        return "<image>" if self._idefics3 else "<|image_pad|>"

    def inputs(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """What the model's forward takes for a prompt."""
        text = self.tokenizer.apply_chat_template(
            template_messages(prompt.messages),
            tools=template_tools(prompt.tools),
            add_generation_prompt=True,
            tokenize=False,
        )
        names = [name for message in prompt.messages for name in message.images]
        images = [PillowImage.open(io.BytesIO(prompt.images[name])).convert("RGB") for name in names]
        if images and self._processor is not None:
            return dict(self._processor(text=[text], images=images, return_tensors="pt"))
        if images:
            return self._qwen2_vl_inputs(text, images)
        return dict(self.tokenizer([text], return_tensors="pt", add_special_tokens=False))

    def greedy(self, prompt: Prompt, max_tokens: int, adapter: str = BASE, *, ignore_eos: bool = False) -> list[int]:
        """Token ids of the greedy answer, the end token included; worked out once, since several tests ask for it."""
        asked = repr((prompt, max_tokens, adapter, ignore_eos))
        if asked not in self._known:
            self._known[asked] = self._generate(prompt, max_tokens, adapter, ignore_eos=ignore_eos)
        return list(self._known[asked])

    def _generate(self, prompt: Prompt, max_tokens: int, adapter: str, *, ignore_eos: bool) -> list[int]:
        inputs = self.inputs(prompt)
        # min_new_tokens would ban the end token; without one, generate runs to the limit as the engine does.
        kwargs: dict[str, Any] = {"eos_token_id": -1} if ignore_eos else {}
        with torch.no_grad(), self._on(adapter):
            out = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens, **kwargs)
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    def logprobs(self, prompt: Prompt, following: list[int], adapter: str = BASE) -> torch.Tensor:
        """[len(following), vocabulary]: log-softmax at each position of a continuation."""
        inputs = self.inputs(prompt)
        num_prompt = inputs["input_ids"].shape[1]
        more = torch.tensor([following], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], dim=1)
        with torch.no_grad(), self._on(adapter):
            logits = self.model(**inputs).logits[0, num_prompt - 1 : -1]
        return logits.log_softmax(dim=-1)

    def _on(self, adapter: str) -> Any:
        if not isinstance(self.model, PeftModel):
            assert adapter == BASE
            return torch.no_grad()
        if adapter == BASE:
            return self.model.disable_adapter()
        self.model.set_adapter(adapter)
        return torch.no_grad()

    def _qwen2_vl_inputs(self, text: str, images: list[Any]) -> dict[str, torch.Tensor]:
        """Qwen2VLProcessor's rule, which needs torchvision: one placeholder per 2 x 2 patches."""
        batch = Qwen2VLImageProcessorPil.from_pretrained(self.folder)(images=images, return_tensors="pt")
        mark = "<|image_pad|>"
        for grid in batch["image_grid_thw"]:
            text = text.replace(mark, "<|placeholder|>" * (int(grid.prod()) // 4), 1)
        inputs = dict(self.tokenizer([text.replace("<|placeholder|>", mark)], return_tensors="pt"))
        is_image = inputs["input_ids"] == self.tokenizer.convert_tokens_to_ids(mark)
        return {**inputs, **batch, "mm_token_type_ids": is_image.long()}
