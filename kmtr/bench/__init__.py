"""Benchmarks: the speed of reading and of a training step, beside other ways to do the same."""
