"""Simulation of a Flower app in this process, with the same numbers for the same seed."""

import copy
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from leakbench.errors import BadOption, LeakbenchError, one_line
from leakbench.flower import require

# Why the app does not go through flwr.simulation.run_simulation: tried with Flower 1.42 on tests/flower_app.py. Two
# runs with the same seed differ in the last digits, because replies are added up in the order of their arrival. Node
# ids are random. Clients run in Ray only, and three rounds of three tiny clients take 30 s. A client that raises is
# left out of the average, and an interrupt in the ServerApp, which runs in a thread, is lost. The function is
# deprecated in favour of `flwr run`, which starts servers and installs the app. Flower's Grid, ServerApp, ClientApp
# and messages are public. Only these are used, and TaskIdentity, without which no Message can be made.

RUN = SERVER = TASK = 1
"""The ids of the run, of the server and of its task, which every message carries."""
MAX_QUERIES = 10
"""How often a ServerApp may ask for the nodes without sending a message: more means that it waits for further nodes."""


@dataclass(frozen=True)
class Failure:
    """A message that a client failed to answer.

    Attributes:
        client: its node id, from 1 on.
        round: the round as the strategy counts (``server-round`` in the message), 0 if the message has none.
        kind: the kind of message: ``train``, ``evaluate``, ``query``.
        reason: one line.
        trace: the traceback in the client, or empty.
    """

    client: int
    round: int
    kind: str
    reason: str
    trace: str = ""

    def __str__(self) -> str:
        """Return everything but the traceback in one line."""
        place = f" in round {self.round}" if self.round else ""
        return f"client {self.client} failed to {self.kind}{place}: {self.reason}"


@dataclass(frozen=True)
class ClientReply:
    """A client's reply to a message: an error reply if the client raised, with the traceback."""

    message: Message
    trace: str = ""


Mail = dict[int, tuple[list[Message], Context]]
"""Node id -> the messages for this client, and its context."""
Delivery = tuple[int, list[ClientReply], Context]
"""The node id of a client, its reply to each message, and its context afterwards."""
Carrier = Callable[[Mail, float | None], Iterator[Delivery]]
"""Takes mail to the clients, with a timeout in seconds, and yields their replies in the order of the mail."""


def simulate(
    server: ServerApp,
    client: ClientApp,
    clients: int,
    *,
    workers: int = 0,
    failed: Callable[[Failure], None] | None = None,
    config: Mapping[str, bool | int | float | str] | None = None,
) -> None:
    """Run a Flower app to its end: the ServerApp in this thread, and ``clients`` copies of the ClientApp.

    The node ids of the clients are 1 to ``clients``, and ``context.node_config["partition-id"]``, which selects a
    client's data, is one less. Each client keeps its context from message to message, and gets copies of messages.
    Replies are handed over in the order of the node ids. A strategy that samples clients draws from Python's global
    ``random``: seed it in the ServerApp. Nothing is sent over the network, and only errors of Flower's log are shown.

    Args:
        server: the app whose ``main`` gets the grid.
        client: the app that every client runs; with ``workers`` it is pickled.
        clients: number of clients, at least 1.
        workers: number of Ray processes, of one thread each, that share the clients; with 0 the clients run one after
            another in this thread. The numbers are the same unless torch's number of threads changes them: the
            processes load the plugins of this process, and compute in its precision.
        failed: called for every message that a client failed to answer; the strategy then continues with the other
            clients, as Flower's strategies do. Without it the first failure ends the simulation.
        config: ``context.run_config`` of the server and the clients, as ``[tool.flwr.app.config]`` of the app has it.

    Raises:
        LeakbenchError: a client failed and ``failed`` is not given; a Ray process died; the strategy waits for more
            clients than there are.
        BadOption: an argument is out of range.
    """
    for name, count, least in (("clients", clients, 1), ("workers", workers, 0)):
        if count < least:
            raise BadOption(f"{name} is {count}; give at least {least}")
    if workers:
        require(ray=True)
        from leakbench.flower.processes import ray_clients

        opened: AbstractContextManager[Carrier] = ray_clients(client, min(workers, clients))
    else:
        opened = nullcontext(in_process(client))
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, SERVER, TASK
    with _errors_only(), opened as carrier:
        grid = SimulatedGrid(clients, carrier, failed, config)
        server(grid, Context(RUN, SERVER, {}, RecordDict(), dict(config or {})))


