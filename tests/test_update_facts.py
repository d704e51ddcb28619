"""What a recorded update shows by itself: the optimiser's rule, images, steps, weight decay, what else was sent."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from test_audit import nets  # noqa: F401
from test_cli import cli, place  # noqa: F401
from torch import Tensor, nn

from leakbench import datasets
from leakbench.audit.given import AuditedNetwork, Update, read_update
from leakbench.audit.run import AuditOptions, _observation
from leakbench.audit.update_facts import UpdateFacts, update_facts, without_decay
from leakbench.core.types import PRESETS
from leakbench.gradients.linear import layer_input, unexplained
from leakbench.gradients.losses import training_loss
from leakbench.gradients.low_rank import low_rank, rounding_error
from leakbench.models.module import OwnModule
from leakbench.plan.matrix import Matrix

SHAPE = (3, 12, 12)


class Signed(torch.optim.Optimizer):
    """SignSGD: every value moves by the same step."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for one in group["params"]:
                one.sub_(group["lr"] * one.grad.sign())


SGD: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "plain": partial(torch.optim.SGD, lr=0.05),
    "decay": partial(torch.optim.SGD, lr=0.05, weight_decay=5e-3),
    "momentum": partial(torch.optim.SGD, lr=0.02, momentum=0.9, dampening=0.1, weight_decay=5e-4),
    "nesterov": partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4),
}
OTHERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "RMSprop": partial(torch.optim.RMSprop, lr=1e-3),
    "Adagrad": torch.optim.Adagrad,
    "signSGD": Signed,
}


def mlp(classes: int = 70) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(432, 64), nn.ReLU(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, classes)
    )


def convolutional(classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    norm = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU())
    return nn.Sequential(*norm, nn.Flatten(), nn.Linear(96, classes))


def train(network: nn.Module, make: Callable[..., torch.optim.Optimizer], images: int, batch: int, epochs: int) -> None:
    """Train a network on the first images, in batches in a random order."""
    x, labels = datasets.parse("samples(size=12)").load(range(images))
    classes = network[-1].out_features  # type: ignore[union-attr]
    optimiser = make(network.parameters())
    order = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for rows in torch.randperm(images, generator=order).split(batch):
            optimiser.zero_grad()
            nn.functional.cross_entropy(
                network(x[rows].to(next(network.parameters()))), labels[rows] % classes
            ).backward()
            optimiser.step()


def recorded(
    folder: Path, network: nn.Module, make: Callable[..., torch.optim.Optimizer], images: int, batch: int, epochs: int
) -> tuple[Update, UpdateFacts]:
    """Return the update of a network that is trained, and what it shows; before.pt and after.pt are its files."""
    own = copy.deepcopy(network)
    torch.save(own.state_dict(), folder / "before.pt")
    train(network, make, images, batch, epochs)
    torch.save(network.state_dict(), folder / "after.pt")
    return read(folder, own)


