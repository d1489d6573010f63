"""From a prompt to token ids: chat template, image blocks, tokens, cache keys and positions.

Owns the tokenizer's side of a request. Runs on a small thread pool, off the event loop and off the
owner thread; equal texts are tokenised once. Token ids are what the model's own processor would make of
the same prompt (checked at start, see `selftest.py`).
"""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nightschool_server.chat import Message, template_messages, template_tools, text_only
from nightschool_server.engine import Prompt
from nightschool_server.engines.pictures import Picture, Pictures
from nightschool_server.errors import InvalidRequestError, NightschoolError

_MAX_CACHED_TEXTS = 4096
_PROBE = "nightschool probe"


@dataclass(frozen=True)
class Rendered:
    """A prompt as the model reads it."""

    token_ids: NDArray[np.int64]
    """[num_tokens]"""
    keys: NDArray[np.int64]
    """[num_tokens] token ids, an image's placeholders replaced by a negative hash of the image."""
    pictures: tuple[Picture, ...] = ()
    positions: NDArray[np.int64] | None = None
    """[3, num_tokens] for models with multimodal rotary positions and images, otherwise 0, 1, 2, ..."""
    position_delta: int = 0
    """What is added to a later token's index to get its position."""


@dataclass(frozen=True)
class RenderingParts:
    """What a loaded model gives the renderer."""

    tokenizer: Any
    chat_template: str
    image_token_id: int | None
    pictures: Pictures | None
    rope_index: Callable[..., Any] | None
    """The model's `get_rope_index`, where its positions have three dimensions."""


