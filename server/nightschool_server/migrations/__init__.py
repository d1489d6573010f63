"""Numbered SQL migrations; each runs once, in one transaction."""
