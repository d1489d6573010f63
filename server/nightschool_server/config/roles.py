"""Settings of the learner's roles: which model plays the task writer, the critic and every other one.

A role is the served model (on its base, the active or a named adapter) or a model behind an OpenAI-compatible
endpoint. Owns the sections that every role has, and those of the critic.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[int, Field(ge=0)]
Price = Annotated[float, Field(ge=0)]
Component = Literal["facts", "judge", "checklist", "scorer", "feedback", "consistency"]


class RoleSection(BaseModel):
    """What every section of a role is."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class EndpointConfig(RoleSection):
    """An OpenAI-compatible endpoint."""

    base_url: str = ""
    """E.g. https://api.example.com/v1."""
    model: str = ""
    """As the endpoint calls it."""
    key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; the key itself is never in a file."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Of one try of a call."""
    max_retries: Annotated[int, Field(ge=0)] = 3
    """Tries after the first, where the endpoint is overloaded, broken or away."""
    max_failures: Positive = 5
    """So many calls in a row that failed after their retries end the cycle: the endpoint is down."""
    concurrency: Positive = 8
    """Calls in flight."""
    requests_per_minute: Rate = 0
    """In any 60 s. 0: no limit of our own."""
    tokens_per_minute: Rate = 0
    """Of prompt and answer, in any 60 s. 0: no limit of our own."""
    prompt_price: Price = 0.0
    """Of a million prompt tokens, in your currency."""
    completion_price: Price = 0.0
    """Of a million completion tokens."""
    has_logprobs: bool = False
    """Whether the endpoint gives the odds of tokens; a critic then reads its margin from them."""


def require_named(kind: str, endpoint: EndpointConfig) -> None:
    """Raise ValueError where an endpoint is to play and is not named."""
    if kind == "endpoint" and not (endpoint.base_url and endpoint.model):
        raise ValueError("kind = 'endpoint' needs endpoint.base_url and endpoint.model")


class RoleConfig(RoleSection):
    """Who plays a role."""

    kind: Literal["served", "endpoint"] = "served"
    """`served`: the model that is served. `endpoint`: another one."""
    adapter: str = "base"
    """Of the served model: `base` (no adapter), `active` (the cycle's incumbent) or an adapter's name."""
    endpoint: EndpointConfig = EndpointConfig()

    @model_validator(mode="after")
    def _endpoint_is_named(self) -> Self:
        require_named(self.kind, self.endpoint)
        return self


class CriticConfig(RoleConfig):
    """Who compares candidates, in which way, and when the verdict counts."""

    kinds: tuple[Component, ...] = ("facts", "judge")
    """Who decides, in this order: the first that is sure. `facts` come first always; `judge` is a model that compares,
    `checklist` one that scores each by yes/no questions which it wrote for the task, `scorer` the application's,
    `feedback` people's on similar requests, `consistency` how many samples agree."""
    vetoes: tuple[Component, ...] = ()
    """Of all but `facts`: one that is sure of the contrary makes the step abstain."""
    margin_nats: Annotated[float, Field(ge=0)] = 1.0
    """The winner's log odds, in either order, must reach this; else the judge abstains."""
    protocol: Literal["pairwise", "listwise"] = "pairwise"
    """`pairwise`: two candidates, in both orders. `listwise`: all of a step, in several orders; needs rubric step-2."""
    rubric: Literal["step-1", "step-2"] = "step-1"
    """The wording. `step-1` is what the shop's model was trained on, `step-2` is for any other model."""
    votes: Annotated[int, Field(ge=1, le=32)] = 1
    """Answers to each pairwise question, where the judge gives no odds: their mean counts."""
    vote_temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    """Of every vote but the first, which is greedy."""
    permutations: Annotated[int, Field(ge=2, le=32)] = 4
    """Orders in which a listwise judge sees a step's candidates."""
    max_answer_tokens: Positive = 64
    """Of a judge that gives no odds."""
    max_chars: Annotated[int, Field(ge=100)] = 8000
    """Of one text that a judge is shown; the middle of a longer one is left out."""
    shows_images: bool = True
    """Whether the judge is shown pictures, those that tools gave back included. False for one that reads text alone."""
    max_comparisons: Annotated[int, Field(ge=0)] = 0
    """Questions that the judge is paid for in a cycle; the rest is left to the other components. 0: no bound."""
    max_tokens: Annotated[int, Field(ge=0)] = 0
    """The same in tokens of prompts and answers. 0: no bound."""
    max_cost: Annotated[float, Field(ge=0)] = 0.0
    """The same in money, by the endpoint's prices. 0: no bound."""
    max_questions: Annotated[int, Field(ge=2, le=20)] = 6
    """Of a checklist."""
    checklist_margin: Annotated[float, Field(gt=0, le=1)] = 0.25
    """By how much the shares of questions that are answered yes must differ."""
    scorer_margin: Annotated[float, Field(gt=0)] = 0.1
    """By how much the scores of the application's scorer must differ."""
    feedback_similarity: Share = 0.35
    """Share of words that a request with feedback must have in common with the task."""
    feedback_margin: Annotated[float, Field(gt=0, le=2)] = 0.5
    """By how much what people thought of two actions must differ, from -1 (all against) to 1 (all for)."""
    consistency_margin_nats: Annotated[float, Field(gt=0)] = 1.0
    """Log odds of the shares of samples. 1.0 takes at least 4 against 1 of 5."""

    min_agreement: Share = 0.7
    """A critic that agrees with the gold set less often ends the cycle before training. 0: not asked."""
    min_gold: Positive = 30
    """Gold pairs that are needed for that."""
    max_position_bias: Annotated[float, Field(ge=0, le=0.5)] = 0.35
    """How far from one half the share of verdicts for the candidate shown first may be."""
    max_parse_failures: Share = 0.5
    """Share of answers that could not be read."""
    max_drift: Share = 0.15
    """How far such a share, or one of the gold set's, may be from that of earlier cycles with the same critic."""
    on_drift: Literal["warn", "stop"] = "warn"
    """What a cycle does whose critic drifted further: `warn` says so and goes on, `stop` ends it before training."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not self.kinds or self.kinds[0] != "facts" or len(set(self.kinds)) < len(self.kinds):
            raise ValueError("kinds must begin with 'facts' and name each component once: facts come before opinions")
        if "facts" in self.vetoes:
            raise ValueError("vetoes holds 'facts': a candidate that failed has lost already, leave it out")
        if self.protocol == "listwise" and self.rubric == "step-1":
            raise ValueError("protocol = 'listwise' needs rubric = 'step-2': step-1 shows two candidates")
        return self
