"""Federated averaging on Flower: its messages, strategy and apps around the rounds of ``clients``.

A client's secrets and momentum live in the state of its Flower context, and in a file of its own from which a training
that was stopped goes on. No message has them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from leakbench.core.rng import generator
from leakbench.errors import Unsupported
from leakbench.flower.simulation import Failure, simulate
from leakbench.training.arm import (
    GLOBAL,
    Outcome,
    Round,
    Session,
    Stage,
    Told,
    View,
    best_of,
    diverged,
    keep,
    stages_of,
    start,
    view,
)
from leakbench.training.clients import Own, begin, local_round
from leakbench.training.data import partition
from leakbench.training.files import STATE, read_state, restoring, write_state
from leakbench.training.settings import Arm
from leakbench.training.steps import Score, State, Trainee
from leakbench.training.thief import thefts

CLIENTS = "clients"
"""The folder of the clients' files, in an arm's folder."""
FIRST = "client 1"
"""Whose secrets are in the checkpoints."""


def train(session: Session, folder: Path, told: Told, workers: int = 0) -> Outcome:
    """Train an arm by rounds of fedavg, or go on after the last finished round, and return what came of it.

    Args:
        session: the arm; its network is changed.
        folder: of the states of server and clients, and of the checkpoints.
        told: told of every round.
        workers: so many Ray processes share the clients; with 0 they train one after another in this process.

    Raises:
        CorruptAsset: a state in ``folder`` cannot be read.
        Unsupported: the defense cannot act on what a client sends.
    """
    server = _Server(session, folder, told)
    if server.waits():
        app = ServerApp()
        app.main()(server.main)
        device = str(session.trainee.device)
        simulate(
            app,
            client_app(session.arm, folder, device),
            session.arm.recipe.clients,
            workers=workers,
            failed=server.fail,
        )
    return server.outcome()


class _Stop(Exception):
    """The training ends before its last round."""


class _Server:
    """What the server of an arm has seen so far, and what is measured of it."""

    def __init__(self, session: Session, folder: Path, told: Told) -> None:
        self.session, self.folder, self.told = session, folder, told
        self.recipe, self.trainee = session.arm.recipe, session.trainee
        self.reached = stages_of(self.recipe)
        self.rounds: list[Round] = []
        self.stages: list[Stage] = []
        self.best: State = {}
        self.shared = self.trainee.shared()
        self.failures: list[Failure] = []
        self.loss = 0.0
        self.views: list[View] = []
        self.begun = time.perf_counter()
        if (folder / STATE).exists():
            state = read_state(folder / STATE)
            with restoring(folder / STATE):
                self.rounds = [Round.of(one) for one in state["rounds"]]
                self.stages = [Stage.of(one) for one in state["stages"]]
                self.best, self.shared = state["best"], state["shared"]
            for path in (folder / CLIENTS).glob("*.pt"):
                if _number(path) > len(self.rounds):  # of a round that did not end
                    path.unlink()
            for one in self.rounds:
                told(one)
        else:
            self.keep("initial", 0, self.measure(0)[0].test.accuracy)

    def waits(self) -> bool:
        """Return whether there is a round left."""
        return len(self.rounds) < self.recipe.rounds and not (self.rounds and diverged(self.rounds[-1]))

    def main(self, grid: Grid, context: Context) -> None:
        """Run the rounds that are left: the ``main`` of the ServerApp."""
        done = len(self.rounds)
        strategy = _Averaging(self, done)
        self.begun = time.perf_counter()
        try:
            strategy.start(grid, _record(self.shared), self.recipe.rounds - done, evaluate_fn=self.finish)
        except _Stop:
            return

    def fail(self, failure: Failure) -> None:
        """Note a client that failed."""
        self.failures.append(failure)

    def finish(self, number: int, arrays: ArrayRecord) -> None:
        """Measure and store what a round of the strategy came to; it counts from 1 on after every start."""
        if number == 0:
            return
        number = len(self.rounds) + 1
        self.shared = _tensors(arrays, self.trainee)
        views = tuple(self.views) if self.trainee.lasting else tuple(self.measure(number))
        untested = tuple(str(failure) for failure in self.failures if failure.kind == "evaluate")
        if not views:
            raise RuntimeError(f"no client could test its model in round {number}: {untested[0]}")
        seconds = time.perf_counter() - self.begun
        failures = tuple(str(failure) for failure in self.failures if failure.kind != "evaluate")
        one = Round(number, self.recipe.rate(number), self.loss, views, seconds, failures, untested)
        self.rounds.append(one)
        for name in [name for name, at in self.reached.items() if at == number]:
            self.keep(name, number, self.first(one))
        if best_of(self.rounds, self.recipe) == number:
            self.best = self.shared
        write_state(
            self.folder / STATE,
            {
                "rounds": [one.plain() for one in self.rounds],
                "stages": [vars(one) for one in self.stages],
                "best": self.best,
                "shared": self.shared,
            },
        )
        _prune(self.folder, self.recipe.clients, (best_of(self.rounds, self.recipe), number - 1, number))
        self.told(one)
        self.begun, self.failures = time.perf_counter(), []
        if diverged(one):
            raise _Stop

    def measure(self, number: int) -> list[View]:
        """Return what the global model scores, with the secrets of the first client where it needs any."""
        self.trainee.load(self.shared, self.private(0, number))
        return [view(self.session, self.whose, self.whose, number)]

    @property
    def whose(self) -> str:
        """The view of the model with the secrets that checkpoints hold: those of the first client, or none."""
        return FIRST if self.trainee.lasting else GLOBAL

    def first(self, one: Round) -> float:
        """Return the test accuracy of a round's checkpoint, measured here where its client could not."""
        found = next((view for view in one.views if view.name == self.whose), None) or self.measure(one.number)[0]
        return found.test.accuracy

    def private(self, client: int, number: int) -> State:
        """Return a client's secrets after a round."""
        path = _file(self.folder, client, number)
        if path is None:
            return begin(self.trainee, client, self.session.arm.seed, self.session.initial).private
        private: State = read_state(path)["private"]
        return private

    def keep(self, name: str, number: int, accuracy: float) -> None:
        """Write the global model as a checkpoint, with the secrets of the first client."""
        self.trainee.load(self.shared, self.private(0, number))
        self.stages.append(keep(self.session, self.folder, name, number, accuracy))

    def outcome(self) -> Outcome:
        """Return what came of the rounds."""
        number = best_of(self.rounds, self.recipe)
        self.shared = self.best
        self.keep("best", number, self.first(self.rounds[number - 1]))
        stolen = thefts(
            self.trainee,
            self.best,
            [self.private(client, number) for client in range(self.recipe.clients)],
            self.session.initial,
            self.session.data.test,
            draws=self.recipe.thief,
            seed=self.session.arm.seed,
        )
        last = self.rounds[-1]
        reason = f"the training loss was {last.loss} in round {last.number}; it stopped there" if diverged(last) else ""
        return Outcome(
            "failed" if diverged(last) else "ok",
            reason,
            tuple(self.rounds),
            number,
            tuple(self.stages),
            tuple(stolen),
            len(self.session.data.train),
        )


