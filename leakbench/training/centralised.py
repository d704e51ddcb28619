"""Training by one party with all the data; the defense acts on the gradient of every batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from leakbench.core.rng import generator, seeded
from leakbench.training.arm import (
    GLOBAL,
    Outcome,
    Round,
    Session,
    Stage,
    Told,
    best_of,
    diverged,
    keep,
    stages_of,
    view,
)
from leakbench.training.data import batches
from leakbench.training.files import STATE, read_state, restoring, write_state
from leakbench.training.steps import State, Trainee, descend, draw, momentum_of, optimiser
from leakbench.training.thief import thefts


def train(session: Session, folder: Path, told: Told) -> Outcome:
    """Train an arm, or go on after the last finished epoch, and return what came of it.

    After every epoch the state is written, so that a training that was killed goes on to the same numbers.

    Args:
        session: the arm; its network is changed.
        folder: of the state and the checkpoints.
        told: told of every epoch.

    Raises:
        CorruptAsset: the state in ``folder`` cannot be read.
    """
    arm, trainee, recipe = session.arm, session.trainee, session.arm.recipe
    classes = session.data.num_classes
    _draw_keys(session)
    reached = stages_of(recipe)
    rounds: list[Round] = []
    stages: list[Stage] = []
    best: State = {}
    sgd = optimiser(trainee, recipe, {})
    if (folder / STATE).exists():
        state = read_state(folder / STATE)
        with restoring(folder / STATE):
            rounds = [Round.of(one) for one in state["rounds"]]
            stages = [Stage.of(one) for one in state["stages"]]
            best = state["best"]
            trainee.load(best)
            trainee.load(state["network"])
            sgd = optimiser(trainee, recipe, state["momentum"])
        for one in rounds:
            told(one)
    else:
        stages.append(keep(session, folder, "initial", 0, view(session, GLOBAL, 0).test.accuracy))
    while len(rounds) < recipe.rounds and not (rounds and diverged(rounds[-1])):
        number, begin = len(rounds) + 1, time.perf_counter()
        key = ("training", arm.seed, "client", 0, "round", number)
        for group in sgd.param_groups:
            group["lr"] = recipe.rate(number)
        rng, draws = generator(*key, "order"), generator(*key, "defense")
        losses = []
        trainee.network.train()
        with seeded(*key, "layers"):
            for x, y in batches(session.data.train, recipe.batch, recipe.augment, rng):
                losses.append(descend(trainee, sgd, x, y, draws, defended=True, classes=classes))
        trainee.settle()
        loss = sum(losses) / len(losses)
        seen = view(session, GLOBAL, number)
        rounds.append(Round(number, recipe.rate(number), loss, (seen,), time.perf_counter() - begin))
        for name in [name for name, at in reached.items() if at == number]:
            stages.append(keep(session, folder, name, number, seen.test.accuracy))
        if best_of(rounds, recipe) == number:
            best = _tensors(trainee)
        state = _state(rounds, stages, best, trainee)
        write_state(folder / STATE, {**state, "momentum": momentum_of(trainee, sgd)})
        told(rounds[-1])
    number = best_of(rounds, recipe)
    trainee.load(best)
    accuracy = rounds[number - 1].accuracy("test")
    stages.append(keep(session, folder, "best", number, accuracy))
    stolen = thefts(
        trainee,
        trainee.shared(),
        [trainee.private()],
        session.initial,
        session.data.test,
        draws=recipe.thief,
        seed=arm.seed,
    )
    failed = diverged(rounds[-1])
    reason = f"the training loss was {rounds[-1].loss} in epoch {rounds[-1].number}; it stopped there" if failed else ""
    return Outcome(
        "failed" if failed else "ok",
        reason,
        tuple(rounds),
        number,
        tuple(stages),
        tuple(stolen),
        len(session.data.train),
    )


def _draw_keys(session: Session) -> None:
    """Draw the secrets that are not trained, as the first client of a federation does."""
    trainee, checkpoint = session.trainee, session.arm.model.checkpoint()
    if checkpoint is not None and checkpoint.defense:
        return
    trained = trainee.parameters()
    keys = [secret for secret in trainee.lasting if secret.name not in trained]
    trainee.load(draw(keys, trainee, generator("training", session.arm.seed, "key", 0)))


def _tensors(trainee: Trainee) -> State:
    return {**trainee.shared(), **trainee.private()}


def _state(rounds: list[Round], stages: list[Stage], best: State, trainee: Trainee) -> dict[str, Any]:
    return {
        "rounds": [one.plain() for one in rounds],
        "stages": [vars(one) for one in stages],
        "best": best,
        "network": _tensors(trainee),
    }
