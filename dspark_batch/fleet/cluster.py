"""Ray: it starts processes, carries values, and says who died. It never runs anything again."""

import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from dspark_batch import device
from dspark_batch.audit.replay import Against, Margin
from dspark_batch.errors import DsparkBatchError, Resumable, UsageError
from dspark_batch.fleet.news import Death, Member, Tell
from dspark_batch.fleet.worker import Worker
from dspark_batch.opening import Opened
from dspark_batch.spec.spec import Spec, resources_of
from dspark_batch.types import Request

# Ray takes 127.0.0.1 for a mistake, and listens where others reach it; on macOS it does not.
_LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
_CALLS = 8  # of a worker at a time: one waits for news, one for the pair, the others are short
_PART_S = 5.0  # for a worker to keep what it learnt
_LOOK_S, _LOOKS = 1.0, 3  # for Ray's head; so many in vain, and it is lost
# What decides how a worker computes, and where it finds models; a local Ray inherits all of it.
_CARRIED = (
    *("OPENBLAS_NUM_THREADS", "DSPARK_BATCH_BLAS", "DSPARK_BATCH_CACHE"),
    *("HF_HOME", "HF_HUB_OFFLINE"),  # and no token: a cluster shows these to whoever asks
)


class Cluster:
    """A Ray of our own on this machine, or a running one.

    Args:
        spec: of the job; says where, and how many workers.

    Attributes:
        workers: how many there are to be.

    Raises:
        UsageError: there is no such cluster, or no room in it.
    """

    def __init__(self, spec: Spec) -> None:
        self._is_ours = not ray.is_initialized()  # else it is the caller's, who joined it
        self._is_local = spec.ray is None
        if self._is_local:
            self.workers = _workers_here(spec)
            self._needs = _needs_here(self.workers)
        if self._is_ours:
            begin_local(self.workers) if self._is_local else _join(str(spec.ray))
        if not self._is_local:
            self._needs = _needs_there(spec)
            self.workers = _workers_there(spec, self._needs)
        self._is_closed = threading.Event()
        self._actor_class = ray.remote(Worker)

    def spawn(self, place: int, open_engine: Callable[[], Opened], tell: Tell) -> Member:
        """Begin a worker; it tells when its pair is loaded, and when it dies."""
        needs = dict(self._needs)
        carried = {name: os.environ[name] for name in _CARRIED if name in os.environ}
        actor_class = self._actor_class.options(
            num_cpus=needs.pop("CPU", 0),
            num_gpus=needs.pop("GPU", 0),
            resources=needs,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=_CALLS,
            runtime_env=None if self._is_local else {"env_vars": carried},
        )
        return _RayMember(actor_class.remote(place, open_engine), tell)

    def watch(self, on_lost: Callable[[DsparkBatchError], None]) -> None:
        """Look for Ray's head from now on; without it Ray ends this process after a minute."""
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")

        def look() -> None:
            missed = 0
            while missed < _LOOKS and not self._is_closed.wait(_LOOK_S):
                missed = 0 if _answers(host, int(port)) else missed + 1
            if not self._is_closed.is_set():
                on_lost(
                    Resumable(
                        f"Ray's head at {host}:{port} is lost. The finished rows are safe; the "
                        "same command continues, once there is a head."
                    )
                )

        threading.Thread(target=look, name="ray-head", daemon=True).start()

    def close(self) -> None:
        """Leave it; a Ray of our own ends."""
        self._is_closed.set()
        if self._is_ours:
            ray.shutdown()


class _RayMember:
    """An actor, with a thread that waits for what it tells."""

    def __init__(self, actor: Any, tell: Tell) -> None:  # noqa: ANN401  Ray's handle has no type
        self._actor = actor
        self._tell = tell
        self._is_closed = False
        self._parting: Any = None
        threading.Thread(target=self._listen, name="ray-worker", daemon=True).start()

    def put(self, requests: Sequence[Request], against: Against | None) -> None:
        """Send requests."""
        self._actor.put.remote(requests, against)

    def take_back(self, most: int) -> None:
        """Ask for requests that have not begun."""
        self._actor.take_back.remote(most)

    def margin(
        self, request: Request, answer: Sequence[int], tokens: tuple[int, int], against: Against
    ) -> Margin:
        """Ask how clear a choice of the target is.

        Raises:
            Resumable: the worker died.
        """
        try:
            asked = self._actor.margin.remote(request, answer, tokens, against)
            found: Margin = ray.get(asked)
        except RayError as error:
            raise Resumable(f"a worker died ({_reason(error)}); run the same again.") from error
        return found

    def part(self) -> None:
        """Let it keep what it learnt."""
        self._parting = self._actor.end.remote()

    def close(self) -> None:
        """End its process."""
        self._is_closed = True
        if self._parting is not None:
            with suppress(RayError, GetTimeoutError):
                ray.get(self._parting, timeout=_PART_S)
        with suppress(RayError):
            ray.kill(self._actor)

    def _listen(self) -> None:
        try:
            self._tell(ray.get(self._actor.hello.remote()))
            while not self._is_closed:
                for news in ray.get(self._actor.news.remote()):
                    self._tell(news)
        except Exception as error:  # noqa: BLE001  whatever it is, nothing will come from there
            self._tell(Death(_reason(error)))


