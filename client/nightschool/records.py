"""What operators see: adapters, cycles, tasks, pairs and the server's status, as frozen types.

Field names are those of `admin.proto`, where each field is explained; `convert.py` reads them by name, and
`--json` writes them by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from nightschool.content import File

__all__ = [
    "Ability",
    "Adapter",
    "AdapterState",
    "Cycle",
    "CycleState",
    "EarlyStop",
    "EngineStatus",
    "Evaluation",
    "Event",
    "FamilyResult",
    "FileOrigin",
    "GateRule",
    "Interval",
    "JudgeResult",
    "LearnerStatus",
    "LogStatus",
    "Pair",
    "RouteChange",
    "SampledResult",
    "Spread",
    "Stage",
    "StageState",
    "Status",
    "Task",
    "Verification",
]


class AdapterState(StrEnum):
    """Where an adapter is in its life."""

    UNSPECIFIED = "unspecified"
    CANDIDATE = "candidate"
    CANARY = "canary"
    ACTIVE = "active"
    RETIRED = "retired"
    REJECTED = "rejected"
    QUARANTINED = "quarantined"


class CycleState(StrEnum):
    """Where a learning cycle is, or how it ended."""

    UNSPECIFIED = "unspecified"
    QUEUED = "queued"
    RUNNING = "running"
    PROMOTED = "promoted"
    REJECTED = "rejected"
    STOPPED = "stopped"
    """Ended early: there was nothing to learn from."""
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self not in {CycleState.UNSPECIFIED, CycleState.QUEUED, CycleState.RUNNING}


class StageState(StrEnum):
    """Where one stage of a cycle is."""

    UNSPECIFIED = "unspecified"
    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class EngineStatus:
    """What the engine is doing."""

    num_running: int
    num_waiting: int
    num_generated_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    loaded_adapters: tuple[str, ...]
    merged_adapter: str
    """The adapter that runs merged into the weights, "base" where none does; empty from a server that does not say."""
    busy_s: float
    """Wall time in which it worked, since its start: its growth over the time between two looks is how busy it was."""


@dataclass(frozen=True)
class LogStatus:
    """The request log."""

    num_requests: int
    num_feedback: int
    num_dropped: int
    """Log lines lost because the writer's queue was full."""
    queue_length: int
    redacts: bool
    """Whether text is redacted before it is stored."""


@dataclass(frozen=True)
class LearnerStatus:
    """The learner process."""

    running: bool
    paused: bool
    current_cycle: str
    last_error: str
    last_seen_at: datetime | None
    num_new_seeds: int
    """Requests that the next cycle may use and no cycle has used yet."""
    next_run_at: datetime | None


@dataclass(frozen=True)
class Status:
    """The server as a whole."""

    version: str
    base_model: str
    base_model_digest: str
    engine: str
    healthy: bool
    started_at: datetime | None
    active_adapter: str
    previous_adapter: str
    engine_status: EngineStatus | None
    log: LogStatus | None
    learner: LearnerStatus | None
    home: str
    requests_served: int
    requests_failed: int
    chat_template_digest: str


@dataclass(frozen=True)
class FamilyResult:
    """An evaluation's result on one family of tasks."""

    family: str
    n: int
    incumbent_success: float
    candidate_success: float
    num_gained: int
    num_lost: int
    p_value: float
    """Exact McNemar, two-sided."""
    non_inferiority_p: float
    """That it is worse by no more than the margin, one-sided."""
    provable: bool
    """Whether so few tasks could prove that at all."""


@dataclass(frozen=True)
class GateRule:
    """One rule of the gate."""

    name: str
    held: bool
    value: float
    threshold: float
    text: str
    decides: bool
    """Whether the candidate fails with it; the others are only reported."""


@dataclass(frozen=True)
class Interval:
    """A two-sided interval at a confidence level."""

    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Spread:
    """One adapter on the sampled tasks."""

    pass_at: tuple[float, ...]
    """pass@k for k = 1, ..., n."""
    distinct_answers: float
    """Different final answers of a task over its draws, mean over tasks."""
    distinct_actions: float
    """Different first steps of a task over its draws, mean over tasks."""


@dataclass(frozen=True)
class SampledResult:
    """Several sampled answers a task, both adapters from the same seeds."""

    num_tasks: int
    num_draws: int
    temperature: float
    incumbent: Spread | None
    candidate: Spread | None
    pass_at_1: Interval | None
    """Of the difference, candidate minus incumbent; whole tasks are resampled."""
    pass_at_n: Interval | None
    reading: str
    """learned, sharpened, narrowed, worse or unclear."""


@dataclass(frozen=True)
class Ability:
    """How likely neutral text is to the three adapters: negative log-likelihood, nats a token."""

    version: str
    """Names the text; numbers of different versions do not compare."""
    num_tokens: int
    base: float
    incumbent: float
    candidate: float


@dataclass(frozen=True)
class JudgeResult:
    """Whose answers a judge prefers, asked in both orders."""

    name: str
    is_training_critic: bool
    num_won: int
    num_lost: int
    num_tied: int
    """Equal answers, neither answered, or a judge that was not sure in both orders."""
    num_asked: int
    """Tasks on which the judge was asked; the others were decided by facts."""
    win_rate: float
    """(won + tied / 2) / n."""
    interval: Interval | None
    first_rate: float
    """How often the answer that was shown first won."""
    prompt_tokens: int


