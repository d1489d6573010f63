-- Which of two candidates of a step people found better, shown blind.
CREATE TABLE labels (
    step_id TEXT NOT NULL REFERENCES steps(id) ON DELETE CASCADE,
    a INTEGER NOT NULL,
    b INTEGER NOT NULL,
    -- Positions, a < b.
    better TEXT NOT NULL CHECK (better IN ('a', 'b', 'tie')),
    labelled_by TEXT NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (step_id, a, b, labelled_by)
);

-- The critic against the gold set.
CREATE TABLE audits (
    id TEXT PRIMARY KEY,
    cycle_id TEXT REFERENCES cycles(id),
    -- NULL for an audit by hand.
    numbers TEXT NOT NULL,
    created_at REAL NOT NULL
);
CREATE INDEX audits_cycle ON audits (cycle_id, created_at);
