"""Prediction with Ray Data: an actor per process, each with the model, over the whole cluster."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from kmtr.data.dataset import writing
from kmtr.data.dataset.ray import Ledger, RemoteJournal
from kmtr.data.dataset.storage import StoreError
from kmtr.evaluate.predict.parts import Done, Job, PartWriter
from kmtr.inference import load_model
from kmtr.ray_start import MAX_BLOCKS
from kmtr.types import InputError, KmtrError, find_cause


class Predict:
    """An actor of Ray Data: numbers of parts in, what became of them out.

    Args:
        files: reference to the content of the model's folder, by name: its node may not reach that.
    """

    def __init__(self, job: Job, files: Any, gpu: bool, journal: RemoteJournal):
        import ray
        import torch

        if not gpu:
            torch.set_num_threads(1)  # the same sums, and so the same bytes, at any number of processes
        with tempfile.TemporaryDirectory() as folder:
            for name, content in ray.get(files[0]).items():
                (Path(folder) / name).write_bytes(content)
            model = load_model(folder, "cuda" if gpu else "cpu")
        self.write, self.journal = PartWriter(job, model), journal

    def __call__(self, block: pa.Table) -> pa.Table:
        numbers = block.column("item").to_pylist()
        return pa.table({"number": numbers, "done": [json.dumps(asdict(self._written(n))) for n in numbers]})

    def _written(self, number: int) -> Done:
        if self.journal.begin(number) > writing.CRASHES:
            raise KmtrError(
                f"predict: part {number} ended its process {writing.CRASHES} times (a crash, or memory ran out); try a "
                "smaller predict.batch in another predict.out"
            )
        done = self.write(number)
        self.journal.end(number)
        return done


def workers_of(asked: int, gpu: bool) -> int:
    """Processes that predict: as many as asked for, else one per GPU or CPU of the cluster. Ray must be up."""
    import ray

    return asked or max(1, int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1)))


def predicted(
    job: Job, files: dict[str, bytes], missing: Sequence[int], workers: int, gpu: bool
) -> Iterator[tuple[int, Done]]:
    """Parts in the order in which they are finished.

    Args:
        files: content of the model's folder, by name.

    Raises:
        KmtrError: a store failed, or a part ended its process again and again.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # ends with the job only
    ledger = ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=here).remote()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    reference = [ray.put(files)]  # in a list, since Ray would put a bare one's content in its place
    # from_items, since range runs tasks that want a whole CPU, which the actors may have taken.
    dataset = ray.data.from_items(list(missing), override_num_blocks=min(len(missing), MAX_BLOCKS)).map_batches(
        Predict,
        fn_constructor_args=(job, reference, gpu, RemoteJournal(ledger)),
        compute=ActorPoolStrategy(size=min(workers, len(missing))),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0 if gpu else 1,
        num_gpus=1 if gpu else 0,
    )
    try:
        for row in dataset.iter_rows():
            yield int(row["number"]), Done(**json.loads(row["done"]))
    except Exception as error:
        kinds: tuple[type[KmtrError], ...] = (InputError, StoreError, KmtrError)
        cause = next(filter(None, (find_cause(error, kind) for kind in kinds)), None)
        if cause is None:
            raise
        raise cause from None
    finally:
        ray.kill(ledger)
