"""What a report holds, as frozen types: the same for the page and for the JSON file.

Texts are as they were logged, that is redacted, and cut at `turns.MAX_CHARS`. Pictures are their sha256.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nightschool_learner.coverage import Coverage
from nightschool_learner.endpoint_records import RoleCost
from nightschool_learner.evaluation_records import EvaluationRow
from nightschool_learner.families import Family
from nightschool_learner.practice_counts import PositionFigures
from nightschool_learner.synthesis.records import FileOrigin, Verification
from nightschool_learner.turns import Said


@dataclass(frozen=True)
class CycleFacts:
    """The cycle's row."""

    id: str
    state: str
    trigger: str
    reason: str
    outcome: str
    seed: int
    incumbent: str | None
    candidate: str | None
    num_resumes: int
    overrides: tuple[str, ...]
    created_at: float
    started_at: float | None
    ended_at: float | None


@dataclass(frozen=True)
class StageFacts:
    """A stage's row."""

    name: str
    state: str
    num_done: int
    num_total: int
    counts: Mapping[str, int]
    message: str
    started_at: float | None
    ended_at: float | None
    seconds: float | None
    """From its start to its end, waiting included."""


@dataclass(frozen=True)
class LeftOut:
    """What a step of the funnel did not pass on."""

    reason: str
    """As the rows name it."""
    words: str
    num: int


@dataclass(frozen=True)
class FunnelStep:
    """One step from logged requests to preference pairs."""

    stage: str
    title: str
    num: int
    of: int
    """Out of how many; 0 where nothing was chosen from."""
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class SeedExample:
    """A logged request that the cycle learned from."""

    request_id: str
    why: str
    turns: tuple[Said, ...]
    feedback: str


@dataclass(frozen=True)
class TaskExample:
    """A task that the model wrote, or what it wrote instead of one."""

    task_id: str
    verdict: str
    """kept, or why it was dropped."""
    text: str
    images: tuple[str, ...]
    files: tuple[str, ...]
    seed_requests: tuple[str, ...]
    reason: str = ""
    """Why it was dropped, where somebody gave a reason in words."""
    origins: tuple[FileOrigin, ...] = ()
    """How the files that it planned came."""
    verification: Verification | None = None
    """What the verifier said of it."""


@dataclass(frozen=True)
class Action:
    """One distinct thing that the model tried at a step."""

    text: str
    observation: str
    """What its tools gave back."""
    failure: str
    num_samples: int
    is_picked: bool
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepExample:
    """A step with everything that was tried."""

    step_id: str
    task_id: str
    history: tuple[Said, ...]
    actions: tuple[Action, ...]
    picked_by: str
    abstention: str


@dataclass(frozen=True)
class PairExample:
    """A preference with what it rests on."""

    pair_id: str
    task_id: str
    kind: str
    margin: float
    history: tuple[Said, ...]
    chosen: Action
    rejected: Action
    seed_requests: tuple[str, ...]


@dataclass(frozen=True)
class Examples:
    """A few of each."""

    seeds: tuple[SeedExample, ...]
    tasks: tuple[TaskExample, ...]
    dropped_tasks: tuple[TaskExample, ...]
    steps: tuple[StepExample, ...]
    pairs: tuple[PairExample, ...]


@dataclass(frozen=True)
class PracticeFigures:
    """How much the model tried, and how much of it was different."""

    num_samples: int
    num_actions: int
    """Distinct ones, summed over steps."""
    by_position: tuple[PositionFigures, ...]
    """The same by the step's place in its attempt."""
    coverage: Coverage
    picked_by: Mapping[str, int]
    failures: Mapping[str, int]
    outcomes: Mapping[str, int]
    """How the attempts at the tasks ended."""
    wall_s: float | None
    """How long practice worked, pauses left out; None where it was not measured, as in cycles of an older learner."""
    asking_share: float | None
    """Of that, with a call to a model in flight."""
    engine_busy_share: float | None
    """Of the time in which the engine was in sight: how much of it it worked, for live requests, too."""


