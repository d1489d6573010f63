"""Learning: turns logged requests into tasks, candidates, preferences and a proven adapter."""
