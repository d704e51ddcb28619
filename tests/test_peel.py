"""Peel: what it recovers exactly, what takes exactness away, what it refuses; trials know nothing of others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import plain, rand, randn, same, watch
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench import attacks, datasets, defenses, models
from leakbench.attacks.peeling.chain import find_chain
from leakbench.attacks.peeling.definite import conjugate_gradients, factor_and_solve
from leakbench.attacks.peeling.equations import Equations
from leakbench.attacks.peeling.estimate import undo_linear
from leakbench.attacks.peeling.layers import Activation, Convolution, Normalisation
from leakbench.attacks.peeling.priors import Smooth
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction
from leakbench.errors import Unsupported
from leakbench.gradients.lanes.geometry import Geometry
from leakbench.metrics.aligned import AlignedPSNR
from leakbench.models import Model, OwnModule
from leakbench.observation import Observation
from leakbench.plan.matrix import parse_threat
from leakbench.victim import Client, observe

psnr_aligned = AlignedPSNR()

TRIALS = 3
SAMPLES = datasets.parse("samples(size=12)")


def network(*layers: nn.Module, seed: int = 0) -> OwnModule:
    """Return layers as a model, with weights U(-0.5, 0.5)."""
    model = nn.Sequential(*layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return OwnModule("own", model)


def see(
    model: str | Model,
    defense: str = "none",
    threat: object = "paper",
    *,
    first: int = 20,
    trials: int = TRIALS,
    fresh: bool = False,
) -> tuple[Observation, Tensor, Tensor]:
    """Return what a server sees of photographs of 12 x 12 pixels, and those and their labels."""
    images, labels = SAMPLES.load(range(first, first + trials))
    clients = [
        Client(x, int(y), f"weights {t if fresh else 0}", f"client {t}") for t, (x, y) in enumerate(zip(images, labels))
    ]
    seen = observe(
        models.parse(model),
        defenses.parse(defense),
        parse_threat(threat),
        clients,
        SAMPLES.num_classes,
        SAMPLES.mean(),
    )
    return seen, images, labels


def run(observation: Observation, spec: str = "peel") -> Reconstruction:
    return attacks.parse(spec)(observation, Rng(tuple(map(str, range(observation.trials)))))


def noisy(observation: Observation, scale: float) -> Observation:
    """Return an observation whose gradient has noise of this size relative to each tensor."""
    gradient = {}
    for index, (name, value) in enumerate(observation.gradient.items()):
        size = value.flatten(1).square().mean(1).sqrt().view(-1, *[1] * (value.ndim - 1))
        gradient[name] = value + scale * size * randn(*value.shape, seed=index)
    return replace(observation, gradient=gradient)


# what is recovered


@pytest.mark.parametrize(
    ("model", "defense", "least"),
    [
        ("lenet", "none", 60),
        ("lenet", "precode(k=6)", 60),
        ("lenet", "norm-only", 60),
        ("lenet", "keylock(length=9, gate=sigmoid)", 60),
        ("lenet", "keylock(length=9, gate=none)", 60),
        ("lenet", "keylock(length=9)", 25),
        ("lenet-bn", "none", 60),
        ("lenet-bn(mode=eval)", "none", 60),
        ("lenet", "soteria(ratio=0.5)", 60),
        ("lenet-bn", "soteria(ratio=0.05)", 60),
        ("lenet-bn", "keylock(length=9, gate=sigmoid)", 40),
        ("lenet-bn", "norm-only(layers=all)", 60),
    ],
)
def test_images_are_recovered(model: str, defense: str, least: float) -> None:
    observation, images, labels = see(model, defense)
    found = run(observation)
    assert found.failed.tolist() == [False] * TRIALS
    assert float(psnr_aligned(found.images, images).min()) > least
    assert torch.equal(found.labels, labels)


def test_every_trial_has_its_own_weights() -> None:
    observation, images, _ = see("lenet", fresh=True)
    assert float(psnr_aligned(run(observation).images, images).min()) > 60


def conv(inputs: int, outputs: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **options})  # type: ignore[arg-type]


class Functional(nn.Module):
    """A network whose forward calls functions and asks for shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 8, stride=2), conv(8, 8)
        self.hidden, self.last = nn.Linear(288, 40), nn.Linear(40, SAMPLES.num_classes)
        self.spare = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x), 0.3)
        x = torch.tanh(self.second(x))
        x = self.hidden(x.view(x.size(0), -1)).relu()
        return self.last(F.relu(x) + x.shape[1])


