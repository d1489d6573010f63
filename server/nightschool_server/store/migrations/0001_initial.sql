-- Times are Unix seconds (REAL). Ids are `<prefix>_<sortable hex>` (see ids.py). JSON is canonical text.

CREATE TABLE tokens (
    name TEXT PRIMARY KEY,
    scope TEXT NOT NULL CHECK (scope IN ('user', 'admin')),
    sha256 TEXT NOT NULL UNIQUE,
    created_at REAL NOT NULL,
    revoked_at REAL
);

CREATE TABLE blobs (
    sha256 TEXT PRIMARY KEY,
    size_bytes INTEGER NOT NULL,
    media_type TEXT NOT NULL,
    created_at REAL NOT NULL
);

CREATE TABLE adapters (
    name TEXT PRIMARY KEY,
    sequence INTEGER NOT NULL UNIQUE,
    digest TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('candidate', 'canary', 'active', 'retired', 'rejected', 'quarantined')),
    parent TEXT NOT NULL,
    cycle_id TEXT REFERENCES cycles(id),
    rank INTEGER NOT NULL,
    alpha REAL NOT NULL,
    target_modules TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    manifest TEXT NOT NULL,
    created_at REAL NOT NULL,
    deleted_at REAL
);

-- One row: which adapter answers requests that are not pinned.
CREATE TABLE routes (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    active TEXT NOT NULL,
    previous TEXT NOT NULL,
    changed_at REAL NOT NULL
);
INSERT INTO routes (id, active, previous, changed_at) VALUES (1, 'base', 'base', 0);

CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    reason TEXT NOT NULL,
    detail TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX events_subject ON events (subject, id);

-- Two callers may use the same id: their sessions are apart.
CREATE TABLE sessions (
    caller TEXT NOT NULL,
    id TEXT NOT NULL,
    adapter TEXT NOT NULL,
    created_at REAL NOT NULL,
    last_used_at REAL NOT NULL,
    PRIMARY KEY (caller, id)
);

CREATE TABLE requests (
    id TEXT PRIMARY KEY,
    -- The response_id that callers see.
    request_id TEXT,
    digest TEXT NOT NULL,
    method TEXT NOT NULL CHECK (method IN ('generate', 'stream', 'task')),
    caller TEXT NOT NULL,
    session_id TEXT,
    adapter TEXT NOT NULL,
    policy TEXT NOT NULL CHECK (policy IN ('train', 'log_only', 'no_log')),
    sampling TEXT NOT NULL,
    tools TEXT NOT NULL,
    status TEXT NOT NULL,
    -- gRPC status name, OK for an answered one.
    outcome TEXT NOT NULL DEFAULT '',
    num_steps INTEGER NOT NULL DEFAULT 1,
    num_tool_errors INTEGER NOT NULL DEFAULT 0,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    response BLOB,
    -- The serialised reply, for idempotent repeats.
    created_at REAL NOT NULL,
    ended_at REAL NOT NULL
);
CREATE UNIQUE INDEX requests_request_id ON requests (caller, request_id) WHERE request_id IS NOT NULL;
CREATE INDEX requests_created ON requests (created_at);

