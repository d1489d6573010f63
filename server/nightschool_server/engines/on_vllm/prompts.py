"""From a prompt to what vLLM takes: our chat template and tokens, its own image processing.

Every engine renders with the same template and tokenizer, so that a trainer sees the tokens that were served. An image
stands as its one mark; vLLM replaces the mark by the image's placeholders.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nightschool_server.engine import Prompt
from nightschool_server.engines.guidance import is_guided
from nightschool_server.engines.matching import Guide
from nightschool_server.engines.model_folder import ModelFolder
from nightschool_server.engines.pictures import decode
from nightschool_server.engines.rendering import Renderer, RenderingParts, image_names, split_at_marks
from nightschool_server.errors import InvalidRequestError


class Prompts:
    """Renders prompts for one vLLM engine, off the event loop."""

    def __init__(self, folder: ModelFolder) -> None:
        self._pictures = folder.pictures
        self._renderer = Renderer(
            RenderingParts(folder.tokenizer, folder.template, folder.image_token_id, folder.pictures, None)
        )
        self._guide = Guide(folder.tokenizer, folder.text_config.vocab_size, folder.eos_ids)
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="nightschool-render")

    async def render(self, core: Any, prompt: Prompt, following: str = "") -> tuple[Any, int, list[int]]:
        """(vLLM's input, its number of tokens without `following`, the tokens of `following`).

        Raises InvalidRequestError.
        """
        parsed, following_ids = await asyncio.get_running_loop().run_in_executor(
            self._pool, self._parse, prompt, following
        )
        tokens = parsed["prompt_token_ids"]
        if "multi_modal_data" not in parsed:
            return {"type": "token", "prompt_token_ids": tokens}, len(tokens) - len(following_ids), following_ids
        try:
            (rendered,) = await core.renderer.render_cmpl_async([parsed])
        except Exception as error:
            # Image processors refuse sizes and shapes with errors of every kind; all of it is about these images.
            raise InvalidRequestError("images", f"the images cannot be preprocessed ({error}): send others") from error
        return rendered, len(rendered["prompt_token_ids"]) - len(following_ids), following_ids

    async def grammar(self, prompt: Prompt) -> str | None:
        """What the answers are held to, None where they are free. Raises InvalidRequestError."""
        if not is_guided(prompt):
            return None
        # vLLM compiles the text again, in its own process.
        return (await asyncio.to_thread(self._guide.compiled, prompt)).grammar

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False)

    def _parse(self, prompt: Prompt, following: str) -> tuple[dict[str, Any], list[int]]:
        names = image_names(prompt, accepts_images=self._pictures is not None)
        text = self._renderer.text(prompt)
        if self._pictures is not None:
            split_at_marks(text, self._pictures.image_mark, len(names))
        tokens = self._renderer.tokenise(text).tolist()
        if not tokens:
            raise InvalidRequestError("messages", "the prompt renders to no tokens: send at least one message")
        following_ids = self._renderer.tokenise(following).tolist() if following else []
        parsed: dict[str, Any] = {"prompt_token_ids": tokens + following_ids}
        if names:
            parsed["multi_modal_data"] = {"image": [decode(name, prompt.images[name]) for name in names]}
            parsed["multi_modal_uuids"] = {"image": names}
        return parsed, following_ids
