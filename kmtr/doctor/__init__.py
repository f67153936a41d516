"""Checks of an environment, a cluster, a dataset and a run's settings, before anything fails."""
