"""Nights at the shop as rows of a table: what is varied, how a night runs, and what is measured of it."""
