"""Trials of several images: the engine over trials x images, and the attacks that serve them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
import torch
from conftest import SALT, rand
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from leakbench import attacks, clients, defenses, models
from leakbench.analysis.integrity import check
from leakbench.attacks.base import Attack, prepare
from leakbench.attacks.batch_labels import batch_labels, inferred_counts
from leakbench.attacks.disaggregation import disaggregate, most_inputs
from leakbench.attacks.lb import rank_one_labels
from leakbench.attacks.matching import GradientMatching, analytic_labels, double
from leakbench.attacks.matching.sets import TakenImages, merged, set_distance
from leakbench.attacks.peel import read_labels
from leakbench.audit.layers import last_in_use
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction, ThreatModel
from leakbench.engine.run import RunOptions, run
from leakbench.errors import BadOption, Unsupported
from leakbench.gradients import Evaluator, choose_path
from leakbench.gradients.low_rank import LowRank
from leakbench.metrics.aligned import AlignedPSNR
from leakbench.metrics.members import matched
from leakbench.metrics.standard import PSNR
from leakbench.models.module import OwnModule
from leakbench.observation import Observation
from leakbench.plan.matrix import Matrix
from leakbench.report import batches, grids
from leakbench.report.files import write
from leakbench.report.html import OF_CLIENT
from leakbench.report.run import RunData
from leakbench.report.show import show
from leakbench.store.run_file import FILE, Store
from leakbench.victim import Client, observe

SHAPE = (1, 8, 8)
CLASSES = 6


def batch(count: int, seed: int = 0, key: str = "c", classes: int = CLASSES) -> Client:
    images = [(rand(*SHAPE, seed=100 * seed + place), (place * place) % classes) for place in range(count)]
    return Client(*images[0], "w", key, (), tuple(images[1:]))


def see(
    count: int,
    threat: ThreatModel = ThreatModel(),  # noqa: B008
    *,
    model: str = "mlp(hidden=16)",
    defense: str = "none",
    client: str = "",
    trials: int = 2,
) -> Observation:
    training = clients.parse(client or f"local(batch={count})")
    who = [batch(training.count, row, f"c{row}") for row in range(trials)]
    return observe(
        models.parse(model), defenses.parse(defense), threat, who, CLASSES, torch.full(SHAPE, 0.5), training=training
    )


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize(
    ("spec", "train"),
    [("lenet", False), ("lenet-bn", True), ("resnet20", True), ("resnet20", False), ("mlp(hidden=8)", False),
     pytest.param("convnet", True, marks=pytest.mark.long)],
)  # fmt: skip
def test_trials_of_several_images_are_computed_as_in_a_loop(spec: str, train: bool, own: bool) -> None:
    torch.manual_seed(0)
    trials, count = 2, 3
    shape = (3, 32, 32) if "lenet" in spec or "mlp" in spec else (3, 16, 16)
    network = models.parse(spec).build(shape, CLASSES).train(train).double()
    names = tuple(name for name, _ in network.named_parameters())
    rows = {name: torch.stack([value.detach() * (1 - 0.02 * row * own) for row in range(trials)])
            for name, value in network.named_parameters()}  # fmt: skip
    if not own:
        rows = {name: value[:1].expand(trials, *value.shape[1:]) for name, value in rows.items()}
    buffers = dict(network.named_buffers())
    x = torch.rand(trials, count, *shape, dtype=torch.float64, requires_grad=True)
    y = torch.randint(CLASSES, (trials, count))
    evaluator = Evaluator(network, names)
    found = evaluator.gradient({**rows, **buffers}, x, y)
    along = {name: torch.randn_like(value[0]) for name, value in found.items()}
    (by_image,) = torch.autograd.grad(sum((found[name] * along[name]).sum() for name in names), x)
    for row in range(trials):
        mine = {name: value[row].detach().clone().requires_grad_() for name, value in rows.items()}
        images = x[row].detach().clone().requires_grad_()
        loss = F.cross_entropy(functional_call(network, {**mine, **buffers}, (images,)), y[row])
        expected = torch.autograd.grad(loss, list(mine.values()), create_graph=True)
        total = sum((value * along[name]).sum() for name, value in zip(names, expected))
        assert isinstance(total, Tensor)
        (second,) = torch.autograd.grad(total, images)
        assert float((by_image[row] - second).norm() / second.norm()) < 1e-10
        for name, value in zip(names, expected):
            size = float(value.detach().norm())
            assert float((found[name][row] - value).detach().norm()) <= 1e-10 * size + 1e-12


@pytest.mark.parametrize("path", ["lanes", "batched", "vmap", "one-at-a-time"])
@pytest.mark.parametrize(("spec", "train"), [("lenet", False), ("mlp(hidden=8)", False), ("resnet20", False),
                                             ("lenet-bn", True)])  # fmt: skip
def test_every_path_computes_trials_of_several_images_as_a_loop(spec: str, train: bool, path: str) -> None:
    """First and second derivatives of clients of three images."""
    torch.manual_seed(1)
    trials, count, shape = 2, 3, (3, 32, 32) if "lenet" in spec else (3, 16, 16)
    network = models.parse(spec).build(shape, CLASSES).train(train).double()
    names = tuple(name for name, _ in network.named_parameters())
    rows = {name: value.detach().expand(trials, *value.shape) for name, value in network.named_parameters()}
    x = torch.rand(trials, count, *shape, dtype=torch.float64, requires_grad=True)
    y = torch.randint(CLASSES, (trials, count))
    tensors = {**rows, **dict(network.named_buffers())}
    evaluator = Evaluator(network, names, path=path)  # type: ignore[arg-type]
    if (path, train) == ("lanes", True):
        with pytest.raises(Unsupported, match="if no statistics are taken of them"):
            evaluator.gradient(tensors, x, y)
        return
    found = evaluator.gradient(tensors, x, y)
    (by_image,) = torch.autograd.grad(sum(value.square().sum() for value in found.values()), x)
    for row in range(trials):
        images = x[row].detach().clone().requires_grad_()
        loss = F.cross_entropy(network(images), y[row])
        expected = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
        (second,) = torch.autograd.grad(sum(value.square().sum() for value in expected), images)
        assert float((by_image[row] - second).norm() / second.norm()) < 1e-10
        for name, value in zip(names, expected):
            size = float(value.detach().norm())
            assert float((found[name][row] - value).detach().norm()) <= 1e-10 * size + 1e-12


@dataclass(frozen=True)
class Answer(Attack):
    """An attack of a plugin that returns images of a shape."""

    shape: tuple[int, ...] = ()

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        return Reconstruction(torch.full((observation.trials, *self.shape, *SHAPE), 0.5))


@dataclass(frozen=True)
class Several(Answer):
    """The same for batches."""

    batches: ClassVar[bool] = True


def test_an_attack_that_says_nothing_of_batches_serves_one_image() -> None:
    assert Answer()(see(1), Rng(("a", "b"))).images.shape == (2, *SHAPE)
    with pytest.raises(Unsupported, match=r"Answer serves clients of one image, and these have several; use batch=1"):
        Answer((3,))(see(3), Rng(("a", "b")))


def test_a_defense_that_says_nothing_of_batches_serves_one_image() -> None:
    class Plain(defenses.Defense):
        pass

    assert not Plain.batched
    with pytest.raises(Unsupported, match="one image"):
        observe(
            models.parse("mlp(hidden=16)"), Plain(), ThreatModel(), [batch(3)], CLASSES, torch.full(SHAPE, 0.5),
            training=clients.parse("local(batch=3)"),
        )  # fmt: skip


@pytest.mark.parametrize(("returned", "words"), [((4,), r"return \(2, 3, 1, 8, 8\)"), ((), r"return \(2, 3, 1, 8, 8\)"),
                                                 ((0,), r"return \(2, 3, 1, 8, 8\)")])  # fmt: skip
def test_more_images_than_a_batch_has_are_no_answer(returned: tuple[int, ...], words: str) -> None:
    """Of more images, the truth would select the best; fewer are an answer."""
    with pytest.raises(BadOption, match=words):
        Several(returned)(see(3), Rng(("a", "b")))
    assert Several((2,))(see(3), Rng(("a", "b"))).images.shape == (2, 2, *SHAPE)


@pytest.mark.parametrize("spec", ["none", "keylock", "precode", "norm-only"])
def test_every_path_serves_batches_behind_a_defense(spec: str) -> None:
    seen = see(3, model="lenet" if spec != "norm-only" else "lenet-bn", defense=spec)
    attack = attacks.parse("ig(steps=2)")
    found = attack(seen, Rng(("a", "b")))
    assert found.images.shape == (2, 3, *SHAPE)
    assert found.labels is not None
    assert found.labels.shape == (2, 3)
    assert found.failed is not None
    assert found.path in ("lanes", "batched", "vmap")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("spec", ["ig(steps=3)", "lb(steps=4)", "log-cosine(steps=6)", "dlg(steps=2)", "idlg(steps=2)"])
def test_an_attack_of_batches_returns_the_same_as_one_trial_at_a_time(spec: str) -> None:
    """In float64: L-BFGS enlarges the rounding of float32, so that whether it passed depended on the processor."""
    seen, attack = see(3), attacks.parse(spec)
    both = attack(seen, Rng(("a", "b")))
    one = attack(see(3, trials=1), Rng(("a",)))
    torch.testing.assert_close(both.images[:1], one.images, rtol=1e-8, atol=1e-8)
    assert both.labels is not None
    assert both.labels.shape == (2, 3)


@pytest.mark.parametrize("spec", ["dlm(steps=2)", "dlm+(steps=2)"])
def test_the_attacks_on_updates_of_unknown_rate_serve_batches(spec: str) -> None:
    seen = see(3, ThreatModel(shares="weights"), client="local(images=4, local_batch=2, local_epochs=2, momentum=0.9)")
    found = attacks.parse(spec)(seen, Rng(("a", "b")))
    assert found.images.shape == (2, 4, *SHAPE)


@pytest.mark.parametrize("count", [2, 5])
def test_the_label_counts_of_an_untrained_network_are_exact(count: int) -> None:
    truth = F.one_hot(batch(count).labels, CLASSES).sum(0)
    seen = see(count, model="mlp(hidden=32, init=default)", trials=1)
    assert torch.equal(inferred_counts(seen)[0], truth)
    assert batch_labels(seen)[0].tolist() == sorted(batch(count).labels.tolist())
    granted = see(count, ThreatModel(labels="counts"), trials=1)
    assert batch_labels(granted)[0].tolist() == sorted(batch(count).labels.tolist())


def test_the_floors_of_a_batch_are_images_of_every_member() -> None:
    seen = see(3)
    for name in ("random", "grey", "mean"):
        assert attacks.parse(name)(seen, Rng(("a", "b"))).images.shape == (2, 3, *SHAPE)


class Beside(nn.Module):
    """A classifier, and behind it a head of as many outputs that no logit depends on."""

    def __init__(self, runs: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.runs = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 16), nn.ReLU()), runs
        self.head, self.auxiliary = nn.Linear(16, CLASSES), nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> object:
        """Return the logits, or these and those of the other head."""
        features = self.body(images)
        return {"logits": self.head(features), "aux": self.auxiliary(features)} if self.runs else self.head(features)


@pytest.mark.parametrize("defense", ["none", "noise(scale=1e-6)"])
@pytest.mark.parametrize("runs", [False, True])
def test_counts_follow_from_the_classifier_and_not_from_a_head_beside_it(runs: bool, defense: str) -> None:
    own, training, mean = OwnModule("beside", Beside(runs)), clients.parse("local(batch=4)"), torch.full(SHAPE, 0.5)
    who = [batch(4)]
    seen = observe(own, defenses.parse(defense), ThreatModel(), who, CLASSES, mean, training=training)
    assert torch.equal(inferred_counts(seen)[0], F.one_hot(who[0].labels, CLASSES).sum(0))
    assert last_in_use(seen.model, seen) == ("head" if defense == "none" else "auxiliary")


@pytest.mark.parametrize("runs", [False, True])
def test_the_label_of_one_image_is_not_read_from_a_head_beside_the_classifier(runs: bool) -> None:
    """Behind noise, a head that is not in use has a gradient, too."""
    own, mean = OwnModule("beside", Beside(runs)), torch.full(SHAPE, 0.5)
    who = [Client(rand(*SHAPE, seed=place), place % CLASSES, "w", f"c{place}", ()) for place in range(6)]
    seen = observe(own, defenses.parse("noise(scale=1e-6)"), ThreatModel(), who, CLASSES, mean)
    for labels in (analytic_labels(seen), rank_one_labels(seen), read_labels(seen)):
        assert labels is not None
        assert labels.tolist() == [each.label for each in who]


def test_the_path_of_a_network_with_a_normalisation_over_the_batch_is_the_fast_one() -> None:
    seen = see(3, model="lenet-bn")
    evaluator = Evaluator(seen.model, tuple(seen.gradient))
    assert choose_path(evaluator, seen.weights, SHAPE, CLASSES, 3) == "batched"


@pytest.fixture(scope="module")
def batch_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of clients of one, two and four images, on the photographs that ship with leakbench."""
    folder: Path = tmp_path_factory.mktemp("batches") / "run"
    matrix = Matrix(
        attacks=["disaggregate", "idlg(steps=1)"],
        defenses=["none"],
        models=["mlp(hidden=256-64, init=default)"],
        datasets=["samples(size=16)"],
        batch=[1, 2, 4],
        images=4,
    )
    run(matrix, folder, RunOptions(chunk=4, salt=SALT))
    return folder


