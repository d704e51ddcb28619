"""GRNN: its generator, the search in place of its first weights, its loss, and what it recovers."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from conftest import CLASSES, close, rand, randn, watch
from torch import Tensor, nn
from torch.nn import functional as F

import leakbench
from leakbench import attacks, datasets, models
from leakbench.attacks import doubling, grnn
from leakbench.attacks.grnn import GRNN
from leakbench.core.compiled import SWITCH, call_on_rows, compiled_for
from leakbench.core.rng import Rng, seeded
from leakbench.models import OwnModule
from leakbench.observation import Observation
from leakbench.optim.rmsprop import RMSprop

LATENT = 16


class Generator(nn.Module):
    """The generator of GRNN written plainly, for one trial."""

    def __init__(self, blocks: int, channels: int, classes: int, latent: int) -> None:
        super().__init__()
        widths = [32 * 2**b for b in range(blocks)][::-1]
        self.label = nn.Linear(latent, classes)
        self.first = nn.ConvTranspose2d(latent, 2 * widths[0], 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2), nn.Conv2d(i, 2 * o, 3, padding=1, bias=False), nn.BatchNorm2d(2 * o)
            )
            for i, o in zip(widths, [*widths[1:], channels])
        )

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        x = F.glu(self.first(latent[:, :, None, None]), 1)
        for block in self.blocks:
            x = F.glu(block(x), 1)
        return torch.sigmoid(x), self.label(latent)

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Take the values of tensors in the layout of ``grnn``."""
        with torch.no_grad():
            self.first.weight.copy_(tensors["first.weight"])
            self.first.bias.copy_(tensors["first.bias"])
            self.label.weight.copy_(tensors["label.weight"].T)
            self.label.bias.copy_(tensors["label.bias"])
            for number, (_, convolution, norm) in enumerate(self.blocks):
                convolution.weight.copy_(tensors[f"{number}.weight"].permute(2, 3, 0, 1))
                norm.weight.copy_(tensors[f"{number}.scale"])
                norm.bias.copy_(tensors[f"{number}.shift"])


def keys(trials: int) -> Rng:
    return Rng(tuple(f"attack {t}" for t in range(trials)))


def plain_search(attack: GRNN, observation: Observation, network: nn.Module, row: int) -> tuple[Tensor, Tensor]:
    """Return the images before and after GRNN's steps, by plain PyTorch and for one trial."""
    channels, height, width = observation.image_shape
    rng = keys(observation.trials)
    layout = grnn.layout(observation.image_shape, attack.latent, observation.num_classes)
    blocks = sum(name.endswith("scale") for name in layout)
    generator = Generator(blocks, channels, observation.num_classes, attack.latent)
    generator.fill({name: law.draw(rng.generators(f"generator {name}")[row]) for name, law in layout.items()})
    latent = rng.normal("latent", (attack.latent,))[row : row + 1]
    network.load_state_dict({name: value[row] for name, value in observation.weights.items()})
    observed = torch.cat([value[row].flatten() for value in observation.gradient.values()])
    names = list(observation.gradient)
    optimiser = torch.optim.RMSprop(generator.parameters(), lr=attack.lr, momentum=0.99)

    def made() -> tuple[Tensor, Tensor]:
        images, logits = generator(latent)
        edge = (images.shape[2] - height) // 2
        return images[:, :, edge : edge + height, edge : edge + width], logits

    begun = made()[0].detach()
    for _ in range(attack.steps):
        optimiser.zero_grad()
        image, logits = made()
        soft = torch.softmax(logits, 1)
        if observation.labels is not None:
            soft = F.one_hot(observation.labels[row : row + 1], observation.num_classes).to(image.dtype)
        loss = -(soft * torch.log_softmax(network(image), 1)).sum(1).mean()
        parameters = dict(network.named_parameters())
        gradient = torch.autograd.grad(loss, [parameters[name] for name in names], create_graph=True)
        own = torch.cat([value.flatten() for value in gradient])
        squared = (own - observed).square().sum()
        other = squared if attack.wd == "l2norm" else (own.sort().values - observed.sort().values).square().sum()
        across, down = image.diff(dim=3).square(), image.diff(dim=2).square()
        variation = 2 * (across.sum() / across.numel() + down.sum() / down.numel())
        (squared + other.sqrt() + attack.tv * variation).backward(inputs=list(generator.parameters()))
        optimiser.step()
    return begun[0], made()[0][0].detach()


# the generator


