"""Benchmarks: measured ratios, never timed tests."""
