"""Proof of effect: that a loaded adapter does what its trainer saw, and does anything at all.

Serving systems have answered with the base model, or with an older version, under a new adapter's name. So after every
load fixed prompts are scored: some token's logprob must differ from the base model's, and the engine's must match the
trainer's own where the manifest holds them: `probe` = {"prompts": [{"messages", "tools", "continuation"}, ...],
"logprobs": [[...], ...]}.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nightschool_server.chat import ToolSpec, canonical_json, messages_from_json, user
from nightschool_server.config.serving import AdaptersConfig
from nightschool_server.engine import BASE, Engine, Prompt
from nightschool_server.errors import InvalidRequestError, OverloadedError

TIMEOUT_S = 120.0
"""For all prompts of one proof; the engine may be busy."""


@dataclass(frozen=True)
class Probe:
    """A prompt, an answer to score under it, and what the trainer saw, if it looked."""

    prompt: Prompt
    continuation: str
    recorded: tuple[float, ...] | None = None


FIXED = (
    Probe(Prompt((user("What is 12 plus 7?"),)), "The answer is 19, because 12 and 7 make 19."),
    Probe(Prompt((user("Which of these is cheaper, and by how much?"),)), '<tool_call>\n{"name": "look_up"'),
)
"""Any model can score these; they say whether an adapter has an effect, not which."""


class Prober:
    """Proves adapters on one engine."""

    def __init__(self, engine: Engine, config: AdaptersConfig) -> None:
        self._engine = engine
        self._config = config
        self._base: dict[int, Sequence[float]] = {}
        # The base model's logprobs by position in FIXED; it never changes.

    async def fault(self, name: str, manifest: Mapping[str, Any]) -> str:
        """What is wrong with the loaded adapter `name`, empty where nothing is.

        Raises OverloadedError where the engine does not get to it in time; that says nothing about the adapter.
        """
        try:
            recorded = probes_of(manifest)
        except (ValueError, KeyError, TypeError) as error:
            return f"the manifest's probe cannot be read ({error!r})"
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._fault(name, recorded)
        except TimeoutError:
            raise OverloadedError(f"the proof of adapter {name!r} took over {TIMEOUT_S:g} s: try again later") from None
        except InvalidRequestError as error:
            return f"the manifest's probe cannot be scored: {error}"

    async def _fault(self, name: str, recorded: Sequence[Probe]) -> str:
        effect = 0.0
        for probe in recorded:
            found = await self._score(probe, name)
            said = self._mismatch(probe, found)
            if said:
                return said
            effect = max(effect, _largest_difference(found, await self._score(probe, BASE)))
        for position, probe in enumerate(FIXED):
            if effect > self._config.min_probe_effect_nats:
                return ""
            if position not in self._base:
                self._base[position] = await self._score(probe, BASE)
            effect = max(effect, _largest_difference(await self._score(probe, name), self._base[position]))
        if effect > self._config.min_probe_effect_nats:
            return ""
        return (
            f"it changes no probe's logprobs by more than {effect:.2g} nats against the base model "
            f"(adapters.min_probe_effect_nats {self._config.min_probe_effect_nats:g}): it has no effect"
        )

    def _mismatch(self, probe: Probe, found: Sequence[float]) -> str:
        assert probe.recorded is not None
        if len(found) != len(probe.recorded):
            return (
                f"a probe has {len(found)} tokens here, {len(probe.recorded)} at the trainer: "
                "it was trained with another tokenizer or chat template"
            )
        error = sum(abs(a - b) for a, b in zip(found, probe.recorded, strict=True)) / len(found)
        if error <= self._config.max_probe_error_nats:
            return ""
        return (
            f"a probe's logprobs are {error:.3g} nats a token off what the trainer recorded "
            f"(adapters.max_probe_error_nats {self._config.max_probe_error_nats:g}): "
            "it is served wrongly, or was trained on another base model"
        )

    async def _score(self, probe: Probe, adapter: str) -> Sequence[float]:
        return (await self._engine.score(probe.prompt, probe.continuation, adapter=adapter)).logprobs


def probes_of(manifest: Mapping[str, Any]) -> list[Probe]:
    """The probes that the trainer recorded; none where it did not. Raises ValueError, KeyError or TypeError."""
    found = manifest.get("probe")
    if not found:
        return []
    return [
        Probe(_prompt(entry), entry["continuation"], tuple(float(value) for value in logprobs))
        for entry, logprobs in zip(found["prompts"], found["logprobs"], strict=True)
    ]


def _prompt(entry: Mapping[str, Any]) -> Prompt:
    messages = entry["messages"] if isinstance(entry["messages"], str) else canonical_json(entry["messages"])
    tools = tuple(
        ToolSpec(tool["name"], tool["description"], _schema(tool), tool.get("strict", False))
        for tool in entry.get("tools", ())
    )
    return Prompt(messages_from_json(messages), tools)


def _schema(tool: Mapping[str, Any]) -> str:
    parameters = tool["parameters"]
    return parameters if isinstance(parameters, str) else canonical_json(json.loads(json.dumps(parameters)))


def _largest_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
