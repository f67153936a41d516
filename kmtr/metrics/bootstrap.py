"""Bootstrap intervals over held-out subjects."""

from __future__ import annotations

import numpy as np

from kmtr.metrics.ridge import Probe


def paired_bootstrap(a: Probe, b: Probe, resamples: int, seed: int = 0) -> tuple[float, float]:
    """95 % interval of R2(a) - R2(b) over resampled held-out subjects, the same subjects for both."""
    rng = np.random.Generator(np.random.Philox(seed))
    index = rng.integers(0, len(a.truth), (resamples, len(a.truth)))
    spread = np.sum((a.truth[index] - a.training_mean) ** 2, axis=1)
    gain = np.sum(((b.predicted - b.truth) ** 2 - (a.predicted - a.truth) ** 2)[index], axis=1) / spread
    low, high = np.quantile(gain, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_r2(a: Probe, resamples: int, seed: int = 0) -> tuple[float, float]:
    """95 % interval of R2 over resampled held-out subjects."""
    mean = Probe(a.truth, np.full_like(a.predicted, a.training_mean), a.training_mean)
    return paired_bootstrap(a, mean, resamples, seed)