class _Averaging(FedAvg):
    """Flower's FedAvg; clients are sampled by the arm's seed, rounds go on counting, and every reply is looked at."""

    def __init__(self, server: _Server, done: int) -> None:
        recipe = server.recipe
        super().__init__(
            fraction_train=recipe.fraction,
            fraction_evaluate=1.0 if server.trainee.lasting else 0.0,
            min_train_nodes=recipe.sampled,
            min_evaluate_nodes=recipe.clients,
            min_available_nodes=recipe.clients,
        )
        self.server = server
        self.done = done

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return a message to each client that takes part."""
        number = server_round + self.done
        before = random.getstate()
        random.seed(generator("training", self.server.session.arm.seed, "sample", number).initial_seed())
        try:
            messages: Iterable[Message] = super().configure_train(number, arrays, config, grid)
        finally:
            random.setstate(before)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the average of what clients sent; raise where every client failed."""
        replies = list(replies)
        reports = [reply.content["metrics"] for reply in replies if not reply.has_error()]
        if not reports:
            reasons = {failure.reason for failure in self.server.failures}
            reason = sorted(reasons)[0] if reasons else "nobody answered"
            kind, _, words = reason.partition(": ")
            raise Unsupported(words) if kind == "Unsupported" else RuntimeError(f"every client failed: {reason}")
        steps = sum(report["steps"] for report in reports)
        self.server.loss = sum(report["loss"] * report["steps"] for report in reports) / steps
        averaged: tuple[ArrayRecord | None, MetricRecord | None] = super().aggregate_train(
            server_round + self.done, replies
        )
        return averaged

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return a message to every client where the model needs their secrets."""
        messages: Iterable[Message] = super().configure_evaluate(server_round + self.done, arrays, config, grid)
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Note what each client measured."""
        reports = [reply.content["metrics"] for reply in replies if not reply.has_error()]
        self.server.views = sorted((_view(report) for report in reports), key=lambda own: int(own.name.split()[1]))
        return None