@pytest.mark.parametrize(
    ("side", "latent", "classes", "count"),
    [(32, 128, 10, 712_278), (32, 1024, 10, 4_391_254), (32, 1024, 100, 4_483_504), (256, 1024, 1000, 47_157_812)],
)
def test_the_generator_has_as_many_weights_as_the_released_one(
    side: int, latent: int, classes: int, count: int
) -> None:
    assert sum(prod(law.shape) for law in grnn.layout((3, side, side), latent, classes).values()) == count


def test_initial_weights_follow_torchs_laws() -> None:
    layout = grnn.layout((3, 32, 32), 128, 10)
    plain = Generator(3, 3, 10, 128)
    modules = {"first": plain.first, "label": plain.label}
    modules |= {str(number): block[1] for number, block in enumerate(plain.blocks)}
    for name, module in modules.items():
        fan_in, _ = nn.init._calculate_fan_in_and_fan_out(module.weight)
        for part in ("weight", "bias"):
            law = layout.get(f"{name}.{part}")
            if law is None:
                assert getattr(module, part) is None
                continue
            assert law.bound == pytest.approx(fan_in**-0.5)
            drawn = law.draw(torch.Generator().manual_seed(0))
            assert drawn.numel() == getattr(module, part).numel()
            assert float(drawn.abs().max()) <= law.bound
            assert float(drawn.std()) == pytest.approx(law.bound / 3**0.5, rel=0.4 if drawn.numel() < 100 else 0.1)
    assert bool((layout["0.scale"].draw(torch.Generator()) == 1).all())
    assert bool((layout["0.shift"].draw(torch.Generator()) == 0).all())


@pytest.mark.parametrize(("shape", "side"), [((1, 8, 8), 8), ((1, 28, 28), 32), ((3, 20, 12), 32), ((3, 5, 5), 8)])
def test_images_are_cut_out_of_the_next_power_of_two(shape: tuple[int, int, int], side: int) -> None:
    observation = watch(OwnModule("pool", Pooled(shape[0])), shape=shape)
    attack = GRNN(steps=1, latent=LATENT)
    unknowns = attack.start(observation, keys(2))
    whole, logits = grnn.generate(unknowns)
    assert whole.shape == (2, shape[0], side, side)
    assert logits is not None
    assert logits.shape == (2, CLASSES)
    found = attack(observation, keys(2)).images
    assert found.shape == (2, *shape)
    assert bool(((found > 0) & (found < 1)).all())
    cut, _ = attack.render(unknowns, observation)
    assert bool((whole.unfold(2, shape[1], 1).unfold(3, shape[2], 1) == cut[:, :, None, None]).flatten(4).all(4).any())


class Pooled(nn.Module):
    """A network for images of any size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, 4, 3)
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.sigmoid(self.convolution(x)).mean((2, 3)))


@pytest.mark.usefixtures("float64")
def test_an_up_block_is_a_convolution_of_the_enlarged_image() -> None:
    x, weight = randn(3, 5, 4, 6).requires_grad_(), randn(3, 3, 3, 7, 5, seed=1).requires_grad_()
    out = doubling.convolve_doubled(x, weight)
    large = F.interpolate(x, scale_factor=2)
    expected = torch.cat([F.conv2d(large[t : t + 1], weight[t].permute(2, 3, 0, 1), padding=1) for t in range(3)])
    close(out.detach(), expected.detach(), 1e-14)
    towards = randn(*out.shape, seed=2)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, weight), towards) for y in (out, expected)), strict=True):
        close(ours, theirs, 1e-14)


BLOCKS = [(3, 128, 128, 4, 4), (2, 64, 64, 8, 8), (3, 32, 6, 16, 16), (1, 32, 2, 4, 4), (2, 32, 4, 8, 16)]
"""Trials, channels, outputs before gating, height and width."""


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", BLOCKS)
def test_the_compiled_block_is_torchs(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    trials, channels, outputs, height, width = shape
    shapes = ((channels, height, width), (3, 3, outputs, channels), (outputs,), (outputs,))
    given = [randn(trials, *own, seed=place).requires_grad_() for place, own in enumerate(shapes)]
    towards = randn(trials, outputs // 2, 2 * height, 2 * width, seed=9)

    def block() -> tuple[torch.Tensor, ...]:
        out = doubling.doubled(*given)
        return (out.detach(), *torch.autograd.grad(out, given, towards))

    if compiled_for(doubling.SOURCE, given[0]) is None:
        pytest.skip("there is no compiler")
    fast = block()
    monkeypatch.setenv(SWITCH, "off")
    for ours, theirs in zip(fast, block(), strict=True):
        close(ours, theirs, 1e-13)


def test_a_compiled_block_without_memory_raises_an_error() -> None:
    if compiled_for(doubling.SOURCE, torch.rand(1)) is None:
        pytest.skip("there is no compiler")
    with pytest.raises(MemoryError, match="not enough memory"):
        call_on_rows(doubling.SOURCE, "forth", (torch.rand(1),) * 9, (32, 32, 2**20, 2**20), 1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("channels", "side"), [(5, 4), (32, 3), (32, 2)])
def test_a_block_of_another_shape_is_torchs(channels: int, side: int) -> None:
    x, weight = randn(2, channels, side, side), randn(2, 3, 3, 4, channels, seed=1)
    scale, shift = randn(2, 4, seed=2), randn(2, 4, seed=3)
    out = doubling.doubled(x, weight, scale, shift)
    for trial in range(2):
        large = F.interpolate(x[trial : trial + 1], scale_factor=2)
        convolved = F.conv2d(large, weight[trial].permute(2, 3, 0, 1), padding=1)
        normalised = F.batch_norm(convolved, None, None, scale[trial], shift[trial], training=True)
        close(out[trial : trial + 1], F.glu(normalised, 1), 1e-13)


# the search


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kernels", ["on", "off"])
@pytest.mark.parametrize("size", [1.0, 1e-7, 1e-9])
def test_values_move_as_if_their_weights_were_searched_for(
    size: float, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the gradient is so small that eps matters, and for a latent with a zero."""
    monkeypatch.setenv(SWITCH, kernels)
    latent, trials = randn(2, 5), 2
    latent[0, 1] = 0.0
    weight = randn(trials, 5, 3, 2, seed=1).requires_grad_()
    value = torch.einsum("ti,tijk->tjk", latent, weight.detach())
    begun = value.clone()
    slow = torch.optim.RMSprop([weight], lr=0.01, momentum=0.99)
    fast = RMSprop([{"params": [value], "lr": 0.01}], {value: grnn.latent_gain(latent)})
    for step in range(6):
        by_value = size * randn(trials, 3, 2, seed=10 + step)
        by_value[:, 0, 0] = 0.0
        weight.grad, value.grad = torch.einsum("ti,tjk->tijk", latent, by_value), by_value
        slow.step()
        fast.step()
    moved = torch.einsum("ti,tijk->tjk", latent, weight.detach()) - begun
    close(value - begun, moved, 1e-12)
    assert float(moved.abs().max()) > 1e-3


