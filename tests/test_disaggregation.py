"""Every image of a batch, or of a local training, from the first linear layer before a ReLU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from test_audit import nets  # noqa: F401
from test_cli import cli, place  # noqa: F401
from test_update_facts import SGD, recorded, short, train  # noqa: F401
from torch import Tensor, nn

from leakbench import attacks, clients, datasets, defenses
from leakbench.attacks.disaggregation import Disaggregation, _Columns, _Search, disaggregate
from leakbench.attacks.shared_errors import shared_errors
from leakbench.core.rng import Rng, generator
from leakbench.core.text import english
from leakbench.core.types import ThreatModel
from leakbench.gradients.low_rank import low_rank, rounding_error
from leakbench.metrics.members import matched
from leakbench.metrics.standard import PSNR
from leakbench.models.module import OwnModule
from leakbench.victim import Client, observe


def wide(activation: type[nn.Module] = nn.ReLU, hidden: int = 256) -> nn.Module:
    """A network on images in [0, 1], which it centres itself."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, affine=False).eval()
    norm.load_state_dict({"running_mean": torch.full((3,), 0.5), "running_var": torch.full((3,), 0.06)}, strict=False)
    return nn.Sequential(norm, nn.Flatten(), nn.Linear(432, hidden), activation(), nn.Linear(hidden, 70))


def found(network: nn.Module, images: int, batch: int, epochs: int, option: str = "plain") -> Disaggregation:
    """Return what the change of the first linear layer gives."""
    layer = network[2]
    before = [layer.weight.detach().double().clone(), layer.bias.detach().double().clone()]
    train(network, SGD[option], images, batch, epochs)
    change, bias = before[0] - layer.weight.detach().double(), before[1] - layer.bias.detach().double()
    rank = low_rank(change, before[0], rounding_error(before[0], change, 2.0**-23))
    assert rank.rank == images
    layers = [(before[0], before[1])]
    if batch * epochs > images or batch < images:
        layers.append((layer.weight.detach().double(), layer.bias.detach().double()))
    return disaggregate(change - rank.decay * before[0], bias - rank.decay * before[1], rank, layers, generator(0))


def error(guess: Disaggregation, images: int) -> float:
    """Return the largest relative error of an image, each with the reconstruction that is nearest to it."""
    truth = (datasets.parse("samples(size=12)").load(range(images))[0].double() - 0.5) / 0.06**0.5
    distances = torch.cdist(truth.flatten(1), guess.inputs) / truth.flatten(1).norm(dim=1, keepdim=True)
    assert len(set(distances.argmin(1).tolist())) == images
    return float(distances.amin(1).max())


@pytest.mark.parametrize(
    ("images", "batch", "epochs", "option"),
    [(1, 1, 1, "plain"), (4, 4, 1, "plain"), (12, 12, 1, "plain"), (12, 4, 2, "nesterov")],
)
def test_every_image_follows_from_the_first_layer(images: int, batch: int, epochs: int, option: str) -> None:
    network = wide()
    first = network[2].weight.detach().double().clone(), network[2].bias.detach().double().clone()
    guess = found(network, images, batch, epochs, option)
    assert guess.complete
    assert error(guess, images) < 2e-3
    last = network[2].weight.detach().double(), network[2].bias.detach().double()
    one_step = batch == images
    assert guess.agreement(*[first] if one_step else (first, last)) > (0.999 if one_step else 0.97)
    wrong = Disaggregation(images, guess.inputs.flip(0) + 0.5 * guess.inputs, guess.errors)
    assert wrong.agreement(first) < 0.9 or images == 1


def test_without_zeros_nothing_is_claimed() -> None:
    """The errors before a sigmoid have none."""
    assert not found(wide(nn.Sigmoid), 4, 4, 1).complete