def test_a_run_of_batches_has_a_score_for_every_image_and_the_whole(batch_run: Path) -> None:
    with Store.open(batch_run / FILE, readonly=True) as store:
        results = store.results()
        members = store.members(results["trial"])
        granted = {dataset: words for (_, dataset), words in store.threats().items()}
        grants = RunData.of(store, "run").grants["paper"]
        pictures = store.images(f"{trial}/1" for trial in members)
    assert set(results["dataset"]) == {"samples(size=16)", *(f"samples(size=16) with local(batch={n})" for n in (2, 4))}
    for dataset, images in (
        ("", "one image"),
        (" with local(batch=2)", "2 images"),
        (" with local(batch=4)", "4 images"),
    ):
        words = granted[f"samples(size=16){dataset}"]
        assert f"shared gradient of {images}, the public weights" in words
        assert words.count("shared gradient") == 1
        assert grants[words] == (dataset.removeprefix(" with ") or "clients of one image")
    counts = results.groupby("dataset")["image"].unique().map(len).to_dict()
    assert sorted(counts.values()) == [1, 2, 4]
    for row in results.to_dict("records"):
        own = members.get(str(row["trial"]), [])
        if "with" not in str(row["dataset"]):
            assert not own
            continue
        assert [one.image for one in own] == list(range(int(row["image"]), int(row["image"]) + len(own)))
        psnr = [one.scores["psnr_aligned"] for one in own]
        assert row["psnr_aligned"] == pytest.approx(sum(psnr) / len(psnr))
        assert (row["psnr_aligned_worst"], row["psnr_aligned_best"]) == (min(psnr), max(psnr))
    exact = results[(results["attack"] == "disaggregate") & results["dataset"].str.contains("batch=")]
    assert len(exact) == 3
    assert (exact["psnr_aligned_worst"] >= 60).all()
    assert (exact["identified"] == 1).all()
    assert len(pictures) == len(members)
    others = results[results["attack"] == "others"]
    assert set(others["dataset"]) == set(results["dataset"]) - {"samples(size=16)"}
    assert others["recovered_share"].max() < 1
    found = check(batch_run)
    assert found.code == 0
    about_images = ("recovered_share", "identified", "psnr_aligned_worst", "ssim_aligned_best")
    assert not [line for line in found.remarks if any(name in line for name in about_images)]  # of one image: none


