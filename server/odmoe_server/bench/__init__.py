"""`odmoe bench`: what is measured against plain transformers, side by side in one run, and what is kept of it.

Starts the same processes as `odmoe serve` does; imported by the command line only when it is asked for.
"""
