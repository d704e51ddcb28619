"""Federated averaging on Flower: its messages, strategy and apps around the rounds of ``clients``.

A client's secrets and momentum stay in a file of its own, from which a training that was stopped is resumed. No message
holds them.
"""

import json
import random
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from pydantic import TypeAdapter
from torch import Tensor

from leakbench.core.rng import generator
from leakbench.errors import DefenseFailed, Unsupported
from leakbench.flower.simulation import Failure, simulate
from leakbench.training.arm import GLOBAL, OnRound, Outcome, Round, TrainingHistory, TrainingSession, View, start, view
from leakbench.training.clients import Own, begin, local_round
from leakbench.training.data import partition
from leakbench.training.files import STATE, plain, read_state, restoring, write_state
from leakbench.training.settings import Arm
from leakbench.training.steps import Tensors, Trainee

CLIENTS_FOLDER = "clients"
"""The folder of the clients' files, in an arm's folder."""
FIRST_CLIENT = "client 1"
"""The client whose secrets are in the checkpoints."""

_VIEW = TypeAdapter(View)


def train(session: TrainingSession, folder: Path, on_round: OnRound, workers: int = 0) -> Outcome:
    """Train an arm by rounds of fedavg, or resume it after its last finished round, and return the outcome.

    Args:
        session: the arm; its network is changed.
        folder: of the states of server and clients, and of the checkpoints.
        on_round: called with every round.
        workers: number of Ray processes that share the clients; with 0 they train one after another in this process.

    Raises:
        CorruptAsset: a state in ``folder`` cannot be read.
        Unsupported: the defense cannot act on an update.
    """
    server = _Server(session, folder, on_round)
    if not server.history.done:
        app = ServerApp()
        app.main()(server.main)
        clients = client_app(session.arm, folder, str(session.trainee.device))
        simulate(app, clients, session.arm.recipe.clients, workers=workers, failed=server.failures.append)
    return server.outcome()


class _Server:
    """The server of an arm: the global model, and the history of its training."""

    def __init__(self, session: TrainingSession, folder: Path, on_round: OnRound) -> None:
        self.session, self.folder, self.on_round = session, folder, on_round
        self.recipe, self.trainee = session.arm.recipe, session.trainee
        self.whose = FIRST_CLIENT if self.trainee.lasting else GLOBAL  # whose secrets the checkpoints hold
        self.failures: list[Failure] = []
        self.shared = self.trainee.shared()
        self.history = TrainingHistory(session, folder, on_round)
        state = self.history.restore()
        if state is None:
            self.history.keep("initial", 0, self.measure(0).test.accuracy)
            return
        with restoring(folder / STATE):
            self.shared = state["shared"]
        for path in (folder / CLIENTS_FOLDER).glob("*.pt"):
            if _number(path) > len(self.history.rounds):  # of a round that did not end
                path.unlink()

    def main(self, grid: Grid, context: Context) -> None:
        """Run the rounds that are left: the ``main`` of the ServerApp."""
        strategy = FedAvg(
            fraction_train=self.recipe.fraction,
            min_train_nodes=self.recipe.sampled,
            min_evaluate_nodes=self.recipe.clients,
            min_available_nodes=self.recipe.clients,
        )
        while not self.history.done:
            self.run_round(strategy, grid, len(self.history.rounds) + 1)

    def run_round(self, strategy: FedAvg, grid: Grid, number: int) -> None:
        """Run a round of the strategy, measure the global model, and write the state."""
        begun = time.perf_counter()
        self.failures.clear()
        before = random.getstate()
        random.seed(generator("training", self.session.arm.seed, "sample", number).initial_seed())
        try:
            messages = strategy.configure_train(number, _record(self.shared), ConfigRecord(), grid)
        finally:
            random.setstate(before)
        replies = list(grid.send_and_receive(messages))
        loss = self.loss_of(replies)
        arrays, _ = strategy.aggregate_train(number, replies)
        self.shared = _tensors(arrays, self.trainee)
        views = self.clients_views(strategy, grid, number, arrays) if self.trainee.lasting else (self.measure(number),)
        failures = [str(failure) for failure in self.failures if failure.kind != "evaluate"]
        untested = [str(failure) for failure in self.failures if failure.kind == "evaluate"]
        if not views:
            raise RuntimeError(f"no client could test its model in round {number}: {untested[0]}")
        seconds = time.perf_counter() - begun
        one = Round(number, self.recipe.rate(number), loss, views, seconds, tuple(failures), tuple(untested))
        accuracy = self.first_accuracy(one)
        self.load(self.shared, number)
        self.history.add(one, accuracy, self.shared, {"shared": self.shared})
        _prune(self.folder, self.recipe.clients, (self.history.best_round.number, number - 1, number))
        self.on_round(one)

    def loss_of(self, replies: Iterable[Message]) -> float:
        """Return the mean training loss of the clients' steps; raise if every client failed."""
        reports = [reply.content["metrics"] for reply in replies if not reply.has_error()]
        if not reports:
            reason = min((failure.reason for failure in self.failures), default="no client replied")
            kind, _, words = reason.partition(": ")
            known = next((error for error in (Unsupported, DefenseFailed) if error.__name__ == kind), None)
            raise known(words) if known else RuntimeError(f"every client failed: {reason}")
        steps = sum(report["steps"] for report in reports)
        loss: float = sum(report["loss"] * report["steps"] for report in reports) / steps
        return loss

    def clients_views(self, strategy: FedAvg, grid: Grid, number: int, arrays: ArrayRecord) -> tuple[View, ...]:
        """Return the scores of the global model with the secrets of each client that could test it."""
        replies = grid.send_and_receive(strategy.configure_evaluate(number, arrays, ConfigRecord(), grid))
        return tuple(_VIEW.validate_json(one.content["report"]["view"]) for one in replies if not one.has_error())

    def measure(self, number: int) -> View:
        """Return the scores of the global model, with the secrets of the first client if it needs any."""
        self.load(self.shared, number)
        return view(self.session, self.whose, self.whose, number)

    def load(self, shared: Tensors, number: int) -> None:
        """Put a global model and the first client's secrets of a round into the network."""
        self.trainee.load(shared, self.private(0, number))

    def first_accuracy(self, one: Round) -> float:
        """Return the test accuracy of a round's checkpoint, measured here if its client could not."""
        found = next((view for view in one.views if view.name == self.whose), None) or self.measure(one.number)
        return found.test.accuracy

    def private(self, client: int, number: int) -> Tensors:
        """Return a client's secrets after a round."""
        return _own(self.session, self.folder, client, number).private

    def outcome(self) -> Outcome:
        """Return the outcome of the rounds."""
        best = self.history.best_round
        self.shared = self.history.best
        accuracy = self.first_accuracy(best)
        self.load(self.shared, best.number)
        return self.history.outcome(
            accuracy, [self.private(client, best.number) for client in range(self.recipe.clients)]
        )