CREATE TABLE messages (
    response_id TEXT NOT NULL REFERENCES requests(id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    role TEXT NOT NULL,
    parts TEXT NOT NULL,
    sampled INTEGER NOT NULL,
    -- 1 where the model wrote it in this request, 0 where the caller sent it or a tool gave it.
    PRIMARY KEY (response_id, position)
);

CREATE TABLE request_blobs (
    response_id TEXT NOT NULL REFERENCES requests(id) ON DELETE CASCADE,
    sha256 TEXT NOT NULL REFERENCES blobs(sha256),
    PRIMARY KEY (response_id, sha256)
);

CREATE TABLE feedback (
    id TEXT PRIMARY KEY,
    response_id TEXT NOT NULL REFERENCES requests(id) ON DELETE CASCADE,
    request_id TEXT,
    caller TEXT NOT NULL,
    good INTEGER,
    score REAL,
    comment TEXT NOT NULL,
    correction TEXT NOT NULL,
    created_at REAL NOT NULL
);
CREATE UNIQUE INDEX feedback_request_id ON feedback (caller, request_id) WHERE request_id IS NOT NULL;
CREATE INDEX feedback_response ON feedback (response_id);

-- Replies to admin writes, by idempotency key.
CREATE TABLE replies (
    caller TEXT NOT NULL,
    request_id TEXT NOT NULL,
    method TEXT NOT NULL,
    digest TEXT NOT NULL,
    response BLOB NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (caller, request_id)
);

CREATE TABLE learner (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    paused INTEGER NOT NULL DEFAULT 0,
    pid INTEGER,
    last_seen_at REAL,
    last_error TEXT NOT NULL DEFAULT '',
    next_run_at REAL
);
INSERT INTO learner (id) VALUES (1);

CREATE TABLE cycles (
    id TEXT PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'promoted', 'rejected', 'stopped', 'cancelled', 'failed')),
    trigger TEXT NOT NULL CHECK (trigger IN ('manual', 'interval', 'cron', 'seeds')),
    reason TEXT NOT NULL,
    overrides TEXT NOT NULL DEFAULT '[]',
    config TEXT NOT NULL DEFAULT '{}',
    seed INTEGER NOT NULL DEFAULT 0,
    incumbent TEXT,
    candidate TEXT,
    outcome TEXT NOT NULL DEFAULT '',
    cancel_reason TEXT,
    num_resumes INTEGER NOT NULL DEFAULT 0,
    lease_pid INTEGER,
    lease_until REAL,
    created_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL
);

CREATE TABLE stages (
    cycle_id TEXT NOT NULL REFERENCES cycles(id),
    name TEXT NOT NULL,
    position INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'running', 'done', 'failed')),
    num_done INTEGER NOT NULL DEFAULT 0,
    num_total INTEGER NOT NULL DEFAULT 0,
    counts TEXT NOT NULL DEFAULT '{}',
    message TEXT NOT NULL DEFAULT '',
    started_at REAL,
    ended_at REAL,
    PRIMARY KEY (cycle_id, name)
);

