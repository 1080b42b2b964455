"""A node agent: holds experts in host memory, loads them into few slots, computes. Knows experts, no
models."""