def read(folder: Path, own: nn.Module) -> tuple[Update, UpdateFacts]:
    update = read_update(AuditedNetwork("own", own), str(folder / "before.pt"), str(folder / "after.pt"))
    classes = own[-1].out_features  # type: ignore[union-attr]
    return update, update_facts(own, update, _observation(own, update, SHAPE, classes, PRESETS["weights"]))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an audit run one short attack."""
    whole = AuditOptions.matrix

    def matrix(self: AuditOptions, scale: str, given: dict[str, object], **flags: bool) -> Matrix:
        return whole(self, scale, {"attacks": ["analytic", "dlm+(steps=2)"], **given}, **flags)

    monkeypatch.setattr(AuditOptions, "matrix", matrix)


@pytest.mark.parametrize("option", SGD)
def test_sgd_of_any_kind_leaves_a_low_rank(option: str) -> None:
    """Once the right multiple of the weights is removed; in float64 the rest is rounding."""
    network = mlp().double()
    before = network[1].weight.detach().clone()
    empty = copy.deepcopy(network)  # its gradients are zero: what decay alone does
    train(network, SGD[option], 6, 2, 3)
    optimiser = SGD[option](empty.parameters())
    for _ in range(9):
        for parameter in empty.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
    true = 1 - float((empty[1].weight.detach() * before).sum() / before.square().sum())
    change = before - network[1].weight.detach()
    found = low_rank(change, before, rounding_error(before, change, 2.0**-52))
    assert (found.rank, found.low) == (6, True)
    assert found.decay == pytest.approx(true, rel=1e-8)
    sizes = torch.linalg.svdvals(change - found.decay * before)
    assert float(sizes[6] / sizes[0]) < 1e-12


@pytest.mark.parametrize("option", SGD)
def test_sgd_in_a_small_network_has_no_rule_of_one_size(tmp_path: Path, option: str) -> None:
    """A few hundred weights have large changes everywhere."""
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2))
    for network in (
        nn.Sequential(*stem, nn.Flatten(), nn.Linear(144, 3)),
        nn.Sequential(nn.Flatten(), nn.Linear(432, 10)),
    ):
        for images, batch, epochs in ((8, 8, 1), (16, 4, 2)):
            _, facts = recorded(tmp_path, copy.deepcopy(network), SGD[option], images, batch, epochs)
            assert facts.rule != "sign"


def test_adam_leaves_no_low_rank() -> None:
    network = mlp().double()
    before = network[1].weight.detach().clone()
    train(network, torch.optim.Adam, 6, 2, 3)
    change = before - network[1].weight.detach()
    found = low_rank(change, before, rounding_error(before, change, 2.0**-52))
    assert (found.low, found.decay) == (False, 0.0)


@pytest.mark.parametrize(("images", "batch", "epochs"), [(1, 1, 1), (1, 1, 3), (5, 5, 1), (12, 4, 2)])
def test_the_images_and_the_decay_of_an_update_follow_from_the_two_models(
    tmp_path: Path, images: int, batch: int, epochs: int
) -> None:
    _, facts = recorded(tmp_path, mlp(), SGD["momentum"], images, batch, epochs)
    assert (facts.rule, facts.images, facts.one_image) == ("sgd", images, images == 1)
    assert all(one.bias_decays is not False for one in facts.layers)
    assert facts.zero_sum
    assert facts.several_steps is {1: epochs > 1}.get(images)
    words = " ".join(facts.contradictions(1))
    assert (f"at least {images} different ones" in words, words == "") == (images > 1, images * epochs == 1)
    assert "shrank by" in dict(facts.facts())["weight decay"]


DECAYS: dict[str, tuple[float, float, float, float]] = {
    "all": (5e-3, 5e-3, 5e-3, 5e-3),
    "weights": (5e-3, 5e-3, 0.0, 0.0),
    "body": (5e-3, 0.0, 5e-3, 0.0),
    "head": (0.0, 5e-3, 0.0, 5e-3),
    "two": (5e-3, 2e-2, 5e-3, 2e-2),
    "head-weight": (0.0, 5e-3, 0.0, 0.0),
    "none": (0.0, 0.0, 0.0, 0.0),
}
"""Weight decay of the body's weights, the head's weight, the body's biases, the head's bias."""


def grouped(kind: str, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    *body, weight, bias = parameters
    parts = [one for one in body if one.dim() > 1], [weight], [one for one in body if one.dim() == 1], [bias]
    groups = [{"params": part, "weight_decay": decay} for part, decay in zip(parts, DECAYS[kind])]
    return torch.optim.SGD(groups, lr=0.02, momentum=0.5)


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize(("images", "batch", "epochs"), [(1, 1, 1), (8, 4, 3)])
def test_each_layer_has_its_own_decay(tmp_path: Path, kind: str, images: int, batch: int, epochs: int) -> None:
    """Parameter groups let heads, bodies and biases decay by themselves; one layer's decay is not another's."""
    network = mlp()
    for one in network.parameters():
        if one.dim() == 1:
            nn.init.normal_(one, std=0.1)
    start = copy.deepcopy(network)
    update, facts = recorded(tmp_path, network, partial(grouped, kind), images, batch, epochs)
    assert (facts.rule, facts.images) == ("sgd", images)
    assert all(one.fits for one in facts.layers if one.low)
    body, head, body_bias, head_bias = DECAYS[kind]
    steps = epochs * images // batch
    momenta = [sum(0.5**k for k in range(n + 1)) for n in range(steps)]
    words = dict(facts.facts())["weight decay"]
    for one in facts.layers:
        if not one.low:
            continue
        last = one.layer == "5"
        decay, bias = (head, head_bias) if last else (body, body_bias)
        # momentum carries what has decayed on; to first order in the decay
        assert one.decay == pytest.approx(0.02 * decay * sum(momenta), rel=0.01, abs=5 * one.decay_error)
        assert one.bias_decays is (bool(bias) if decay else None)
        (group,) = [group for group in facts.decays if one in group]
        assert (decay == 0) == (group[0].decay == 0)
    assert len(facts.decays) == (1 if body == head else 2)
    assert ("did not decay" in words) == (kind in ("weights", "head-weight"))
    assert ("layer 5 that exceeds" in words) == (kind == "body")
    left = without_decay(update, facts)
    assert (left is update) == (kind == "none")
    if images == 1:  # what is left is the gradient
        x, labels = datasets.parse("samples(size=12)").load([0])
        nn.functional.cross_entropy(start(x), labels % 70).backward()
        for name, value in start.named_parameters():
            assert value.grad is not None
            error = (left.change[name] - 0.02 * value.grad).norm() / (0.02 * value.grad.norm())
            assert float(error) < 2e-3


def test_a_head_alone_does_not_say_that_the_other_layers_do_not_decay(tmp_path: Path) -> None:
    """A convolution's change does not show its decay."""
    for kind, taken in (("body", ""), ("head", " and are taken to have the same"), ("none", "")):
        _, facts = recorded(tmp_path, convolutional(3), partial(grouped, kind), 6, 3, 2)
        words = dict(facts.facts())["weight decay"]
        assert words.endswith(f"; other layers do not show it{taken}")
        assert ("none in layer 7 that exceeds" in words) == (kind != "head")


