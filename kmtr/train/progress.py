"""Progress of a run for a person: lines and a bar in the driver, sent by rank 0 through an actor. Nothing
else is printed.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from kmtr.progress import Screen
from kmtr.ray_start import NAMESPACE
from kmtr.train.folder import SPEED
from kmtr.train.watch import Watch

SHOWN = {
    "loss": "loss",
    "kspace_loss": "k-space",
    "image_loss": "image",
    "infonce_dynamic": "InfoNCE dynamic",
    "top1_dynamic": "top-1",
}


STOP_S = 60.0
"""Time that workers have to save and leave when the command is asked to stop."""


class Mailbox:
    """Actor between the workers and the driver: what they say, which failed, whether they live, and orders to them.

    Args:
        silent_s, hang_s: of `Watch`.
    """

    def __init__(self, silent_s: float = 0.0, hang_s: float = 0.0) -> None:
        self.items: list[tuple[int, str, dict[str, float]] | str] = []
        self.failures: list[tuple[bool, str]] = []
        self.final = self.stopping = False
        self.past: set[str] = set()
        self.saves = 0
        self.watch = Watch(silent_s, hang_s)
        self.workers: dict[int, Any] = {}

    def put(self, step: int, stage: str, metrics: dict[str, float]) -> None:
        self.items.append((step, stage, metrics))

    def say(self, line: str) -> None:
        self.items.append(line)

    def drain(self) -> list[tuple[int, str, dict[str, float]] | str]:
        self._judge()
        items, self.items = self.items, []
        return items

    def fail(self, group: str, message: str, lost_peer: bool = False) -> None:
        """An error of a worker of a group; `lost_peer`: it only says that another one has left."""
        if group not in self.past:
            self.failures.append((lost_peer, message))

    def first_failure(self) -> str:
        """The error of the worker that failed first; the others' only say that it left them."""
        return self.own_failure() or (self.failures[0][1] if self.failures else "")

    def own_failure(self) -> str:
        """The first error that does not say that another worker has left; empty: there is none."""
        return next((message for lost_peer, message in self.failures if not lost_peer), "")

    def settle(self, group: str) -> None:
        """A worker had to be ended because another one had failed: that failure, if it was one, stays the reason."""
        self.final = self.final or (group not in self.past and bool(self.own_failure()))

    def restarted(self) -> None:
        """Workers were lost and all start again: what the others said of that is no failure, none is waited for, and
        those that live on for a moment are not listened to.
        """
        self.past.add(self.watch.group)
        self.watch.forget()
        if not self.final:
            self.failures = []

    def settled(self) -> str:
        """The failure for which no worker is to start again; empty: there is none."""
        return self.first_failure() if self.final else ""

    def stop(self) -> None:
        """From now on the orders are to save and leave."""
        self.stopping = True

    def save(self) -> None:
        """From now on the orders are to save once, and to go on."""
        self.saves += 1

    def beat(self, group: str, rank: int, moves: int, where: str, worker: Any) -> dict[str, Any]:
        """A sign of life of a worker (its handle last), and the orders to it (`Pulse`)."""
        if group in self.past:
            return {}
        self.watch.beat(group, rank, moves, where, time.monotonic())
        self.workers[rank] = worker
        self._judge()
        return {"stop": self.stopping, "saves": self.saves, "failure": self.first_failure()}

    def leave(self, rank: int) -> None:
        """It ends by itself."""
        self.watch.leave(rank)

    def _judge(self) -> None:
        """End workers that are lost or stuck: Ray Train then starts all again from the last checkpoint."""
        import ray

        line, ranks = self.watch.judge(time.monotonic())
        if line:
            self.items.append(f"               {line}; ending {'it' if len(ranks) == 1 else 'them'}")
        for rank in ranks:
            ray.kill(self.workers.pop(rank))


