"""A critic behind an OpenAI-compatible HTTP endpoint, for those who have a better judge than their model.

Needs `pip install 'nightschool[endpoint]'` and a key in the environment variable that the configuration
names. The verdict is a JSON object; its confidence becomes the margin, as odds.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nightschool_server.chat import Image, Message, Text
from nightschool_server.config.practice import EndpointConfig

from nightschool_learner.critique import Context, Verdict
from nightschool_learner.errors import StageFailedError
from nightschool_learner.prompts import FIRST, SECOND, CandidateView, critic_messages

FORMAT = (
    f'Reply with one JSON object and nothing else: {{"better": "{FIRST}" or "{SECOND}", '
    '"confidence": a number from 0.5 (a guess) to 1 (certain)}.'
)
MAX_MARGIN_NATS = 10.0
"""What a confidence of 1 counts as."""

ReadBlob = Callable[[str], bytes]


@dataclass(frozen=True)
class EndpointCritic:
    """Asks one model of one endpoint."""

    client: Any
    """An `openai.AsyncOpenAI`: its retries and timeouts are the configuration's."""
    model: str
    read_blob: ReadBlob

    @staticmethod
    def connect(config: EndpointConfig, read_blob: ReadBlob) -> EndpointCritic:
        """Raises StageFailedError where the SDK or the key is missing."""
        try:
            import openai
        except ImportError as error:
            raise StageFailedError(
                "learner.critic.kind = 'endpoint' needs the OpenAI SDK: pip install 'nightschool[endpoint]'"
            ) from error
        key = os.environ.get(config.key_env)
        if not key:
            raise StageFailedError(
                f"the environment variable {config.key_env} (learner.critic.endpoint.key_env) is not set: "
                "export the endpoint's key, or any text where it needs none"
            )
        client = openai.AsyncOpenAI(
            base_url=config.base_url, api_key=key, timeout=config.timeout_s, max_retries=config.max_retries
        )
        return EndpointCritic(client, config.model, read_blob)

    async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
        messages = critic_messages(context.task, context.images, context.history, first, second)
        completion = await self.client.chat.completions.create(
            model=self.model, messages=to_openai(messages, self.read_blob), temperature=0
        )
        text = completion.choices[0].message.content or ""
        return read_verdict(text, completion.usage.prompt_tokens if completion.usage else 0)


def read_verdict(text: str, prompt_tokens: int) -> Verdict:
    """The verdict in the endpoint's JSON; anything else is `invalid`."""
    invalid = Verdict("invalid", 0.0, text, prompt_tokens)
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return invalid
    if not isinstance(value, dict) or value.get("better") not in (FIRST, SECOND):
        return invalid
    confidence = value.get("confidence")
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0.5 <= confidence <= 1:
        return invalid
    margin = MAX_MARGIN_NATS if confidence == 1 else min(MAX_MARGIN_NATS, math.log(confidence / (1 - confidence)))
    return (
        Verdict("first", margin, text, prompt_tokens)
        if value["better"] == FIRST
        else Verdict("second", -margin, text, prompt_tokens)
    )


def to_openai(messages: Sequence[Message], read_blob: ReadBlob) -> list[dict[str, Any]]:
    """The critic's messages as the endpoint reads them, pictures as data URLs, the format's rule at the end."""
    rendered: list[dict[str, Any]] = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message.parts:
            match part:
                case Text(text):
                    content.append({"type": "text", "text": text})
                case Image(sha256):
                    content.append({"type": "image_url", "image_url": {"url": _data_url(read_blob(sha256))}})
                case _:
                    raise AssertionError(f"a critic's message holds no {type(part).__name__}")
        rendered.append({"role": message.role, "content": content})
    rendered[-1]["content"].append({"type": "text", "text": FORMAT})
    return rendered


def _data_url(data: bytes) -> str:
    media_type = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
