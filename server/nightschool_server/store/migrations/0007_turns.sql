-- How an adapter came to its greedy answer to a held-out task, for people who read what changed.
CREATE TABLE evaluation_turns (
    set_digest TEXT NOT NULL,
    protocol TEXT NOT NULL,
    adapter TEXT NOT NULL,
    task_id TEXT NOT NULL,
    turns TEXT NOT NULL,
    -- JSON: {who, text, images} each, without the question.
    PRIMARY KEY (set_digest, protocol, adapter, task_id)
);
