"""Frozen, validated configuration and its one way in: ``RECIPE key=value ...`` with dotted keys.

A ``RunConfig`` is what a person, a job and a Tune trial all change in the same way (`override`), what is printed, saved
(`to_json`, `from_json`) and logged to MLflow (`flatten`, `run_keys`). Whatever can't work dies here, before a worker
starts, on one line that says what to change.

core          sections, keys, overrides, errors          run         settings that a training run reads
commands      settings of everything else                whole       all together: RunConfig, identity of a run
recipes       tiny, base, large                             used        settings that each command reads
help          text of --help                                submitted   paths of a command on a cluster
budget        lines of a sampling family at some R
"""

from kmtr.config.budget import check_lines, drawn_lines, most_lines
from kmtr.config.commands import (
    Bench,
    Evaluate,
    Ingest,
    Phenotypes,
    Predict,
    Search,
    Shards,
    Simulate,
    Study,
    Verify,
)
from kmtr.config.core import Section, changed, flatten, keys, override, plain, to_json, typed
from kmtr.config.run import (
    MIN_ALIGNED_SUBJECTS,
    MIN_TEMPERATURE,
    Align,
    Augment,
    Data,
    Masked,
    Model,
    Optimizer,
    Plan,
    Run,
    Sampling,
    Storage,
    Task,
    Tracking,
    Train,
    Workers,
)
from kmtr.config.whole import RunConfig, from_json, given, parse, run_keys

__all__ = [
    "MIN_ALIGNED_SUBJECTS",
    "MIN_TEMPERATURE",
    "Align",
    "Augment",
    "Bench",
    "Data",
    "Evaluate",
    "Ingest",
    "Masked",
    "Model",
    "Optimizer",
    "Phenotypes",
    "Plan",
    "Predict",
    "Run",
    "RunConfig",
    "Sampling",
    "Search",
    "Section",
    "Shards",
    "Simulate",
    "Storage",
    "Study",
    "Task",
    "Tracking",
    "Train",
    "Verify",
    "Workers",
    "changed",
    "check_lines",
    "drawn_lines",
    "flatten",
    "from_json",
    "given",
    "keys",
    "most_lines",
    "override",
    "parse",
    "plain",
    "run_keys",
    "to_json",
    "typed",
]