@pytest.mark.usefixtures("float64")
def test_rmsprop_is_torchs() -> None:
    for shape in ((3, 5), (2, 70_000)):  # the second is updated in several blocks
        ours, theirs = randn(*shape), randn(*shape).requires_grad_()
        fast, slow = RMSprop([{"params": [ours], "lr": 0.1}], {}), torch.optim.RMSprop([theirs], 0.1, momentum=0.99)
        for step in range(4):
            ours.grad = theirs.grad = randn(*shape, seed=step)
            fast.step()
            slow.step()
        close(ours, theirs.detach(), 1e-14)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("shape", "threat", "options"),
    [
        ((3, 32, 32), "paper", {}),
        ((1, 28, 28), "known-label", {"tv": 0.5}),
        ((1, 16, 16), "paper", {"wd": "wasserstein", "tv": 0.0}),
    ],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_all_trials_at_once_are_plain_pytorch_one_at_a_time(
    shape: tuple[int, int, int], threat: str, options: dict[str, object], fresh: bool
) -> None:
    observation = watch("lenet", threat=threat, trials=3, shape=shape, fresh=fresh)
    attack = attacks.registry.build("grnn", {"steps": 5, "latent": LATENT, **options})
    assert isinstance(attack, GRNN)
    found = attack(observation, keys(3))
    network = models.parse("lenet").build(shape, CLASSES)
    for row in range(3):
        begun, ended = plain_search(attack, observation, network, row)
        assert float((ended - begun).abs().max()) > 0.01
        torch.testing.assert_close(found.images[row], ended, rtol=0, atol=1e-10)


def test_a_known_label_needs_no_label_branch() -> None:
    names = [set(GRNN().start(watch("lenet", threat=threat), keys(2))) for threat in ("paper", "known-label")]
    assert names[0] - names[1] == {"label.weight", "label.bias"}
    assert names[1] < names[0]


def test_every_trial_and_every_restart_draws_its_own_generator() -> None:
    observation = watch("lenet")
    first = GRNN(latent=LATENT).start(observation, keys(2))
    second = GRNN(latent=LATENT).start(observation, keys(2).fork("restart 1"))
    for name, value in first.items():
        if not name.endswith(("scale", "shift")):
            assert not torch.isclose(value[0], value[1]).all()
            assert not torch.isclose(value, second[name]).all()


# the loss