class Sender:
    """A worker's end: sends without waiting; silent where nobody listens."""

    def __init__(self, name: str) -> None:
        import ray

        self.group = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"  # of each start another one
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

    def fail(self, message: str, lost_peer: bool = False) -> None:
        """Waits until it arrived, since the worker ends next."""
        self._asked("fail", self.group, message, lost_peer)

    def beat(self, rank: int, moves: int, where: str) -> dict[str, Any] | None:
        """A sign of life of this worker: the orders to it; None: nobody answered in time."""
        import ray

        worker = ray.get_runtime_context().current_actor
        orders: dict[str, Any] | None = self._asked("beat", self.group, rank, moves, where, worker)
        return orders

    def leave(self, rank: int) -> None:
        """This worker ends by itself."""
        if self._actor is not None:
            self._actor.leave.remote(rank)

    def settle(self) -> None:
        """This worker is ended for another one's failure; waits until it arrived."""
        self._asked("settle", self.group)

    def restarted(self) -> None:
        """Workers were lost and start again."""
        if self._actor is not None:
            self._actor.restarted.remote()

    def save(self) -> None:
        """Ask the workers to save, and to go on."""
        if self._actor is not None:
            self._actor.save.remote()

    def settled(self) -> str:
        """The failure for which no worker is to start again; empty: there is none."""
        return str(self._asked("settled") or "")

    def _asked(self, method: str, *arguments: Any) -> Any:
        import ray

        if self._actor is None:
            return None
        with contextlib.suppress(ray.exceptions.RayError):  # the driver is gone, or the network for a moment
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=10)
        return None


class Display:
    """The driver's end: prints what arrives until closed, and passes on that the command is to stop. On a terminal the
    current step is a bar.

    Args:
        silent_s, hang_s: of `Watch`.
    """

    def __init__(self, name: str, total: int, quiet: bool = False, silent_s: float = 0.0, hang_s: float = 0.0):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.total, self.quiet = total, quiet
        self.screen = Screen(total, quiet=quiet)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {
            "name": name,
            "namespace": NAMESPACE,
            "num_cpus": 0,
            "max_restarts": -1,  # what it held is lost then, and progress goes on
            "scheduling_strategy": here,  # where the driver is: no lost node takes it along
        }
        self.mailbox = ray.remote(Mailbox).options(**options).remote(silent_s, hang_s)
        self._asked, self._closed, self._handlers = threading.Event(), threading.Event(), dict[int, Any]()
        self._thread = threading.Thread(target=self._poll, name="kmtr-progress", daemon=True)

    def __enter__(self) -> Display:
        self._thread.start()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._signalled)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._closed.set()
        self._thread.join(5)
        self.screen.close()

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C or SIGTERM asks the workers to save and leave; the second leaves them alone."""
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()

    @property
    def stopping(self) -> bool:
        """The command was asked to stop."""
        return self._asked.is_set()

    def stop(self) -> None:
        """As if the command was asked to stop."""
        self._asked.set()

    def line(self, text: str) -> None:
        """A line of the driver's own."""
        if not self.quiet:
            self.screen.line(text)

    def first_failure(self) -> str:
        """Why the run failed, by the worker that failed first."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):  # it is gone: others say why
            return str(ray.get(self.mailbox.first_failure.remote(), timeout=10))
        return ""

    def own_failure(self) -> str:
        """`first_failure`, unless workers only say that another one has left; empty: there is none."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            return str(ray.get(self.mailbox.own_failure.remote(), timeout=10))
        return ""

    def _poll(self) -> None:
        import ray

        until = 0.0
        while True:
            closing = self._closed.wait(0.5)
            if self._asked.is_set() and not until:
                until = time.monotonic() + STOP_S
                self.mailbox.stop.remote()
                self.screen.line("               stopping      saving a checkpoint first; once more ends it at once")
            if until and time.monotonic() > until:
                self.screen.line(f"               stopping      no answer for {STOP_S:.0f} s, so it ends without")
                _thread.interrupt_main()
                until = float("inf")
            try:
                items = ray.get(self.mailbox.drain.remote(), timeout=5)
            except ray.exceptions.RayError:  # late, as while a node is being lost, or starting again
                items = []
            for item in items:
                if isinstance(item, tuple):
                    self._show(*item)
                else:
                    self.line(item)
            if closing:
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
        speed = f"{metrics[SPEED]:.1f} subjects/s  wait {100 * metrics['speed/data_wait_fraction']:.0f} %"
        told = f"{stage}   {'  '.join(parts)}   {speed}"
        if self.screen.terminal:
            self.screen.move(step, told)
        else:
            self.screen.line(f"  step {step:>6}/{self.total}  {told}")
