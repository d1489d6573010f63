"""The critics that a configuration can name: a model that is asked with a rubric, and a sabotaged one.

What they say is a `Verdict`; whether it counts is `critique.choose`'s to decide. A `Judge` knows two protocols: two
candidates in one order (`compare`), and all of a step in several orders at once (`rank`). Answers are cached by content
across cycles, and a budget bounds what a cycle pays.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean

from nightschool_server.chat import Message, Text, canonical_json
from nightschool_server.config.roles import CriticConfig
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.errors import ContextOverflowError

from nightschool_learner.critique import Abstention, Context, Critic, Verdict, Winner
from nightschool_learner.errors import EndpointError
from nightschool_learner.prompts import CandidateView
from nightschool_learner.roles import Model, open_role
from nightschool_learner.rubrics import RUBRICS, clipped, letters_of, without_images
from nightschool_learner.sampling import AnswerSampler, derive_seed, patiently
from nightschool_learner.stages import Cycle
from nightschool_learner.verdict_cache import Answer, Spent, VerdictCache, key_of
from nightschool_learner.verdicts import best_of, json_format, read_json, read_odds

logger = logging.getLogger(__name__)

ODDS_SAMPLING = Sampling(max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=20)
"""One greedy token, with the odds of the likeliest ones."""

_FLIPPED: dict[Winner, Winner] = {"first": "second", "second": "first", "invalid": "invalid"}


@dataclass(frozen=True)
class Ranking:
    """What a critic says of all candidates of a step, by the order in which it saw them."""

    orders: tuple[tuple[int, ...], ...]
    """Indices of the candidates, as shown each time."""
    answers: tuple[Answer | None, ...]
    """To each order; None where it was not asked."""
    why: Abstention = ""
    """Why some were not asked."""

    def verdict(self, first: int, second: int, rubric: str) -> Verdict:
        """The verdict on two of them, from the orders in which `first` was shown before `second`."""
        margins: list[float] = []
        for order, answer in zip(self.orders, self.answers, strict=True):
            at = {candidate: position for position, candidate in enumerate(order)}
            if answer is not None and answer.scores is not None and at[first] < at[second]:
                margins.append(answer.scores[at[first]] - answer.scores[at[second]])
        if not margins:
            return Verdict("invalid", 0.0, "", 0, why=self.why or "malformed", rubric=rubric, num_votes=0)
        margin = fmean(margins)
        return Verdict("first" if margin > 0 else "second", margin, "", 0, rubric=rubric, num_votes=len(margins))

    def with_costs(self, verdict: Verdict) -> Verdict:
        """`verdict` with what all the answers took."""
        answers = [answer for answer in self.answers if answer is not None]
        return replace(
            verdict,
            raw=" ".join(answer.raw for answer in answers),
            prompt_tokens=sum(answer.prompt_tokens for answer in answers),
            completion_tokens=sum(answer.completion_tokens for answer in answers),
            num_cached=sum(answer.is_cached for answer in answers),
        )

    def position_wins(self) -> Counter[int]:
        """How often the candidate shown at each position was the best."""
        return Counter(best_of(answer.scores) for answer in self.answers if answer is not None and answer.scores)


@dataclass(frozen=True)
class Judge:
    """A model that is asked with a rubric. A `Critic`."""

    model: Model
    config: CriticConfig
    cache: VerdictCache | None = None
    """None asks anew each time."""
    spent: Spent = field(default_factory=Spent)

    @property
    def rubric(self) -> str:
        """Version and digest of the wording."""
        return f"{self.config.rubric}:{RUBRICS[self.config.rubric].digest}"

    async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
        """Two candidates in one order: `config.votes` answers, their mean margin, and the winner most of them name."""
        # The odds of one greedy token say all that votes could.
        num_votes = 1 if self.model.has_odds else self.config.votes
        answers: list[Answer] = []
        for vote in range(num_votes):
            answer, why = await self._ask(context, (first, second), vote)
            if answer is None:
                return Verdict("invalid", 0.0, "", sum(a.prompt_tokens for a in answers), why=why, rubric=self.rubric)
            answers.append(answer)
        return replace(count_votes(answers), rubric=self.rubric)

    async def rank(self, context: Context, views: Sequence[CandidateView]) -> Ranking:
        """All candidates of a step, shown `config.permutations` times in orders that balance each other."""
        content = canonical_json([[view.action, view.observation] for view in views])
        orders = balanced_orders(len(views), self.config.permutations, content)
        answers: list[Answer | None] = []
        reason: Abstention = ""
        for vote, order in enumerate(orders):
            answer, why = await self._ask(context, [views[i] for i in order], vote)
            answers.append(answer)
            reason = reason or why
        return Ranking(tuple(orders), tuple(answers), reason)

    async def _ask(
        self, context: Context, views: Sequence[CandidateView], vote: int
    ) -> tuple[Answer | None, Abstention]:
        """One answer, from the cache where it was given before; else None and why."""
        if not self.config.shows_images:
            context, views = without_images(context, views)
        shown, clipped_views = clipped(context, views, self.config.max_chars)
        messages = RUBRICS[self.config.rubric].ask(shown, clipped_views)
        letters = letters_of(len(views))
        if not self.model.has_odds:
            messages = (*messages[:-1], _and_format(messages[-1], json_format(letters)))
        key = key_of(self.model.name, self.rubric, messages, vote)
        if self.cache is not None and (known := self.cache.get(key)) is not None:
            return known, ""
        if self.spent.reaches(self.config):
            return None, "budget"
        prompt = Prompt(messages, images=shown.pixels)
        # Counted before it is asked: others that are under way must not pass the bound together.
        self.spent.num_asked += 1
        try:
            samples = await self.model.sampler.sample(prompt, self._sampling(key, vote), adapter=self.model.adapter)
        except ContextOverflowError as error:
            self.spent.num_asked -= 1
            return Answer(None, str(error), 0, 0), ""
        except EndpointError as error:
            self.spent.num_asked -= 1
            logger.warning("event=critic_unavailable error=%s", error)
            return None, "unavailable"
        text = samples.answers[0].text
        top = samples.answers[0].top_logprobs
        scores = read_odds(text, top[0] if top else (), letters) if self.model.has_odds else read_json(text, letters)
        answer = Answer(scores, text, samples.num_prompt_tokens, samples.num_completion_tokens)
        await self._keep(key, answer)
        return answer, ""

    async def _keep(self, key: str, answer: Answer) -> None:
        cost = self.model.cost(answer.prompt_tokens, answer.completion_tokens)
        self.spent.num_tokens += answer.prompt_tokens + answer.completion_tokens
        self.spent.cost += cost
        if self.cache is not None:
            await self.cache.put(key, self.rubric, self.model.name, answer, cost)

    def _sampling(self, key: str, vote: int) -> Sampling:
        if self.model.has_odds:
            return ODDS_SAMPLING
        # The first vote is the model's best guess, the others show how sure it is of it.
        temperature = 0.0 if vote == 0 else self.config.vote_temperature
        return Sampling(max_tokens=self.config.max_answer_tokens, temperature=temperature, seed=derive_seed(0, key))


@dataclass(frozen=True)
class InvertedCritic:
    """Fault injection: prefers what the critic inside finds worse. It exists to show that the gate rejects."""

    inner: Critic

    async def compare(self, context: Context, first: CandidateView, second: CandidateView) -> Verdict:
        verdict = await self.inner.compare(context, first, second)
        return replace(verdict, winner=_FLIPPED[verdict.winner], margin_nats=-verdict.margin_nats)


def count_votes(answers: Sequence[Answer]) -> Verdict:
    """What several answers to one question come to.

    Unreadable where half of them or more are. The margin is the mean over all votes, an unreadable one counting as
    none; where most votes name another winner than the mean does, the margin is 0.
    """
    margins = [answer.scores[0] - answer.scores[1] for answer in answers if answer.scores is not None]
    totals = Verdict(
        "invalid",
        0.0,
        answers[0].raw,
        sum(answer.prompt_tokens for answer in answers),
        num_votes=len(answers),
        num_cached=sum(answer.is_cached for answer in answers),
        completion_tokens=sum(answer.completion_tokens for answer in answers),
    )
    if 2 * len(margins) <= len(answers):
        return replace(totals, why="malformed")
    margin = sum(margins) / len(answers)
    num_first = sum(m > 0 for m in margins)
    num_second = sum(m < 0 for m in margins)
    if (margin > 0) != (num_first > num_second) or num_first == num_second:
        margin = 0.0
    return replace(totals, winner="first" if margin >= 0 else "second", margin_nats=margin)


def balanced_orders(num: int, num_orders: int, content: str) -> list[tuple[int, ...]]:
    """Orders of `num` candidates, drawn from the content alone: the same step is asked alike in every cycle.

    Each second order is the reverse of the one before, so that of any two candidates each is shown first equally often;
    the others are rotations of one shuffle, which spread every candidate over the positions.
    """
    seed = int.from_bytes(hashlib.sha256(content.encode()).digest()[:6], "big")
    base = list(range(num))
    random.Random(seed).shuffle(base)
    orders: list[tuple[int, ...]] = []
    for index in range(num_orders):
        by = (index // 2) * max(1, num // max(1, (num_orders + 1) // 2)) % num
        rotated = base[by:] + base[:by]
        orders.append(tuple(rotated if index % 2 == 0 else reversed(rotated)))
    return orders


@asynccontextmanager
async def open_critic(cycle: Cycle, sampler: AnswerSampler) -> AsyncIterator[Critic]:
    """The critic that the cycle's configuration names, for as long as the block runs."""
    config = cycle.config.critic
    async with open_role(cycle, "critic", config, sampler) as found:
        model = found
        if model.is_served:
            # Other weights under the same name are another critic, whose answers nobody has heard yet.
            status = await patiently(cycle, cycle.client.admin.status)
            model = replace(model, name=f"{model.name}@{status.base_model_digest}")
        cache = VerdictCache(cycle.store, cycle.id or None)
        critic: Critic = Judge(model, config, cache, cache.spent())
        if cycle.config.fault_injection.invert_critic:
            logger.warning("event=fault_injected cycle=%s fault=invert_critic", cycle.id)
            critic = InvertedCritic(critic)
        yield critic


def _and_format(message: Message, rule: str) -> Message:
    """A user message with the answer's format at its end."""
    *parts, last = message.parts
    assert isinstance(last, Text)
    return Message("user", (*parts, Text(f"{last.text}\n{rule}")))
