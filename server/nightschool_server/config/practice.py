"""Settings of the learner's practice: when it runs, what it learns from, how it tries and judges.

Owns the sections of `[learner]` from scheduling to pairs; `config.py` puts them together, training and the
gate have theirs, and what every role of a model has is in `roles.py`. Every field is documented once, under it.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nightschool_server.config.difficulty import ProbeConfig
from nightschool_server.config.files import FilesConfig, VerifierConfig
from nightschool_server.config.roles import RoleConfig

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0, le=4)]
TopP = Annotated[float, Field(gt=0, le=1)]

MIN_PLAN_TOKENS = 200
"""Of a writer's answer that holds a task and its files."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ScheduleConfig(_Section):
    """When cycles start by themselves; all off by default."""

    interval_s: Annotated[float, Field(ge=0)] = 0.0
    """A cycle every so many seconds. 0: never."""
    cron: str = ""
    """A cycle at these times, five fields of crontab, local time. Empty: never."""
    min_new_seeds: Annotated[int, Field(ge=0)] = 0
    """A cycle when so many trainable requests came in since the last one was queued. 0: never."""
    check_seeds_s: Annotated[float, Field(gt=0)] = 5.0
    """How often new requests are counted, seconds."""


class SeedsConfig(_Section):
    """Which logged requests a cycle learns from."""

    max_requests: Positive = 5000
    """How many of the newest trainable requests are looked at."""
    max_seeds: Positive = 400
    """How many of them are kept, failures first."""
    min_seeds: Positive = 12
    """A cycle with fewer stops: there is nothing to learn from."""
    max_chars: Positive = 2000
    """Longer prompts are no seeds."""
    reserved_session_share: Share = 0.0
    """Share of all sessions, by hash of their id, that are kept back for evaluation and never learned from."""