def replies_of(client: ClientApp, messages: list[Message], context: Context) -> tuple[list[ClientReply], Context]:
    """Return a client's replies to its messages, and its context; a message at which it raises changes no context."""
    replies = []
    for message in messages:
        own = copy.deepcopy(context)
        try:
            replies.append(ClientReply(copy.deepcopy(client(message, own))))
            context = own
        except Exception as error:
            replies.append(failed_reply(message, first_line(error), traceback.format_exc()))
    return replies, context


def failed_reply(message: Message, reason: str, trace: str = "") -> ClientReply:
    """Return the reply of a client that failed to answer a message."""
    return ClientReply(Message(Error(0, reason), reply_to=message), trace)  # 0: unknown, the most general code


def first_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def in_process(client: ClientApp) -> Carrier:
    """Return a carrier to clients in this thread, one after another; a timeout interrupts none of them."""

    def carry(mail: Mail, timeout: float | None) -> Iterator[Delivery]:
        for node, (messages, context) in mail.items():
            yield node, *replies_of(client, messages, context)

    return carry


class SimulatedGrid(Grid):
    """A grid of nodes 1 to ``clients`` that delivers at once, and returns replies in the order of the nodes.

    Strategies shuffle the messages, and add up replies as they come: a fixed order makes the sum repeatable.
    """

    def __init__(
        self,
        clients: int,
        carrier: Carrier,
        failed: Callable[[Failure], None] | None = None,
        config: Mapping[str, bool | int | float | str] | None = None,
    ) -> None:
        self._contexts = {
            node: Context(
                RUN, node, {"partition-id": node - 1, "num-partitions": clients}, RecordDict(), dict(config or {})
            )
            for node in range(1, clients + 1)
        }
        self._carrier = carrier
        self._failed = failed
        self._replies: dict[str, Message] = {}
        self._queries = 0
        self._run: Any = None

    def set_run(self, run: Any) -> None:
        """Keep the description of the run, which the simulation does not use."""
        self._run = run

    @property
    def run(self) -> Any:
        """The description of the run, None unless ``set_run`` was called."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return 1 to N; raise LeakbenchError if the ServerApp seems to wait for more nodes, which never come."""
        self._queries += 1
        if self._queries > MAX_QUERIES:
            raise LeakbenchError(
                f"the ServerApp waits for more clients than the {len(self._contexts)} there are; give the strategy "
                "smaller min_available_nodes, min_train_nodes and min_evaluate_nodes"
            )
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages, wait for the replies, and return the messages' ids."""
        return self._deliver(messages, None)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages in the order of the nodes, each once."""
        replies = [self._replies.pop(id) for id in message_ids if id in self._replies]
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the replies in the order of the nodes; an error replaces one that takes over ``timeout`` seconds."""
        return self.pull_messages(self._deliver(messages, timeout))

    def _deliver(self, messages: Iterable[Message], timeout: float | None) -> list[str]:
        self._queries = 0
        mail: Mail = {}
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self._contexts:
                raise BadOption(f"a message is addressed to node {node}; the nodes are 1 to {len(self._contexts)}")
            ids.append(str(uuid4()))
            mail.setdefault(node, ([], self._contexts[node]))[0].append(_numbered(message, ids[-1]))
        for node, replies, context in self._carrier(mail, timeout):
            self._contexts[node] = context
            for message, reply in zip(mail[node][0], replies):
                self._replies[message.metadata.message_id] = reply.message
                if reply.message.has_error():
                    self._report(message, reply)
        return ids

    def _report(self, message: Message, reply: ClientReply) -> None:
        records = message.content.config_records.values()
        number = next((record["server-round"] for record in records if "server-round" in record), 0)
        kind = message.metadata.message_type.split(".")[0]
        reason = one_line(reply.message.error.reason or "no reason given")
        failure = Failure(message.metadata.dst_node_id, int(number), kind, reason, reply.trace)
        if self._failed is None:
            raise LeakbenchError(str(failure))
        self._failed(failure)


def _numbered(message: Message, id: str) -> Message:
    """Return a copy of a message with an id, which its reply refers to."""
    given = message.metadata
    metadata = Metadata(
        run_id=given.run_id,
        message_id=id,
        src_node_id=given.src_node_id,
        dst_node_id=given.dst_node_id,
        reply_to_message_id=given.reply_to_message_id,
        group_id=given.group_id,
        created_at=given.created_at,
        ttl=given.ttl,
        message_type=given.message_type,
    )
    return Message(content=copy.deepcopy(message.content), metadata=metadata)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Show only the errors of Flower's log."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