def client_app(arm: Arm, folder: Path, device: str) -> ClientApp:
    """Return the app that every client runs; its images are those of its partition, and its files are in ``folder``."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Train a round; send the update that the defense releases."""
        session, client, number = _opened(message, context)
        data = session.data
        sent, own = local_round(
            session.trainee,
            data.train.take(partition(data.train.labels, arm.recipe, arm.seed)[client]),
            arm.recipe,
            _own(session, folder, client, number - 1),
            _tensors(message.content["arrays"], session.trainee),
            client=client,
            number=number,
            seed=arm.seed,
            classes=data.num_classes,
        )
        write_state(folder / CLIENTS_FOLDER / f"{client}-{number}.pt", vars(own))
        metrics = MetricRecord({"num-examples": sent.examples, "loss": sent.loss, "steps": sent.steps})
        return Message(RecordDict({"arrays": _record(sent.shared), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        """Test the global model with the client's own secrets."""
        session, client, number = _opened(message, context)
        own = _own(session, folder, client, number)
        session.trainee.load(_tensors(message.content["arrays"], session.trainee), own.private)
        seen = view(session, f"client {client + 1}", client, number)
        return Message(RecordDict({"report": ConfigRecord({"view": json.dumps(plain(seen))})}), reply_to=message)

    def _opened(message: Message, context: Context) -> tuple[TrainingSession, int, int]:
        """Return the session, the client's number from 0 on, and the round."""
        config = message.content["config"]
        return _session(arm, device), int(context.node_config["partition-id"]), int(config["server-round"])

    return app


@lru_cache(maxsize=1)
def _session(arm: Arm, device: str) -> TrainingSession:
    """Return the images and the network of all clients in this process."""
    return start(arm, device)


def _own(session: TrainingSession, folder: Path, client: int, number: int) -> Own:
    """Return the tensors that a client keeps after a round, from its file; before its first round the initial ones."""
    path = _file(folder, client, number)
    if path is None:
        return begin(session.trainee, client, session.arm, session.initial)
    return Own(**read_state(path))


def _file(folder: Path, client: int, number: int) -> Path | None:
    """Return a client's file of its last round up to this one, None before its first."""
    numbers = [_number(path) for path in (folder / CLIENTS_FOLDER).glob(f"{client}-*.pt")]
    last = max((one for one in numbers if one <= number), default=None)
    return None if last is None else folder / CLIENTS_FOLDER / f"{client}-{last}.pt"


def _number(path: Path) -> int:
    """Return the round of a client's file."""
    return int(path.stem.partition("-")[2])


def _prune(folder: Path, clients: int, needed: Iterable[int]) -> None:
    """Remove the clients' files that belong to none of the rounds needed."""
    kept = {_file(folder, client, number) for client in range(clients) for number in needed}
    for path in (folder / CLIENTS_FOLDER).glob("*.pt"):
        if path not in kept:
            path.unlink()


def _record(state: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: value.detach().cpu() for name, value in state.items()})


def _tensors(record: ArrayRecord, trainee: Trainee) -> Tensors:
    """Return arrays as tensors of the network's types; an average turns integers into fractions, which are rounded."""
    own = trainee.network.state_dict()
    return {
        name: (value if own[name].is_floating_point() else value.round()).to(own[name].dtype)
        for name, value in record.to_torch_state_dict().items()
    }
