"""Spread and collapse of embeddings."""

from __future__ import annotations

import numpy as np


def effective_rank(embeddings: np.ndarray) -> float:
    """Directions that embeddings ``subject feature`` really use: exp of the entropy of their normalised singular values
    (Roy and Vetterli 2007) after the mean is taken off. Between 1, all on one line, and the lesser of subjects - 1 and
    features; 0 where all are alike.
    """
    singular = np.linalg.svd(embeddings.astype(np.float64) - embeddings.mean(0, dtype=np.float64), compute_uv=False)
    if singular.sum() <= 1e-9 * max(float(np.abs(embeddings).max(initial=0)), 1e-30):
        return 0.0
    share = singular / singular.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def embedding_deviation(embeddings: np.ndarray) -> float:
    """Mean SD of the features of L2-normalised embeddings ``subject feature``, times sqrt(features): 1 where they are
    spread evenly over the sphere, 0 where they collapse (Chen and He 2021).
    """
    norm = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.where(norm > 0, norm, 1)
    return float(unit.std(0).mean() * np.sqrt(embeddings.shape[1]))
