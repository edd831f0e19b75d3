"""Processes that share one training, on one machine or on many: JAX's distributed runtime.

Every process runs the same program on its own devices. The first process has the run directory, the
trackers and the output. Clocks, signals and disks differ between processes, so that every decision
that depends on them is made together (`agree`, `from_first`). In a single process nothing is
exchanged.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from ppo_jax.errors import ConfigError

CONNECT_TIMEOUT = 300.0  # seconds; the default of JAX
_LONGER = 60.0  # seconds that JAX waits beyond our time limit; its own ends with a stack trace
_LONGEST = 86_400  # seconds; the largest time limit that is accepted
_GRACE_SECONDS = 2.0
_GREET_SECONDS = 5.0
_KEEPALIVE_SECONDS = 60
_PART = 2**26  # bytes that are sent together, so that devices need not hold a whole checkpoint
# Words in the errors of XLA about a process that cannot be reached; Gloo connects CPUs, NCCL GPUs.
_LOST = ("Gloo", "NCCL", "closed by peer", "reset by peer", "UNAVAILABLE", "heartbeat")

_ending = threading.Lock()
_connections: list[socket.socket] = []  # held open by the first process, one to each other


class ProcessError(RuntimeError):
    """Another process of the training has ended, or cannot be reached."""


def connect(
    coordinator: str | None = None,
    process: tuple[int, int] | None = None,
    *,
    timeout: float = CONNECT_TIMEOUT,
) -> None:
    """Connects this process to the others. Call it before JAX has computed anything.

    The process ends with status 1 and one sentence if the others do not connect in time.

    Args:
      coordinator: address `host:port` of the first process, the same for all; None where JAX finds
        it by itself (SLURM, Open MPI, Kubernetes, TPU pods).
      process: `(i, n)` for the i-th of n processes, 1 ≤ i ≤ n; None where JAX finds it.
      timeout: seconds to wait for all processes.

    Raises:
      ConfigError: an argument breaks a rule, or JAX finds no cluster.
    """
    # With only one of them, JAX would look for a cluster, and fail after minutes.
    if (coordinator is None) != (process is None):
        raise ConfigError(
            "a coordinator and the number of the process go together; got "
            f"{coordinator} and {process}. Give both, or neither on a cluster that JAX knows "
            "(SLURM, Open MPI, Kubernetes, TPU pods)."
        )
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ConfigError(f"a coordinator must be host:port; got {coordinator}.")
    if process is not None and not 1 <= process[0] <= process[1]:
        raise ConfigError(
            "the number of a process must be i/n with i from 1 to n; got "
            f"{process[0]}/{process[1]}."
        )
    if not 0 < timeout <= _LONGEST:
        raise ConfigError(
            f"the time limit must be a number of seconds above 0 and at most {_LONGEST:,}; got "
            f"{timeout}."
        )

    def give_up() -> None:
        where = "" if coordinator is None else f" at {coordinator}"
        say_and_end(
            f"the processes of the training did not all connect{where} within {timeout:g} s. Start "
            "all of them with the same coordinator, and check that its port can be reached."
        )

    # JAX ends the process from C++ at its own time limit, with a stack trace.
    alarm = threading.Timer(timeout, give_up)
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator,
            None if process is None else process[1],
            None if process is None else process[0] - 1,
            initialization_timeout=int(timeout + _LONGER),
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the processes of a training could not be connected: {error} Give the coordinator "
            "and the number of the process, and connect before JAX has computed anything."
        ) from error
    finally:
        alarm.cancel()


def require_one(what: str, remedy: str) -> None:
    """Raises a `ConfigError` if there are several processes."""
    if count() > 1:
        raise ConfigError(f"{what} runs in a single process; got {count()} processes. {remedy}")


def count() -> int:
    """Returns the number of processes; 1, without starting a backend, before `connect`."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Returns whether this is the first process, which writes files and prints."""
    return count() == 1 or jax.process_index() == 0