def client_app(arm: Arm, folder: Path, device: str) -> ClientApp:
    """Return what every client runs; its images are those of its partition, and its files are in ``folder``."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Train a round; send what the defense releases."""
        session = _session(arm, device)
        client, number = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
        data = session.data
        sent, own = local_round(
            session.trainee,
            data.train.take(partition(data.train.labels, arm.recipe, arm.seed)[client]),
            arm.recipe,
            _own(context, session, folder, client, number - 1),
            _tensors(message.content["arrays"], session.trainee),
            client=client,
            number=number,
            seed=arm.seed,
            classes=data.num_classes,
        )
        context.state["private"], context.state["momentum"] = _record(own.private), _record(own.momentum)
        path = folder / CLIENTS / f"{client}-{number}.pt"
        write_state(path, {"private": own.private, "momentum": own.momentum})
        metrics = MetricRecord({"num-examples": sent.examples, "loss": sent.loss, "steps": sent.steps})
        return Message(RecordDict({"arrays": _record(sent.shared), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        """Test the global model with the client's own secrets."""
        session = _session(arm, device)
        client, number = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
        own = _own(context, session, folder, client, number)
        session.trainee.load(_tensors(message.content["arrays"], session.trainee), own.private)
        seen = view(session, f"client {client + 1}", client, number)
        parts = {"validation": seen.validation, "test": seen.test}
        values = {
            f"{name}-{part}": value
            for name, score in parts.items()
            if score is not None
            for part, value in (("loss", score.loss), ("correct", score.correct), ("count", score.count))
        }
        metrics = MetricRecord({"num-examples": seen.test.count, "client": client, **values})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


@lru_cache(maxsize=1)
def _session(arm: Arm, device: str) -> Session:
    """Return the images and the network that the clients of a process work with."""
    return start(arm, device)


def _own(context: Context, session: Session, folder: Path, client: int, number: int) -> Own:
    """Return what a client has after a round: from its context, from its file, or what it begins with."""
    if "momentum" in context.state:
        return Own(*(_plain(context.state[name]) for name in ("private", "momentum")))
    path = _file(folder, client, number)
    if path is not None:
        return Own(**read_state(path))
    return begin(session.trainee, client, session.arm.seed, session.initial)


def _file(folder: Path, client: int, number: int) -> Path | None:
    """Return a client's file of its last round up to this one, None before its first."""
    numbers = [_number(path) for path in (folder / CLIENTS).glob(f"{client}-*.pt")]
    last = max((one for one in numbers if one <= number), default=None)
    return None if last is None else folder / CLIENTS / f"{client}-{last}.pt"


def _number(path: Path) -> int:
    """Return the round of a client's file."""
    return int(path.stem.partition("-")[2])


def _prune(folder: Path, clients: int, needed: Iterable[int]) -> None:
    """Remove the files of clients that no round among those needed goes back to."""
    kept = {_file(folder, client, number) for client in range(clients) for number in needed}
    for path in (folder / CLIENTS).glob("*.pt"):
        if path not in kept:
            path.unlink()


def _record(state: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: value.detach().cpu() for name, value in state.items()})


def _plain(record: ArrayRecord) -> State:
    return dict(record.to_torch_state_dict())


def _tensors(record: ArrayRecord, trainee: Trainee) -> State:
    """Return arrays as tensors of the types that the network has; whole numbers come as fractions from an average."""
    own = trainee.network.state_dict()
    return {
        name: (value if own[name].is_floating_point() else value.round()).to(own[name].dtype)
        for name, value in _plain(record).items()
    }


def _view(report: Any) -> View:
    scores = {
        part: Score(float(report[f"{part}-loss"]), int(report[f"{part}-correct"]), int(report[f"{part}-count"]))
        for part in ("validation", "test")
        if f"{part}-count" in report
    }
    return View(f"client {int(report['client']) + 1}", scores.get("validation"), scores["test"])
