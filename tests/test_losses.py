"""Networks with other heads and losses than one tensor of logits and the cross-entropy."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_audit import nets  # noqa: F401
from test_cli import cli, place, refused  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench import Unsupported, defenses
from leakbench.attacks.peel import read_labels
from leakbench.audit.given import output_note
from leakbench.core.types import PRESETS
from leakbench.defenses.base import Step
from leakbench.errors import BadOption
from leakbench.gradients.evaluate import Evaluator
from leakbench.gradients.losses import Head, head_of, loss_named, main_output, training_loss
from leakbench.models.module import OwnModule
from leakbench.victim import Client, observe

SHAPE, CLASSES = (3, 12, 12), 5
Two = namedtuple("Two", ["logits", "aux"])
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda z: z,
    "tuple": lambda z: (z, 0.5 * z),
    "named": lambda z: Two(z, 0.5 * z),
    "dict": lambda z: {"loss": None, "logits": z},
    "out": lambda z: {"out": z, "aux": 2 * z},
    "object": lambda z: SimpleNamespace(logits=z),
}


class Formed(nn.Module):
    """A network whose output has a form."""

    def __init__(self, form: str = "tensor", outputs: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.form = nn.Linear(432, 9), nn.Linear(9, outputs), form

    def forward(self, x: Tensor) -> Any:
        return FORMS[self.form](self.two(torch.sigmoid(self.one(x.flatten(1)))))


def with_aux(outputs: Any, targets: Tensor) -> Tensor:
    """The loss of a network with an auxiliary head."""
    return F.cross_entropy(outputs.logits, targets) + 0.4 * F.cross_entropy(outputs.aux, targets)


def smooth(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, label_smoothing=0.1)


def vector(outputs: Any, targets: Tensor) -> Tensor:
    return outputs


def usual(logits: Tensor, label: int) -> Tensor:
    return F.cross_entropy(logits, torch.tensor([label]))


def one_hot(label: int, outputs: int) -> Tensor:
    return F.one_hot(torch.tensor([label]), outputs).double()


PLAIN: list[tuple[str, int, Any, Callable[[Any, int], Tensor]]] = [
    *(
        (form, CLASSES, "cross-entropy", lambda out, y: F.cross_entropy(main_output(out), torch.tensor([y])))
        for form in FORMS
    ),
    ("tensor", 1, "bce", lambda out, y: F.binary_cross_entropy_with_logits(out, torch.tensor([[float(y)]]).double())),
    ("tensor", CLASSES, "bce", lambda out, y: F.binary_cross_entropy_with_logits(out, one_hot(y, CLASSES))),
    ("tuple", CLASSES, "mse", lambda out, y: F.mse_loss(out[0], one_hot(y, CLASSES))),
    ("tensor", CLASSES, "nll", lambda out, y: F.nll_loss(out, torch.tensor([y]))),
    ("named", CLASSES, with_aux, lambda out, y: with_aux(out, one_hot(y, CLASSES))),
    ("tensor", CLASSES, smooth, lambda out, y: smooth(out, torch.tensor([y]))),
]


@pytest.mark.parametrize(("form", "outputs", "loss", "plain"), PLAIN)
def test_gradients_are_those_of_plain_torch(form: str, outputs: int, loss: Any, plain: Any) -> None:
    """Of the client's step and of every path of the attacker, in float64; for each image its own."""
    network = Formed(form, outputs).double()
    own = OwnModule("own", network, loss)
    classes = own.logits(torch.rand(1, *SHAPE)).shape[1]
    assert classes == max(2, outputs)
    built = own.build(SHAPE, classes)
    images = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
    wanted = []
    for number, image in enumerate(images):
        label = number % 2
        each = torch.autograd.grad(plain(network(image[None]), label), list(network.parameters()))
        wanted.append(dict(zip(dict(network.named_parameters()), each)))
        sent = Step(built, image[None], torch.tensor([label]), defenses.parse("none")).gradient()
        assert all(torch.allclose(sent[name], value, atol=1e-12) for name, value in wanted[-1].items())
    labels = torch.tensor([0, 1, 0])
    tensors = {name: value.detach()[None].expand(3, *value.shape) for name, value in built.named_parameters()}
    for path in ("batched", "vmap", "one-at-a-time"):
        found = Evaluator(built, tuple(tensors), path=path).gradient(tensors, images, labels)  # type: ignore[arg-type]
        for name, value in found.items():
            assert torch.allclose(value, torch.stack([row[name] for row in wanted]), atol=1e-12)


