"""Clients of a simulated Flower app in Ray processes of one thread each."""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from ray.exceptions import RayError

from leakbench.core.lock import remove_abandoned, temporary_folder
from leakbench.core.registry import load_plugin, plugins
from leakbench.errors import BadOption, LeakbenchError
from leakbench.flower.simulation import Carrier, ClientReply, Delivery, Mail, failed_reply, first_line, replies_of

OBJECT_STORE_BYTES = 256 * 2**20
"""Bytes of Ray's object store, through which messages of more than 100 KB pass; Ray spills further ones to the disk."""
WATCH_SECONDS = 1.0
"""Seconds between two checks that Ray is still there."""


@contextmanager
def ray_clients(client: ClientApp, count: int) -> Iterator[Carrier]:
    """Start Ray with ``count`` processes, and leave no trace of it; a Ray that runs already is used and left running.

    Raises:
        BadOption: the ClientApp cannot be pickled.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # otherwise Ray warns that it will hide no GPU
    os.environ.setdefault("RAY_worker_niceness", "0")  # otherwise 15: every other process comes first
    servers: list[psutil.Process] = []
    with ExitStack() as stack:
        if not ray.is_initialized():
            remove_abandoned()
            folder = stack.enter_context(temporary_folder("ray"))
            stack.callback(ray.shutdown)
            ray.init(
                address="local",
                num_cpus=count,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
            )
            servers = [one for one in psutil.Process().children() if one.name() in ("raylet", "gcs_server")]
        try:
            packed = ray.put(ray.cloudpickle.dumps(client))
        except (TypeError, AttributeError) as error:
            raise BadOption(f"the ClientApp cannot be pickled for Ray ({first_line(error)}); give workers=0") from error
        cudnn = torch.backends.cudnn
        precision = (cudnn.allow_tf32, cudnn.deterministic, torch.get_float32_matmul_precision())
        host = ray.remote(num_cpus=1)(ClientHost)
        yield RayClients(lambda: host.remote(packed, sys.path, plugins(), precision), count, servers).carry


class RayClients:
    """Clients that share Ray processes.

    Args:
        start: starts a process and returns its handle.
        count: number of processes.
        servers: Ray's own servers, if they were started here.
    """

    def __init__(self, start: Callable[[], Any], count: int, servers: Sequence[psutil.Process]) -> None:
        self._start = start
        self._servers = servers
        self._idle = [start() for _ in range(count)]

    def carry(self, mail: Mail, timeout: float | None) -> Iterator[Delivery]:
        """Yield the replies of every client; a process that takes over ``timeout`` seconds is replaced.

        Raises:
            LeakbenchError: a process or a server of Ray's died.
        """
        end = None if timeout is None else time.monotonic() + timeout
        waiting = deque(mail)
        busy: dict[Any, tuple[int, Any]] = {}
        done: dict[int, tuple[list[ClientReply], Context]] = {}
        while waiting or busy:
            while waiting and self._idle:
                node, host = waiting.popleft(), self._idle.pop()
                busy[host.run.remote(*mail[node])] = node, host
            ready, _ = ray.wait(list(busy), timeout=WATCH_SECONDS)
            for reference in ready:
                node, host = busy.pop(reference)
                try:
                    done[node] = ray.get(reference)
                except RayError as error:
                    self._check_servers()
                    raise LeakbenchError(
                        f"Ray lost the process of client {node} ({first_line(error)}); start again, with fewer workers "
                        "if memory ran out"
                    ) from error
                self._idle.append(host)
            if not ready:
                self._check_servers()
                if end is not None and time.monotonic() > end:
                    break
        for _, host in busy.values():
            ray.kill(host)
            self._idle.append(self._start())
        for node, (messages, context) in mail.items():
            late = [failed_reply(message, f"no reply within {timeout} s") for message in messages]
            yield node, *done.get(node, (late, context))

    def _check_servers(self) -> None:
        """Raise LeakbenchError if a server of Ray's has ended: Ray would end this process some time later."""
        for server in self._servers:
            if not server.is_running() or server.status() == psutil.STATUS_ZOMBIE:
                raise LeakbenchError("Ray was interrupted: a server of its own has ended; start again")


class ClientHost:
    """A Ray process that answers messages in one thread.

    Args:
        client: the ClientApp, pickled; it can need components that plugins register.
        path: folders that modules are imported from.
        files: the plugins.
        precision: whether CUDA convolutions may be in TF32, whether they are deterministic, and torch's precision of
            float32 products.
    """

    def __init__(
        self, client: bytes, path: Sequence[str], files: Sequence[Path], precision: tuple[bool, bool, str]
    ) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]
        for file in files:
            load_plugin(file)
        torch.set_num_threads(1)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = precision[:2]
        torch.set_float32_matmul_precision(precision[2])
        self._client = ray.cloudpickle.loads(client)

    def run(self, messages: list[Message], context: Context) -> tuple[list[ClientReply], Context]:
        """Return the client's replies, and its context."""
        return replies_of(self._client, messages, context)
