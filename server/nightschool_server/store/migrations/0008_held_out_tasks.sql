-- Every held-out task that this home has met, of whatever set and version: none of them is ever practised.
CREATE TABLE held_out_tasks (
    digest TEXT PRIMARY KEY,
    -- sha256 over prompt and pictures.
    prompt TEXT NOT NULL,
    images TEXT NOT NULL,
    -- JSON: sha256 each.
    looks TEXT NOT NULL,
    -- JSON: how each of them looks, base64 of hashes and blocks.
    met_at REAL NOT NULL
);