BATCHED: list[tuple[str, int, Any, Callable[[Any, Tensor], Tensor]]] = [
    ("tuple", CLASSES, "cross-entropy", lambda out, y: F.cross_entropy(out[0], y)),
    ("dict", CLASSES, "cross-entropy", lambda out, y: F.cross_entropy(out["logits"], y)),
    ("tensor", 1, "bce", lambda out, y: F.binary_cross_entropy_with_logits(out.flatten(), y.double())),
    ("tensor", CLASSES, "bce", lambda out, y: F.binary_cross_entropy_with_logits(out, F.one_hot(y, CLASSES).double())),
    ("tensor", CLASSES, "mse", lambda out, y: F.mse_loss(out, F.one_hot(y, CLASSES).double())),
    ("tensor", CLASSES, "nll", F.nll_loss),
    ("named", CLASSES, with_aux, with_aux),
    ("tensor", CLASSES, smooth, smooth),
]


@pytest.mark.parametrize(("form", "outputs", "loss", "plain"), BATCHED)
def test_gradients_of_a_batch_are_those_of_plain_torch(form: str, outputs: int, loss: Any, plain: Any) -> None:
    """Of the client's step and of every path of the attacker, in float64, with second derivatives."""
    network = Formed(form, outputs).double()
    built = OwnModule("own", network, loss).build(SHAPE, max(2, outputs))
    images = torch.rand(2, 4, *SHAPE, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    labels = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]])
    names, wanted, second = [name for name, _ in network.named_parameters()], [], []
    for own, classes in zip(images, labels):
        each = torch.autograd.grad(plain(network(own), classes), list(network.parameters()), create_graph=True)
        wanted.append(dict(zip(names, each)))
        second.append(torch.autograd.grad(sum(value.square().sum() for value in each), own)[0])
        sent = Step(built, own.detach(), classes, defenses.parse("none")).gradient()
        assert all(torch.allclose(sent[name], value, atol=1e-12) for name, value in wanted[-1].items())
    tensors = {name: value.detach()[None].expand(2, *value.shape) for name, value in built.named_parameters()}
    for path in ("batched", "vmap", "one-at-a-time"):
        found = Evaluator(built, tuple(tensors), path=path).gradient(tensors, images, labels)  # type: ignore[arg-type]
        (by_image,) = torch.autograd.grad(sum(value.square().sum() for value in found.values()), images)
        assert torch.allclose(by_image, torch.stack(second), rtol=1e-10, atol=1e-14)
        for name, value in found.items():
            assert torch.allclose(value, torch.stack([row[name] for row in wanted]), atol=1e-12)


def test_the_usual_network_has_no_hook_and_its_settings_stay() -> None:
    own = OwnModule("own", Formed())
    assert head_of(own.build(SHAPE, CLASSES)) == Head()
    assert not own.build(SHAPE, CLASSES)._forward_hooks
    assert "loss" not in own.settings()
    assert OwnModule("own", Formed(), "bce").settings()["loss"] == "bce"
    assert OwnModule("own", Formed(), with_aux).title == f"own, loss {__name__}:with_aux"