def require_whole_mesh(mesh: Mesh | None) -> None:
    """Raises a `ConfigError` unless the mesh has every device of every process."""
    size = 1 if mesh is None else mesh.size
    if count() > 1 and size != jax.device_count():
        shape = {"env": 1, "member": 1} if mesh is None else mesh.shape
        raise ConfigError(
            "a training of several processes uses all of their devices; got a mesh of "
            f"env={shape['env']} times member={shape['member']}, and {jax.device_count()} devices "
            f"of {count()} processes. Set --mesh, or num_devices and member_devices."
        )


def require_same(settings: Mapping[str, Any]) -> None:
    """Raises a `ConfigError` in every process unless all have the same settings (JSON)."""
    if count() == 1:
        return
    own = json.dumps(settings, sort_keys=True).encode()
    every = [json.loads(text) for text in _gather_bytes(own)]
    for number, other in enumerate(every[1:], start=2):
        for name in sorted(every[0].keys() | other.keys()):
            first, second = every[0].get(name), other.get(name)
            if first != second:
                raise ConfigError(
                    f"the processes of a training must have the same settings; {name} is {first} "
                    f"in the first process and {second} in process {number}. Start all of them "
                    "with the same command."
                )


def agree(values: Sequence[int]) -> np.ndarray:
    """Returns the values of every process, `[processes, len(values)]`."""
    if count() == 1:
        return np.array([values], np.int32)
    return np.asarray(multihost_utils.process_allgather(np.asarray(values, np.int32)))


def from_first(make: Callable[[], bytes]) -> bytes:
    """Calls a function in the first process, and returns its bytes in every process.

    Raises:
      ConfigError: in every process, if the function raises one. After another error the others
        raise a `ProcessError`.
    """
    if count() == 1:
        return make()
    # The first byte tells an answer from an error, which must not leave the others waiting.
    answer, failed = b"", None
    if is_first():
        try:
            answer = b"+" + make()
        except ConfigError as error:
            answer = b"-" + str(error).encode()
        except Exception as error:
            answer, failed = b"!" + f"{type(error).__name__}: {error}".encode(), error
    # Devices take integers of 32 bits, unless x64 is enabled.
    sizes = multihost_utils.broadcast_one_to_all(np.array(divmod(len(answer), _PART), np.int32))
    size = int(sizes[0]) * _PART + int(sizes[1])
    padded = np.frombuffer(answer.ljust(size, b"\0"), np.uint8)
    parts = [padded[start : start + _PART] for start in range(0, size, _PART)]
    answer = b"".join(multihost_utils.broadcast_one_to_all(part).tobytes() for part in parts)
    if answer[:1] == b"-":
        raise ConfigError(answer[1:].decode())
    if answer[:1] == b"!":
        raise failed or ProcessError(f"the first process failed with {answer[1:].decode()}")
    return answer[1:]


def plain_from_first(make: Callable[[], Any]) -> Any:
    """Calls a function in the first process, and returns its JSON value in every process."""
    return json.loads(from_first(lambda: json.dumps(make()).encode()))


def on_first(call: Callable[[], object]) -> None:
    """Calls a function in the first process; an error is raised in every process."""

    def answer() -> bytes:
        call()
        return b""

    from_first(answer)


def fetch(tree: Any) -> Any:
    """Gathers every array of a tree in this process; all processes must call it together."""
    if count() == 1:
        return tree
    return jax.tree.map(_whole, tree)


