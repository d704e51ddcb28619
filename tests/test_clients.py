"""Clients of several images: local training, which images they have, and what an attacker is granted of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import rand
from test_cli import cli, place, refused  # noqa: F401
from torch import nn
from torch.nn import functional as F

import leakbench
from leakbench import attacks, clients, defenses, models
from leakbench.clients.local import Local
from leakbench.core.types import ThreatModel
from leakbench.errors import BadOption, LeakbenchError, Unsupported
from leakbench.observation import Observation
from leakbench.plan.matrix import Matrix
from leakbench.plan.trial import Cell, split_label
from leakbench.victim import Client, build, observe

SHAPE = (1, 8, 8)
CLASSES = 6
WEIGHTS = ThreatModel(shares="weights", rate="known")


def client(count: int, key: str = "c") -> Client:
    images = [(rand(*SHAPE, seed=row), row % CLASSES) for row in range(count)]
    return Client(*images[0], "w", key, (), tuple(images[1:]))


def see(
    spec: str, threat: ThreatModel = WEIGHTS, *, defense: str = "none", model: str = "mlp(hidden=16)"
) -> Observation:
    training = clients.parse(spec)
    who = [client(training.count, f"c{row}") for row in range(2)]
    return observe(
        models.parse(model), defenses.parse(defense), threat, who, CLASSES, torch.full(SHAPE, 0.5), training=training
    )


@pytest.mark.parametrize(
    "options",
    [
        "local_batch=4, local_epochs=2, lr=0.05, momentum=0.9, nesterov=true, weight_decay=5e-4",
        "local_batch=5, local_steps=4, lr=0.01, optimizer=adam, weight_decay=5e-4",
        "local_batch=3, lr=0.01, optimizer=adamw, weight_decay=0.1, shuffle=false",
    ],
)
def test_a_client_trains_as_torch_does(options: str) -> None:
    spec = f"local(images=10, {options})"
    training = clients.parse(spec)
    assert isinstance(training, Local)
    model = leakbench.Model
    network = build(models.parse("mlp(hidden=16)"), defenses.parse("none"), SHAPE, CLASSES, "w").double()
    assert isinstance(model, type)

    class Double(leakbench.Model):
        """The same network in float64."""

        def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
            """Return the network."""
            return models.parse("mlp(hidden=16)").build(image_shape, num_classes).double()

    seen = observe(
        Double(), defenses.parse("none"), replace(WEIGHTS, order="known"), [client(10)], CLASSES,
        torch.full(SHAPE, 0.5), training=training,
    )  # fmt: skip
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[training.optimizer]
    own = {"momentum": training.momentum, "nesterov": training.nesterov} if training.optimizer == "sgd" else {}
    torch_optimiser = kind(network.parameters(), lr=training.lr, weight_decay=training.weight_decay, **own)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    images, labels = client(10).images.double(), client(10).labels
    assert len(seen.order) == training.steps
    for rows in seen.order:
        torch_optimiser.zero_grad()
        F.cross_entropy(network(images[rows[0]]), labels[rows[0]]).backward()
        torch_optimiser.step()
    for name, value in network.named_parameters():
        torch.testing.assert_close(seen.gradient[name][0], before[name] - value.detach(), rtol=1e-12, atol=1e-12)


def test_an_epoch_takes_every_image_once_and_batches_are_of_their_size() -> None:
    training = Local(images=10, local_batch=4, local_epochs=2)
    rows = list(training.rows(torch.Generator().manual_seed(0)))
    assert [len(one) for one in rows] == [4, 4, 2, 4, 4, 2]
    assert sorted(torch.cat(rows[:3]).tolist()) == sorted(torch.cat(rows[3:]).tolist()) == list(range(10))
    assert rows[0].tolist() != rows[3].tolist()
    assert [len(one) for one in replace(training, local_epochs=1, local_steps=2).rows(torch.Generator())] == [4, 4]


def test_the_gradient_of_a_batch_is_the_mean_of_those_of_its_images() -> None:
    whole = see("local(batch=3)", ThreatModel())
    each = [
        observe(models.parse("mlp(hidden=16)"), defenses.parse("none"), ThreatModel(), [Client(image, label, "w", "c")],
                CLASSES, torch.full(SHAPE, 0.5))
        for image, label in zip(client(3).images, client(3).labels.tolist())
    ]  # fmt: skip
    for name, value in whole.gradient.items():
        expected = torch.stack([one.gradient[name][0] for one in each]).mean(0)
        torch.testing.assert_close(value[0], expected, rtol=1e-4, atol=1e-7)


def test_every_batch_size_has_the_same_images_and_keeps_the_id_of_one_image() -> None:
    axes = {"attacks": ["ig"], "defenses": ["none"], "models": ["lenet"], "datasets": ["samples"], "floors": False}
    plain = Matrix(**axes, images=8)
    several = Matrix(**axes, images=8, batch=[1, 2, 4])
    trials = several.trials()
    for count in (1, 2, 4):
        own = [trial for trial in trials if trial.cell.client.count == count]
        assert list(itertools.chain.from_iterable(trial.indices for trial in own)) == list(range(8))
        assert [trial.image for trial in own] == list(range(0, 8, count))
    assert [trial.id for trial in trials if trial.cell.client == Local()] == [trial.id for trial in plain.trials()]
    assert "clients" not in plain.describe()
    assert several.describe()["clients"] == ["local", "local(batch=2)", "local(batch=4)"]
    assert Matrix(**several.describe()).trials() == trials
    one = trials[-1].cell
    assert split_label(one.labels["dataset"]) == ("samples", "local(batch=4)")
    assert one.specs["dataset"] == "samples"
    assert one.threat_words.startswith("An honest-but-curious server sees the shared gradient of 4 images")
    changed = Cell(one.dataset, one.model, one.defense, one.attack, one.threat)
    assert "client" not in changed.settings
    assert changed.key != one.key


def test_labels_that_are_distinct_or_the_same_choose_disjoint_images() -> None:
    labels = dict(enumerate([0, 0, 1, 1, 2, 2, 0, 1]))
    assert Local(batch=3, labels="distinct").members(range(8), labels) == [(0, 2, 4), (1, 3, 5)]
    assert Local(batch=3, labels="same").members(range(8), labels) == [(0, 1, 6), (2, 3, 7)]
    with pytest.raises(BadOption, match=r"no 4 images of distinct labels"):
        Local(batch=4, labels="distinct").members(range(8), labels)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"batch": 3}, r"images=8 do not fill batches of 3; give a multiple of 3"),
        ({"batch": [16]}, r"images=8 do not fill batches of 16"),
        ({"batch": ["x"]}, r"batch='x' is not a number of images"),
        ({"batch": []}, r"batch is empty"),
        ({"batch": 2, "clients": ["local"]}, r"both clients and batch are given"),
        ({"clients": ["local(batch=2, images=4)"]}, r"both say how many images"),
        ({"clients": ["local(images=4, local_batch=8)"]}, r"local_batch=8 is more than its 4 images"),
        ({"clients": ["local(local_steps=2, local_epochs=2)"]}, r"both say how many steps"),
        ({"clients": ["local(momentum=0.9)"]}, r"shares=gradient; add shares=weights"),
        ({"clients": ["local(nesterov=true)"]}, r"nesterov=true .* needs momentum"),
        ({"clients": ["local(optimizer=adam, momentum=0.9)"]}, r"momentum=0.9 is of sgd"),
        ({"clients": ["local(lr=0.1)"]}, r"lr is for clients that share weights"),
        ({"clients": ["local(batch=2)"], "threats": ["shares=weights, local_steps=3"]}, r"local_steps=3 in the client"),
        ({"clients": ["local(lr=0.1)"], "threats": ["shares=weights, learning_rate=0.2"]}, r"leave learning_rate out"),
        ({"batch": 0}, r"batch=0 is not a number of images"),
        ({"batch": 1.5}, r"batch=1.5 is not a number of images"),
        ({"batch": 2, "images": [0, 3, 0, 1]}, r"images names 0 twice; name each image once"),
        ({"clients": ["local(local_epochs=0)"]}, r"local_epochs='0' is not valid"),
        ({"clients": ["local(images=0)"]}, r"images='0' is not valid"),
        ({"clients": ["local(momentum=-0.5)"]}, r"momentum='-0.5' is not valid"),
        ({"clients": ["local(lr=nan)"]}, r"lr='nan' is not valid"),
        (
            {"clients": ["local(batch=2)"], "threats": ["labels=counts, count=hidden"]},
            r"labels=counts shows and count=hi",
        ),
        (
            {"clients": ["local(batch=2)"], "threats": ["shares=weights, count=hidden"]},
            r"recipe=known shows and count=hidden hides; add recipe=hidden",
        ),
        (
            {"clients": ["local(images=4, local_batch=2)"], "threats": ["shares=weights, count=hidden, order=known"]},
            r"recipe=known shows and count=hidden hides; add recipe=hidden",
        ),
        (
            {"clients": ["local(images=4, local_batch=2)"], "threats": ["shares=weights, recipe=hidden, order=known"]},
            r"order=known shows how it trains, which recipe=hidden hides",
        ),
        ({"clients": ["lokal"]}, r"unknown client 'lokal'; did you mean 'local'"),
    ],
)
def test_a_client_that_cannot_be_is_refused_in_one_line(axes: dict[str, object], words: str) -> None:
    usual = {"attacks": ["ig"], "defenses": ["none"], "models": ["lenet"], "datasets": ["samples"]}
    with pytest.raises(LeakbenchError, match=words) as error:
        Matrix(**usual, **axes).trials()
    assert "\n" not in str(error.value)
    assert str(error.value).count("client 'local':") <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--batch", "3", "--images", "8"), "images=8 do not fill batches of 3; give a multiple of 3, such as 6"),
        (("--batch", "16", "--images", "8"), "images=8 do not fill batches of 16"),
        (("--batch", "100", "--images", "100"), "image index 99 is out of range for dataset 'samples(size=12)' (64"),
        (("--batch", "2", "--images", "0,0"), "images names 0 twice"),
        (("--batch", "0"), "batch='0' is not a number of images"),
        (("--clients", "local(images=4, local_batch=8)"), "local_batch=8 is more than its 4 images"),
        (("--clients", "local(local_epochs=0)"), "local_epochs='0' is not valid"),
        (("--clients", "local(images=4, local_batch=2)", "--images", "4"), "add shares=weights to the threat model"),
        (("--batch", "2", "--images", "4", "--threat", "labels=known, count=hidden"), "count=hidden hides"),
        (
            ("--batch", "9", "--images", "9", "--attack", "disaggregate", "--model", "mlp(hidden=16)"),
            "at most 8 images in the change of layer 1, which has 16 units and takes 432 values, and a client has 9",
        ),
        (("--batch", "2", "--images", "4", "--attack", "analytic"), "serves clients of one image, and these have"),
    ],
)
def test_a_command_with_a_client_that_cannot_be_writes_nothing(
    cli,  # noqa: F811
    place: Path,  # noqa: F811
    options: tuple[str, ...],
    words: str,
) -> None:
    usual = {"--attack": "ig(steps=1)", "--model": "lenet"}
    axes = [word for name, value in usual.items() if name not in options for word in (name, value)]
    refused(
        cli("run", "matrix", *axes, "--defense", "none", "--dataset", "samples(size=12)", "--out", "out", *options),
        words,
    )
    assert not (place / "out").exists()


def test_the_attacker_sees_of_a_batch_what_the_threat_model_grants() -> None:
    spec = "local(images=6, local_batch=3, lr=0.07, momentum=0.9, weight_decay=5e-4)"
    hidden = see(spec, replace(WEIGHTS, rate="hidden"))
    assert (hidden.count, hidden.labels, hidden.counts, hidden.order) == (6, None, None, ())
    assert hidden.threat.learning_rate is None
    assert hidden.client == Local(images=6, local_batch=3, momentum=0.9, weight_decay=5e-4)
    assert hidden.threat.local_steps == 2
    nothing = see(spec, replace(WEIGHTS, rate="known", recipe="hidden", count="hidden"))
    assert (nothing.count, nothing.client, nothing.threat.learning_rate, nothing.threat.local_steps) == (
        0,
        None,
        None,
        1,
    )
    assert "0.07" not in repr(nothing.threat)
    unnumbered = see("local(batch=3)", ThreatModel(count="hidden"))
    assert (unnumbered.count, unnumbered.client, unnumbered.labels) == (0, None, None)
    counts = see(spec, replace(WEIGHTS, labels="counts"))
    assert counts.labels is None
    assert counts.counts is not None
    assert counts.counts.tolist() == [[1] * 6] * 2
    granted = see(spec, replace(WEIGHTS, labels="known", order="known"))
    assert granted.threat.learning_rate == 0.07
    assert granted.labels is not None
    assert granted.labels.shape == (2, 6)
    assert [tuple(rows.shape) for rows in granted.order] == [(2, 3), (2, 3)]
    assert granted.order[0][0].tolist() != granted.order[0][1].tolist()


def test_the_unit_of_an_update_is_that_of_its_optimiser_and_decay_is_taken_out() -> None:
    spec = "local(images=4, local_steps=3, lr=1e-6, momentum=0.9, weight_decay=0.5)"
    seen = see(spec)
    one = see("local(images=4, lr=1e-6)")
    assert seen.sent_unit == pytest.approx(1e-6 * (1 + 1.9 + 2.71))
    assert seen.rate_unit == pytest.approx(1 + 1.9 + 2.71)
    assert one.sent_unit == pytest.approx(1e-6)
    assert see("local(images=4, optimizer=adam, lr=0.01)").sent_unit is None


def test_an_attack_and_a_defense_that_know_no_batches_say_so() -> None:
    attack = next(attacks.parse(name) for name in ("grnn", "analytic") if not attacks.get(name).batches)
    with pytest.raises(Unsupported, match=r"serves clients of one image, and these have several; use batch=1"):
        attack.preflight(see("local(batch=2)", ThreatModel()))
    with pytest.raises(Unsupported, match=r"defense 'mixup' serves clients of one image"):
        see("local(batch=2)", ThreatModel(), defense="mixup")


SUMMED = {"secagg"}  # of several clients: see ``test_malicious``


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(one, marks=pytest.mark.long if one == "dcs" else ())  # it optimises its images
        for one in defenses.names()
        if defenses.get(one).batched and one not in SUMMED
    ],
)
def test_a_defense_of_batches_sends_a_gradient_of_every_parameter(spec: str) -> None:
    threat = WEIGHTS if "weight" in spec else ThreatModel()
    model = "lenet" if spec != "norm-only" else "lenet-bn"
    seen = see("local(batch=3)", threat, defense=spec, model=model)
    assert all(bool(torch.isfinite(value).all()) for value in seen.gradient.values())
    if spec == "precode" and threat.shares == "gradient":
        update = see("local(images=3, local_batch=2)", WEIGHTS, defense=spec, model=model)
        assert update.gradient.keys() == seen.gradient.keys()