OWN = {
    "mlp": [nn.Flatten(), nn.Linear(432, 20), nn.ReLU(), nn.Linear(20, 7)],
    "mlp of which only the last layer has a bias": [
        *(nn.Flatten(), nn.Linear(432, 450, bias=False), nn.Sigmoid()),
        *(nn.Linear(450, 460, bias=False), nn.Tanh(), nn.Linear(460, 7)),
    ],
    "leaky relu": [conv(3, 12, stride=2), nn.LeakyReLU(0.2), conv(12, 12), nn.LeakyReLU(), nn.Flatten()],
    "elu, softplus": [conv(3, 12, stride=2), nn.ELU(0.7), conv(12, 12), nn.Softplus(2.0), nn.Flatten()],
    "groups, dilation, no padding": [
        *(nn.Conv2d(3, 24, 2, stride=2, groups=3, padding="valid"), nn.Tanh()),
        *(conv(24, 24, groups=2, dilation=2, padding="same", bias=False), nn.Sigmoid(), nn.Flatten()),
    ],
    "normalised above a plain convolution": [
        *(conv(3, 12, stride=2), nn.Sigmoid(), conv(12, 12), nn.BatchNorm2d(12), nn.Sigmoid(), nn.Flatten())
    ],
    "normalised, leaky relu": [
        *(conv(3, 12, stride=2), nn.BatchNorm2d(12), nn.LeakyReLU(0.3)),
        *(conv(12, 12), nn.BatchNorm2d(12), nn.LeakyReLU(0.3), nn.Flatten()),
    ],
}


@pytest.mark.parametrize("kind", [*OWN, "functional"])
def test_chains_of_all_kinds_are_undone(kind: str) -> None:
    if kind == "functional":
        model: Model = OwnModule(kind, Functional())
    else:
        layers = OWN[kind] if kind.startswith("mlp") else [*OWN[kind], nn.LazyLinear(7)]
        built = nn.Sequential(*layers)
        built(torch.zeros(2, 3, 12, 12))
        model = network(*built)
    observation, images, labels = see(model)
    attacks.parse("peel").check(observation)
    found = run(observation)
    assert float(psnr_aligned(found.images, images).min()) > 50
    assert torch.equal(found.labels, labels)


@pytest.mark.parametrize("threat", ["T0", "T1", "T5", "labels=known, informed=true"])
def test_a_key_or_a_lock_adds_nothing(threat: str) -> None:
    plainly, _, _ = see("lenet", "keylock(length=9, gate=sigmoid)")
    told, _, _ = see("lenet", "keylock(length=9, gate=sigmoid)", threat)
    assert torch.equal(run(told).images, run(plainly).images)


def test_the_eps_of_a_public_normalisation_tells_the_contrast() -> None:
    observation, images, _ = see("lenet", "norm-only")
    assert float((run(observation).images - images).abs().max()) < 0.03
    rough = run(noisy(observation, 1e-2)).images
    assert float((rough - images).abs().max()) > 0.1


def test_an_image_of_lost_contrast_is_given_the_brightness_of_the_public_mean() -> None:
    observation, _, _ = see("lenet", "keylock(length=9, gate=sigmoid)")
    found = run(observation).images.flatten(1)
    torch.testing.assert_close(found.mean(1), SAMPLES.mean().mean().expand(TRIALS), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std(1, unbiased=False), torch.full((TRIALS,), 0.2), rtol=1e-5, atol=0)


# what the gradient gives