@pytest.mark.parametrize(
    ("images", "normalised", "classes"), [(2, False, 70), (2, True, 2), (4, False, 2), (16, False, 70)]
)
def test_pixels_that_are_all_positive_are_separated(images: int, normalised: bool, classes: int) -> None:
    """Without an input normalisation, few units are off for one image and on for another."""
    network = wide(hidden=384)
    layers = [nn.Linear(384, 64), nn.ReLU(), nn.Linear(64, classes)] if classes == 2 else [network[4]]
    shown = nn.Sequential(*network[0 if normalised else 1 : 4], *layers)
    pixels, labels = datasets.parse("samples(size=12)").load(range(images))
    first = shown[-len(layers) - 2]
    loss = nn.functional.cross_entropy(shown(pixels), labels % classes)
    weight, bias = (one.double() for one in torch.autograd.grad(loss, [first.weight, first.bias]))
    rank = low_rank(weight, torch.zeros_like(weight), rounding_error(torch.zeros(()), weight, 2.0**-23))
    before = first.weight.detach().double(), first.bias.detach().double()
    guess = disaggregate(weight, bias, rank, [before], generator(0))
    assert guess.complete
    assert guess.agreement(before) > 0.99
    true = (shown[:2] if normalised else shown[:1])(pixels).double()
    nearest = torch.cdist(true, guess.inputs).min(1)
    assert len(set(nearest.indices.tolist())) == images
    assert float((nearest.values / true.norm(dim=1)).max()) < 2e-3


def columns(mixing: Tensor, rows: Tensor) -> _Columns:
    """The space of columns of a layer that takes unit vectors; for what does not look at its weights."""
    count = len(mixing)
    return _Columns(
        rows, 1e-9, torch.zeros(1, len(rows), count).double(), torch.zeros(1, len(rows)).double(), mixing.sum(0)
    )


def test_a_mixture_of_columns_is_split() -> None:
    rng = torch.Generator().manual_seed(0)
    made: Tensor = torch.randn(200, 6, generator=rng, dtype=torch.float64)
    made = torch.where(torch.rand(200, 6, generator=rng) < 0.5, made, 0.0)
    rows, mixing = torch.linalg.qr(made)
    true = mixing.T  # rows @ true[i] is column i
    space = columns(true, rows)
    for parts in ((0, 3), (0, 3, 5)):
        mixed = sum(true[one] / true[one].norm() for one in parts)
        flat = space.free(mixed / mixed.norm())
        assert flat.shape[1] == len(parts)
        split = space.split(flat, rng)
        alike = (split @ true.T).abs() / true.norm(dim=1) / split.norm(dim=1, keepdim=True)
        assert float(alike[:, parts].amax(0).min()) > 1 - 1e-9
    assert space.free(true[0] / true[0].norm()).shape[1] == 1


def test_a_little_of_another_column_is_removed() -> None:
    """A few values that happen to cancel determine the mixture, which is nearly in the direction of the column."""
    rng = torch.Generator().manual_seed(0)
    made = torch.randn(200, 4, generator=rng, dtype=torch.float64)
    made = torch.where(torch.rand(200, 4, generator=rng) < 0.5, made, 0.0)
    both = (made[:, 0] != 0) & (made[:, 1] != 0)
    made[torch.nonzero(both)[:2, 0], 0] = 1e-3 * made[torch.nonzero(both)[:2, 0], 1]
    rows, mixing = torch.linalg.qr(made)
    true = mixing.T / mixing.T.norm(dim=1, keepdim=True)
    space = columns(mixing.T, rows)
    mixed = mixing.T[0] - 1e-3 * mixing.T[1]
    mixed = mixed / mixed.norm()
    purer = space.purer(mixed, true[1:])
    assert float((rows @ mixed).abs()[made[:, 0] == 0].max()) > 1e-5
    assert float((rows @ purer).abs()[made[:, 0] == 0].max()) < 1e-12
    assert float((space.purer(true[2], true[:2]) @ true[2]).abs()) > 1 - 1e-12