@dataclass(frozen=True)
class CriticFigures:
    """What the critic did, and the signs of a bad one."""

    num_comparisons: int
    num_first_won: int
    num_second_won: int
    """Of readable answers, where both orders were asked: what is asked first has the likelier action in front."""
    num_invalid: int
    num_duels: int
    decided_by: Mapping[str, int]
    """Duels by the component that decided."""
    undecided: Mapping[str, int]
    """Duels that nobody won, by reason."""
    abstentions: Mapping[str, int]
    """Steps without a pick of the critic, by reason."""
    num_longer_won: int
    num_shorter_won: int
    """Duels between two answers, or two calls, of different lengths."""
    num_votes: int
    num_cached: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """From question to decision, added up over the duels: many of them wait side by side."""
    rubrics: tuple[str, ...]
    tokens_per_pair: float | None
    """Read and written, for each preference pair of the cycle; None where there is none."""
    seconds_per_pair: float | None

    @property
    def first_share(self) -> float | None:
        """How often the one that was shown first won; one half where order does not matter."""
        valid = self.num_first_won + self.num_second_won
        return self.num_first_won / valid if valid else None

    @property
    def longer_share(self) -> float | None:
        """How often the longer text won."""
        both = self.num_longer_won + self.num_shorter_won
        return self.num_longer_won / both if both else None


@dataclass(frozen=True)
class Training:
    """What the trainer logged."""

    num_pairs: int
    num_steps: int
    alarms: tuple[str, ...]
    final: Mapping[str, float]
    """Means of the last quarter of the steps."""
    curves: Mapping[str, tuple[tuple[float, float], ...]]
    """(step, value), by the metric's name."""


@dataclass(frozen=True)
class Attempt:
    """One adapter's answer to a held-out task."""

    adapter: str
    answer: str
    outcome: str
    num_steps: int
    turns: tuple[Said, ...]
    """The way to the answer, where it was kept."""


@dataclass(frozen=True)
class Changed:
    """A held-out task whose result flipped."""

    task_id: str
    family: str
    became: Literal["right", "wrong", "better", "worse"]
    """The last two where a judge compared answers."""
    question: str
    """Empty where the set is another one by now."""
    images: tuple[str, ...]
    expected: str
    before: Attempt
    after: Attempt


@dataclass(frozen=True)
class Link:
    """One pair's way back to live requests."""

    pair_id: str
    task_id: str
    request_ids: tuple[str, ...]


@dataclass(frozen=True)
class Lineage:
    """From the adapter back to the requests that it learned from."""

    adapter: str
    parent: str
    pairs_sha256: str
    """Of the trainer's file."""
    num_pairs: int
    num_tasks: int
    num_requests: int
    num_callers: int
    links: tuple[Link, ...]


@dataclass(frozen=True)
class TokenUse:
    """Tokens that one role wrote and read."""

    role: str
    words: str
    written: int
    read: int | None
    """None where it is not counted."""


@dataclass(frozen=True)
class Report:
    """Everything about one cycle."""

    cycle: CycleFacts
    funnel: Mapping[str, int]
    funnel_steps: tuple[FunnelStep, ...]
    stages: tuple[StageFacts, ...]
    examples: Examples
    practice: PracticeFigures
    task_families: tuple[Family, ...]
    """What practice found of each family of tasks."""
    critic: CriticFigures
    critic_audit: Mapping[str, Any] | None
    """The critic against the gold set, as `audit.Audit.to_json` gives it."""
    critic_drifts: tuple[str, ...]
    """How it answered otherwise than in earlier cycles, a sentence each."""
    training: Training | None
    evaluation: EvaluationRow | None
    changed: tuple[Changed, ...]
    lineage: Lineage
    tokens: tuple[TokenUse, ...]
    endpoints: tuple[RoleCost, ...]

    @property
    def seconds(self) -> float | None:
        """From start to end."""
        start, end = self.cycle.started_at, self.cycle.ended_at
        return end - start if start is not None and end is not None else None

    @property
    def money(self) -> float:
        """What endpoints cost, by the configured prices."""
        return sum(cost.cost for cost in self.endpoints)
