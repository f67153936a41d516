"""Progress of a run for a person: lines and a bar in the driver, sent by rank 0 through an actor. Nothing
else is printed.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

from kmtr.progress import Screen
from kmtr.ray_start import NAMESPACE

SHOWN = {
    "loss": "loss",
    "kspace_loss": "k-space",
    "image_loss": "image",
    "infonce_dynamic": "InfoNCE dynamic",
    "top1_dynamic": "top-1",
}


class Mailbox:
    """Actor between the workers and the driver."""

    def __init__(self) -> None:
        self.items: list[tuple[int, str, dict[str, float]] | str] = []
        self.failures: list[str] = []

    def put(self, step: int, stage: str, metrics: dict[str, float]) -> None:
        self.items.append((step, stage, metrics))

    def say(self, line: str) -> None:
        self.items.append(line)

    def drain(self) -> list[tuple[int, str, dict[str, float]] | str]:
        items, self.items = self.items, []
        return items

    def fail(self, message: str) -> None:
        self.failures.append(message)

    def first_failure(self) -> str:
        """The error of the worker that failed first; the others' only say that it left them."""
        return self.failures[0] if self.failures else ""


class Sender:
    """A worker's end: sends without waiting; silent where nobody listens."""

    def __init__(self, name: str) -> None:
        import ray

        try:
            self._actor = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            self._actor = None

    def put(self, step: int, stage: str, metrics: dict[str, float]) -> None:
        if self._actor is not None:
            self._actor.put.remote(step, stage, metrics)

    def say(self, line: str) -> None:
        """A line as it is."""
        if self._actor is not None:
            self._actor.say.remote(line)

    def fail(self, message: str) -> None:
        """Waits until it arrived, since the worker ends next."""
        import ray

        if self._actor is not None:
            ray.get(self._actor.fail.remote(message), timeout=10)


class Display:
    """The driver's end: prints what arrives until closed. On a terminal the current step is a bar."""

    def __init__(self, name: str, total: int, quiet: bool = False):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.total, self.quiet = total, quiet
        self.screen = Screen(total, quiet=quiet)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "scheduling_strategy": here}
        self.mailbox = (
            ray.remote(Mailbox).options(**options).remote()
        )  # where the driver is: no lost node takes it along
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="kmtr-progress", daemon=True)

    def __enter__(self) -> Display:
        self.began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(5)
        self.screen.close()

    def first_failure(self) -> str:
        """Why the run failed, by the worker that failed first."""
        import ray

        failure: str = ray.get(self.mailbox.first_failure.remote(), timeout=10)
        return failure

    def _poll(self) -> None:
        import ray

        while True:
            stopping = self._stop.wait(0.5)
            try:
                items = ray.get(self.mailbox.drain.remote(), timeout=5)
            except ray.exceptions.RayActorError:
                return
            except ray.exceptions.RayError:  # late, as while a node is being lost
                items = []
            for item in items:
                if isinstance(item, tuple):
                    self._show(*item)
                elif not self.quiet:
                    self.screen.line(item)
            if stopping:
                return

    def _show(self, step: int, stage: str, metrics: dict[str, float]) -> None:
        if self.quiet:
            return
        if any(name.startswith("val/") for name in metrics):
            shown = {k.removeprefix("val/"): v for k, v in metrics.items() if k.startswith("val/")}
            text = "  ".join(f"{k} {v:.3f}" for k, v in shown.items() if k.endswith(("_loss", "_r2")) or k == "score")
            self.screen.line(f"  step {step:>6}  validation   {text}")
            return
        if any(name.startswith("lost/") for name in metrics):
            lost = "  ".join(f"{name.removeprefix('lost/')} -{value:.3f}" for name, value in metrics.items())
            self.screen.line(f"  step {step:>6}  guard        {stage} costs what was learnt ({lost}): stopped, undone")
            return
        parts = [f"{shown} {metrics[f'{stage}/{n}']:.4f}" for n, shown in SHOWN.items() if f"{stage}/{n}" in metrics]
        speed = f"{metrics['subjects_per_s']:.1f} subjects/s  wait {100 * metrics['data_wait_fraction']:.0f} %"
        told = f"{stage}   {'  '.join(parts)}   {speed}"
        if self.screen.terminal:
            self.screen.move(step, told)
        else:
            self.screen.line(f"  step {step:>6}/{self.total}  {told}")
