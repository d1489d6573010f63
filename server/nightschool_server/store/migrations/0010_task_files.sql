-- Tasks with a file plan: what is known of blobs, how each file of a task came, what the verifier said of it.

-- What a blob is found by: a picture's caption, the first text of a file.
CREATE TABLE descriptions (
    sha256 TEXT NOT NULL REFERENCES blobs(sha256) ON DELETE CASCADE,
    model TEXT NOT NULL,
    -- Who described it; 'text' where it is the file's own text.
    text TEXT NOT NULL,
    tokens INTEGER NOT NULL,
    cycle_id TEXT REFERENCES cycles(id),
    -- That paid for it.
    created_at REAL NOT NULL,
    PRIMARY KEY (sha256, model)
);
CREATE INDEX descriptions_cycle ON descriptions (cycle_id);

-- Vectors of what blobs are found by, where an endpoint gives them.
CREATE TABLE embeddings (
    sha256 TEXT NOT NULL REFERENCES blobs(sha256) ON DELETE CASCADE,
    digest TEXT NOT NULL,
    -- sha256 of the text that was embedded.
    model TEXT NOT NULL,
    vector BLOB NOT NULL,
    -- float32, little-endian, of length 1.
    PRIMARY KEY (sha256, digest, model)
);

-- The files that a task planned, and how each came.
CREATE TABLE task_files (
    task_id TEXT NOT NULL REFERENCES tasks(id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    name TEXT NOT NULL,
    type TEXT NOT NULL,
    -- 'picture' for one that the assistant is shown.
    description TEXT NOT NULL,
    source TEXT NOT NULL CHECK (source IN ('retrieved', 'made')),
    sha256 TEXT NOT NULL,
    similarity REAL NOT NULL,
    response_id TEXT NOT NULL,
    -- The request that brought a retrieved one; '' for a made one.
    num_attempts INTEGER NOT NULL,
    code TEXT NOT NULL,
    -- Of a made one: programs that were written for it, and the one that made it.
    PRIMARY KEY (task_id, position)
);

-- What the verifier said of a draft, by the attempt of its slot.
CREATE TABLE verifications (
    task_id TEXT NOT NULL REFERENCES tasks(id) ON DELETE CASCADE,
    attempt INTEGER NOT NULL,
    verdict TEXT NOT NULL CHECK (verdict IN ('keep', 'repair', 'drop', 'unreadable')),
    reason TEXT NOT NULL,
    original TEXT NOT NULL,
    -- The task as the writer wrote it.
    PRIMARY KEY (task_id, attempt)
);

ALTER TABLE tasks ADD COLUMN role_tokens TEXT NOT NULL DEFAULT '{}';
-- JSON: tokens by role (file_maker, verifier), beside the writer's.
