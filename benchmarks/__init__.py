"""Benchmarks: single ops, whole training steps, a step counted without a GPU, convergence, and the report on all."""