def _whole(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _whole(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    # One array after another, so that a device holds one whole array at a time.
    return multihost_utils.process_allgather(leaf, tiled=True)


def place(array: jax.Array, sharding: Sharding) -> jax.Array:
    """Places an array, of which every process has a full copy, on the devices of all processes."""
    if count() == 1:
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = place(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _gather_bytes(own: bytes) -> list[bytes]:
    """Returns the bytes of every process."""
    sizes = agree([len(own)])[:, 0]
    padded = np.frombuffer(own.ljust(sizes.max(), b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def loss_explained() -> Iterator[None]:
    """Turns the runtime's error about another process that has ended into a `ProcessError`."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if count() == 1 or not any(word in str(error) for word in _LOST):
            raise
        reason = " ".join(str(error).split())[-200:]
        raise ProcessError(f"{_loss('another process')} The runtime reports: {reason}") from error


def _loss(which: str) -> str:
    return (
        f"process {jax.process_index() + 1} of {count()} has lost {which} of the training, which "
        "ended or cannot be reached. Start all of them again; with resume (--resume) they "
        "continue from the last checkpoint."
    )


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Ends this process at once if an error is raised, so that no process waits for another.

    An ordinary exit would wait until all processes exit. All processes enter the context together.
    """
    is_over = threading.Event()
    try:
        with loss_explained():
            _watch_first(is_over)
        try:
            yield
        finally:
            is_over.set()
    except (ConfigError, ProcessError) as error:
        message, status = str(error), 2 if isinstance(error, ConfigError) else 1
    except Exception:
        traceback.print_exc()
        message, status = "this process has failed, and ends the training with it.", 1
    else:
        return
    say_and_end(message, status, grace_seconds=_GRACE_SECONDS if is_first() else 0.0)


def _watch_first(is_over: threading.Event) -> None:
    """Ends this process with a sentence when the first one ends before the training is over.

    The first process runs JAX's coordination service. Without it XLA aborts the other processes
    with a stack trace, even with `jax_enable_recoverability`. A thread that waits for a connection
    to close nearly always notices first. A process that cannot connect to the server watches
    nothing.
    """
    if count() == 1:
        return
    server = plain_from_first(_start_server)
    if server is None or is_first():
        return
    message = _loss("the first process")

    def end() -> None:
        if not is_over.is_set():
            say_and_end(message)

    threading.Thread(target=_watch, args=(*server, end), daemon=True).start()


def _start_server() -> tuple[list[str], int, str] | None:
    """Starts a server to which the other processes connect.

    Returns:
      Names of this machine, the port of the server, and its token; None if no server could start.
    """
    try:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            server = socket.create_server(("", 0))
    except OSError:
        return None
    token = secrets.token_hex()
    arguments = (server, token, count() - 1)
    threading.Thread(target=_greet, args=arguments, daemon=True).start()
    names = [socket.gethostname()]
    # Other machines may not know the name. This socket sends nothing to the address, which is
    # reserved, but tells by which of its own addresses this machine is reached.
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as route:
        route.connect(("192.0.2.1", 9))
        names.append(route.getsockname()[0])
    return names, server.getsockname()[1], token


def _greet(server: socket.socket, token: str, num_processes: int) -> None:
    """Accepts and keeps the connections of `num_processes` processes that send the token."""
    with server:
        while len(_connections) < num_processes:
            try:
                connection, _ = server.accept()
            except OSError:
                time.sleep(0.1)
                continue
            if _knows(connection, token):
                _connections.append(connection)
            else:
                connection.close()


def _knows(connection: socket.socket, token: str) -> bool:
    """Sends the token, and returns whether the other side sends the same."""
    with contextlib.suppress(OSError):
        connection.sendall(token.encode())
        connection.settimeout(_GREET_SECONDS)
        return connection.recv(len(token)) == token.encode()
    return False


def _watch(names: Sequence[str], port: int, token: str, end: Callable[[], None]) -> None:
    """Waits until the first process has closed its connection.

    Args:
      names: host names and addresses of the first process, tried in order. One may be that of
        another machine in this network.
      port: of its server.
      token: that the first process knows.
      end: called when the connection is closed; not at all if there was none.
    """
    for name in names:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((name, port), timeout=_GREET_SECONDS) as connection,
        ):
            if not _knows(connection, token):
                continue
            connection.settimeout(None)
            # Firewalls forget connections over which nothing is sent.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_KEEPIDLE"):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
            with contextlib.suppress(OSError):
                connection.recv(1)
            end()
            return


def say_and_end(message: str, status: int = 1, *, grace_seconds: float = 0.0) -> None:
    """Prints an error and ends this process at once; only the first thread that calls it prints.

    Args:
      message: text of the error.
      status: exit status.
      grace_seconds: seconds that other processes have to say what happened, before the runtime ends
        them with a stack trace because the first process is gone.
    """
    _ending.acquire()
    try:
        # One write, so that lines of XLA's log do not break it.
        sys.stderr.write(f"ppo-jax: error: {message}\n")
        sys.stderr.flush()
        sys.stdout.flush()  # `os._exit` does not
        time.sleep(grace_seconds)
    finally:  # writing fails if the reader of a pipe has ended
        os._exit(status)
