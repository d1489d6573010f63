-- Who may fetch a blob, and name it in a task, beside the requests that name it already. It lasts agent.keep_uploads_s.
CREATE TABLE blob_holders (
    caller TEXT NOT NULL,
    sha256 TEXT NOT NULL REFERENCES blobs(sha256),
    created_at REAL NOT NULL,
    PRIMARY KEY (caller, sha256)
);
CREATE INDEX blob_holders_sha256 ON blob_holders (sha256);
CREATE INDEX blob_holders_created ON blob_holders (created_at);
CREATE INDEX request_blobs_sha256 ON request_blobs (sha256);

-- The files that a task begins with, as JSON: name, media_type, size_bytes, sha256.
ALTER TABLE tasks ADD COLUMN files TEXT NOT NULL DEFAULT '[]';

-- Blobs that a task's rows name: its files, and images that its tools gave back.
CREATE TABLE task_blobs (
    task_id TEXT NOT NULL REFERENCES tasks(id) ON DELETE CASCADE,
    sha256 TEXT NOT NULL REFERENCES blobs(sha256),
    PRIMARY KEY (task_id, sha256)
);
CREATE INDEX task_blobs_sha256 ON task_blobs (sha256);
