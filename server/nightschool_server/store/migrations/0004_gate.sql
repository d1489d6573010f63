-- Evaluation: versions of the held-out set, several answers of a task, everything that the gate's decision rests on.

CREATE TABLE evaluation_sets (
    digest TEXT PRIMARY KEY,
    app TEXT NOT NULL,
    version INTEGER NOT NULL,
    -- 1 for the application's first set, and so on.
    n INTEGER NOT NULL,
    families TEXT NOT NULL,
    -- JSON: family -> {n, digest}.
    created_at REAL NOT NULL,
    UNIQUE (app, version)
);

CREATE TABLE evaluation_results_new (
    set_digest TEXT NOT NULL,
    protocol TEXT NOT NULL,
    -- Digest of what else a result depends on: base model, system prompt, tools, limits, sampling.
    adapter TEXT NOT NULL,
    task_id TEXT NOT NULL,
    draw INTEGER NOT NULL,
    -- 0: the greedy answer; others: sampled ones.
    family TEXT NOT NULL,
    success INTEGER NOT NULL,
    answer TEXT NOT NULL,
    outcome TEXT NOT NULL,
    num_steps INTEGER NOT NULL,
    num_tool_errors INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    num_simulated INTEGER NOT NULL DEFAULT 0,
    -- Observations of the episode that a simulator gave.
    num_unreadable INTEGER NOT NULL DEFAULT 0,
    num_external INTEGER NOT NULL DEFAULT 0,
    num_unsafe INTEGER NOT NULL DEFAULT 0,
    refused INTEGER NOT NULL DEFAULT 0,
    actions TEXT NOT NULL DEFAULT '[]',
    -- JSON: a digest of each step's action.
    cycle_id TEXT REFERENCES cycles(id),
    created_at REAL NOT NULL,
    PRIMARY KEY (set_digest, protocol, adapter, task_id, draw)
);
INSERT INTO evaluation_results_new (
    set_digest, protocol, adapter, task_id, draw, family, success, answer, outcome, num_steps, num_tool_errors,
    completion_tokens, num_simulated, cycle_id, created_at
)
SELECT set_digest, '', adapter, task_id, 0, family, success, answer, outcome, num_steps, num_tool_errors,
    completion_tokens, num_simulated, cycle_id, created_at
FROM evaluation_results;
DROP TABLE evaluation_results;
ALTER TABLE evaluation_results_new RENAME TO evaluation_results;

-- One comparison of two answers to a held-out task without a known answer, in one order.
CREATE TABLE evaluation_judgements (
    cycle_id TEXT NOT NULL REFERENCES cycles(id),
    task_id TEXT NOT NULL,
    candidate_first INTEGER NOT NULL,
    winner TEXT NOT NULL CHECK (winner IN ('candidate', 'incumbent', 'none')),
    margin REAL NOT NULL,
    -- Nats, in favour of the candidate.
    raw TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (cycle_id, task_id, candidate_first)
);

ALTER TABLE evaluations ADD COLUMN set_version INTEGER NOT NULL DEFAULT 0;
ALTER TABLE evaluations ADD COLUMN protocol TEXT NOT NULL DEFAULT '';
ALTER TABLE evaluations ADD COLUMN detectable REAL NOT NULL DEFAULT 0;
ALTER TABLE evaluations ADD COLUMN rules TEXT NOT NULL DEFAULT '[]';
ALTER TABLE evaluations ADD COLUMN sampled TEXT NOT NULL DEFAULT 'null';
ALTER TABLE evaluations ADD COLUMN early_stop TEXT NOT NULL DEFAULT 'null';
ALTER TABLE evaluations ADD COLUMN judge TEXT NOT NULL DEFAULT 'null';
ALTER TABLE evaluations ADD COLUMN ability TEXT NOT NULL DEFAULT 'null';
ALTER TABLE evaluations ADD COLUMN notes TEXT NOT NULL DEFAULT '[]';
ALTER TABLE evaluations ADD COLUMN thresholds TEXT NOT NULL DEFAULT '{}';
