"""Recordings of a running Flower app's updates, for an audit."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from safetensors.numpy import save_file

from leakbench.errors import BadOption


def record(
    strategy: Strategy,
    folder: str | Path,
    *,
    clients: Collection[int] | None = None,
    rounds: Collection[int] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Strategy:
    """Return a strategy that acts as ``strategy``, and records the arrays that clients receive and send.

    For every round and client there is a folder ``round-0001/client-ID`` with ``before.safetensors`` (the arrays that
    the client received), ``after.safetensors`` (those of its reply, as they arrived) and ``facts.json``: ``round``,
    ``client`` (its node id), ``examples`` (null if the reply does not say), ``metrics``, ``strategy`` and the hashes of
    both files. If the reply's metrics or configs, the config that was sent to the client, or ``config`` state them,
    ``facts.json`` also has ``batch``, ``epochs``, ``steps``, ``lr``, ``optimizer``, ``momentum`` and ``weight_decay``
    (under these or similar names, such as ``local-epochs`` and ``batch-size``). A folder appears when it is complete.
    ``leakbench audit --recording FOLDER`` reads it. Replies with errors are not recorded.

    Args:
        strategy: a strategy of Flower's message API, such as ``flwr.serverapp.strategy.FedAvg``.
        folder: of the recording; it must not exist, or must be empty.
        clients: node ids to record; all by default.
        rounds: the rounds to record, from 1 on; all by default.
        config: what the app states of its clients' training, such as ``context.run_config``.

    Raises:
        BadOption: the folder is not empty, or the strategy overrides ``start``.
    """
    if not isinstance(strategy, Strategy):
        raise BadOption(
            f"{type(strategy).__name__} is not a strategy of Flower's message API; give one of flwr.serverapp.strategy"
            ", or save an older strategy's arrays yourself (docs/flower.md, 'Older strategies')"
        )
    if type(strategy).start is not Strategy.start:
        raise BadOption(
            f"{type(strategy).__name__} overrides start and cannot be recorded; give a strategy that leaves it"
        )
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadOption(f"{str(folder)!r} is not empty; give a folder that is empty or does not exist")
    path.mkdir(parents=True, exist_ok=True)
    return Recording(strategy, path, clients, rounds, config or {})


class Recording(Strategy):
    """A strategy that records the messages of another; every other attribute is that strategy's own."""

    def __init__(
        self,
        strategy: Strategy,
        folder: Path,
        clients: Collection[int] | None,
        rounds: Collection[int] | None,
        config: Mapping[str, Any],
    ) -> None:
        self._strategy = strategy
        self._folder = folder
        self._clients = None if clients is None else frozenset(clients)
        self._rounds = None if rounds is None else frozenset(rounds)
        self._config = dict(config)
        self._before: dict[int, ArrayRecord] = {}
        self._sent: dict[int, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's messages, and keep what is sent to the chosen clients."""
        messages = list(self._strategy.configure_train(server_round, arrays, config, grid))
        wanted = self._rounds is None or server_round in self._rounds
        chosen = {
            message.metadata.dst_node_id: message
            for message in messages
            if wanted and (self._clients is None or message.metadata.dst_node_id in self._clients)
        }
        self._before = {client: _only(message, "sent to") for client, message in chosen.items()}
        self._sent = {client: _values(message) for client, message in chosen.items()}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Record the replies of the chosen clients, and return the strategy's average of all replies."""
        replies = list(replies)
        for reply in replies:
            client = reply.metadata.src_node_id
            if client in self._before and not reply.has_error():
                self._write(server_round, client, reply)
        return self._strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's messages."""
        return self._strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the strategy's metrics of the replies."""
        return self._strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log the strategy's summary."""
        self._strategy.summary()

    def _write(self, server_round: int, client: int, reply: Message) -> None:
        metrics = {name: value for record in reply.content.metric_records.values() for name, value in record.items()}
        facts = {
            "round": server_round,
            "client": client,
            "examples": metrics.get(getattr(self._strategy, "weighted_by_key", "num-examples")),
            "metrics": metrics,
            "strategy": type(self._strategy).__name__,
            **_stated(self._config, self._sent[client], _values(reply)),
        }
        parent = self._folder / f"round-{server_round:04d}"
        parent.mkdir(exist_ok=True)
        whole = Path(tempfile.mkdtemp(prefix=".client-", dir=parent))
        try:
            whole.chmod(0o755)
            save_file(_arrays(self._before[client]), whole / "before.safetensors")
            save_file(_arrays(_only(reply, "from")), whole / "after.safetensors")
            facts["sha256"] = {
                arm: hashlib.sha256((whole / f"{arm}.safetensors").read_bytes()).hexdigest() for arm in ARMS
            }
            (whole / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
            os.replace(whole, parent / f"client-{client}")
        except BaseException:
            shutil.rmtree(whole, ignore_errors=True)
            raise


def _only(message: Message, direction: str) -> ArrayRecord:
    """Return a message's one ArrayRecord."""
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise BadOption(
            f"a message {direction} a client has {len(records)} ArrayRecords; one, the weights, is recorded"
        )
    return records[0]


def _values(message: Message) -> dict[str, Any]:
    """Return the metrics and configs of a message by name; of a name that several records have, the last one's."""
    content = message.content
    records = [*content.config_records.values(), *content.metric_records.values()]
    return {name: value for record in records for name, value in record.items()}


def _stated(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the sources state of a client's training, by the keys of ``facts.json``; the last source counts."""
    found: dict[str, Any] = {}
    for source in sources:
        for name, value in source.items():
            key = _KEYS.get(name.lower().replace("_", "-"))
            if key is not None and isinstance(value, str if key == "optimizer" else (int, float)):
                found[key] = value
    return found


ARMS = ("before", "after")

_NAMES: Mapping[str, tuple[str, ...]] = {
    "batch": ("batch", "batch-size", "local-batch", "local-batch-size", "train-batch-size"),
    "epochs": ("epochs", "local-epochs", "num-epochs", "train-epochs"),
    "steps": ("steps", "local-steps", "num-steps"),
    "lr": ("lr", "learning-rate", "local-lr", "client-lr"),
    "optimizer": ("optimizer", "optimiser"),
    "momentum": ("momentum",),
    "weight_decay": ("weight-decay",),
}
"""The keys of ``facts.json``, and the names under which apps state them, with ``-`` in place of ``_``."""

_KEYS = {name: key for key, names in _NAMES.items() for name in names}


def _arrays(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: np.array(array.numpy(), order="C") for name, array in record.items()}