def test_heads_and_losses_that_cannot_be_are_refused() -> None:
    with pytest.raises(Unsupported, match="returns 1 logit; give it one output for each class"):
        OwnModule("own", Formed(outputs=1)).build(SHAPE, 2)
    with pytest.raises(BadOption, match="--loss 'hinge' is none of cross-entropy, bce"):
        OwnModule("own", Formed(), "hinge")
    with pytest.raises(Unsupported, match="returns a dict of loss; return the logits as 'logits'"):
        main_output({"loss": torch.zeros(1)})
    with pytest.raises(BadOption, match=r"vector returns \(1, 5\) for one image; return one number"):
        training_loss(OwnModule("own", Formed(), vector).build(SHAPE, 5), torch.rand(1, *SHAPE), torch.tensor([0]))
    assert loss_named("nll") == "nll"


@pytest.mark.parametrize(
    ("last", "loss", "words"),
    [
        (nn.Softmax(1), "cross-entropy", "ends in a softmax, and the loss"),
        (nn.Sigmoid(), "bce", "ends in a sigmoid, and the loss"),
        (nn.LogSoftmax(1), "cross-entropy", ""),
        (nn.LogSoftmax(1), "nll", ""),
        (nn.Identity(), "nll", "does not end in a log-softmax"),
        (nn.Sigmoid(), "mse", ""),
        (nn.Identity(), "cross-entropy", ""),
    ],
)
def test_a_network_that_ends_in_a_softmax_is_pointed_out(last: nn.Module, loss: str, words: str) -> None:
    found = output_note(OwnModule("own", nn.Sequential(Formed(), last), loss), SHAPE)
    assert (words in found, bool(found)) == (True, bool(words))


@pytest.mark.parametrize(
    ("outputs", "loss", "form"), [(1, "bce", "tensor"), (CLASSES, "bce", "dict"), (CLASSES, "cross-entropy", "tuple")]
)
def test_labels_and_images_follow_behind_other_heads(outputs: int, loss: str, form: str) -> None:
    own = OwnModule("own", Formed(form, outputs), loss)
    images = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([1, 0, 1])
    clients = [Client(image, int(label), "w", f"k{label}") for image, label in zip(images, labels)]
    seen = observe(own, defenses.parse("none"), PRESETS["paper"], clients, max(2, outputs), images.mean(0))
    read = read_labels(seen)
    assert read is not None
    assert read.tolist() == labels.tolist()


class Rectified(nn.Sequential):
    """A network whose first layer takes the pixels before a ReLU."""

    def __init__(self, outputs: int) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Flatten(), nn.Linear(432, 80), nn.ReLU(), nn.Linear(80, 20), nn.ReLU(), nn.Linear(20, outputs)
        )


def page_of(
    cli: Any,  # noqa: F811
    folder: Path,
    outputs: int,
    targets: Tensor,
    *options: str,
) -> str:
    """Return the page on an update of ``Rectified`` by one step on a batch under the binary cross-entropy."""
    network = Rectified(outputs)
    torch.save(network.state_dict(), folder / "before.pt")
    images = torch.rand(len(targets), *SHAPE, generator=torch.Generator().manual_seed(1))
    F.binary_cross_entropy_with_logits(network(images), targets).backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    torch.save(network.state_dict(), folder / "after.pt")
    (folder / "nets.py").write_text(f"from test_losses import Rectified\ndef build(): return Rectified({outputs})\n")
    files = ("--before", "before.pt", "--after", "after.pt", "--size", "12", "--budget", "quick", "--out", "out")
    done = cli("audit", "--plugin", "nets.py", "--model", "build", *files, *options)
    assert (done.code, done.err) == (0, "")
    return (folder / "out" / "audit.md").read_text()


def test_one_logit_of_a_batch_leaks_no_feature_exactly(cli, nets: Path) -> None:  # noqa: F811
    """The one row of the last layer's change is explained by one input, whatever the batch is."""
    page = page_of(cli, nets, 1, torch.tensor([[0.0], [1], [1], [1]]), "--loss", "bce")
    assert "follows exactly" not in page
    assert "its input, exactly" not in page
    assert "Layer 1: its inputs, the images themselves, follow together" in page
    assert "1 of class 0 and 3 of class 1" in page
    assert "mean over the outputs" not in page


