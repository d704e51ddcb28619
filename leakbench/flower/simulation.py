"""A Flower app in this process: its ServerApp, ClientApp, strategy, mods and messages, and a grid that carries them.

Flower's own ``run_simulation`` is deprecated and ``flwr run`` needs a server and installs packages; both give nodes
random ids, hand over replies as they come, and finish in good order when every client failed. This grid numbers the
nodes and orders the replies by them, so that one seed gives the same numbers, and shows every failure.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import psutil
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from leakbench.core.registry import load_plugin, plugins
from leakbench.errors import BadOption, LeakbenchError

RUN = 1
"""The id of the one run of a simulation."""
PATIENCE = 10
"""How often a ServerApp may ask for the nodes without sending anything before it is taken to wait for more of them."""
STORE = 256 * 2**20
"""Bytes of Ray's object store, through which messages of more than 100 KB pass; what is beyond goes to the disk."""
WATCH = 1.0
"""How often, in seconds, a look is taken at whether Ray is still there."""


@dataclass(frozen=True)
class Failure:
    """A message that a client did not answer as it should.

    Attributes:
        client: its node id, from 1 on.
        round: the round as the strategy counts (``server-round`` in the message), 0 where it does not say.
        kind: what was asked of it: ``train``, ``evaluate``, ``query``.
        reason: in one line.
        trace: the traceback in the client, empty where there is none.
    """

    client: int
    round: int
    kind: str
    reason: str
    trace: str = ""

    def __str__(self) -> str:
        """Return all but the traceback in a line."""
        where = f" in round {self.round}" if self.round else ""
        return f"client {self.client} failed to {self.kind}{where}: {self.reason}"


@dataclass(frozen=True)
class Job:
    """A message on its way: its id, the place of the client that it is for, from 0 on, and what is on the wire."""

    id: str
    client: int
    data: bytes


@dataclass(frozen=True)
class Answer:
    """What a client makes of a message: the reply on the wire, its context afterwards, and a traceback or nothing."""

    data: bytes
    context: Context
    trace: str = ""


class Carrier(Protocol):
    """What takes messages to clients."""

    def carry(self, jobs: Sequence[Job], contexts: list[Context], timeout: float | None) -> dict[str, Answer]:
        """Return the answers by the messages' ids, where there are any; contexts are updated in place."""
        ...


def simulate(
    server: ServerApp,
    client: ClientApp,
    clients: int,
    *,
    workers: int = 0,
    failed: Callable[[Failure], None] | None = None,
) -> None:
    """Run a Flower app to its end: the ServerApp in this thread, and so many clients.

    Clients are known by their node ids, 1 to ``clients``; ``context.node_config["partition-id"]``, the part of the
    data that is theirs, is one less, as Flower has it. Each client's context stays with it from message to message;
    messages pass through Flower's wire format both ways. A strategy that samples clients does so by Python's global
    ``random``: seed it in the ServerApp. Nothing is sent over the network, and Flower's log is shown from errors on
    alone.

    Args:
        server: its ``main`` gets the grid.
        client: what every client runs; with ``workers`` it is pickled.
        clients: how many.
        workers: so many Ray processes of one thread share the clients; with 0 they run one after another in this
            thread. The numbers are the same, as far as the number of torch's threads does not change them: the
            processes load the plugins that this one has, and compute in its precision.
        failed: called for every message that a client failed to answer; the strategy then goes on with the rest, as
            Flower's strategies do. Without it the first failure ends the simulation.

    Raises:
        LeakbenchError: a client failed and there is no ``failed``; a Ray process died; the strategy waits for more
            clients than there are.
        BadOption: an argument does not fit.
    """
    for name, count, least in (("clients", clients, 1), ("workers", workers, 0)):
        if count < least:
            raise BadOption(f"{name} is {count}; give at least {least}")
    contexts = [
        Context(RUN, number + 1, {"partition-id": number, "num-partitions": clients}, RecordDict(), {})
        for number in range(clients)
    ]
    carrier = nullcontext(Inline(client)) if workers == 0 else _pool(client, min(workers, clients))
    with _quiet(), _identity(), carrier as carries:
        server(SimulatedGrid(contexts, carries, failed), Context(RUN, SUPERLINK_NODE_ID, {}, RecordDict(), {}))


