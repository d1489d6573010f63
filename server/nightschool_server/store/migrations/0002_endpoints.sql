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