def test_a_little_of_several_columns_is_removed() -> None:
    """Of two others in one column: what is left of the first does not hide the second."""
    rng = torch.Generator().manual_seed(1)
    made = torch.randn(300, 4, generator=rng, dtype=torch.float64)
    made = torch.where(torch.rand(300, 4, generator=rng) < 0.5, made, 0.0)
    rows, mixing = torch.linalg.qr(made)
    true = mixing.T / mixing.T.norm(dim=1, keepdim=True)
    space = columns(mixing.T, rows)
    mixed = true[0] - 1e-3 * true[1] + 2e-3 * true[2]
    purer = space.purer(mixed / mixed.norm(), true[1:])
    assert float((rows @ purer).abs()[made[:, 0] == 0].max()) < 1e-12


def test_two_columns_that_each_hold_a_little_of_another_are_both_freed() -> None:
    """The worst input is as bad until the second one is freed, too."""
    count, units = 4, 300
    rng = torch.Generator().manual_seed(6)
    inputs = torch.rand(count, 40, generator=rng, dtype=torch.float64)
    weight = torch.randn(units, 40, generator=rng, dtype=torch.float64)
    bias = -(weight @ inputs.T).mean(1)
    made = torch.randn(units, count, generator=rng, dtype=torch.float64)
    made = torch.where(weight @ inputs.T + bias[:, None] > 0, made, 0.0)
    rows, mixing = torch.linalg.qr(made)
    rest = rows.T @ made @ inputs
    space = _Columns(rows, 1e-9, (weight @ rest.T)[None], bias[None], mixing.sum(1))
    # column i of the errors is rows @ mixing[:, i]
    true = mixing.T / mixing.T.norm(dim=1, keepdim=True)
    assert space.agreement(true) == 1
    spoilt = true.clone()
    for one, other, share in ((0, 1, 0.02), (2, 3, 0.035)):
        spoilt[one] = true[one] + share * true[other]
        spoilt[one] /= spoilt[one].norm()
    search = _Search(space, rng)
    before = space.agreement(spoilt)
    found, agreement = search._purified(spoilt, before)
    assert before < search.consistent
    assert agreement == 1
    assert float((found * true).sum(1).abs().min()) > 1 - 1e-9


@pytest.mark.parametrize("outputs", [1, 2])
def test_one_hidden_layer_before_two_classes_is_separated(outputs: int) -> None:
    """All images share their errors up to factors, so that differences of columns have as many zeros as columns."""
    torch.manual_seed(1)
    layers = [nn.Flatten(), nn.Linear(432, 128), nn.ReLU(), nn.Linear(128, outputs)]
    model = OwnModule("one", nn.Sequential(*layers), "cross-entropy" if outputs == 2 else "bce")
    pixels, labels = datasets.parse("samples(size=12)").load(range(8))
    own = [(image, int(label) % 2) for image, label in zip(pixels, labels)]
    client = Client(*own[0], "w", "c", (), tuple(own[1:]))
    training = clients.parse("local(batch=8)")
    seen = observe(model, defenses.parse("none"), ThreatModel(), [client], 2, pixels.mean(0), training=training)
    shared = shared_errors(seen, 0, "1")
    assert shared is not None
    with torch.no_grad():
        head = layers[3].weight.double()
    expected = head[0] - head[1] if outputs == 2 else head[0]
    assert float(torch.cosine_similarity(shared, torch.where(shared == 0, 0.0, expected), dim=0).abs()) > 1 - 1e-9
    guess = attacks.parse("disaggregate")(seen, Rng(("a",)))
    assert guess.reasons == ("",)
    assert float(PSNR()(matched(guess.images[0].clamp(0, 1), client.images), client.images).min()) > 60


def test_images_of_several_hidden_layers_share_no_errors() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(432, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2))
    pixels, labels = datasets.parse("samples(size=12)").load(range(1))
    client = Client(pixels[0], int(labels[0]) % 2, "w", "c")
    seen = observe(OwnModule("two", network), defenses.parse("none"), ThreatModel(), [client], 2, pixels[0])
    assert shared_errors(seen, 0, "1") is None


