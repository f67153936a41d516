"""Evaluation of an encoder on held-out subjects, beside linear baselines."""
