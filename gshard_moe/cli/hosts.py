"""Several processes as one training: joining them, and leaving with a message when one dies.

The process that the user starts launches a worker and watches it. The worker joins the others
through `jax.distributed`. When a peer dies, the worker's next collective fails and it says so; when
the runtime aborts the worker (the coordinator is gone, or a peer is silent), the launcher says why.
Launcher and worker never outlive each other.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import jax

# Seconds of silence after which a peer counts as dead.
_HEARTBEAT = 10
# Seconds for all processes to arrive.
_ARRIVAL = 300
# Holds the file descriptor that ends when the launcher does.
_WORKER = "GSHARD_MOE_LAUNCHER_FD"
# What shows that a scheduler started several processes; JAX reads the rest from there itself.
_SCHEDULERS: dict[str, Callable[[str], bool]] = {
    # Within srun: the script of an sbatch is one process, however many tasks it may start.
    "SLURM_NTASKS": lambda value: _several(value) and "SLURM_STEP_NODELIST" in os.environ,
    "OMPI_COMM_WORLD_SIZE": lambda value: _several(value),
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,
    "MEGASCALE_COORDINATOR_ADDRESS": bool,
    "JOB_COMPLETION_INDEX": lambda value: "KUBERNETES_SERVICE_HOST" in os.environ,
}


def _several(count: str) -> bool:
    return count.isdigit() and int(count) > 1


class HostsError(ValueError):
    """Says what is wrong with the flags, or which process is gone."""


class Cluster(NamedTuple):
    """The processes of one training; all None where JAX finds them out from the scheduler."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def find(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Cluster | None:
    """Returns the cluster that the flags or the environment speak of; None: one process.

    Raises:
      HostsError: if only some of the flags are given, or they do not fit each other.
    """
    given = (coordinator, num_processes, process_id)
    if all(flag is None for flag in given):
        several = any(
            name in os.environ and test(os.environ[name]) for name, test in _SCHEDULERS.items()
        )
        return Cluster() if several else None
    if coordinator is None or num_processes is None or process_id is None:
        raise HostsError(
            "--coordinator, --num-processes and --process-id must be given together; got "
            f"coordinator={coordinator}, num-processes={num_processes}, process-id={process_id}"
        )
    if not 0 <= process_id < num_processes:
        raise HostsError(
            "--process-id must be from 0 to num-processes - 1; "
            f"got process-id={process_id}, num-processes={num_processes}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise HostsError(f"--coordinator must be HOST:PORT; got {coordinator!r}")
    return Cluster(coordinator, num_processes, process_id)


def is_worker() -> bool:
    """Whether this process was launched by `launch`."""
    return _WORKER in os.environ


def launch(args: Sequence[str], cluster: Cluster, how_to_go_on: Callable[[], str]) -> int:
    """Runs the same command as a worker, watches it, and returns its exit status.

    Args:
      args: the command line, without the program.
      cluster: of the worker.
      how_to_go_on: names the last checkpoint, for the message.
    """
    reading, writing = os.pipe()
    environment = os.environ | {_WORKER: str(reading)}
    command = [sys.executable, "-m", "gshard_moe", *args]
    # A session of its own: a Ctrl-C on the terminal comes here, and is passed on once.
    worker = subprocess.Popen(command, env=environment, pass_fds=[reading], start_new_session=True)
    os.close(reading)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: worker.send_signal(number))
    status = worker.wait()
    os.close(writing)
    if status >= 0:
        return status
    print(f"gshard-moe: {_cause(status, cluster)}; {how_to_go_on()}", file=sys.stderr)
    return 1


def join(cluster: Cluster) -> None:
    """Joins the other processes; this process dies with its launcher.

    Raises:
      HostsError: if they do not all arrive.
    """
    threading.Thread(target=_die_with_launcher, daemon=True).start()
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            initialization_timeout=_ARRIVAL,
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        raise HostsError(
            f"all processes must arrive within {_ARRIVAL} s; got {_first_line(error)}; "
            f"check that {cluster.coordinator or 'the coordinator'} can be reached from here"
        ) from error


def leave(error: BaseException, cluster: Cluster, how_to_go_on: Callable[[], str]) -> NoReturn:
    """Says why this process cannot go on, and leaves at once, without waiting for its peers."""
    who = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, jax.errors.JaxRuntimeError):
        gone = _coordinator_gone(cluster) or "a peer is gone"
        why = f"{gone} ({_first_line(error)})"
    else:
        why = str(error)
    print(f"gshard-moe: {who}: {why}; {how_to_go_on()}", file=sys.stderr, flush=True)
    os._exit(1)


def _cause(status: int, cluster: Cluster) -> str:
    """Says what ended a worker that a signal ended."""
    name = signal.Signals(-status).name
    who = "the worker" if cluster.process_id is None else f"process {cluster.process_id}"
    gone = _coordinator_gone(cluster)
    if gone is not None:
        return f"{who} was ended ({name}): {gone}"
    if -status == signal.SIGABRT:
        return f"{who} was ended by the JAX runtime ({name}): a peer is gone, or cannot be reached"
    return f"{who} was ended by {name}"


def _coordinator_gone(cluster: Cluster) -> str | None:
    """Says that the coordinator is gone, if it is known, another process, and does not answer."""
    if cluster.process_id == 0 or not cluster.coordinator or _answers(cluster.coordinator):
        return None
    return f"the coordinator, {cluster.coordinator}, is gone"


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except OSError:
        return False


def _die_with_launcher() -> None:
    os.read(int(os.environ[_WORKER]), 1)  # returns when the launcher's end is closed
    os._exit(1)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