def test_labels_are_not_counted_by_a_loss_that_the_update_contradicts(cli, nets: Path) -> None:  # noqa: F811
    targets = (torch.rand(4, 6, generator=torch.Generator().manual_seed(3)) < 0.5).float()
    page = page_of(cli, nets, 6, targets)
    assert "the client used another loss than the cross-entropy" in page
    assert "The label counts do not follow from what was sent and stated." in page


def test_the_classes_of_a_batch_follow_from_its_images_errors(cli, nets: Path) -> None:  # noqa: F811
    """Under the binary cross-entropy of several outputs an image may have several classes, or none."""
    targets = torch.tensor([[0.0, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    page = page_of(cli, nets, 5, targets, "--loss", "bce")
    words = "0 class 0, 3 class 1, 2 class 2, 1 class 3 and 0 class 4"
    assert f"How many images have each class is estimated from the errors of the images at layer 1: {words}." in page
    assert "The labels of the images are" not in page


def test_the_classes_of_a_batch_follow_from_the_last_bias(cli, nets: Path) -> None:  # noqa: F811
    """Below a sigmoid the images do not follow; with the rate and the number of images, the counts do."""
    network = Formed("tuple")
    torch.save(network.state_dict(), nets / "before.pt")
    images = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(1))
    targets = (torch.rand(6, CLASSES, generator=torch.Generator().manual_seed(4)) < 0.5).float()
    F.binary_cross_entropy_with_logits(network(images)[0], targets).backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    torch.save(network.state_dict(), nets / "after.pt")
    (nets / "nets.py").write_text("from test_losses import Formed\ndef build(): return Formed('tuple')\n")
    files = ("--before", "before.pt", "--after", "after.pt", "--size", "12", "--budget", "quick", "--loss", "bce")
    command = ("audit", "--plugin", "nets.py", "--model", "build", *files, "--images", "6", "--local-steps", "1")
    counts = [f"{int(count)} class {number}" for number, count in enumerate(targets.sum(0))]
    for rate, found in ((0.1, True), (0.001, False)):  # by a false rate, counts would be beyond the number of images
        assert cli(*command, "--rate", str(rate), "--out", f"out{rate}").code == 0
        page = (nets / f"out{rate}" / "audit.md").read_text()
        assert (
            f"estimated from the change of the last bias: {', '.join(counts[:-1])} and {counts[-1]}." in page
        ) == found
        assert ("The label counts do not follow from what was sent and stated." in page) == (not found)


def test_the_loss_is_named_on_the_page_and_several_classes_of_an_image_are_found(cli, nets: Path) -> None:  # noqa: F811
    network = Formed("dict")
    torch.save(network.state_dict(), nets / "before.pt")
    after = copy.deepcopy(network)
    image, target = torch.rand(1, *SHAPE), torch.tensor([[0.0, 1, 0, 1, 1]])
    F.binary_cross_entropy_with_logits(after(image)["logits"], target).backward()
    torch.optim.SGD(after.parameters(), lr=0.1).step()
    torch.save(after.state_dict(), nets / "after.pt")
    (nets / "nets.py").write_text("from test_losses import Formed\ndef build(): return Formed('dict')\n")
    command = ("audit", "--plugin", "nets.py", "--model", "build", "--before", "before.pt", "--after", "after.pt")
    done = cli(*command, "--size", "12", "--budget", "quick", "--loss", "bce", "--out", "out")
    assert (done.code, done.err) == (0, "")
    page = (nets / "out" / "audit.md").read_text()
    assert "The classes of the image are inferred from what was sent: 1, 3 and 4." in page
    assert (
        "**loss**: the binary cross-entropy of the logits and the label (mean over the outputs), of one image" in page
    )
    assert "The server recovers the image." in page
    refused(cli(*command, "--size", "12", "--loss", "hinge", "--out", "other"), "--loss 'hinge' is none of")
    refused(cli(*command, "--size", "12", "--loss", "no.such:loss", "--out", "other"), "--loss 'no.such:loss': import")
