"""The accuracy of a stolen global model with wrong secrets, for each kind of wrong secret."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from leakbench.datasets.images import ByteImages
from leakbench.training.steps import Tensors, Trainee, evaluate

OWN = "own key and lock"
"""No theft: each client with its own secrets."""
INITIAL = "fresh key, initial lock"
PAPER_RANDOM = "fresh key, fresh lock"
"""The kind that the words of FedKL's section 4.2 fit best: a random key and random weights of the lock."""
ZERO = "zero lock"
"""The kind that FedKL's released code evaluates."""

KINDS = {
    OWN: "each client with its own secrets, as it uses the model",
    "another client's key and lock": "a thief with all secrets of one client (the same figures as the client's own)",
    "another client's key, own lock": "the lock of one client with the key of another, every pair of clients",
    INITIAL: "a key drawn from its distribution, and the lock that the server began with",
    PAPER_RANDOM: "key and lock drawn from their distributions",
    ZERO: "the lock's tensors are zero, a mistake in the released code: with ReLU gates scale and shift are 0 and "
    "the output is constant; with sigmoid gates both are 1/2 for every key",
}
"""Kind of secrets -> its description. A *key* is a private tensor that is not trained, a *lock* one that is."""


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of secrets {kind!r}")
    return kind


@dataclass(frozen=True)
class Theft:
    """The test accuracy of the global model with secrets of one kind.

    Attributes:
        kind: one of ``KINDS``.
        correct: for each draw, the number of test images that are classified correctly.
        count: number of test images.
    """

    kind: Annotated[str, AfterValidator(_known)]
    correct: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    count: Annotated[int, Field(ge=1)]


def thefts(
    trainee: Trainee,
    shared: Mapping[str, Tensor],
    privates: Sequence[Tensors],
    initial: Mapping[str, Tensor],
    images: ByteImages,
    *,
    draws: int,
    seed: int,
) -> list[Theft]:
    """Return the accuracy of the global model with every kind of secrets; nothing for a model without secrets.

    Args:
        trainee: a network to test in; its tensors are overwritten.
        shared: the global model.
        privates: the secrets of each client.
        initial: those that the first model had.
        images: the test images.
        draws: number of draws of each fresh secret.
        seed: of the draws.
    """
    if not trainee.lasting or not draws:
        return []
    keys, locks, own = trainee.keys, trainee.locks, list(privates)
    first = {secret.name: initial[secret.name] for secret in locks}
    fresh_keys = [trainee.draw(keys, "thief", seed, "key", number) for number in range(draws)]
    fresh_locks = [trainee.draw(locks, "thief", seed, "lock", number) for number in range(draws)]
    zero = {secret.name: torch.zeros(trainee.shapes[secret.name]) for secret in locks}
    names = [secret.name for secret in keys]
    crossed = [{**mine, **{name: other[name] for name in names}} for mine, other in itertools.permutations(own, 2)]
    guesses: dict[str, list[Tensors]] = {
        OWN: own,
        "another client's key and lock": own if len(own) > 1 else [],
        "another client's key, own lock": crossed if keys and locks else [],
        INITIAL: [{**first, **key} for key in fresh_keys] if keys else [],
        PAPER_RANDOM: [{**lock, **key} for lock, key in zip(fresh_locks, fresh_keys)],
        ZERO: [{**zero, **key} for key in fresh_keys] if locks else [],
    }
    found = []
    for kind, states in guesses.items():
        scores = []
        for number, state in enumerate(states):
            trainee.load(shared, state)
            scores.append(evaluate(trainee, images, seed, "thief", kind, number))
        if scores:
            found.append(Theft(kind, tuple(score.correct for score in scores), len(images)))
    return found
