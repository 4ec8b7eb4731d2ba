"""Trials on a Ray cluster: one actor per node of identical hardware."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptspec.errors import AdaptSpecError
from adaptspec_tuner.measuring.profiler import Measurer
from adaptspec_tuner.searching.trials import Job, run_trial

if TYPE_CHECKING:
    from adaptspec.params import Scalar
    from adaptspec.profile import Environment, Trial
    from adaptspec_tuner.measuring.models import Models

MOST_WORKERS_ENDED = 3
START_SECONDS = 600.0  # for loading the models
PLACE = (
    *("model", "draft", "dtype", "device", "device_name", "threads", "heads"),
    "versions",
)


@dataclass(frozen=True)
class Bench:
    """What a node measures with.

    Args:
        place: Trials run only where it is the leader's, see :func:`place_of`.
    """

    measurer: Measurer
    place: Sequence[Any]


class Worker:
    """What runs on a node; Ray makes an actor of it."""

    def __init__(self, build: Callable[[], Bench]) -> None:
        self._bench = build()

    def place(self) -> list[Any]:
        """The key of its environment."""
        return list(self._bench.place)

    def run(self, job: Job) -> tuple[Trial, list[str]]:
        """One trial, and what is to be warned of.

        Nothing of it is pruned: that takes the other trials, which the leader has.
        """
        warnings: list[str] = []
        trial = run_trial(
            self._bench.measurer, job, lambda step, ratio: False, warnings.append
        )
        return trial, warnings


class RayPool:
    """Runs trials on every node whose environment is the leader's.

    A trial whose actor dies is begun anew, elsewhere or on the actor's successor.

    Args:
        address: Of a running cluster; ``auto`` finds the one this machine belongs to.
        build: Loads the models, on the node.
        place: The leader's.
        warn: Told of nodes left out and of deaths.

    Raises:
        AdaptSpecError: without Ray, a cluster, or a node like this one.
    """

    def __init__(
        self,
        address: str,
        build: Callable[[], Bench],
        place: Sequence[Any],
        warn: Callable[[str], None],
    ) -> None:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise AdaptSpecError(
                f"--ray needs Ray ({error}); `pip install 'adaptspec[ray]'`"
            ) from error
        self._ray, self._build, self._warn = ray, build, warn
        self._place = list(place)
        self._own = not ray.is_initialized()
        try:
            ray.init(
                address=address,
                ignore_reinit_error=True,
                log_to_driver=False,
                logging_level="error",
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise AdaptSpecError(
                f"no Ray cluster at {address!r}: {str(error).splitlines()[0]}; start "
                "one with `ray start --head`"
            ) from error
        self._idle: deque[Any] = deque()
        self._node: dict[Any, str] = {}  # actor -> node
        self._busy: dict[Any, tuple[Any, Job]] = {}  # result -> actor, job
        self._waiting: deque[Job] = deque()
        self._attempts: dict[Job, int] = {}
        for node in ray.nodes():
            if node["Alive"] and node["Resources"].get("CPU"):
                self._start(node)
        if not self._node:
            self.close()
            raise AdaptSpecError(
                "no node of the cluster has this machine's hardware, models and "
                "threads; start tune on one of the kind that is to be tuned for"
            )

    @property
    def size(self) -> int:
        """The actors."""
        return len(self._node)

    def submit(self, job: Job) -> None:
        """Begin it on an idle actor, or when one is."""
        self._waiting.append(job)
        self._hand_out()

    def next(self) -> tuple[Job, Trial, Sequence[str]]:
        """Wait for any trial.

        Raises:
            AdaptSpecError: if no actor is left and none can be started.
        """
        while True:
            if not self._busy:
                raise AdaptSpecError(
                    "every worker of the cluster died; finished trials are kept, the "
                    "same command continues"
                )
            (done,), _ = self._ray.wait(list(self._busy), num_returns=1)
            actor, job = self._busy.pop(done)
            try:
                trial, warnings = self._ray.get(done)
            except self._ray.exceptions.RayActorError:
                self._bury(actor, job)
                continue
            self._idle.append(actor)
            self._hand_out()
            return job, trial, warnings

    def close(self) -> None:
        """Let the nodes go."""
        for actor in self._node:
            self._ray.kill(actor)
        self._node.clear()
        if self._own:
            self._ray.shutdown()

    def _bury(self, actor: Any, job: Job) -> None:
        node = self._node.pop(actor)
        self._attempts[job] = self._attempts.get(job, 0) + 1
        if self._attempts[job] >= MOST_WORKERS_ENDED:
            raise AdaptSpecError(
                f"{job.strategy} {dict(job.params)} ended {MOST_WORKERS_ENDED} "
                "workers; leave the strategy out with --strategies"
            )
        self._warn(f"a worker died at {job.strategy} {dict(job.params)}; trying again")
        self._waiting.appendleft(job)
        for found in self._ray.nodes():
            if found["NodeID"] == node and found["Alive"]:
                self._start(found)
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._idle:
            actor, job = self._idle.popleft(), self._waiting.popleft()
            self._busy[actor.run.remote(job)] = (actor, job)

    def _start(self, found: Mapping[str, Any]) -> None:
        """An actor on a node, if that is like the leader's.

        It takes all of the node's CPUs: others' work would slow what it measures.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node: str = found["NodeID"]
        actor = (
            self._ray.remote(Worker)
            .options(
                num_cpus=found["Resources"]["CPU"],
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(self._build)
        )
        try:
            place = self._ray.get(actor.place.remote(), timeout=START_SECONDS)
        except self._ray.exceptions.RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            self._warn(f"node {node[:8]} left out: {lines[-1].strip()}")
            return
        if differing := self._differences(place):
            self._ray.kill(actor)
            self._warn(f"node {node[:8]} left out: {differing}")
            return
        self._node[actor] = node
        self._idle.append(actor)

    def _differences(self, place: Sequence[Any]) -> str:
        return ", ".join(
            f"{name} {theirs} (here {ours})"
            for name, theirs, ours in zip(PLACE, place, self._place, strict=True)
            if theirs != ours
        )


def bench(
    models: Models,
    max_new_tokens: int,
    max_memory: int | None,
    threads: int,
    controls: Mapping[str, Scalar | None],
    seed: int,
) -> Bench:
    """Load the models as ``tune`` does."""
    import torch

    from adaptspec.environment import environment_of
    from adaptspec.host import Host
    from adaptspec_tuner.measuring.profiler import Profiler

    torch.set_num_threads(threads)
    host = Host.installed()
    engine = models.engine(host)
    profiler = Profiler(
        engine,
        host,
        max_new_tokens,
        max_memory=max_memory,
        controls=controls,
        seed=seed,
    )
    return Bench(profiler, place_of(environment_of(engine.model, engine.draft)))


def place_of(environment: Environment) -> list[Any]:
    """What must be equal where trials of one run are measured."""
    return [*environment.key(), dict(environment.versions)]