@dataclass(frozen=True)
class EarlyStop:
    """Where an evaluation ended that was looked at while it ran."""

    verdict: str
    """accepted, futile or complete."""
    n: int
    num_planned: int
    num_looks: int
    e_value: float
    """Evidence that the candidate is better; 1 is none."""
    e_futile: float
    """Evidence that it is not better by `futility_difference`."""
    futility_difference: float


@dataclass(frozen=True)
class Evaluation:
    """A candidate against an incumbent on the same held-out tasks."""

    id: str
    candidate: str
    incumbent: str
    n: int
    incumbent_success: float
    candidate_success: float
    interval_low: float
    """Of the difference, candidate minus incumbent."""
    interval_high: float
    interval_level: float
    num_gained: int
    """Tasks that only the candidate solved."""
    num_lost: int
    """Tasks that only the incumbent solved."""
    p_value: float
    """Exact McNemar, two-sided."""
    passed: bool
    reasons: tuple[str, ...]
    families: tuple[FamilyResult, ...]
    set_digest: str
    set_version: int
    """Of the application's held-out set; 1 is the first that was used, 0 unknown."""
    detectable: float
    """The true difference that n tasks find in 8 of 10 runs at the gate's p."""
    rules: tuple[GateRule, ...]
    sampled: SampledResult | None
    notes: tuple[str, ...]
    thresholds_json: str
    early_stop: EarlyStop | None
    ability: Ability | None
    judge: JudgeResult | None


@dataclass(frozen=True)
class Event:
    """A line of the audit trail."""

    at: datetime | None
    actor: str
    action: str
    reason: str


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in the registry."""

    name: str
    state: AdapterState
    parent: str
    cycle_id: str
    digest: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    size_bytes: int
    created_at: datetime | None
    evaluation: Evaluation | None
    events: tuple[Event, ...]
    """Why it is in its state, newest first."""
    num_leases: int
    loaded: bool


@dataclass(frozen=True)
class RouteChange:
    """The active pointer after it moved."""

    active_adapter: str
    previous_adapter: str
    at: datetime | None
    duration_s: float


@dataclass(frozen=True)
class Stage:
    """One stage of a cycle."""

    name: str
    state: StageState
    num_done: int
    num_total: int
    """0 while unknown."""
    started_at: datetime | None
    ended_at: datetime | None
    rate_per_s: float
    eta_s: float
    counts: Mapping[str, int]
    message: str


@dataclass(frozen=True)
class TaskFamily:
    """Tasks that call the same tools and bring the same kinds of content."""

    name: str
    """E.g. `add+look_up/text`."""
    num_tasks: int
    """Practised or probed."""
    solve_rate: float
    """Mean over its tasks."""
    num_pairs: int
    """Preference pairs that came of them."""


@dataclass(frozen=True)
class Cycle:
    """One round of learning, from seeds to the gate's decision."""

    id: str
    state: CycleState
    trigger: str
    reason: str
    created_at: datetime | None
    started_at: datetime | None
    ended_at: datetime | None
    stages: tuple[Stage, ...]
    incumbent: str
    candidate: str
    evaluation: Evaluation | None
    outcome: str
    """Why it ended as it did."""
    num_resumes: int
    """Process restarts that this cycle survived."""
    task_families: tuple[TaskFamily, ...]
    """What practice found of each family of tasks, the largest first; once the cycle has ended."""


@dataclass(frozen=True)
class FileOrigin:
    """How a file that a task planned came to be there."""

    name: str
    type: str
    """"picture" for one that the assistant is shown, else the type of a file in its workspace."""
    description: str
    source: str
    """retrieved, or made."""
    sha256: str
    similarity: float
    """Of a retrieved one: how like the description it is."""
    request_id: str
    """Of a retrieved one: the request that brought it."""
    num_attempts: int
    """Of a made one: programs that were written for it."""


@dataclass(frozen=True)
class Verification:
    """What a verifier said of a task."""

    verdict: str
    """keep, repair, drop, or unreadable."""
    reason: str
    original_prompt: str
    """The task as it was written, before any repair."""


@dataclass(frozen=True)
class Task:
    """A task that the learner wrote from logged requests."""

    id: str
    cycle_id: str
    prompt: str
    image_sha256: tuple[str, ...]
    state: str
    """kept, or the reason for which it was dropped."""
    seed_request_ids: tuple[str, ...]
    created_at: datetime | None
    num_simulated: int
    """Candidates of its rollout whose observation a simulator gave, wholly or in part."""
    files: tuple[File, ...]
    """In its workspace when it begins."""
    solve_rate: float | None
    """How often quick attempts solved it; None where nobody probed."""
    origins: tuple[FileOrigin, ...]
    """How each file that it planned came."""
    verification: Verification | None
    """What the verifier said of it; None where none was asked."""


@dataclass(frozen=True)
class Pair:
    """A preference between two candidates of one step."""

    id: str
    cycle_id: str
    task_id: str
    step: int
    kind: str
    """both_ran or ran_vs_failed."""
    prompt: str
    chosen: str
    rejected: str
    margin: float
    simulated: bool
    """Whether it rests on an observation that a simulator gave in the place of an external tool."""


@dataclass(frozen=True)
class RunChunk:
    """A piece of a training run on its way to a trainer on another host."""

    cycle_id: str
    chunk: bytes
    """Of a tar archive."""