def test_the_report_of_batches_shows_every_image_and_the_share_against_their_number(batch_run: Path) -> None:
    written = {path.relative_to(batch_run).as_posix() for path in write(batch_run, ["csv", "md"])}
    assert "batches.md" in written
    assert any(name.startswith("grids/batches-") for name in written)
    rows = [row.split("|") for row in (batch_run / "batches.md").read_text().splitlines() if row.startswith("| ")]
    head = [cell.strip() for cell in rows[0]]
    single = {row[3].strip(): row[head.index("recovered_share")].strip() for row in rows if row[1].strip() == "1"}
    assert single["disaggregate"].startswith("1.00")  # a share of one image is 0 or 1
    assert single["grey"].startswith("0.00")
    with Store.open(batch_run / FILE, readonly=True) as store:
        results = store.results()
        pages = grids.pages(grids.of_members(results, store.members(results["trial"])))
    page = next(page for page in pages if "batch=2" in page.block[0])
    assert page.images == (0, 1, 2, 3)
    assert page.firsts == {0: 2, 2: 2}
    assert all(len(column.cells) == 4 for column in page.columns)


def test_the_trial_of_a_batch_is_shown_and_made_again_by_its_command(batch_run: Path) -> None:
    with Store.open(batch_run / FILE, readonly=True) as store:
        results = store.results()
        row = results[results["dataset"].str.endswith("local(batch=4)") & (results["attack"] == "disaggregate")].iloc[0]
        shown = show(store, str(row["trial"]))
    assert "--clients 'local(batch=4)'" in shown.command
    assert "--images 0,1,2,3, " in shown.command
    assert dict(shown.facts)["image"] == "index 0, whose label is 0; with images 1, 2 and 3; seed 0"
    assert "prints the command" not in shown.note
    write(batch_run, ["html"])
    assert OF_CLIENT in (batch_run / "report.html").read_text()
    axes = {"attacks": ["disaggregate"], "defenses": ["none"], "models": ["mlp(hidden=256-64, init=default)"]}
    again = Matrix(**axes, datasets=["samples(size=16)"], clients=["local(batch=4)"], images=[0, 1, 2, 3], floors=False)
    assert [trial.id for trial in again.trials()] == [row["trial"]]