class SynthesizeConfig(RoleConfig):
    """Who writes new tasks, and how."""

    num_tasks: Positive = 150
    """Slots of a cycle; a slot becomes one task or none."""
    min_tasks: Positive = 10
    """A cycle that keeps fewer stops."""
    num_examples: Positive = 3
    """Seeds that the writer is shown."""
    max_attempts: Positive = 4
    """Answers of the writer for one slot before it is given up."""
    temperature: Temperature = 1.0
    top_p: TopP = 0.95
    max_tokens: Positive = 128
    """Of the writer's answer."""
    min_words: Positive = 2
    max_chars: Positive = 1000
    """Bounds of a task."""
    concurrency: Positive = 24
    """Slots in flight."""
    curriculum: bool = False
    """Draw the writer's examples more often from families of requests that are solved now and then."""
    curriculum_floor: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Weight of a family that is always or never solved; one that is solved half of the time has 1."""
    curriculum_cycles: Positive = 5
    """Earlier cycles that say how well a family is solved, each with half the weight of the one after it."""
    files: FilesConfig = FilesConfig()
    verifier: VerifierConfig = VerifierConfig()
    probe: ProbeConfig = ProbeConfig()

    @model_validator(mode="after")
    def _plan_fits(self) -> Self:
        if self.files.enabled and self.max_tokens < MIN_PLAN_TOKENS:
            raise ValueError(
                f"files.enabled asks the writer for a plan, which max_tokens = {self.max_tokens} cuts off: "
                f"set it to {MIN_PLAN_TOKENS} or more"
            )
        return self


class ExploreConfig(_Section):
    """How several actions are tried at every step (SPORT: 1 cold and 4 hot)."""

    num_candidates: Annotated[int, Field(ge=1, le=64)] = 5
    """Samples of a step: one cold, the others hot."""
    cold_temperature: Temperature = 0.7
    hot_temperature: Temperature = 1.2
    temperatures: tuple[Temperature, ...] = ()
    """Of each sample, instead of one cold and the others hot; equal ones share a call. Empty: cold and hot."""
    adaptive_after: Annotated[int, Field(ge=0)] = 0
    """Look at so many samples first, and take the rest only where they disagree or their action failed. 0: take all."""
    top_p: TopP = 0.8
    max_tokens: Positive = 512
    """Of one candidate."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of a rollout. 0 takes the application's."""
    concurrency: Positive = 24
    """Rollouts in flight."""
    num_tool_workers: Positive = 2
    """Processes that run tools for them."""
    max_cycle_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens that a cycle samples here; then no new step begins, and pairs are made of what there is. 0: no bound."""
    max_cycle_s: Annotated[float, Field(ge=0)] = 0.0
    """The same in seconds, pauses left out. 0: no bound."""
    max_cycle_calls: Annotated[int, Field(ge=0)] = 0
    """The same in tool calls of all candidates. 0: no bound."""
    min_choice_share: Share = 0.0
    """Share of steps whose samples must not all agree; with less the cycle stops before training."""
    target_choice_share: Share = 0.0
    """That share as it is wanted: the hot temperature rises after a cycle with less and falls after one with more, by
    at most half. 0: it stays as it is."""

    @model_validator(mode="after")
    def _samples_add_up(self) -> Self:
        if self.temperatures and len(self.temperatures) != self.num_candidates:
            raise ValueError(
                f"temperatures names {len(self.temperatures)} and num_candidates is {self.num_candidates}: "
                "name one for each candidate, or none"
            )
        if self.temperatures and self.target_choice_share:
            raise ValueError("temperatures names every sample's own: target_choice_share has none to change, set one")
        if self.adaptive_after and not 2 <= self.adaptive_after < self.num_candidates:
            raise ValueError(
                f"adaptive_after is {self.adaptive_after}; it must be 0, or at least 2 and less than num_candidates = "
                f"{self.num_candidates}: one sample agrees with itself"
            )
        return self


class PairsConfig(_Section):
    """Which preferences become training pairs."""

    min_pairs: Positive = 24
    """A cycle with fewer stops: training on them would teach noise."""
    train_on_simulated: bool = False
    """Train on pairs and anchors that rest on what a simulator gave back in the place of an external tool."""
    max_lead_nats: Annotated[float, Field(ge=0)] = 0.0
    """Leave out a pair whose chosen answer the policy gives more than so many nats before the rejected one: it does so
    already. 0: keep all. For short answers: the logprobs of long ones differ by more for their length alone."""
    max_per_step: Positive = 4
    max_per_task: Positive = 8
    max_per_tool: Positive = 200
    """Pairs whose chosen step calls the same tool first; final answers count as one tool."""
    max_share_failed: Share = 0.5
    """Of pairs in which the rejected candidate failed: they teach format more than judgement."""
    max_length_ratio: Annotated[float, Field(ge=0)] = 1.5
    """Tokens of chosen answers over those of rejected ones, or the other way round, over pairs that ran and in which
    both answer or both call. Beyond it those that stretch it most are left out. At least 1; 0: no matching."""
    replay_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of what is trained on: pairs of earlier promoted cycles, newest first, of the same base model, chat template and
    critic settings. 0: none."""
    replay_unproven: bool = False
    """Replay also pairs of cycles whose adapter was not promoted, or whose critic was inverted."""
    max_feedback: Annotated[int, Field(ge=0)] = 1000
    """Newest rated requests whose corrections and thumbs are written beside the pairs, for SFT and KTO. 0: none."""
    anchors_per_pair: Annotated[float, Field(ge=0, le=16)] = 1.0
    """Steps on which all candidates agreed, for each pair; training holds their likelihood. 0: none."""
    anchor_turns: Literal["tool", "step"] = "step"
    """What takes turns among anchors, so that none is rare: `tool`, what a step calls; `step`, that and what the step
    before it called, so that an answer after one look-up is not of one kind with every other answer."""
    min_anchor_probability: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Of such a step's whole answer, untempered: an error on which all agreed by chance is not held fast."""

    @model_validator(mode="after")
    def _ratio_can_hold(self) -> Self:
        if 0 < self.max_length_ratio < 1:
            raise ValueError(f"max_length_ratio is {self.max_length_ratio:g}; it must be 0 or at least 1")
        return self


class FaultInjectionConfig(_Section):
    """For demonstrations that the guards hold. Never in production."""

    allow: bool = False
    """Must be set for any of the faults below."""
    invert_critic: bool = False
    """The critic prefers the worse: the gate must reject what is learned from it."""
    practice_as_live: bool = False
    """What the learner samples goes among live requests: to measure what priorities are worth."""

    @model_validator(mode="after")
    def _allowed(self) -> Self:
        if self.invert_critic and not self.allow:
            raise ValueError("invert_critic spoils what is learned: set fault_injection.allow = true if that is meant")
        if self.practice_as_live and not self.allow:
            raise ValueError("practice_as_live delays live requests: set fault_injection.allow = true if that is meant")
        return self
