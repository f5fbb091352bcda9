"""Fused kernels for Hiera vision transformers; `accelerate(model)` swaps them into a model that exists already."""
