"""Simulation of a cohort, written as a dataset."""

from __future__ import annotations

from functools import partial
from typing import Any

from kmtr.config import RunConfig
from kmtr.data.dataset import splits
from kmtr.data.dataset.driver import write
from kmtr.simulation import phantom
from kmtr.simulation.labels import labels
from kmtr.simulation.population import anatomy
from kmtr.types import Study


def simulated(item: int, config: RunConfig) -> Study:
    """Subject number `item` of the cohort that the configuration describes."""
    return phantom.simulate(
        item,
        seed=config.simulate.seed,
        views=config.data.views,
        sax_slices=config.data.sax_slices,
        frames=config.data.frames,
        matrix=config.data.matrix,
        snr_db=config.simulate.snr_db,
        difficulty=config.simulate.difficulty,
        coils=config.simulate.coils,
        oversampling=config.simulate.oversampling,
    )


def made_by(config: RunConfig) -> str:
    """Text of all that decides a simulated cohort's content: the same text, the same data."""
    d, s = config.data, config.simulate
    return (
        f"simulate {phantom.SOURCE} views={','.join(d.views)} sax_slices={d.sax_slices} frames={d.frames} "
        f"matrix={d.matrix[0]},{d.matrix[1]} subjects={s.subjects} seed={s.seed} snr_db={s.snr_db} "
        f"difficulty={s.difficulty} coils={s.coils} oversampling={s.oversampling}"
    )


def strata(config: RunConfig) -> list[str]:
    """Sex and diseases of every subject, known without its images."""
    s = config.simulate
    return [splits.stratum(labels(anatomy(i, seed=s.seed))) for i in range(s.subjects)]


def run(config: RunConfig) -> dict[str, Any]:
    """Simulate, or find that it is done; what the last line on stdout says."""
    ids = [phantom.subject_id(i, seed=config.simulate.seed) for i in range(config.simulate.subjects)]
    _, said = write(
        "simulate", config, ids, partial(simulated, config=config), made_by(config), partial(strata, config)
    )
    return said
