"""Clients whose gradients are computed at once, against the same clients one at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from conftest import ALL_DEFENSES, CLASSES, ON_WEIGHTS, SHAPE, clients, close
from torch import Tensor, nn
from torch.nn import functional as F

import leakbench
from leakbench import defenses, models
from leakbench.clients import registry as trainings
from leakbench.core.component import shipped
from leakbench.core.rng import DrawsOnHost, generator
from leakbench.core.types import Gradient
from leakbench.defenses import Defense, Step
from leakbench.errors import ClientFailed, DefenseFailed
from leakbench.observation import Observation
from leakbench.plan.matrix import parse_threat
from leakbench.victim import Client, Exchange, StepRecord, observing
from leakbench.victim import steps as client_steps

CPU = torch.device("cpu")

Steps = Callable[..., tuple[Observation, list[StepRecord]]]


def several(count: int, trials: int) -> list[Client]:
    """Return clients of several images."""
    own = clients(trials * count)
    groups = [own[begin : begin + count] for begin in range(0, len(own), count)]
    return [
        Client(first.image, first.label, "weights 0", first.key, others=tuple((o.image, o.label) for o in others))
        for first, *others in groups
    ]


def taken(
    model: str | leakbench.Model = "lenet",
    defense: str | Defense = "none",
    threat: object = "paper",
    *,
    own: list[Client] | None = None,
    training: str = "local",
) -> tuple[Observation, list[StepRecord]]:
    """Return what a server sees of three clients, and the records of their steps."""
    return Exchange(
        models.parse(model) if isinstance(model, str) else model,
        defenses.parse(defense) if isinstance(defense, str) else defense,
        parse_threat(threat),
        own or clients(3),
        CLASSES,
        torch.full(SHAPE, 0.5),
        training=trainings.parse(training),
    ).recorded()


@pytest.fixture
def jointly(monkeypatch: pytest.MonkeyPatch, float64: None) -> Steps:
    """Observe clients that are computed together, on the CPU too; it fails if they are not."""

    def steps(*args: Any, **options: Any) -> tuple[Observation, list[StepRecord]]:
        with monkeypatch.context() as patch:
            own = lambda trainers, clients, device, blame, record: client_steps._joint_part(  # noqa: E731
                trainers, clients, device, blame, record
            )
            patch.setattr(observing, "joint_steps", own)
            return taken(*args, **options)

    return steps


def same(one: tuple[Observation, list[StepRecord]], other: tuple[Observation, list[StepRecord]]) -> None:
    """Assert that two observations, and the records of the steps, are equal in float64."""
    for part in ("gradient", "weights"):
        here, there = getattr(one[0], part), getattr(other[0], part)
        assert list(here) == list(there)
        assert all(here[name].shape == value.shape for name, value in there.items())
        # some gradients are zero but for rounding, such as that of a bias before a normalisation
        close(*(torch.cat([value.flatten() for value in all_.values()]) for all_ in (here, there)), 1e-9)
    for here, there in zip(one[1], other[1], strict=True):
        assert here.cosine == pytest.approx(there.cosine, rel=1e-9, nan_ok=True)
        assert here.unseen == there.unseen
        assert (here.changed is None) == (there.changed is None)
        if here.changed is not None and there.changed is not None:
            assert torch.equal(here.changed, there.changed)


JOINT = [spec for spec in ALL_DEFENSES if type(defenses.parse(spec)).joint]


def test_clients_are_computed_one_at_a_time_only_behind_defenses_that_run_their_network_again() -> None:
    alone = [name for name in defenses.names() if not defenses.get(name).joint]
    assert [name for name in alone if shipped(defenses.get(name))] == ["censor", "dcs"]


@pytest.mark.parametrize("defense", JOINT)
def test_gradients_behind_every_defense(jointly: Steps, defense: str) -> None:
    same(jointly(defense=defense), taken(defense=defense))


@pytest.mark.parametrize("defense", [*ON_WEIGHTS, "noise", "precode(k=6)", "keylock(length=9)", "mixup"])
def test_updates_of_clients_that_train(jointly: Steps, defense: str) -> None:
    threat = {"shares": "weights", "local_steps": 3, "learning_rate": 0.1}
    same(jointly(defense=defense, threat=threat), taken(defense=defense, threat=threat))


@pytest.mark.parametrize(
    ("defense", "training", "threat"),
    [
        ("none", "local(batch=4)", "paper"),
        ("dp", "local(batch=4)", "paper"),
        ("precode(k=6)", "local(batch=4)", "paper"),
        ("secagg(clients=2)", "local(batch=4)", "paper"),
        ("noise", "local(images=4, local_batch=2, local_epochs=2, momentum=0.9)", "weights"),
        ("precode(k=6)", "local(images=4, local_batch=3, optimizer=adam, lr=0.01)", "weights"),
    ],
)
def test_clients_of_several_images(jointly: Steps, defense: str, training: str, threat: str) -> None:
    case: Mapping[str, Any] = {"defense": defense, "training": training, "threat": threat, "own": several(4, 2)}
    same(jointly(**case), taken(**case))


@dataclass(frozen=True)
class Drawing(leakbench.Model):
    """A network that drops entries and whole channels, and adds noise."""

    name: ClassVar[str] = "drawing"

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        return DrawingNetwork()


class DrawingNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 6, 3), nn.Linear(216, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout2d(torch.sigmoid(self.first(x)), 0.3, self.training)
        x = F.dropout(x + 0.1 * torch.randn_like(x), 0.2, self.training)
        logits: Tensor = self.last(x.flatten(1))
        return logits


@pytest.mark.parametrize(
    ("model", "case"),
    [
        ("resnet20(width=4)", {"defense": "soteria"}),
        ("lenet-bn", {"defense": "keylock(length=9)"}),
        ("mlp", {"defense": "noise"}),
        (Drawing(), {}),
        (Drawing(), {"threat": {"shares": "weights", "local_steps": 3, "learning_rate": 0.1}}),
        ("lenet", {"own": clients(3, fresh=True), "defense": "clip(norm=0.01)"}),
    ],
)
def test_networks(jointly: Steps, model: str | leakbench.Model, case: Mapping[str, Any]) -> None:
    same(jointly(model, **case), taken(model, **case))


@dataclass(frozen=True)
class Broken(Defense):
    """Sends what is not finite, or raises, for images with a pixel above a limit."""

    name: ClassVar[str] = "broken"
    reference: ClassVar[str] = "a test"
    joint: ClassVar[bool] = True
    raises: bool = False

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        if self.raises:
            raise ValueError("no")
        return {name: value / 0 for name, value in step.gradient().items()}


def test_a_defense_that_fails_is_named(jointly: Steps) -> None:
    for defense, words in ((Broken(), "'broken' released 'features.0.weight'"), (Broken(True), "'broken' raised")):
        with pytest.raises(DefenseFailed, match=words) as one:
            jointly(defense=defense)
        with pytest.raises(DefenseFailed, match=words) as other:
            taken(defense=defense)
        assert str(one.value) == str(other.value)
    infinite = [Client(torch.full(SHAPE, torch.inf), 0, "weights 0", "a")]
    with pytest.raises(ClientFailed, match="without any defense the client sends"):
        jointly(own=infinite)


def test_joint_is_not_inherited() -> None:
    class Own(type(defenses.parse("noise"))):  # type: ignore[misc]
        pass

    assert type(defenses.parse("noise")).joint
    assert not Own.joint


def test_draws_for_a_device_are_those_of_the_cpu() -> None:
    def drawn(own: torch.Generator) -> list[Tensor]:
        return [
            torch.randn(3, generator=own),
            torch.empty(3).exponential_(generator=own),
            torch.randint(9, (3,), generator=own),
            torch.normal(0.0, 2.0, (3,), generator=own),
        ]

    with DrawsOnHost(torch.device("meta")):
        assert {value.device.type for value in drawn(generator("a"))} == {"meta"}
        assert torch.ones(3).device.type == "meta"
    with DrawsOnHost(CPU):
        here = drawn(generator("a"))
    assert all(map(torch.equal, here, drawn(generator("a"))))