def test_the_image_of_an_update_with_momentum_and_decay_follows_from_it_alone() -> None:
    training = "local(local_steps=3, lr=0.1, momentum=0.9, weight_decay=5e-4)"
    for threat in (ThreatModel(shares="weights"), ThreatModel(shares="weights", recipe="hidden")):
        seen = see(1, threat, client=training, model="mlp(hidden=64)", trials=1)
        found = attacks.parse("disaggregate")(seen, Rng(("a",)))
        assert found.failed is not None
        assert not bool(found.failed[0]), found.reasons
        assert float(AlignedPSNR()(found.images, batch(1, 0).images).min()) >= 60
    adam = see(4, ThreatModel(shares="weights"), client="local(images=4, optimizer=adam)", model="mlp(hidden=64)")
    with pytest.raises(Unsupported, match="adam divides each entry by a number of its own"):
        attacks.parse("disaggregate")(adam, Rng(("a", "b")))


def test_unrolled_steps_with_momentum_and_decay_give_the_update_of_the_true_images() -> None:
    training = "local(images=4, local_batch=2, local_epochs=2, lr=0.1, momentum=0.9, weight_decay=0.01)"
    threat = ThreatModel(shares="weights", rate="known", labels="known", order="known")
    seen = double(see(4, threat, client=training))
    attack = attacks.parse("ig(local=unrolled)")
    assert isinstance(attack, GradientMatching)
    _, known = prepare(attack, seen)
    objective = attack._objective(known, Rng(("a", "b"))).with_path()
    images = torch.stack([batch(4, row).images for row in range(2)]).double()
    assert known.labels is not None
    found = objective.dummy(images, known.labels, {"image": images}, 0)
    for name, value in known.gradient.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