def test_a_linear_layer_gives_its_input_and_the_error_there() -> None:
    d, f, weight = (randn(*shape, seed=seed).double() for seed, shape in enumerate([(2, 5), (2, 7), (2, 5, 7)]))
    value, error, noise = undo_linear(weight, d[:, :, None] * f[:, None], d, 1e-9, never_zero=False)
    torch.testing.assert_close(value.mean, f, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(error.mean, torch.einsum("tk,tkd->td", d, weight), rtol=1e-12, atol=1e-12)
    assert noise.relative.tolist() == [1e-9, 1e-9]
    assert noise.absolute.tolist() == [0, 0]


def test_the_noise_of_a_gradient_is_seen_at_the_linear_layer() -> None:
    d, f, weight = (randn(*shape, seed=seed).double() for seed, shape in enumerate([(2, 20), (2, 300), (2, 20, 300)]))
    exact = d[:, :, None] * f[:, None]
    _, _, noise = undo_linear(weight, exact + 0.01 * randn(2, 20, 300, seed=5), d, 1e-9, never_zero=False)
    torch.testing.assert_close(noise.absolute, torch.full_like(noise.absolute, 0.01), rtol=0.1, atol=0)
    torch.testing.assert_close(noise.relative, 0.01 / exact.square().mean((1, 2)).sqrt(), rtol=0.1, atol=0)
    assert bool((noise.variance(1e-6 * exact) >= noise.absolute.square()).all())
    torch.testing.assert_close(
        noise.variance(1e6 * exact).sqrt(), 1e6 * 0.01 * torch.ones(2).double(), rtol=0.1, atol=0
    )


@pytest.mark.parametrize(
    "layer",
    [
        Activation("a", "sigmoid"),
        Activation("a", "tanh"),
        Activation("a", "leaky-relu", 0.2),
        Activation("a", "elu", 0.7),
        Activation("a", "softplus", 2.0),
    ],
)
def test_an_activation_is_inverted_with_its_derivatives(layer: Activation) -> None:
    x = torch.linspace(-4, 4, 40, dtype=torch.float64).requires_grad_()
    y = layer.forward(x, {})
    inverse, slope, bend = layer.invert(y.detach(), torch.full_like(y, 1e-12))
    torch.testing.assert_close(inverse, x.detach(), rtol=1e-10, atol=1e-10)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(slope, first.detach(), rtol=1e-10, atol=1e-10)
    second = torch.autograd.grad(first.sum(), x)[0] if first.requires_grad else torch.zeros_like(x)
    torch.testing.assert_close(bend, second / first.detach(), rtol=1e-9, atol=1e-9)
    outside = torch.tensor([-5.0, 5.0], dtype=torch.float64)
    assert all(bool(torch.isfinite(value).all()) for value in layer.invert(outside, 0.1 + 0 * outside))


@pytest.mark.parametrize("groups", [1, 2])
def test_the_equations_of_a_convolution(groups: int) -> None:
    """Their matrices against the convolution and autograd, one unit vector at a time."""
    geometry = Geometry((2, 1), (1, 2), (1, 2), groups, (5, 6), (3, 2))
    kernel = randn(2, 4, 4 // groups, 3, 2, seed=1).double()
    image = randn(2, 4, 5, 6, seed=2).double()
    outputs = torch.stack(
        [F.conv2d(x[None], w, None, (2, 1), (1, 2), (1, 2), groups)[0] for x, w in zip(image, kernel)]
    )
    layer = Convolution("c", "w", None, geometry, (4, 5, 6), tuple(outputs.shape[1:]))  # type: ignore[arg-type]
    forward, gradient = rand(*outputs.shape, seed=4).double(), rand(2, 4, seed=5).double()
    equations = Equations(layer, kernel, randn(*outputs.shape, seed=3).double(), forward, gradient)
    by_output, by_weight = equations.apply(image.flatten(1))
    torch.testing.assert_close(by_output, outputs, rtol=1e-10, atol=1e-10)
    for t in range(2):
        own = kernel[t].clone().requires_grad_()
        out = F.conv2d(image[t : t + 1], own, None, (2, 1), (1, 2), (1, 2), groups)
        (expected,) = torch.autograd.grad((out * equations.error[t]).sum(), own)
        torch.testing.assert_close(by_weight[t], expected, rtol=1e-10, atol=1e-10)
    eye = torch.eye(120, dtype=torch.float64)
    columns = [equations.adjoint(*equations.apply(row.expand(2, 120))) for row in eye]
    torch.testing.assert_close(equations.gram(), torch.stack(columns, 2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(equations.diagonal(), equations.gram().diagonal(dim1=1, dim2=2), rtol=1e-12, atol=1e-12)
    rows = randn(*outputs.shape, seed=6).double(), randn(*kernel.shape, seed=7).double()
    left = (forward * rows[0] * by_output).sum() + (gradient[..., None, None, None] * rows[1] * by_weight).sum()
    torch.testing.assert_close((equations.adjoint(*rows) * image.flatten(1)).sum(), left, rtol=1e-10, atol=1e-10)


def test_conjugate_gradients_and_factors_solve_the_same_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of conditions up to 1e4, and in a trial that conjugate gradients leave; a prior's products are its matrix's."""
    smooth = Smooth(rand(3, 4, 5, seed=1).double(), 0.1, 0.15)
    values = randn(2, 60, seed=2).double()
    torch.testing.assert_close(smooth.times(values), values @ smooth.matrix(), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(smooth.diagonal(), smooth.matrix().diagonal(), rtol=1e-12, atol=1e-12)
    matrix = smooth.matrix().expand(2, 60, 60) * torch.tensor([1.0, 1e12], dtype=torch.float64)[:, None, None]
    right = randn(2, 60, seed=3).double()
    scale = matrix.diagonal(dim1=1, dim2=2).rsqrt()
    scaled = (scale[:, :, None] * matrix * scale[:, None]).float()

    def rest(found: Tensor) -> Tensor:
        return right - (matrix @ found[..., None])[..., 0]

    expected = torch.linalg.solve(matrix, right)
    found, solved = conjugate_gradients(lambda a: (scaled @ a[..., None])[..., 0], rest, scale**-2)
    assert solved.all()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 * float(expected[0].abs().max()))
    factored, inverse = factor_and_solve(matrix.clone(), rest, torch.zeros_like(right), inverse=True)
    torch.testing.assert_close(factored, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(inverse, torch.linalg.inv(matrix).diagonal(dim1=1, dim2=2), rtol=1e-9, atol=0)
    observation, _, _ = see("lenet")
    images = run(observation).images
    monkeypatch.setattr("leakbench.attacks.peeling.definite.MAX_STEPS", 30)
    torch.testing.assert_close(run(observation).images, images, rtol=0, atol=1e-4)


def test_variances_are_conditional_or_marginal() -> None:
    observation, images, _ = see("lenet", "noise(scale=0.0001, relative=true)")
    marginal = attacks.parse("peel(variances=marginal)").run(observation, Rng(tuple("abc"))).images
    assert not torch.allclose(marginal, run(observation).images, atol=1e-4)
    assert bool((marginal - images).square().mean((1, 2, 3)).lt(1e-2).all())


def test_the_chain_ends_at_the_lowest_linear_layer_that_sent_its_gradients() -> None:
    observation, _, _ = see("lenet-bn", "keylock(length=9)")
    chain = find_chain(observation)
    assert chain.weight == "classifier.weight"
    assert [type(layer).__name__ for layer in chain.layers] == [
        *["Convolution", "Normalisation", "Activation"] * 3,
        "Reshape",
    ]
    norms = [layer for layer in chain.layers if isinstance(layer, Normalisation)]
    assert [norm.secret for norm in norms] == [True, False, False]
    assert find_chain(see("lenet", "precode(k=6)")[0]).weight == "classifier.0.encoder.weight"
    withheld = {name: value for name, value in observation.gradient.items() if name != "classifier.bias"}
    with pytest.raises(Unsupported, match="none sent the gradients"):
        find_chain(replace(observation, gradient=withheld))


def test_labels_come_from_the_classifiers_bias() -> None:
    """Which holds behind PRECODE too, where the classifier's inputs have both signs."""
    observation, _, labels = see("lenet", "precode(k=6)", trials=8)
    assert torch.equal(run(observation).labels, labels)
    known, _, _ = see("lenet", "precode(k=6)", "known-label")
    assert torch.equal(run(known).labels, labels[:TRIALS])


# what takes it away


def test_noise_hurts() -> None:
    observation, images, _ = see("lenet")
    scores = [float(psnr_aligned(run(noisy(observation, scale)).images, images).mean()) for scale in (1e-5, 1e-3, 0.1)]
    assert scores[0] > scores[1] + 15
    assert scores[1] > scores[2] + 5
    assert scores[2] > 10


def test_noise_that_is_seen_counts_more_than_the_precision_that_is_assumed() -> None:
    observation, images, _ = see("lenet")
    half = {name: value.half().float() for name, value in observation.gradient.items()}
    told, untold = (run(replace(observation, gradient=half), spec) for spec in ("peel(precision=3e-4)", "peel"))
    for found in (told, untold):
        assert float(psnr_aligned(found.images, images).min()) > 30


def test_entries_that_are_not_finite_are_left_out_of_their_own_trial() -> None:
    observation, _, _ = see("lenet", "keylock(length=9, gate=sigmoid)")
    clean = run(observation)
    for name in ("features.0.0.weight", "classifier.bias"):
        gradient = {key: value.clone() for key, value in observation.gradient.items()}
        gradient[name][1].fill_(torch.nan)
        found = run(replace(observation, gradient=gradient))
        whole = name == "classifier.bias"  # without it the closed form has nowhere to begin
        assert found.failed.tolist() == [False, whole, False]
        assert not torch.equal(found.images[1], clean.images[1])
        torch.testing.assert_close(found.images[[0, 2]], clean.images[[0, 2]], rtol=1e-4, atol=1e-4)
    silent = {key: torch.zeros_like(value) for key, value in observation.gradient.items()}
    assert run(replace(observation, gradient=silent)).failed.tolist() == [True] * TRIALS


def test_pieces_and_neighbours_do_not_change_an_image() -> None:
    for model, defense in (("lenet", "none"), ("lenet", "keylock(length=9)"), ("lenet-bn", "none")):
        observation, _, _ = see(model, defense)
        whole = run(observation).images
        torch.testing.assert_close(run(replace(observation, slots=2)).images, whole, rtol=1e-4, atol=1e-4)
        alone, _, _ = see(model, defense, trials=1)
        torch.testing.assert_close(run(alone).images, whole[:1], rtol=1e-4, atol=1e-4)


def test_a_probe_undoes_the_top_and_says_what_the_rest_needs() -> None:
    attack = attacks.parse("peel")
    for defense in ("none", "norm-only"):
        observation, _, _ = see("lenet", defense)
        before = plain(observation)
        held = attack.probe(observation, Rng(tuple("abc")))
        assert held is not None
        assert held >= TRIALS * 8 * (432**2 if defense == "norm-only" else 432)
        assert same(plain(observation), before)
    assert attack.probe(see(network(nn.Flatten(), nn.Linear(432, 7)))[0], Rng(tuple("abc"))) is None


# what is refused


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(3, 3), nn.Linear(432, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sigmoid(self.first(x) + x).flatten(1))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(3, 3), nn.Linear(432, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sigmoid(self.first(torch.sigmoid(self.first(x)))).flatten(1))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(432, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.flatten(x, 1) if x.sum() > 0 else -torch.flatten(x, 1))


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(3, 3), nn.Linear(432, 7)
        self.first.register_forward_hook(lambda module, inputs, output: 2 * output)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sigmoid(self.first(x)).flatten(1))


HEAD = (nn.Flatten(), nn.Linear(432, 7))
REFUSED = {
    "relu": (nn.Sequential(conv(3, 3), nn.ReLU(), conv(3, 3), nn.Tanh(), *HEAD), "not invertible"),
    "pooling": (
        nn.Sequential(conv(3, 12), nn.MaxPool2d(2), conv(12, 12), nn.Tanh(), *HEAD),
        "pooling loses information",
    ),
    "dropout": (nn.Sequential(conv(3, 3), nn.AlphaDropout(), *HEAD).train(), "do not follow from the gradient"),
    "layer norm": (nn.Sequential(conv(3, 3), nn.LayerNorm([3, 12, 12]), *HEAD), "none of the layers it knows"),
    "batch norm first": (nn.Sequential(nn.BatchNorm2d(3), conv(3, 3), *HEAD).train(), "right before a normalisation"),
    "fewer values": (
        nn.Sequential(conv(3, 32), nn.Tanh(), nn.Conv2d(32, 1, 1), nn.Tanh(), nn.Flatten(), nn.Linear(144, 7)),
        "equations for the",
    ),
    "reflected": (nn.Sequential(conv(3, 3, padding_mode="reflect"), *HEAD), "pads otherwise"),
    "flat slope": (nn.Sequential(conv(3, 3), nn.LeakyReLU(0.0), conv(3, 3), nn.Tanh(), *HEAD), "invertible activation"),
    "no bias": (nn.Sequential(nn.Flatten(), nn.Linear(432, 7, bias=False)), "none sent the gradients"),
    "residual": (Residual(), "2 ways"),
    "twice": (Twice(), "runs 2 times"),
    "branch": (Branch(), "cannot follow"),
    "hooked": (Hooked(), "does not compute what the network does"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_undone_is_refused(kind: str) -> None:
    module, reason = REFUSED[kind]
    observation, _, _ = see(OwnModule(kind, module))
    for call in (attacks.parse("peel").check, run):
        with pytest.raises(Unsupported, match=reason) as told:
            call(observation)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("model", "defense", "reason"),
    [
        ("resnet20(width=1)", "none", "not invertible"),
        ("resnet20(activation=sigmoid, width=2)", "none", "residual"),
        ("lenet-bn", "keylock(length=9, layers=all)", "scale of the input"),
        ("lenet-bn(mode=eval)", "keylock(length=9, layers=all)", "running ones"),
    ],
)
def test_networks_and_defenses_that_are_refused(model: str, defense: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        attacks.parse("peel").check(see(model, defense)[0])


def test_images_that_are_too_large_are_refused() -> None:
    observation = watch("lenet", shape=(3, 72, 72), trials=1)
    with pytest.raises(Unsupported, match="up to 12288 values"):
        attacks.parse("peel").check(observation)
