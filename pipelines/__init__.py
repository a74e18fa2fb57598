"""Inference: the pipeline and the pure helpers that only it needs."""
