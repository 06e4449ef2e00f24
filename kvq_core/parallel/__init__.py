"""Tensor parallelism: one model over several processes, each with its own device and its own pages."""
