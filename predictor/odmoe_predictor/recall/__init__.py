"""Recall of the shadow and of its rivals, measured on many prompts in lockstep: `python -m odmoe_predictor.recall`."""
