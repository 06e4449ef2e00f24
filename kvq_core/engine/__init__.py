"""Continuous batching: schedule, run, update."""