@pytest.mark.parametrize(("hidden", "compared"), [(256, False), (8, True)])
def test_an_audit_recovers_the_images_of_a_local_training(
    cli,  # noqa: F811
    nets: Path,  # noqa: F811
    short: None,  # noqa: F811
    hidden: int,
    compared: bool,
) -> None:
    """A wide layer leaks all of them; one of 8 units has no low rank, and nothing is said to be safe or recovered."""
    recorded(nets, wide(hidden=hidden), SGD["momentum"], 12, 4, 2)
    (nets / "nets.py").write_text(f"from test_disaggregation import wide\ndef build(): return wide(hidden={hidden})\n")
    (nets / "truth").mkdir()
    for number, image in enumerate(datasets.parse("samples(size=12)").load(range(12))[0]):
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(nets / "truth" / f"{number:02}.png")
    files = ("--before", "before.pt", "--after", "after.pt", "--size", "12", "--budget", "quick", "--mode", "eval")
    given = ("--truth", "truth") if compared else ()
    command = ("audit", "--plugin", "nets.py", "--model", "build", "--out", "out", *files, *given)
    done = cli(*command, "--fail-if", "recovered > 0.9")
    page = (nets / "out" / "audit.md").read_text()
    if hidden < 12:
        assert (done.code, "| disaggregate |" in page) == (0, False)
        assert "PASSED, but inconclusive" in page
        return
    claim = "all 12 images. They follow in closed form"
    assert (done.code, f"The server recovers {claim} from the change of layer 2" in page) == (1, True)
    assert "at least 12 different ones" in done.out
    assert page.count("| disaggregate |") == 13  # twelve images, and the table of attacks
    labels = datasets.parse("samples(size=12)").load(range(12))[1].tolist()
    counts = [f"{labels.count(label)} of class {label}" for label in sorted(set(labels))]
    assert f"estimated from the errors of the images at layer 2: {english(counts)}." in page


def normalising() -> nn.Module:
    """A network whose last normalisation has one value of an image, and so takes no single one."""
    torch.manual_seed(0)
    lower = [nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)]
    return nn.Sequential(*lower, nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("compared", [False, True])
def test_an_audit_searches_for_all_images_that_are_stated(
    cli,  # noqa: F811
    nets: Path,  # noqa: F811
    short: None,  # noqa: F811
    compared: bool,
) -> None:
    recorded_files(nets, normalising(), SGD["momentum"], 4, 4, 2)
    (nets / "nets.py").write_text("from test_disaggregation import normalising as build\n")
    (nets / "truth").mkdir()
    for number, image in enumerate(datasets.parse("samples(size=12)").load(range(4))[0]):
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(nets / "truth" / f"{number:02}.png")
    files = ("--before", "before.pt", "--after", "after.pt", "--size", "12", "--budget", "quick")
    command = ("audit", "update", "--plugin", "nets.py", "--model", "build", "--out", "out", *files)
    refused = cli(*command)
    assert "--images if an update is of several" in refused.err
    given = ("--truth", "truth") if compared else ()
    stated = ("--images", "4", "--local-batch", "4", "--local-epochs", "2", "--momentum", "0.9", "--rate", "0.05")
    done = cli(*command, *stated, *given)
    assert done.code == 0, done.err
    page = (nets / "out" / "audit.md").read_text()
    assert "Attacks that search assume 4 images at once" in page
    assert "2 steps of SGD with momentum 0.9 at learning rate 0.05" in page
    assert "assume one image" not in page
    assert "several; record an update of one image" in page  # the reason of an attack of one image
    assert "batch=1" not in page
    assert "How many images the update comes from is not shown: the change of layer 7 has the largest rank" in page
    assert "looks like one image" not in page
    assert page.count("| dlm+(steps=2, local=unrolled) |") >= 4  # an image each, compared or not


def recorded_files(folder: Path, network: nn.Module, make: object, images: int, batch: int, epochs: int) -> None:
    """Write before.pt and after.pt of a network that is trained."""
    torch.save(network.state_dict(), folder / "before.pt")
    train(network.train(), make, images, batch, epochs)  # type: ignore[arg-type]
    torch.save(network.state_dict(), folder / "after.pt")
