"""Training by one party with all the data; the defense acts on the gradient of every batch."""

from __future__ import annotations

import time
from pathlib import Path

from leakbench.core.rng import generator, seeded
from leakbench.training.arm import GLOBAL, OnRound, Outcome, Round, TrainingHistory, TrainingSession, view
from leakbench.training.data import batches
from leakbench.training.files import STATE, restoring
from leakbench.training.steps import descend, draw, momentum_of, optimiser


def train(session: TrainingSession, folder: Path, on_round: OnRound) -> Outcome:
    """Train an arm, or resume it after its last finished epoch, and return the outcome.

    The state is written after every epoch, so that a training that was killed is resumed with the same numbers.

    Args:
        session: the arm; its network is changed.
        folder: of the state and the checkpoints.
        on_round: called with every epoch.

    Raises:
        CorruptAsset: the state in ``folder`` cannot be read.
    """
    arm, trainee, recipe = session.arm, session.trainee, session.arm.recipe
    history = TrainingHistory(session, folder, on_round)
    _draw_keys(session)
    state = history.restore()
    if state is None:
        sgd = optimiser(trainee, recipe, {})
        history.keep("initial", 0, view(session, GLOBAL, 0).test.accuracy)
    else:
        with restoring(folder / STATE):
            trainee.load(history.best, state["network"])
            sgd = optimiser(trainee, recipe, state["momentum"])
    while not history.done:
        number, begin = len(history.rounds) + 1, time.perf_counter()
        key = ("training", arm.seed, "client", 0, "round", number)
        for group in sgd.param_groups:
            group["lr"] = recipe.rate(number)
        rng, draws = generator(*key, "order"), generator(*key, "defense")
        losses = []
        trainee.network.train()
        with seeded(*key, "layers"):
            for x, y in batches(session.data.train, recipe.batch, recipe.augment, rng):
                losses.append(descend(trainee, sgd, x, y, draws, defended=True, classes=session.data.num_classes))
        trainee.settle()
        loss = sum(losses) / len(losses)
        seen = view(session, GLOBAL, number)
        one = Round(number, recipe.rate(number), loss, (seen,), time.perf_counter() - begin)
        model = {**trainee.shared(), **trainee.private()}
        history.add(one, seen.test.accuracy, model, {"network": model, "momentum": momentum_of(trainee, sgd)})
        on_round(one)
    trainee.load(history.best)
    return history.outcome(history.best_round.accuracy("test"), [trainee.private()])


def _draw_keys(session: TrainingSession) -> None:
    """Draw the secrets that are not trained, as the first client of a federation does."""
    trainee, checkpoint = session.trainee, session.arm.model.checkpoint()
    if checkpoint is not None and checkpoint.defense:
        return
    trained = trainee.parameters()
    keys = [secret for secret in trainee.lasting if secret.name not in trained]
    trainee.load(draw(keys, trainee, generator("training", session.arm.seed, "key", 0)))
