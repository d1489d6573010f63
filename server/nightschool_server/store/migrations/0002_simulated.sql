-- In practice a simulator may answer in the place of a tool that changes the world outside; whatever rests on it says so.

ALTER TABLE steps ADD COLUMN simulated INTEGER NOT NULL DEFAULT 0;
-- 1 where an observation of `history` is simulated.

ALTER TABLE candidates ADD COLUMN simulated INTEGER NOT NULL DEFAULT 0;
-- 1 where a part of `observation` is simulated.

ALTER TABLE evaluation_results ADD COLUMN num_simulated INTEGER NOT NULL DEFAULT 0;
-- Observations of the episode that a simulator gave.
