"""Runnable examples; each is a plain script that prints stock against accelerated."""