def answer(client: ClientApp, data: bytes, context: Context) -> Answer:
    """Return a client's answer to a message; an error reply, and the context as it was, where the client raises."""
    message = message_from_proto(ProtoMessage.FromString(data))
    own = copy.deepcopy(context)
    trace = ""
    try:
        reply = client(message, own)
    except Exception as error:
        trace, own = traceback.format_exc(), context
        reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _one_line(error)), reply_to=message)
    return Answer(message_to_proto(reply).SerializeToString(), own, trace)


@dataclass(frozen=True)
class Inline:
    """Clients in this thread, one after another."""

    client: ClientApp

    def carry(self, jobs: Sequence[Job], contexts: list[Context], timeout: float | None) -> dict[str, Answer]:
        """Return every answer; nothing is interrupted by a timeout."""
        answers = {}
        for job in jobs:
            answers[job.id] = answer(self.client, job.data, contexts[job.client])
            contexts[job.client] = answers[job.id].context
        return answers


class Pool:
    """Clients in Ray processes; a client has one message at a time."""

    def __init__(self, start: Callable[[], Any], count: int, servers: Sequence[psutil.Process] = ()) -> None:
        self._start = start
        self._servers = servers
        self._idle = [start() for _ in range(count)]

    def carry(self, jobs: Sequence[Job], contexts: list[Context], timeout: float | None) -> dict[str, Answer]:
        """Return the answers that came in time; a process that did not answer is ended, and another started."""
        import ray
        from ray.exceptions import RayError

        end = None if timeout is None else time.monotonic() + timeout
        waiting, answers = deque(jobs), {}
        busy: dict[Any, tuple[Job, Any]] = {}
        while waiting or busy:
            taken = {job.client for job, _ in busy.values()}
            for job in [job for job in waiting if job.client not in taken]:
                if self._idle and job.client not in taken:
                    worker = self._idle.pop()
                    busy[worker.run.remote(job.data, contexts[job.client])] = (job, worker)
                    taken.add(job.client)
                    waiting.remove(job)
            ready, _ = ray.wait(list(busy), timeout=WATCH)
            if not ready:
                self._watch()
                if end is not None and time.monotonic() > end:
                    break
                continue
            job, worker = busy[ready[0]]
            try:
                answers[job.id] = ray.get(ready[0])
            except RayError as error:
                self._watch()
                raise LeakbenchError(
                    f"Ray lost the process of client {job.client + 1} ({_one_line(error)}); start again, with fewer "
                    "workers if memory ran out"
                ) from error
            contexts[job.client] = answers[job.id].context
            del busy[ready[0]]
            self._idle.append(worker)
        for _, worker in busy.values():
            ray.kill(worker)
            self._idle.append(self._start())
        return answers

    def _watch(self) -> None:
        """Raise LeakbenchError where a server of Ray's has ended: Ray itself would end this process some time later."""
        for server in self._servers:
            if not server.is_running() or server.status() == psutil.STATUS_ZOMBIE:
                raise LeakbenchError("Ray was interrupted: a server of its own has ended; start again")


