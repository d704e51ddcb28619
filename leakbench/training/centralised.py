"""Training by one party with all the data; the defense acts on the gradient of every batch."""

import time
from pathlib import Path

from leakbench.training.arm import GLOBAL, OnRound, Outcome, Round, TrainingHistory, TrainingSession, view
from leakbench.training.files import STATE, restoring
from leakbench.training.steps import resumed, train_round


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
    state, kept = history.restore(), resumed(trainee, {}, {})
    if state is None:
        history.keep("initial", 0, view(session, GLOBAL, 0).test.accuracy)
    else:
        with restoring(folder / STATE):
            trainee.load(history.best, state["network"])
            kept = resumed(trainee, state["momentum"], state.get("memory", {}))
    while not history.done:
        number, begin = len(history.rounds) + 1, time.perf_counter()
        key = ("training", arm.seed, "client", 0, "round", number)
        data = session.data
        losses, kept, _ = train_round(
            trainee, data.train, recipe, kept, key=key, number=number, defended=True, classes=data.num_classes
        )
        seen = view(session, GLOBAL, number)
        one = Round(number, recipe.rate(number), sum(losses) / len(losses), (seen,), time.perf_counter() - begin)
        model = {**trainee.shared(), **trainee.private()}
        memory = {"memory": kept.memory} if kept.memory else {}
        momentum = dict(kept.optimiser.first)
        history.add(one, seen.test.accuracy, model, {"network": model, "momentum": momentum, **memory})
        on_round(one)
    trainee.load(history.best)
    return history.outcome(history.best_round.accuracy("test"), [trainee.private()])
