BEGIN TRANSACTION;
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
INSERT INTO "adapters" VALUES('0001-aaaaaaaa',1,'aaaaaaaa','active','base','cycle_1',4,8.0,'["q_proj"]',10,'{}',1.0,NULL);
CREATE TABLE audits (
    id TEXT PRIMARY KEY,
    cycle_id TEXT REFERENCES cycles(id),
    -- NULL for an audit by hand.
    numbers TEXT NOT NULL,
    created_at REAL NOT NULL
);
CREATE TABLE blob_holders (
    caller TEXT NOT NULL,
    sha256 TEXT NOT NULL REFERENCES blobs(sha256),
    created_at REAL NOT NULL,
    PRIMARY KEY (caller, sha256)
);
CREATE TABLE blobs (
    sha256 TEXT PRIMARY KEY,
    size_bytes INTEGER NOT NULL,
    media_type TEXT NOT NULL,
    created_at REAL NOT NULL
);
INSERT INTO "blobs" VALUES('ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad',3,'image/png',1.0);
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
    final INTEGER NOT NULL, simulated INTEGER NOT NULL DEFAULT 0, images TEXT NOT NULL DEFAULT '[]',
    UNIQUE (step_id, position)
);
INSERT INTO "candidates" VALUES('cand_1','step_1',0,'a','[1]',-1.0,3,'','',1,0,'[]');
INSERT INTO "candidates" VALUES('cand_2','step_1',1,'b','[2]',-2.0,2,'','',1,0,'[]');
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
    created_at REAL NOT NULL, why TEXT NOT NULL DEFAULT '', rubric TEXT NOT NULL DEFAULT '', num_votes INTEGER NOT NULL DEFAULT 1, num_cached INTEGER NOT NULL DEFAULT 0, completion_tokens INTEGER NOT NULL DEFAULT 0,
    UNIQUE (step_id, first, second)
);
INSERT INTO "critiques" VALUES('crit_1','step_1',0,1,'first',2.0,'',9,2.0,'','',1,0,0);
CREATE TABLE cycle_seeds (
    cycle_id TEXT NOT NULL REFERENCES cycles(id),
    response_id TEXT NOT NULL REFERENCES requests(id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    why TEXT NOT NULL,
    PRIMARY KEY (cycle_id, response_id)
);
INSERT INTO "cycle_seeds" VALUES('cycle_1','resp_1',0,'bad feedback');
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
INSERT INTO "cycles" VALUES('cycle_1','promoted','manual','try','[]','{}',0,NULL,NULL,'',NULL,0,NULL,NULL,1.0,NULL,NULL);
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
CREATE TABLE duels (
    step_id TEXT NOT NULL REFERENCES steps(id) ON DELETE CASCADE,
    a INTEGER NOT NULL,
    b INTEGER NOT NULL,
    -- Positions, a < b.
    winner INTEGER,
    -- NULL where nobody could be sure.
    why TEXT NOT NULL,
    margin REAL NOT NULL,
    component TEXT NOT NULL, seconds REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (step_id, a, b)
);
CREATE TABLE embeddings (
    sha256 TEXT NOT NULL REFERENCES blobs(sha256) ON DELETE CASCADE,
    digest TEXT NOT NULL,
    -- sha256 of the text that was embedded.
    model TEXT NOT NULL,
    vector BLOB NOT NULL,
    -- float32, little-endian, of length 1.
    PRIMARY KEY (sha256, digest, model)
);
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
CREATE TABLE "evaluation_results" (
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
INSERT INTO "evaluation_results" VALUES('s','','base','t1',0,'stock',1,'4','answered',2,0,30,0,0,0,0,0,'[]','cycle_1',3.0);
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
CREATE TABLE evaluation_turns (
    set_digest TEXT NOT NULL,
    protocol TEXT NOT NULL,
    adapter TEXT NOT NULL,
    task_id TEXT NOT NULL,
    turns TEXT NOT NULL,
    -- JSON: {who, text, images} each, without the question.
    PRIMARY KEY (set_digest, protocol, adapter, task_id)
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
, set_version INTEGER NOT NULL DEFAULT 0, protocol TEXT NOT NULL DEFAULT '', detectable REAL NOT NULL DEFAULT 0, rules TEXT NOT NULL DEFAULT '[]', sampled TEXT NOT NULL DEFAULT 'null', early_stop TEXT NOT NULL DEFAULT 'null', judge TEXT NOT NULL DEFAULT 'null', ability TEXT NOT NULL DEFAULT 'null', notes TEXT NOT NULL DEFAULT '[]', thresholds TEXT NOT NULL DEFAULT '{}');
INSERT INTO "evaluations" VALUES('eval_1','cycle_1','0001-aaaaaaaa','base','s',400,0.6,0.9,0.2,0.4,0.95,130,10,0.0001,1,'[]','[]',3.0,0,'',0.0,'[]','null','null','null','null','[]','{}');
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    reason TEXT NOT NULL,
    detail TEXT NOT NULL DEFAULT '{}'
);
INSERT INTO "events" VALUES(1,2.0,'cli','promote','0001-aaaaaaaa','better','{}');
CREATE TABLE families (
    cycle_id TEXT NOT NULL REFERENCES cycles(id),
    family TEXT NOT NULL,
    -- Tools that were called, and what was brought beside text: add+look_up/text.
    num_tasks INTEGER NOT NULL,
    solve_rate REAL NOT NULL,
    num_pairs INTEGER NOT NULL,
    seen_at REAL NOT NULL,
    PRIMARY KEY (cycle_id, family)
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
INSERT INTO "feedback" VALUES('fb_1','resp_1',NULL,'alice',0,NULL,'no','',2.0);
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
CREATE TABLE learner (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    paused INTEGER NOT NULL DEFAULT 0,
    pid INTEGER,
    last_seen_at REAL,
    last_error TEXT NOT NULL DEFAULT '',
    next_run_at REAL
);
INSERT INTO "learner" VALUES(1,0,NULL,NULL,'',NULL);
CREATE TABLE messages (
    response_id TEXT NOT NULL REFERENCES requests(id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    role TEXT NOT NULL,
    parts TEXT NOT NULL,
    sampled INTEGER NOT NULL,
    -- 1 where the model wrote it in this request, 0 where the caller sent it or a tool gave it.
    PRIMARY KEY (response_id, position)
);
INSERT INTO "messages" VALUES('resp_1',0,'user','[{"text":"hi","type":"text"}]',0);
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
INSERT INTO "pairs" VALUES('pair_1','cycle_1','step_1','cand_1','cand_2','both_ran',2.0,2.0);
CREATE TABLE replies (
    caller TEXT NOT NULL,
    request_id TEXT NOT NULL,
    method TEXT NOT NULL,
    digest TEXT NOT NULL,
    response BLOB NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (caller, request_id)
);
INSERT INTO "replies" VALUES('cli','k','PromoteAdapter','d',X'00',2.0);
CREATE TABLE request_blobs (
    response_id TEXT NOT NULL REFERENCES requests(id) ON DELETE CASCADE,
    sha256 TEXT NOT NULL REFERENCES blobs(sha256),
    PRIMARY KEY (response_id, sha256)
);
INSERT INTO "request_blobs" VALUES('resp_1','ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad');
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
INSERT INTO "requests" VALUES('resp_1','r1','d','task','alice','s1','base','train','{}','[]','OK','answered',2,0,10,5,0,X'0102',1.0,2.0);
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
INSERT INTO "rollouts" VALUES('roll_1','cycle_1','task_1','base','done','answered','4',2.0,3.0);
CREATE TABLE routes (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    active TEXT NOT NULL,
    previous TEXT NOT NULL,
    changed_at REAL NOT NULL
);
INSERT INTO "routes" VALUES(1,'0001-aaaaaaaa','base',2.0);
CREATE TABLE sessions (
    caller TEXT NOT NULL,
    id TEXT NOT NULL,
    adapter TEXT NOT NULL,
    created_at REAL NOT NULL,
    last_used_at REAL NOT NULL,
    PRIMARY KEY (caller, id)
);
INSERT INTO "sessions" VALUES('alice','s1','base',1.0,2.0);
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
INSERT INTO "stages" VALUES('cycle_1','seeds',0,'done',0,0,'{}','',NULL,NULL);
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
    created_at REAL NOT NULL, simulated INTEGER NOT NULL DEFAULT 0, abstention TEXT NOT NULL DEFAULT '', num_tokens INTEGER NOT NULL DEFAULT 0, num_calls INTEGER NOT NULL DEFAULT 0,
    UNIQUE (rollout_id, position)
);
INSERT INTO "steps" VALUES('step_1','roll_1',0,'[]',0,'critic',2.0,0,'',5,0);
CREATE TABLE task_blobs (
    task_id TEXT NOT NULL REFERENCES tasks(id) ON DELETE CASCADE,
    sha256 TEXT NOT NULL REFERENCES blobs(sha256),
    PRIMARY KEY (task_id, sha256)
);
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
CREATE TABLE task_seeds (
    task_id TEXT NOT NULL REFERENCES tasks(id) ON DELETE CASCADE,
    response_id TEXT NOT NULL REFERENCES requests(id) ON DELETE CASCADE,
    PRIMARY KEY (task_id, response_id)
);
INSERT INTO "task_seeds" VALUES('task_1','resp_1');
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
    created_at REAL NOT NULL, files TEXT NOT NULL DEFAULT '[]', role_tokens TEXT NOT NULL DEFAULT '{}', solve_rate REAL, probed_by TEXT NOT NULL DEFAULT '', probe_answers TEXT NOT NULL DEFAULT '[]', probe_tokens INTEGER NOT NULL DEFAULT 0, family TEXT NOT NULL DEFAULT '',
    UNIQUE (cycle_id, slot)
);
INSERT INTO "tasks" VALUES('task_1','cycle_1',0,'a task','[]','kept','[]',3,2.0,'[]','{}',NULL,'','[]',0,'');
CREATE TABLE tokens (
    name TEXT PRIMARY KEY,
    scope TEXT NOT NULL CHECK (scope IN ('user', 'admin')),
    sha256 TEXT NOT NULL UNIQUE,
    created_at REAL NOT NULL,
    revoked_at REAL
);
INSERT INTO "tokens" VALUES('alice','user','hash',1.0,NULL);
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
CREATE TABLE verifications (
    task_id TEXT NOT NULL REFERENCES tasks(id) ON DELETE CASCADE,
    attempt INTEGER NOT NULL,
    verdict TEXT NOT NULL CHECK (verdict IN ('keep', 'repair', 'drop', 'unreadable')),
    reason TEXT NOT NULL,
    original TEXT NOT NULL,
    -- The task as the writer wrote it.
    PRIMARY KEY (task_id, attempt)
);
CREATE INDEX events_subject ON events (subject, id);
CREATE UNIQUE INDEX requests_request_id ON requests (caller, request_id) WHERE request_id IS NOT NULL;
CREATE INDEX requests_created ON requests (created_at);
CREATE UNIQUE INDEX feedback_request_id ON feedback (caller, request_id) WHERE request_id IS NOT NULL;
CREATE INDEX feedback_response ON feedback (response_id);
CREATE INDEX blob_holders_sha256 ON blob_holders (sha256);
CREATE INDEX blob_holders_created ON blob_holders (created_at);
CREATE INDEX request_blobs_sha256 ON request_blobs (sha256);
CREATE INDEX task_blobs_sha256 ON task_blobs (sha256);
CREATE INDEX endpoint_calls_cycle ON endpoint_calls (cycle_id, role);
CREATE INDEX verdicts_cycle ON verdicts (cycle_id);
CREATE INDEX audits_cycle ON audits (cycle_id, created_at);
CREATE INDEX descriptions_cycle ON descriptions (cycle_id);
COMMIT;
PRAGMA user_version = 11;
