"""Micro-benchmarks of the ops and, later, of whole training steps."""