ADAM = "local(images=4, local_batch=2, local_epochs=2, lr=0.01, optimizer={}, weight_decay=0.01)"


@pytest.mark.parametrize(("kind", "granted"), [("adam", "known"), ("adamw", "known"), ("adam", "hidden")])
def test_unrolled_steps_of_adam_give_the_update_of_the_true_images(kind: str, granted: str) -> None:
    """With the order granted, of all weights; without it, of other images."""
    threat = ThreatModel(shares="weights", rate="known", labels="known", order=granted)  # type: ignore[arg-type]
    seen = double(see(4, threat, client=ADAM.format(kind), model="mlp(hidden=16, activation=sigmoid)"))
    attack = attacks.parse("ig(local=unrolled)")
    assert isinstance(attack, GradientMatching)
    _, known = prepare(attack, seen)
    objective = attack._objective(known, Rng(("a", "b"))).with_path()
    images = torch.stack([batch(4, row).images for row in range(2)]).double().requires_grad_()
    assert known.labels is not None
    found = objective.dummy(images, known.labels, {"image": images}, 0)
    apart = torch.stack(
        [(found[name].detach() - value).norm() / value.norm() for name, value in known.gradient.items()]
    )
    assert (float(apart.max()) < 0.02) == (granted == "known")
    (slope,) = torch.autograd.grad(sum(value.square().sum() for value in found.values()), images)
    assert bool((slope.flatten(2).abs().sum(2) > 0).all())  # signs alone would have none