-- The logged requests that a cycle may learn from, chosen once.
CREATE TABLE cycle_seeds (
    cycle_id TEXT NOT NULL REFERENCES cycles(id),
    response_id TEXT NOT NULL REFERENCES requests(id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    why TEXT NOT NULL,
    PRIMARY KEY (cycle_id, response_id)
);

-- A task that the writer wrote, kept or dropped. `slot` is the unit of work: one call of the writer.
CREATE TABLE tasks (
    id TEXT PRIMARY KEY,
    cycle_id TEXT NOT NULL REFERENCES cycles(id),
    slot INTEGER NOT NULL,
    prompt TEXT NOT NULL,
    images TEXT NOT NULL,
    state TEXT NOT NULL,
    -- 'kept' or the reason for which it was dropped.
    raw TEXT NOT NULL,
    tokens INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL,
    UNIQUE (cycle_id, slot)
);
CREATE TABLE task_seeds (
    task_id TEXT NOT NULL REFERENCES tasks(id) ON DELETE CASCADE,
    response_id TEXT NOT NULL REFERENCES requests(id) ON DELETE CASCADE,
    PRIMARY KEY (task_id, response_id)
);

CREATE TABLE rollouts (
    id TEXT PRIMARY KEY,
    cycle_id TEXT NOT NULL REFERENCES cycles(id),
    task_id TEXT NOT NULL UNIQUE REFERENCES tasks(id) ON DELETE CASCADE,
    adapter TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed')),
    outcome TEXT NOT NULL DEFAULT '',
    answer TEXT NOT NULL DEFAULT '',
    started_at REAL NOT NULL,
    ended_at REAL
);

CREATE TABLE steps (
    id TEXT PRIMARY KEY,
    rollout_id TEXT NOT NULL REFERENCES rollouts(id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    history TEXT NOT NULL,
    -- The conversation that the candidates continue, as messages JSON.
    picked INTEGER,
    -- Position of the candidate that the trajectory continued from.
    picked_by TEXT NOT NULL DEFAULT '',
    -- 'facts', 'critic' or 'fallback' (the critic abstained: no pair).
    created_at REAL NOT NULL,
    UNIQUE (rollout_id, position)
);

-- Distinct actions of a step. Equal samples are one candidate with a count.
CREATE TABLE candidates (
    id TEXT PRIMARY KEY,
    step_id TEXT NOT NULL REFERENCES steps(id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    text TEXT NOT NULL,
    token_ids TEXT NOT NULL,
    logprob REAL NOT NULL,
    num_samples INTEGER NOT NULL,
    observation TEXT NOT NULL,
    failure TEXT NOT NULL DEFAULT '',
    -- '' or which fact speaks against it: parse, schema, execution, budget.
    final INTEGER NOT NULL,
    UNIQUE (step_id, position)
);

-- One comparison in one order.
CREATE TABLE critiques (
    id TEXT PRIMARY KEY,
    step_id TEXT NOT NULL REFERENCES steps(id) ON DELETE CASCADE,
    first INTEGER NOT NULL,
    second INTEGER NOT NULL,
    verdict TEXT NOT NULL CHECK (verdict IN ('first', 'second', 'invalid')),
    margin REAL NOT NULL,
    -- Nats, in favour of `first`.
    raw TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    created_at REAL NOT NULL,
    UNIQUE (step_id, first, second)
);

CREATE TABLE pairs (
    id TEXT PRIMARY KEY,
    cycle_id TEXT NOT NULL REFERENCES cycles(id),
    step_id TEXT NOT NULL REFERENCES steps(id) ON DELETE CASCADE,
    chosen TEXT NOT NULL REFERENCES candidates(id) ON DELETE CASCADE,
    rejected TEXT NOT NULL REFERENCES candidates(id) ON DELETE CASCADE,
    kind TEXT NOT NULL CHECK (kind IN ('both_ran', 'ran_vs_failed')),
    margin REAL NOT NULL,
    created_at REAL NOT NULL,
    UNIQUE (step_id, chosen, rejected)
);

CREATE TABLE evaluations (
    id TEXT PRIMARY KEY,
    cycle_id TEXT REFERENCES cycles(id),
    candidate TEXT NOT NULL,
    incumbent TEXT NOT NULL,
    set_digest TEXT NOT NULL,
    n INTEGER NOT NULL,
    incumbent_success REAL NOT NULL,
    candidate_success REAL NOT NULL,
    interval_low REAL NOT NULL,
    interval_high REAL NOT NULL,
    interval_level REAL NOT NULL,
    num_gained INTEGER NOT NULL,
    num_lost INTEGER NOT NULL,
    p_value REAL NOT NULL,
    passed INTEGER NOT NULL,
    reasons TEXT NOT NULL,
    families TEXT NOT NULL,
    created_at REAL NOT NULL
);

-- One held-out task on one adapter: the unit of work of the evaluate stage.
CREATE TABLE evaluation_results (
    set_digest TEXT NOT NULL,
    adapter TEXT NOT NULL,
    task_id TEXT NOT NULL,
    family TEXT NOT NULL,
    success INTEGER NOT NULL,
    answer TEXT NOT NULL,
    outcome TEXT NOT NULL,
    num_steps INTEGER NOT NULL,
    num_tool_errors INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cycle_id TEXT REFERENCES cycles(id),
    created_at REAL NOT NULL,
    PRIMARY KEY (set_digest, adapter, task_id)
);
