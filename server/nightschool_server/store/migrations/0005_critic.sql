-- Calls to OpenAI-compatible endpoints, by role: counts and costs, never a prompt, an answer or a key.
CREATE TABLE endpoint_calls (
    id TEXT PRIMARY KEY,
    cycle_id TEXT REFERENCES cycles(id),
    role TEXT NOT NULL,
    base_url TEXT NOT NULL,
    model TEXT NOT NULL,
    error TEXT NOT NULL,
    -- Empty where it was answered, else the kind of the last failure.
    num_tries INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cost REAL NOT NULL,
    duration_s REAL NOT NULL,
    created_at REAL NOT NULL
);
CREATE INDEX endpoint_calls_cycle ON endpoint_calls (cycle_id, role);

ALTER TABLE candidates ADD COLUMN images TEXT NOT NULL DEFAULT '[]';
-- sha256 of the images in `observation`, in order; `task_blobs` names them, too.

-- A critic's comparison in one order: why there is none, how it was asked, and what stands behind it.
ALTER TABLE critiques ADD COLUMN why TEXT NOT NULL DEFAULT '';
ALTER TABLE critiques ADD COLUMN rubric TEXT NOT NULL DEFAULT '';
-- Version and digest of the wording.
ALTER TABLE critiques ADD COLUMN num_votes INTEGER NOT NULL DEFAULT 1;
ALTER TABLE critiques ADD COLUMN num_cached INTEGER NOT NULL DEFAULT 0;
ALTER TABLE critiques ADD COLUMN completion_tokens INTEGER NOT NULL DEFAULT 0;

-- Two candidates of a step that both ran, and which component of the critic decided between them.
CREATE TABLE duels (
    step_id TEXT NOT NULL REFERENCES steps(id) ON DELETE CASCADE,
    a INTEGER NOT NULL,
    b INTEGER NOT NULL,
    -- Positions, a < b.
    winner INTEGER,
    -- NULL where nobody could be sure.
    why TEXT NOT NULL,
    margin REAL NOT NULL,
    component TEXT NOT NULL,
    PRIMARY KEY (step_id, a, b)
);
INSERT INTO duels (step_id, a, b, winner, why, margin, component)
SELECT f.step_id, f.first, f.second, CASE f.verdict WHEN 'first' THEN f.first ELSE f.second END, '',
    min(abs(f.margin), abs(r.margin)), 'judge'
FROM critiques f JOIN critiques r ON r.step_id = f.step_id AND r.first = f.second AND r.second = f.first
WHERE f.first < f.second AND (f.verdict, r.verdict) IN (VALUES ('first', 'second'), ('second', 'first'));

ALTER TABLE steps ADD COLUMN abstention TEXT NOT NULL DEFAULT '';
-- Why nobody won, where `picked_by` is 'fallback'.

-- What a critic answered before, by the hash of all that it was asked: scores and counts, no text of anybody.
CREATE TABLE verdicts (
    key TEXT PRIMARY KEY,
    cycle_id TEXT REFERENCES cycles(id),
    -- That paid for it; NULL for an audit by hand.
    rubric TEXT NOT NULL,
    model TEXT NOT NULL,
    scores TEXT NOT NULL,
    -- One number a candidate in the order shown, in nats; [] where the answer could not be read.
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cost REAL NOT NULL,
    created_at REAL NOT NULL
);
CREATE INDEX verdicts_cycle ON verdicts (cycle_id);