def test_one_image_with_weight_decay_is_one_image(tmp_path: Path) -> None:
    """The decay by itself looked like further images: it leaves a part of the change unexplained."""
    plain, facts = recorded(tmp_path, mlp(), partial(torch.optim.SGD, lr=0.01, weight_decay=5e-3), 1, 1, 1)
    left = []
    for update in (plain, without_decay(plain, facts)):
        weight, bias = (update.change[f"1.{part}"][None].double() for part in ("weight", "bias"))
        left.append(float(unexplained(weight, bias, layer_input(weight, bias))))
    assert left[0] > 1e-3
    assert left[1] < 1e-4
    assert facts.contradictions(1) == ()


@pytest.mark.parametrize("network", [mlp, convolutional], ids=["linear", "convolutional"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("optimiser", OTHERS)
def test_one_image_under_another_rule_is_neither_exact_nor_one_image(
    tmp_path: Path, optimiser: str, steps: int, network: Callable[[], nn.Module]
) -> None:
    _, facts = recorded(tmp_path, network(), OTHERS[optimiser], 1, 1, steps)
    assert (facts.rule, facts.one_image, facts.images, facts.decays) == ("sign", None, None, ())


@pytest.mark.parametrize(
    ("optimiser", "steps"),
    [(each, 1) for each in OTHERS] + [pytest.param(each, 4, marks=pytest.mark.long) for each in OTHERS],
)
def test_the_page_of_one_image_under_another_rule_says_neither_exact_nor_one_image(
    cli,  # noqa: F811
    nets: Path,  # noqa: F811
    short: None,
    optimiser: str,
    steps: int,
) -> None:
    recorded(nets, mlp(), OTHERS[optimiser], 1, 1, steps)
    (nets / "nets.py").write_text("from test_update_facts import mlp\n")
    files = ("--before", "before.pt", "--after", "after.pt", "--size", "12", "--budget", "quick")
    command = ("audit", "--plugin", "nets.py", "--model", "mlp", "--out", "out", *files)
    done = cli(*command, "--fail-if", "recovered > 0.5")
    assert (done.code, "nearly one size" in done.out, "cannot be judged" in done.err) == (2, True, True)
    page = (nets / "out" / "audit.md").read_text()
    assert page.index("nearly one size") < page.index("The recorded update:")
    findings, assumptions = page.split("## What the server sees")  # which names what attackers assume: one image
    for claim in (
        "exact",
        "one image",
        "1 image",
        "single image",
        "in closed form from",
        "inferred from what was sent",
    ):
        assert claim not in findings
        assert claim not in done.out.partition("expected time")[0]
    assert "Labels were not inferred: the rules are for SGD." in findings
    assert "**one image per step**: not shown: ranks count images only under SGD." in assumptions


def test_a_step_on_several_images_is_not_called_one_images_by_a_layer_that_cannot_tell(tmp_path: Path) -> None:
    """Below two classes, a stack of wide linear layers changes by one matrix of rank one, whatever the batch is."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(432, 512), nn.Linear(512, 512), nn.Linear(512, 2))
    _, facts = recorded(tmp_path, wide, SGD["plain"], 8, 8, 1)
    assert (facts.one_image, [one.rank for one in facts.layers]) == (None, [1, 1, 1])
    assert not any(one.conclusive for one in facts.layers)


def test_a_layer_of_one_row_or_column_shows_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(432, 40), nn.ReLU(), nn.Linear(40, 1), nn.Tanh(), nn.Linear(1, 5))
    _, facts = recorded(tmp_path, network, SGD["plain"], 8, 8, 1)
    assert [(one.layer, one.conclusive) for one in facts.layers] == [("1", True), ("3", False), ("5", False)]
    assert facts.images == 8


def groups(make: Callable[..., torch.optim.Optimizer], parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimiser whose last layer has ten times the learning rate."""
    *body, weight, bias = parameters
    return make([{"params": body}, {"params": [weight, bias], "lr": 1e-2}], lr=1e-3)


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("trained", ["all", "1.", "5."])
@pytest.mark.parametrize("optimiser", ["Adam", "AdamW", "RMSprop", "Adagrad"])
def test_other_rules_with_own_rates_or_frozen_layers_are_not_called_sgd(
    tmp_path: Path, optimiser: str, trained: str, images: int
) -> None:
    """Units that no image switches on made a full rank look low, and one size in each layer is several ones in all."""
    network = mlp(10)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(trained == "all" or name.startswith(trained))
    make = partial(groups, getattr(torch.optim, optimiser)) if trained == "all" else OTHERS[optimiser]
    own = copy.deepcopy(network).requires_grad_(True)
    torch.save(network.state_dict(), tmp_path / "before.pt")
    train(network, make, images, images, 1)
    torch.save(network.state_dict(), tmp_path / "after.pt")
    _, facts = read(tmp_path, own)
    decayed = optimiser == "AdamW" and trained == "5."  # most of the head's features are off, and only decay
    assert facts.rule == "sign" or (decayed and facts.rule == "unknown")
    assert (facts.images, facts.one_image) == (None, None)


@pytest.mark.parametrize(("images", "batch"), [(1, 1), (4, 2)])
def test_a_pruned_update_is_neither_called_sgd_nor_of_one_size(tmp_path: Path, images: int, batch: int) -> None:
    """The largest tenth of the changes lies in few rows, whose rank is full."""
    network = mlp(10)
    recorded(tmp_path, copy.deepcopy(network), SGD["plain"], images, batch, 1)
    before, after = (torch.load(tmp_path / f"{arm}.pt") for arm in ("before", "after"))
    for name, value in after.items():
        change = value - before[name]
        after[name] = before[name] + torch.where(change.abs() >= change.abs().quantile(0.9), change, 0)
    torch.save(after, tmp_path / "after.pt")
    _, facts = read(tmp_path, network)
    assert (facts.rule, facts.images, facts.one_image) == ("unknown", None, None)
    assert "or single values were changed (by noise, clipping, pruning" in " ".join(facts.contradictions(1))


class Tied(nn.Sequential):
    """Two layers with one weight."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = (nn.Flatten(), nn.Linear(432, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48))
        super().__init__(*layers, nn.ReLU(), nn.Linear(48, 10))
        self[5].weight = self[3].weight


def test_a_shared_weight_shows_no_steps(tmp_path: Path) -> None:
    """It changes by one image's inputs of both layers in one step."""
    _, facts = recorded(tmp_path, Tied(), SGD["decay"], 1, 1, 1)
    assert [(one.layer, one.rank) for one in facts.layers] == [("1", 1), ("7", 1)]
    assert (facts.one_image, facts.several_steps, facts.contradictions(1)) == (True, False, ())


def test_augmented_copies_of_an_image_are_said_to_count(tmp_path: Path) -> None:
    network = mlp(10)
    own = copy.deepcopy(network)
    torch.save(own.state_dict(), tmp_path / "before.pt")
    image = datasets.parse("samples(size=12)").load([0])[0]
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05)
    for one in (image, image.flip(3)):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(one), torch.tensor([3])).backward()
        optimiser.step()
    torch.save(network.state_dict(), tmp_path / "after.pt")
    _, facts = read(tmp_path, own)
    assert "at least 2 different ones, since" in facts.contradictions(1)[0]
    assert "copies that differ, such as flipped ones, count" in facts.contradictions(1)[0]


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_a_loss_of_probabilities_is_not_called_the_cross_entropy(tmp_path: Path, loss: str) -> None:
    """Through a softmax, the rows of every loss's gradient sum to zero."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(432, 64), nn.ReLU(), nn.Linear(64, 10), nn.Softmax(1))
    model = OwnModule("own", copy.deepcopy(network), loss).build(SHAPE, 10)
    torch.save(network.state_dict(), tmp_path / "before.pt")
    images, labels = datasets.parse("samples(size=12)").load(range(8))
    gradients = torch.autograd.grad(training_loss(model, images, labels).mean(), list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(network.parameters(), gradients):
            parameter.sub_(0.5 * gradient)
    torch.save(network.state_dict(), tmp_path / "after.pt")
    update = read_update(AuditedNetwork("own", model), str(tmp_path / "before.pt"), str(tmp_path / "after.pt"))
    facts = update_facts(model, update, _observation(model, update, SHAPE, 10, PRESETS["weights"]))
    assert (facts.images, facts.loss) == (8, "")


def straight() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(432, 64), nn.Linear(64, 2))


def test_adam_below_two_classes_is_said_to_hide_the_images_and_not_the_network(
    cli,  # noqa: F811
    nets: Path,  # noqa: F811
    short: None,
) -> None:
    recorded(nets, straight(), torch.optim.Adam, 4, 4, 1)
    (nets / "nets.py").write_text("from test_update_facts import straight as build\n")
    files = ("--before", "before.pt", "--after", "after.pt", "--size", "12", "--budget", "quick")
    cli("audit", "--plugin", "nets.py", "--model", "build", "--out", "out", *files)
    page = (nets / "out" / "audit.md").read_text()
    assert "looks like one image" not in page
    assert "**one image per step**: not shown: ranks count images only under SGD." in page


@pytest.mark.parametrize("classes", [2, 3])
def test_the_page_of_an_epoch_on_batches_says_nothing_false(cli, nets: Path, short: None, classes: int) -> None:  # noqa: F811
    """Two classes show no second image, but the counters of the normalisation show the batches."""
    _, facts = recorded(nets, convolutional(classes), SGD["momentum"], 16, 8, 2)
    assert (facts.steps, facts.statistics, facts.one_image) == (4, ("1", "4"), None)
    (nets / "nets.py").write_text(
        f"from test_update_facts import convolutional\ndef build(): return convolutional({classes})\n"
    )
    files = ("--before", "before.pt", "--after", "after.pt", "--size", "12", "--budget", "quick")
    done = cli("audit", "--plugin", "nets.py", "--model", "build", "--out", "out", *files, "--fail-if", "labels > 0.5")
    assert done.code == 2
    assert "The client trained on 4 batches, by the counters of its BatchNorm layers." in done.out
    page = " ".join((nets / "out" / "audit.md").read_text().split())
    assert ("several images or several steps: the change of layer 7 has rank 2" in page) == (classes == 3)
    assert "sent by 2 layers; they leak the means and variances of the private batches" in page
    for claim in (
        "1 of shape",
        "sends no running statistics",
        "takes one step of SGD",
        "follows exactly",
        "from what was sent: class",
        *(("not tested: a step on several images",) if classes == 3 else ()),
    ):
        assert claim not in page


def test_images_that_are_only_listed_are_not_called_stated(cli, nets: Path, short: None) -> None:  # noqa: F811
    """No attack sees how many images --labels has; the page says how to grant it."""
    recorded(nets, convolutional(3), SGD["momentum"], 16, 8, 2)
    (nets / "nets.py").write_text("from test_update_facts import convolutional\ndef build(): return convolutional(3)\n")
    (nets / "labels.txt").write_text("0\n" * 16)
    files = ("--before", "before.pt", "--after", "after.pt", "--size", "12", "--budget", "quick")
    command = ("audit", "--plugin", "nets.py", "--model", "build", *files, "--labels", "labels.txt")
    assert cli(*command, "--out", "out").code == 0
    page = (nets / "out" / "audit.md").read_text()
    assert "**Listed by --truth or --labels: 16 images. What holds for the update from one image does not" in page
    assert "Stated:" not in page
    assert "give --images 16: attacks that search then look for all of them" in page
    assert cli(*command, "--images", "16", "--out", "known").code == 0
    assert "give --images" not in (nets / "known" / "audit.md").read_text()


def test_the_share_of_rounding_is_that_of_the_update_without_its_decay(tmp_path: Path) -> None:
    """With much decay, little of the change is gradient: its rounding is a larger share of that."""
    update, facts = recorded(tmp_path, mlp(), partial(torch.optim.SGD, lr=1e-3, weight_decay=0.5), 3, 3, 1)
    left = without_decay(update, facts)
    eps = torch.finfo(torch.float32).eps
    for name in ("1.weight", "3.weight", "5.weight"):
        share = eps * float(update.before[name].double().norm()) / float(left.change[name].double().norm())
        assert left.rounding[name] == pytest.approx(share, rel=1e-3)
        assert left.rounding[name] > 1.5 * update.rounding[name]


def test_a_record_of_half_precision_is_called_one_and_judged_by_its_rounding(tmp_path: Path) -> None:
    """A file of float32 that holds numbers of 16 bits is one, too."""
    network = mlp()
    update, _ = recorded(tmp_path, network, SGD["plain"], 1, 1, 1)
    assert update.precision == "float32"
    for kind in (torch.float16, torch.bfloat16):
        torch.save(
            {name: value.to(kind).float() for name, value in network.state_dict().items()}, tmp_path / "after.pt"
        )
        update, facts = read(tmp_path, mlp())
        assert update.precision == str(kind).removeprefix("torch.")
        assert facts.one_image is not False
        assert facts.facts()[-1][1].startswith(update.precision)


def test_a_layer_in_which_rows_do_not_sum_to_zero_has_another_loss(tmp_path: Path) -> None:
    network = mlp(4)
    own = copy.deepcopy(network)
    torch.save(own.state_dict(), tmp_path / "before.pt")
    x, labels = datasets.parse("samples(size=12)").load([0, 1])
    optimiser = SGD["plain"](network.parameters())
    target: Tensor = nn.functional.one_hot(labels % 4, 4).float()
    nn.functional.binary_cross_entropy_with_logits(network(x), target).backward()
    optimiser.step()
    torch.save(network.state_dict(), tmp_path / "after.pt")
    _, facts = read(tmp_path, own)
    assert (facts.zero_sum, facts.rule, facts.images) == (False, "sgd", 2)
    assert "another loss than the cross-entropy" in " ".join(facts.contradictions(1))