def test_a_set_of_images_for_each_epoch_needs_no_order() -> None:
    """Sets of the same images, each in an order of its own, are no distance from each other, and their mean is one."""
    training = "local(images=4, local_batch=2, local_epochs=3, lr=0.1, momentum=0.9)"
    threat = ThreatModel(shares="weights", rate="known", labels="known")
    seen = double(see(4, threat, client=training))
    attack = attacks.parse("ig(local=separate)")
    assert isinstance(attack, GradientMatching)
    _, known = prepare(attack, seen)
    objective = attack._objective(known, Rng(("a", "b"))).with_path()
    assert objective.epochs == 3
    order = TakenImages.of(
        tuple(see(4, ThreatModel(shares="weights", order="known"), client=training).order), 4
    )  # what the clients did
    images = torch.stack([batch(4, row).images for row in range(2)])
    sets = torch.zeros(2, 3, 4, *SHAPE).double()
    for own, guess, epoch in zip(order.steps, objective.taken.steps, objective.taken.earlier):
        for row in range(2):
            sets[row, epoch[row], guess[row]] = images[row, own[row]].double()
    assert float(set_distance(sets, objective._filters).max()) < 1e-12
    other = sets.clone()
    other[:, 1, 0] = 0.5
    assert float(set_distance(other, objective._filters).min()) > 1e-4
    seen_all = objective.taken.seen(4)
    assert bool(seen_all.all())
    mean = merged(sets, torch.zeros(2, 4).long(), seen_all, True)  # as if all labels were one: any may be matched
    torch.testing.assert_close(mean, sets[:, 0])
    apart = merged(sets + torch.tensor([0.0, 0.3, -0.3]).view(3, 1, 1, 1, 1), torch.zeros(2, 4).long(), seen_all, True)
    assert float((apart - sets[:, 0]).abs().mean()) < 0.05


def test_a_set_of_images_for_each_epoch_gives_the_update_of_one_label() -> None:
    training = "local(images=4, local_batch=2, local_epochs=3, lr=0.1, momentum=0.9)"
    client = Client(rand(*SHAPE, seed=0), 1, "w", "c", (), tuple((rand(*SHAPE, seed=k), 1) for k in (1, 2, 3)))
    threat = ThreatModel(shares="weights", rate="known", labels="known", order="known")
    seen = observe(
        models.parse("mlp(hidden=16)"), defenses.parse("none"), threat, [client], CLASSES, torch.full(SHAPE, 0.5),
        training=clients.parse(training),
    )  # fmt: skip
    attack = attacks.parse("ig(steps=2, local=separate)")
    assert isinstance(attack, GradientMatching)
    _, granted = prepare(attack, double(seen))
    order = TakenImages.of(granted.order, 4)
    objective = attack._objective(replace(granted, order=()), Rng(("a",))).with_path()
    sets = torch.zeros(1, 3, 4, *SHAPE).double()
    for own, guess, epoch in zip(order.steps, objective.taken.steps, objective.taken.earlier):
        sets[0, epoch[0], guess[0]] = client.images[own[0]].double()
    assert granted.labels is not None
    found = objective.dummy(sets.flatten(1, 2), granted.labels, {}, 0)
    for name, value in granted.gradient.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    guess = attack(seen, Rng(("a",)))
    assert guess.images.shape == (1, 4, *SHAPE)
    with pytest.raises(Unsupported, match="use local=unrolled"):
        attack(replace(see(1, ThreatModel(shares="weights", rate="known"), client="local(local_steps=2)")), Rng("ab"))


def small(hidden: int) -> OwnModule:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, hidden)]
    return OwnModule("small", nn.Sequential(*layers, *([nn.ReLU(), nn.Linear(hidden, CLASSES)] * (hidden > CLASSES))))


