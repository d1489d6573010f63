"""Adapters: their folders and rows, which one answers, who holds it, and the proof that it does something."""