def _reason(error: Exception) -> str:
    """Say why in one sentence or two; Ray tells where to look in many."""
    said = " ".join(str(error).split()).rpartition("Worker exit detail: ")[2]
    return re.split(r" (?:Some common|There are some)", said)[0].rstrip(".") or type(error).__name__


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_LOOK_S).close()
    except OSError:
        return False
    return True


def _workers_here(spec: Spec) -> int:
    """Say how many workers this machine is to have.

    Raises:
        UsageError: they are more than it has processors of the kind that computes.
    """
    what, most = _processors()
    if spec.workers == "auto":
        if what == "cores":
            raise UsageError(
                "--workers auto is one for each GPU, and there is none here; name a number, "
                f"1 to {most}."
            )
        return most
    workers = int(spec.workers or 1)
    if workers > most:
        raise UsageError(
            f"--workers {workers}: this machine has {most} {what}, and a worker takes one; name 1 "
            f"to {most}."
        )
    return workers


def _processors() -> tuple[str, int]:
    """Count what computes here."""
    import mlx.core as mx

    if device.is_cpu():
        return "cores", device.num_cores()
    count = mx.device_count(mx.gpu)
    return ("GPU" if count == 1 else "GPUs"), count


def _needs_here(workers: int) -> Mapping[str, float]:
    what, most = _processors()
    cores = device.num_cores()
    if what == "cores":
        return {"CPU": max(1, most // workers)}
    return {"GPU": 1, "CPU": max(1, cores // workers)}


def begin_local(workers: int) -> None:
    """Begin a Ray for this job, which nobody else can reach."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    what, most = _processors()
    _hush()
    ray.init(
        address="local",
        num_cpus=max(workers, device.num_cores()),
        num_gpus=0 if what == "cores" else most,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address=_LOOPBACK,
    )


def _hush() -> None:
    """Keep Ray's own news, a worker's death for example, off stdout, where rows may go."""
    from ray._private import worker

    worker._worker_logs_enabled = False  # as Ray's debugger does it; no option does


def _join(address: str) -> None:
    """Join a running cluster.

    Raises:
        UsageError: none answers there.
    """
    if "://" in address:
        raise UsageError(
            f"--ray {address}: expected HOST:PORT of a cluster's head, or auto, on a machine of "
            "the cluster."
        )
    host, _, port = address.rpartition(":")
    if address != "auto" and not (port.isdecimal() and _answers(host, int(port))):
        raise UsageError(
            f"--ray {address}: no Ray answers there; start one with `ray start --head`, and give "
            "its HOST:PORT, or auto."
        )
    _hush()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        said = str(error).strip().splitlines()
        raise UsageError(
            f"--ray {address}: cannot be joined ({said[0] if said else type(error).__name__}); "
            "run this on a machine of a running cluster, with the cluster's token."
        ) from error


def _needs_there(spec: Spec) -> Mapping[str, float]:
    if spec.worker_resources is not None:
        return resources_of(spec.worker_resources)
    return {"GPU": 1} if ray.cluster_resources().get("GPU") else {"CPU": 1}


def _workers_there(spec: Spec, needs: Mapping[str, float]) -> int:
    """Say how many workers a cluster is to have.

    Raises:
        UsageError: there is no room for them.
    """
    has = ray.cluster_resources()
    most = min(int(has.get(name, 0) // amount) for name, amount in needs.items())
    if spec.workers in (None, "auto") and (most == 0 or set(needs) == {"CPU"}):
        raise UsageError(
            "--ray without --workers N is one worker for each GPU, and the cluster has "
            f"{int(has.get('GPU', 0))}; name a number of workers."
        )
    workers = most if spec.workers in (None, "auto") else int(spec.workers or 1)
    if workers > most:
        wanted = ", ".join(f"{name} {amount:g}" for name, amount in needs.items())
        raise UsageError(
            f"--workers {workers}: the cluster has room for {most}, where each takes {wanted}; "
            f"name 1 to {most}, or other --worker-resources."
        )
    return workers