def test_the_squared_variation_of_known_images() -> None:
    ramp = torch.arange(7).float().expand(1, 3, 5, 7) * 0.5
    torch.testing.assert_close(grnn.squared_variation(ramp), torch.tensor([0.5]))
    torch.testing.assert_close(grnn.squared_variation(ramp.transpose(2, 3)), torch.tensor([0.5]))
    spike = torch.zeros(1, 1, 5, 7)
    spike[0, 0, 2, 3] = 2.0
    torch.testing.assert_close(grnn.squared_variation(spike), torch.tensor([2 * (8 / 30 + 8 / 28)]))


def test_the_distance_is_the_squared_norm_plus_the_norm_and_has_a_gradient_at_zero() -> None:
    observed = {"a": randn(2, 3, 4), "b": randn(2, 5, seed=1)}
    gradient = {"a": observed["a"].clone(), "b": observed["b"].clone()}
    gradient["b"][1] += torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0])
    for value in gradient.values():
        value.requires_grad_()
    for wd in ("l2norm", "wasserstein"):
        distance = attacks.registry.build("grnn", {"wd": wd}).distance(gradient, observed)
        assert distance[0].item() == 0.0
        grads = torch.autograd.grad(distance.sum(), list(gradient.values()))
        assert all(bool(torch.isfinite(grad).all()) for grad in grads)
        assert float(grads[1][1].abs().sum()) > 0
        if wd == "l2norm":
            assert distance[1].item() == pytest.approx(30.0, rel=1e-6)


def test_the_sorted_distance_compares_distributions() -> None:
    observed = {"a": randn(2, 3, 4), "b": randn(2, 5, seed=1)}
    entries = torch.cat([value.flatten(1) for value in observed.values()], 1)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    mixed = entries[:, order]
    permuted = {"a": mixed[:, :12].reshape(2, 3, 4), "b": mixed[:, 12:]}
    assert grnn.sorted_distance(permuted, observed).tolist() == [0.0, 0.0]
    shifted = {name: value + 0.5 for name, value in permuted.items()}
    torch.testing.assert_close(grnn.sorted_distance(shifted, observed), torch.full((2,), 17 * 0.25))


# what it finds


@pytest.mark.long
def test_small_photographs_are_recovered_with_their_labels() -> None:
    images, labels = datasets.parse("samples(size=16)").load([0, 1])
    with seeded("network"):
        network = models.parse("lenet").build((3, 16, 16), 10)
    found = leakbench.attack("grnn(steps=250)", leakbench.observe(network, images, labels % 10))
    assert not bool(found.failed.any())
    assert torch.equal(found.labels, labels % 10)
    own, other = (
        -10 * (found.images - truth).square().flatten(1).mean(1).log10() for truth in (images, images.roll(1, 0))
    )
    assert float(own.min()) > 17
    assert float((own - other).min()) > 5


def test_an_entry_that_is_not_finite_is_left_out_of_its_own_row() -> None:
    observation = watch("lenet", trials=3)
    gradient = {name: value.clone() for name, value in observation.gradient.items()}
    gradient["classifier.weight"][1, 0, 0] = torch.nan
    attack = GRNN(steps=4, latent=LATENT)
    clean, broken = attack(observation, keys(3)), attack(replace(observation, gradient=gradient), keys(3))
    assert not broken.failed.any()
    assert not torch.equal(broken.images[1], clean.images[1])
    torch.testing.assert_close(broken.images[[0, 2]], clean.images[[0, 2]], rtol=1e-5, atol=1e-6)


def test_a_key_can_be_sought_with_the_generator() -> None:
    observation = watch("lenet", "keylock(length=9)", {"reveals": ["lock"]})
    found = attacks.parse(f"grnn(steps=5, latent={LATENT}, secrets=optimise)")(observation, keys(2))
    assert not bool(found.failed.any())


@pytest.mark.parametrize("side", [pytest.param(64, marks=pytest.mark.long), pytest.param(256, marks=pytest.mark.full)])
def test_a_network_of_ones_own_of_any_size(side: int) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = torchvision.models.resnet18(num_classes=5).train()
    observation = leakbench.observe(network, rand(1, 3, side, side), torch.tensor([3]))
    found = leakbench.attack(f"grnn(steps=2, latent={LATENT}, tv=1e-6)", observation)
    assert found.images.shape == (1, 3, side, side)
    assert found.path == "batched"
    assert not bool(found.failed.any())


@pytest.mark.usefixtures("float64")
def test_resnet20() -> None:
    observation = watch("resnet20", trials=2, shape=(3, 16, 16))
    found = attacks.parse(f"grnn(steps=3, latent={LATENT})")(observation, keys(2))
    assert found.images.shape == (2, 3, 16, 16)
    assert not bool(found.failed.any())
