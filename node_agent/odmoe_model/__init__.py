"""Checkpoint, expert store and expert maths. Knows torch and transformers; knows no socket and no role."""