class Renderer:
    """Renders prompts for one model."""

    def __init__(self, parts: RenderingParts) -> None:
        self._parts = parts
        self._lock = threading.Lock()
        self._tokenised: OrderedDict[str, NDArray[np.int64]] = OrderedDict()
        self._list_content = not self._takes_string_content()

    def render(self, prompt: Prompt) -> Rendered:
        """Token ids of a prompt, ready for the assistant's answer.

        Raises InvalidRequestError on an image that does not decode or fit, on a message that the template
        refuses.
        """
        pictures = self._pictures_of(prompt)
        text = self.text(prompt)
        if self._parts.pictures is not None:
            text = _splice(text, self._parts.pictures.image_mark, pictures)
        token_ids = self.tokenise(text)
        if not len(token_ids):
            raise InvalidRequestError("messages", "the prompt renders to no tokens: send at least one message")
        if not pictures:
            return Rendered(token_ids, token_ids)
        return self._with_pictures(token_ids, pictures)

    def text(self, prompt: Prompt) -> str:
        """The rendered template, every image still its mark. Raises InvalidRequestError on messages that it refuses."""
        return self._apply_template(prompt.messages, template_tools(prompt.tools))

    def tokenise(self, text: str) -> NDArray[np.int64]:
        """Token ids of a text, special tokens recognised and none added; equal texts share the array."""
        with self._lock:
            known = self._tokenised.get(text)
            if known is not None:
                self._tokenised.move_to_end(text)
                return known
        ids = self._parts.tokenizer(text, add_special_tokens=False)["input_ids"]
        token_ids = np.array(ids, dtype=np.int64)
        token_ids.setflags(write=False)
        with self._lock:
            self._tokenised[text] = token_ids
            while len(self._tokenised) > _MAX_CACHED_TEXTS:
                self._tokenised.popitem(last=False)
        return token_ids

    def _pictures_of(self, prompt: Prompt) -> tuple[Picture, ...]:
        names = image_names(prompt, accepts_images=self._parts.pictures is not None)
        return tuple(self._parts.pictures.get(name, prompt.images[name]) for name in names)  # type: ignore[union-attr]

    def _apply_template(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> str:
        conversation = template_messages(messages if self._parts.pictures is not None else text_only(messages))
        if self._list_content:
            for entry in conversation:
                if isinstance(entry["content"], str):
                    entry["content"] = [{"type": "text", "text": entry["content"]}]
        try:
            return self._render_text(conversation, tools)
        except NightschoolError:
            raise
        except Exception as error:
            # Templates are programs of the model's makers: whatever they raise is about these messages.
            raise InvalidRequestError(
                "messages", f"the model's chat template refuses these messages: {error}"
            ) from error

    def _render_text(self, conversation: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        text: str = self._parts.tokenizer.apply_chat_template(
            conversation,
            tools=tools,
            chat_template=self._parts.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
        return text

    def _takes_string_content(self) -> bool:
        """Whether the template writes out a message whose content is a string; some read lists of parts only."""
        try:
            return _PROBE in self._render_text([{"role": "user", "content": _PROBE}], None)
        except Exception:
            return False

    def _with_pictures(self, token_ids: NDArray[np.int64], pictures: tuple[Picture, ...]) -> Rendered:
        is_placeholder = token_ids == self._parts.image_token_id
        expected = sum(picture.num_placeholders for picture in pictures)
        if int(is_placeholder.sum()) != expected:
            raise InvalidRequestError(
                "images",
                f"the prompt has {int(is_placeholder.sum())} image tokens for {len(pictures)} images that need "
                f"{expected}: do not write the model's image token in a text part",
            )
        keys = token_ids.copy()
        keys[is_placeholder] = np.concatenate([_picture_keys(picture) for picture in pictures])
        if self._parts.rope_index is None:
            return Rendered(token_ids, keys, pictures)
        positions, delta = _rope_positions(self._parts.rope_index, token_ids, is_placeholder, pictures)
        return Rendered(token_ids, keys, pictures, positions, delta)


def image_names(prompt: Prompt, *, accepts_images: bool) -> list[str]:
    """The images of a prompt in order, by sha256. Raises InvalidRequestError where they cannot be had.

    A model that reads text only is told of a tool's images in words; one that the user sends it is refused.
    """
    messages = prompt.messages if accepts_images else text_only(prompt.messages)
    names = [sha256 for message in messages for sha256 in message.images]
    if names and not accepts_images:
        raise InvalidRequestError(
            "images", f"the prompt has {len(names)} images and this model reads text only: send text"
        )
    missing = [name for name in names if name not in prompt.images]
    if missing:
        raise InvalidRequestError("images", f"the messages name image {missing[0]} whose bytes are not here: send it")
    return names


def split_at_marks(text: str, mark: str, num_images: int) -> list[str]:
    """The texts around the image marks. Raises InvalidRequestError where marks and images differ in number."""
    pieces = text.split(mark)
    if len(pieces) - 1 != num_images:
        raise InvalidRequestError(
            "images",
            f"the prompt has {num_images} images and {len(pieces) - 1} image marks {mark!r}: "
            "do not write the mark in a text part, and use a template that marks every image",
        )
    return pieces


def _splice(text: str, mark: str, pictures: Sequence[Picture]) -> str:
    """The rendered text with each image mark replaced by its picture's block."""
    pieces = split_at_marks(text, mark, len(pictures))
    return pieces[0] + "".join(p.block + piece for p, piece in zip(pictures, pieces[1:], strict=True))


def _picture_keys(picture: Picture) -> NDArray[np.int64]:
    """One negative key per placeholder, different for every image."""
    digest = hashlib.sha256(picture.sha256.encode()).digest()
    return np.full(picture.num_placeholders, -1 - (int.from_bytes(digest[:8], "big") >> 2), dtype=np.int64)


def _rope_positions(
    rope_index: Callable[..., Any],
    token_ids: NDArray[np.int64],
    is_placeholder: NDArray[np.bool_],
    pictures: Sequence[Picture],
) -> tuple[NDArray[np.int64], int]:
    """Positions [3, num_tokens] and the delta of later tokens, from the model's own rule."""
    accepted = inspect.signature(rope_index).parameters
    arguments = {
        "mm_token_type_ids": torch.from_numpy(is_placeholder.astype(np.int32))[None],
        "image_grid_thw": torch.cat([p.inputs["image_grid_thw"] for p in pictures]),
        "attention_mask": torch.ones((1, len(token_ids)), dtype=torch.long),
    }
    chosen = {name: value for name, value in arguments.items() if name in accepted}
    positions, delta = rope_index(input_ids=torch.tensor(token_ids)[None], **chosen)
    return positions[:, 0].cpu().numpy().astype(np.int64), int(delta.reshape(-1)[0])