@pytest.mark.parametrize("hidden", [CLASSES, pytest.param(64, marks=pytest.mark.long)])
def test_images_follow_from_the_inputs_of_the_first_linear_layer(hidden: int) -> None:
    """By the zeros of the ReLU in front of the classifier, and by those of the one behind a hidden layer."""
    who = [batch(3, row, f"c{row}") for row in range(1)]
    seen = observe(
        small(hidden), defenses.parse("none"), ThreatModel(), who, CLASSES, torch.full(SHAPE, 0.5),
        training=clients.parse("local(batch=3)"),
    )  # fmt: skip
    guess = attacks.parse("disaggregate")(seen, Rng(("a",)))
    assert guess.failed is not None
    assert not bool(guess.failed[0]), guess.reasons
    assert float(PSNR()(matched(guess.images[0].clamp(0, 1), who[0].images), who[0].images).min()) > 50


def test_what_disaggregate_cannot_separate_above_convolutions_is_said() -> None:
    attack = attacks.parse("disaggregate")
    with pytest.raises(Unsupported, match="no layer tells images apart"):
        attack(see(2, model="lenet"), Rng("ab"))
    with pytest.raises(Unsupported, match="needs the gradient of one step"):
        attack(see(2, ThreatModel(shares="weights"), model="lenet", client="local(batch=2, local_epochs=2)"), Rng("ab"))


@pytest.mark.parametrize(
    ("spec", "network", "most"),
    [
        ("disaggregate", "mlp(hidden=16)", 8),  # half of the units
        ("disaggregate", "mlp(hidden=12)", 4),  # but for the zeros that each column has
        ("disaggregate", "flat", CLASSES - 1),  # the errors at the logits of each image add up to zero
        ("disaggregate", "gated", 16),
        ("cocktail(steps=1)", "mlp(hidden=16)", 15),
    ],
)
def test_more_images_than_an_attack_can_return_are_refused_before_a_run(spec: str, network: str, most: int) -> None:
    model = {"flat": small(CLASSES), "gated": small(33)}.get(network)
    attack = attacks.parse(spec)

    def preflight(count: int, threat: ThreatModel = ThreatModel()) -> None:  # noqa: B008
        seen = observe(
            model or models.parse(network), defenses.parse("none"), threat, [batch(count, 1)], CLASSES,
            torch.full(SHAPE, 0.5), training=clients.parse(f"local(batch={count})"),
        )  # fmt: skip
        attack.preflight(seen)

    preflight(most)
    with pytest.raises(Unsupported, match=rf"at most {most} images .* a client has {most + 1}; give .* {most}, or use"):
        preflight(most + 1)
    if model is None:
        preflight(most + 1, ThreatModel(count="hidden"))
        several = f"local(images={most + 1}, local_batch=2, local_epochs=2)"
        with pytest.raises(Unsupported, match=f"a client has {most + 1}"):
            attack(see(most + 1, ThreatModel(shares="weights"), model=network, client=several), Rng("ab"))


@pytest.mark.parametrize("rows", [8, 12, 20])
def test_what_is_refused_by_the_size_of_a_layer_is_not_found_in_it(rows: int) -> None:
    """Of inputs of any size, with columns of which each has a zero where another one is on."""
    rng = torch.Generator().manual_seed(rows)
    count = most_inputs(rows, 64) + 1
    inputs = torch.randn(count, 64, generator=rng, dtype=torch.float64)
    weight = torch.randn(rows, 64, generator=rng, dtype=torch.float64)
    bias = torch.zeros(rows, dtype=torch.float64)
    errors = (inputs @ weight.T > 0).T * torch.randn(rows, count, generator=rng, dtype=torch.float64)
    rank = LowRank(count, count, 0.0, 1e-12)
    assert not disaggregate(errors @ inputs, errors.sum(1), rank, [(weight, bias)], rng).complete


def test_lines_of_one_batch_size_are_beside_their_tick() -> None:
    ends = {f"{batches.SHARE} low": 0.0, f"{batches.SHARE} high": 1.0}
    row = {"attack": "disaggregate", "defense": "none", "floor": False, "count": 32, batches.SHARE: 0.5} | ends
    rows = pd.DataFrame([row, row | {"attack": "others", "floor": True}])
    (panel,) = batches.figure(batches.BatchesPage(("cifar10", "mlp", "paper"), "one.png", rows)).axes
    left, right = panel.get_xlim()
    drawn = [float(container.lines[0].get_xdata()[0]) for container in panel.containers]
    assert len(drawn) == 2
    assert all(left < x < right and abs(x - math.log2(32)) < (right - left) / 10 for x in drawn)