class SimulatedGrid(Grid):
    """Nodes 1 to N, whose replies come in their order; strategies shuffle the messages and add up as replies come."""

    def __init__(
        self, contexts: list[Context], carrier: Carrier, failed: Callable[[Failure], None] | None = None
    ) -> None:
        self._contexts = contexts
        self._carrier = carrier
        self._failed = failed
        self._replies: dict[str, Message] = {}
        self._asked = 0

    def set_run(self, run: Run) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(RUN)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return 1 to N; raise LeakbenchError where the ServerApp seems to wait for more, which never come."""
        self._asked += 1
        if self._asked > PATIENCE:
            raise LeakbenchError(
                f"the ServerApp waits for more clients than the {len(self._contexts)} there are; give the strategy "
                "smaller min_available_nodes, min_train_nodes and min_evaluate_nodes"
            )
        return list(range(1, len(self._contexts) + 1))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Carry messages to their nodes, wait for the answers, and return the messages' ids."""
        return self._deliver(messages, None)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages in the order of the nodes, each once."""
        replies = [self._replies.pop(id) for id in message_ids if id in self._replies]
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the replies in the order of the nodes; an error stands for one that did not come in time."""
        return self.pull_messages(self._deliver(messages, timeout))

    def _deliver(self, messages: Iterable[Message], timeout: float | None) -> list[str]:
        self._asked = 0
        sent = []
        for message in messages:
            node = message.metadata.dst_node_id
            if not 1 <= node <= len(self._contexts):
                raise BadOption(f"a message is for node {node}, and there are 1 to {len(self._contexts)}")
            message.metadata.__dict__["_message_id"] = str(uuid4())  # as a SuperLink does
            sent.append(message)
        jobs = [
            Job(
                message.metadata.message_id,
                message.metadata.dst_node_id - 1,
                message_to_proto(message).SerializeToString(),
            )
            for message in sent
        ]
        for message, job, came in self._answers(sent, jobs, timeout):
            if came is None:
                error = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, f"no reply within {timeout:g} s")
                reply = Message(error, reply_to=message)
            else:
                reply = message_from_proto(ProtoMessage.FromString(came.data))
            reply.metadata.__dict__["_message_id"] = str(uuid4())
            self._replies[job.id] = reply
            if reply.has_error():
                self._tell(message, reply.error, came.trace if came else "")
        return [job.id for job in jobs]

    def _answers(
        self, messages: Sequence[Message], jobs: Sequence[Job], timeout: float | None
    ) -> Iterator[tuple[Message, Job, Answer | None]]:
        """Yield messages with their answers; where the first failure ends all, nobody works on behind it for long."""
        size = 1 if isinstance(self._carrier, Inline) else len(jobs) or 1
        for first in range(0, len(jobs), size):
            answers = self._carrier.carry(jobs[first : first + size], self._contexts, timeout)
            for message, job in zip(messages[first : first + size], jobs[first : first + size]):
                yield message, job, answers.get(job.id)

    def _tell(self, message: Message, error: Error, trace: str) -> None:
        records = message.content.config_records.values()
        number = next((record["server-round"] for record in records if "server-round" in record), 0)
        kind = message.metadata.message_type.split(".")[0]
        reason = " ".join((error.reason or "no reason given").split())
        failure = Failure(message.metadata.dst_node_id, int(number), kind, reason, trace)
        if self._failed is None:
            raise LeakbenchError(str(failure))
        self._failed(failure)


def _one_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Show Flower's errors alone."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _identity() -> Iterator[None]:
    """Say who sends the ServerApp's messages, which Flower keeps by process."""
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, SUPERLINK_NODE_ID
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


@contextmanager
def _pool(client: ClientApp, count: int) -> Iterator[Pool]:
    """Start Ray with so many processes, and leave no trace of it; a Ray that runs already is used and left running."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns that it will hide no GPU
    os.environ.setdefault("RAY_worker_niceness", "0")  # else 15, and whatever else the machine does goes first
    import ray

    own = not ray.is_initialized()
    folder = tempfile.mkdtemp(prefix="leakbench-ray-") if own else ""
    path = os.environ.get("PYTHONPATH")
    try:
        if own:
            os.environ["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            ray.init(
                address="local",
                num_cpus=count,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=STORE,
                _temp_dir=folder,
            )
        servers = [one for one in psutil.Process().children() if one.name() in ("raylet", "gcs_server")] if own else []
        yield _started(client, count, servers)
    finally:
        if own:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
            if path is None:
                os.environ.pop("PYTHONPATH", None)
            else:
                os.environ["PYTHONPATH"] = path


def _started(client: ClientApp, count: int, servers: Sequence[psutil.Process]) -> Pool:
    """Return a pool of processes that hold the ClientApp; raise BadOption where it cannot be pickled."""
    import ray

    try:
        packed = ray.cloudpickle.dumps(client)
    except (TypeError, AttributeError) as error:
        raise BadOption(f"the ClientApp cannot be pickled for Ray ({_one_line(error)}); take workers=0") from error
    held = ray.put(packed)
    cudnn = torch.backends.cudnn
    precision = (cudnn.allow_tf32, cudnn.deterministic, torch.get_float32_matmul_precision())
    process = ray.remote(num_cpus=1)(Worker)
    return Pool(lambda: process.remote(held, plugins(), precision), count, servers)


class Worker:
    """A Ray process that answers messages in one thread.

    Args:
        client: the ClientApp, pickled: it can need what plugins register.
        files: the plugins.
        precision: whether CUDA convolutions may be in TF32, whether they are deterministic, and torch's precision of
            float32 products.
    """

    def __init__(self, client: bytes, files: Sequence[Path], precision: tuple[bool, bool, str]) -> None:
        import ray

        for file in files:
            load_plugin(file)
        torch.set_num_threads(1)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = precision[:2]
        torch.set_float32_matmul_precision(precision[2])
        self._client = ray.cloudpickle.loads(client)

    def run(self, data: bytes, context: Context) -> Answer:
        """Return the answer to a message."""
        return answer(self._client, data, context)
