"""Systems side by side: k-MTR and its opponents (`contenders`) on the same labels, for as many seconds, at every R.

A study of tasks whose rows are contenders, all with all labels; it shares its folder of rows with a study of tasks of
the same settings, and takes the rows of k-MTR from there.
"""

from __future__ import annotations

from kmtr.config import RunConfig
from kmtr.studies import system_report
from kmtr.studies.contenders import CONTENDERS
from kmtr.studies.task_rows import PRETRAINED, Asked
from kmtr.studies.task_study import Kind
from kmtr.types import InputError


def order(config: RunConfig) -> list[Asked]:
    """All rows, seed by seed in the order of `CONTENDERS`, of later seeds those that are not of the first alone; who
    learns none of the study's tasks is left out.

    Raises:
        InputError: `study.systems` names one that there is not, or leaves out k-MTR, or one that another one needs.
    """
    asked = config.study.systems or tuple(CONTENDERS)
    if other := [name for name in asked if name not in CONTENDERS]:
        raise InputError(f"study.systems: expected some of {', '.join(CONTENDERS)}, got {other[0]}")
    if PRETRAINED not in asked:
        raise InputError(
            f"study.systems: expected {PRETRAINED} among them, which the others are compared with, got "
            f"{','.join(asked)}"
        )
    for name in asked:
        needed = [one for one in (CONTENDERS[name].first, CONTENDERS[name].then) if one in CONTENDERS]
        if missing := [one for one in needed if one not in asked]:
            raise InputError(
                f"study.systems: expected {missing[0]} among them, whose model {name} takes, got {','.join(asked)}"
            )
    names = [name for name in CONTENDERS if name in asked]
    rows = [
        Asked(seed, name, CONTENDERS[name].learns(config), 0)
        for seed in config.study.seeds
        for name in names
        if seed == config.study.seeds[0] or not CONTENDERS[name].once
    ]
    return [one for one in rows if one.tasks]


KIND = Kind("systems", order, system_report.report)
