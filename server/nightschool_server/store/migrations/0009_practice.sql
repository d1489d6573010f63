-- What a step's samples and executions took: samples that asked for an action which another one had asked for before are
-- in no row of their own.
ALTER TABLE steps ADD COLUMN num_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE steps ADD COLUMN num_calls INTEGER NOT NULL DEFAULT 0;
-- Tool calls that its candidates asked for.
UPDATE steps SET num_tokens = COALESCE(
    (SELECT SUM(num_samples * json_array_length(token_ids)) FROM candidates c WHERE c.step_id = steps.id), 0
);

ALTER TABLE duels ADD COLUMN seconds REAL NOT NULL DEFAULT 0;
-- From the question to the decision, waiting included.
