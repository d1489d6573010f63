"""The critics that a configuration can name: the served model, another endpoint, and a sabotaged one.

All ask with the wording of `prompts.py`: candidates and observations stand in fences as data. What they
say is a `Verdict`; whether it counts is `critique.choose`'s to decide.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nightschool_server.engine import Prompt, Sampling, TopLogprob
from nightschool_server.errors import ContextOverflowError

from nightschool_learner.critique import Context, Critic, Verdict, Winner
from nightschool_learner.prompts import FIRST, SECOND, CandidateView, critic_messages
from nightschool_learner.sampling import AnswerSampler
from nightschool_learner.stages import Cycle

logger = logging.getLogger(__name__)

VERDICT_SAMPLING = Sampling(max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=20)
"""One greedy token, with the odds of the likeliest ones."""

_FLIPPED: dict[Winner, Winner] = {"first": "second", "second": "first", "invalid": "invalid"}


@dataclass(frozen=True)
class ServedCritic:
    """Asks the served model, on a fixed adapter; the margin is read from the odds of the first token."""

    sampler: AnswerSampler
    adapter: str

    async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
        messages = critic_messages(context.task, context.images, context.history, first, second)
        try:
            reply = await self.sampler.sample(Prompt(messages), VERDICT_SAMPLING, adapter=self.adapter)
        except ContextOverflowError as error:
            return Verdict("invalid", 0.0, str(error), 0)
        answer = reply.answers[0]
        top = answer.top_logprobs[0] if answer.top_logprobs else ()
        return read_odds(answer.text, top, reply.num_prompt_tokens)


@dataclass(frozen=True)
class InvertedCritic:
    """Fault injection: prefers what the critic inside finds worse. It exists to show that the gate rejects."""

    inner: Critic

    async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
        verdict = await self.inner.compare(context, first, second)
        return replace(verdict, winner=_FLIPPED[verdict.winner], margin_nats=-verdict.margin_nats)


def read_odds(text: str, top: Sequence[TopLogprob], prompt_tokens: int) -> Verdict:
    """The verdict in a critic's first token and the odds beside it.

    A letter that is not among the likeliest tokens is taken to be as likely as the least of them, so
    the margin is never overstated.
    """
    letter = text.strip()
    if letter not in (FIRST, SECOND) or not top:
        return Verdict("invalid", 0.0, text, prompt_tokens)
    floor = min(entry.logprob for entry in top)
    margin = _logprob_of(FIRST, top, floor) - _logprob_of(SECOND, top, floor)
    return Verdict("first" if letter == FIRST else "second", margin, text, prompt_tokens)


def make_critic(cycle: Cycle, sampler: AnswerSampler) -> Critic:
    """The critic that the cycle's configuration names."""
    config = cycle.config.critic
    critic: Critic
    if config.kind == "endpoint":
        from nightschool_learner.endpoint_critic import EndpointCritic

        critic = EndpointCritic.connect(config.endpoint, cycle.store.get_blob)
    else:
        critic = ServedCritic(sampler, cycle.adapter_of(config.adapter))
    if cycle.config.fault_injection.invert_critic:
        logger.warning("event=fault_injected cycle=%s fault=invert_critic", cycle.id)
        return InvertedCritic(critic)
    return critic


def _logprob_of(letter: str, top: Sequence[TopLogprob], floor: float) -> float:
    """log of the summed odds of every token that reads `letter`, e.g. with and without a leading space."""
    found = [entry.logprob for entry in top if entry.token.strip() == letter]
    if not found:
        return floor
    highest = max(found)
    return highest + math.log(sum(math.exp(logprob - highest) for logprob in found))
