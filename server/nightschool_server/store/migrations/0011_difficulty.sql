-- How often a written task is solved, by a few quick attempts, and how well each family of tasks is, cycle by cycle.
ALTER TABLE tasks ADD COLUMN solve_rate REAL;
ALTER TABLE tasks ADD COLUMN probed_by TEXT NOT NULL DEFAULT '';
-- scorer or agreement; '' where nobody probed.
ALTER TABLE tasks ADD COLUMN probe_answers TEXT NOT NULL DEFAULT '[]';
-- JSON: each sample's answer, cut; '' for none.
ALTER TABLE tasks ADD COLUMN probe_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tasks ADD COLUMN family TEXT NOT NULL DEFAULT '';
-- Of the probe's attempts.

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
