"""The rows of the gate's decisions: one for each evaluation, with its numbers, its rules and its thresholds.

Owns their SQL. Everything that a page about the decision shows is in one `EvaluationRow`; the single answers behind
it are `evaluation_results.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from nightschool_learner.ability import Ability
from nightschool_learner.diversity import Sampled
from nightschool_learner.gate import Rule
from nightschool_learner.judge import JudgeResult
from nightschool_learner.sequential import EarlyStop

if TYPE_CHECKING:
    from nightschool_server.store.store import Store


@dataclass(frozen=True)
class EvaluationRow:
    """A row of `evaluations`: a decision of the gate with all that it rests on."""

    id: str
    cycle_id: str
    candidate: str
    incumbent: str
    set_digest: str
    n: int
    incumbent_success: float
    candidate_success: float
    interval_low: float
    interval_high: float
    interval_level: float
    num_gained: int
    num_lost: int
    p_value: float
    passed: bool
    reasons: tuple[str, ...]
    families: Sequence[Mapping[str, Any]]
    """A `comparison.Family` each."""
    set_version: int
    """Of the application's held-out set; 1 is the first that was used."""
    protocol: str
    """Digest of what else the results depend on; see `evaluation_sets.protocol_of`."""
    detectable: float
    """The true difference that n tasks find in 8 of 10 runs at `gate.max_p`."""
    rules: tuple[Rule, ...]
    sampled: Sampled | None
    """pass@1, pass@n and diversity; None where nothing was sampled."""
    ability: Ability | None
    """How likely neutral text is to the three adapters."""
    judge: JudgeResult | None
    """Who compared the answers, where tasks have none of their own; success is then the share that it prefers."""
    early_stop: EarlyStop | None
    """Where it ended, if somebody looked on the way; `p_value` and the interval then hold at every look."""
    notes: tuple[str, ...]
    """What a reader must know beside the numbers, e.g. that the set changed since the last evaluation."""
    thresholds: Mapping[str, Any]
    """The settings of `learner.gate` and of `learner.evaluate` that were in force."""


_JSON = {"reasons", "families", "rules", "sampled", "ability", "judge", "early_stop", "notes", "thresholds"}
_COLUMNS = tuple(EvaluationRow.__dataclass_fields__)
_ROW = TypeAdapter(EvaluationRow)


def evaluation_of(store: Store, cycle_id: str) -> EvaluationRow | None:
    """The cycle's evaluation, once the gate has decided."""
    row = store.one(f"SELECT {', '.join(_COLUMNS)} FROM evaluations WHERE cycle_id = ?", (cycle_id,))
    if row is None:
        return None
    values = {key: json.loads(value) if key in _JSON else value for key, value in row.items()}
    return _ROW.validate_python(values)


def insert_evaluation(store: Store, row: EvaluationRow) -> None:
    """Write the decision, once: the id derives from the cycle."""
    values = {key: _cell(key, getattr(row, key)) for key in _COLUMNS} | {"created_at": time.time()}
    marks = ", ".join("?" for _ in values)
    with store.transaction() as db:
        db.execute(f"INSERT OR IGNORE INTO evaluations ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))


def _cell(key: str, value: Any) -> Any:
    if key in _JSON:
        return json.dumps(_plain(value), ensure_ascii=False)
    return int(value) if isinstance(value, bool) else value


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
