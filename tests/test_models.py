"""The networks: sizes, initial laws, checkpoints, one's own module, and surgery on any network."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import MODES, close, rand, randn, tensors_of
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench import defenses, models
from leakbench.errors import BadOption, CorruptAsset, MissingAsset, Unsupported
from leakbench.models import OwnModule
from leakbench.models.base import with_mode
from leakbench.models.surgery import linears, plain_norm, replace_norms
from leakbench.victim import build

RGB = (3, 32, 32)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def make(spec: str, shape: tuple[int, int, int] = RGB, classes: int = 10, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.parse(spec).build(shape, classes)


@pytest.mark.parametrize(
    ("spec", "classes", "parameters"),
    [
        ("lenet", 10, 15_826),
        ("lenet", 100, 85_036),
        ("lenet-bn", 10, 15_826 + 3 * 2 * 12),
        ("resnet20", 10, 269_722),
        ("resnet20", 100, 275_572),
        ("resnet20(shortcut=conv)", 10, 269_722 + 2_752),
        ("resnet32", 10, 464_154),
        ("resnet32", 100, 470_004),
        ("convnet", 10, 2_904_970),
        ("resnet18(max_pool=false)", 10, 11_181_642),
        ("resnet18(max_pool=false)", 100, 11_227_812),
        ("resnet34(max_pool=false)", 10, 21_289_802),
        ("resnet34(max_pool=false)", 100, 21_335_972),
    ],
)
def test_parameter_counts(spec: str, classes: int, parameters: int) -> None:
    assert count(make(spec, classes=classes)) == parameters


def test_vgg_has_the_published_size() -> None:
    with torch.device("meta"):
        network = models.parse("vgg16(norm=none)").build((3, 64, 64), 100)
        normalised = models.parse("vgg16").build((3, 64, 64), 100)
    assert count(network) == 134_670_244
    assert count(normalised) - count(network) == 2 * 4224


def test_a_spec_names_the_mode_and_so_does_that_of_an_older_run() -> None:
    named = [name for name in models.names() if "mode" in models.registry.fields(models.get(name))]
    assert {"convnet", "lenet-bn", "resnet20", "vgg16"} <= set(named)
    for name in named:
        model = models.parse(name)
        assert models.spec(model) == f"{name}(mode=train)" == with_mode(name, model.settings())
        assert models.spec(models.parse(f"{name}(mode=eval)")) == f"{name}(mode=eval)"
        assert models.parse(models.spec(model)) == model
    narrow = models.parse("convnet(width=16)")
    assert models.spec(narrow) == "convnet(width=16, mode=train)" == with_mode("convnet(width=16)", narrow.settings())
    for model in (narrow, models.parse("resnet20(mode=eval)"), models.parse("lenet")):
        assert with_mode(models.spec(model), model.settings()) == models.spec(model)


NARROW = [
    "convnet(width=2)",
    "convnet(width=2, activation=sigmoid, mode=eval)",
    "resnet18(width=2)",
    "resnet18(width=2, max_pool=false, activation=sigmoid)",
    "resnet34(width=2, stem=cifar)",
    "resnet32(width=2, shortcut=conv, activation=sigmoid)",
    "vgg16(width=2, hidden=8, dropout=0)",
    "vgg16(width=2, hidden=8, dropout=0, norm=none, activation=sigmoid, mode=eval)",
]
"""The deep networks with few channels."""


@pytest.mark.parametrize("shape", [(1, 33, 33), (3, 40, 57), (2, 64, 35)])
@pytest.mark.parametrize("spec", NARROW)
def test_deep_models_take_any_shape(spec: str, shape: tuple[int, int, int]) -> None:
    network = make(spec, shape, 7)
    assert network(rand(2, *shape)).shape == (2, 7)
    assert {module.training for module in network.modules()} == {"mode=eval" not in spec}
    kinds = {type(module) for module in network.modules()} & {nn.ReLU, nn.Sigmoid}
    assert kinds == {nn.Sigmoid if "sigmoid" in spec else nn.ReLU}


@pytest.mark.parametrize(
    ("spec", "largest"),
    [
        ("convnet(width=2)", 8),
        ("resnet18(width=2)", 32),
        ("resnet18(width=2, max_pool=false)", 16),
        ("resnet18(width=2, stem=cifar)", 16),
        ("resnet34(width=2, stem=cifar, max_pool=false)", 8),
        ("vgg16(width=2, hidden=8)", 31),
    ],
)
def test_images_too_small_for_a_deep_model_are_told(spec: str, largest: int) -> None:
    with pytest.raises(Unsupported, match=f"{largest}x{largest}"):
        make(spec, (1, largest, largest))
    network = make(spec, (1, largest + 1, largest + 1))
    assert network(rand(1, 1, largest + 1, largest + 1)).shape == (1, 10)


def test_deep_models_are_torchvisions() -> None:
    from torchvision.models import VGG, resnet18, resnet34
    from torchvision.models.vgg import cfgs, make_layers

    x = rand(2, 3, 40, 40)
    for name, published in (("resnet18", resnet18), ("resnet34", resnet34)):
        network = make(f"{name}(mode=eval)", (3, 40, 40))
        reference = published(num_classes=10).eval()
        reference.load_state_dict(network.state_dict())
        torch.testing.assert_close(network(x), reference(x))
    for norm in ("batch", "none"):
        network = make(f"vgg16(mode=eval, norm={norm}, hidden=4)", (3, 40, 40))
        reference = make_layers(cfgs["D"], batch_norm=norm == "batch").eval()
        reference.load_state_dict(network.features.state_dict())
        torch.testing.assert_close(network.features(x), reference(x))
    with torch.device("meta"):
        whole = models.parse("vgg16").build((3, 40, 40), 10)
        published_names = {n: v.shape for n, v in VGG(make_layers(cfgs["D"], True), 10).state_dict().items()}
    assert {name: value.shape for name, value in whole.state_dict().items()} == published_names


def test_vgg_drops_units_in_training_alone() -> None:
    x = rand(1, 1, 32, 32)
    network = make("vgg16(width=2, hidden=64)", (1, 32, 32))
    assert not torch.equal(network(x), network(x))
    assert torch.equal(network.eval()(x), network(x))
    still = make("vgg16(width=2, hidden=64, dropout=0)", (1, 32, 32))
    state = torch.get_rng_state()
    still(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 14), (2, 16, 11)])
@pytest.mark.parametrize("spec", MODES)
def test_every_model_takes_any_shape_from_8x8(spec: str, shape: tuple[int, int, int]) -> None:
    network = make(spec, shape, 7)
    assert network(rand(2, *shape)).shape == (2, 7)
    with pytest.raises(Unsupported, match="8x8"):
        make(spec, (1, 7, 12))


@pytest.mark.parametrize("spec", MODES)
def test_mode_is_the_one_that_is_asked_for(spec: str) -> None:
    network = make(spec)
    wanted = "mode=eval" not in spec
    assert {module.training for module in network.modules()} == {wanted}


def test_lenet_is_three_strided_convolutions_with_sigmoids() -> None:
    network = make("lenet")
    weights = list(network.parameters())
    x = rand(2, *RGB)
    h = x
    for layer, stride in enumerate((2, 2, 1)):
        h = torch.sigmoid(F.conv2d(h, weights[2 * layer], weights[2 * layer + 1], stride=stride, padding=2))
    assert h.shape == (2, 12, 8, 8)
    torch.testing.assert_close(network(x), h.flatten(1) @ weights[6].T + weights[7])


def test_lenet_bn_normalises_between_convolution_and_sigmoid() -> None:
    network = make("lenet-bn(init=default)")
    x = rand(3, *RGB)
    h = x
    own = list(network.parameters())
    for layer, stride in enumerate((2, 2, 1)):
        weight, bias, scale, shift = own[4 * layer : 4 * layer + 4]
        h = F.conv2d(h, weight, bias, stride=stride, padding=2)
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), unbiased=False, keepdim=True)
        h = torch.sigmoid((h - mean) / (var + 1e-5).sqrt() * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1))
    torch.testing.assert_close(network(x), h.flatten(1) @ own[-2].T + own[-1])


@pytest.mark.parametrize("spec", ["lenet", "lenet-bn", "resnet20(init=uniform(0.5))"])
def test_uniform_init_is_the_law_of_every_parameter(spec: str) -> None:
    values = torch.cat([parameter.detach().flatten() for parameter in make(spec).parameters()])
    assert float(values.abs().max()) <= 0.5
    n = len(values)
    assert float(values.mean()) == pytest.approx(0, abs=5 * 12**-0.5 / n**0.5)
    assert float(values.var()) == pytest.approx(1 / 12, abs=5 * (1 / 180 / n) ** 0.5)
    for parameter in make(spec).parameters():
        assert float(parameter.detach().std()) > 0.1


def test_default_init_leaves_torchs_own() -> None:
    conv = next(iter(make("lenet(init=default)").parameters()))
    assert float(conv.detach().abs().max()) <= (3 * 25) ** -0.5
    network = make("lenet-bn(init=default)")
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 3
    assert all(bool((norm.weight == 1).all()) and bool((norm.bias == 0).all()) for norm in norms)


@pytest.mark.parametrize("init", ["uniform", "uniform()", "uniform(-1)", "uniform(0)", "uniform(1e999)", "normal(1)"])
def test_a_bad_init_is_told(init: str) -> None:
    with pytest.raises(BadOption, match="init"):
        models.parse(f'lenet(init="{init}")')


def test_resnet_shortcuts_subsample_and_pad() -> None:
    """With every convolution at zero (and normalisation's shift at zero) a block is its shortcut."""
    network = make("resnet20(activation=relu, mode=eval)")
    blocks = [module for module in network.modules() if hasattr(module, "conv2")]
    assert len(blocks) == 9
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "layers" in name and "conv" in name:
                parameter.zero_()
    x = rand(2, 16, 8, 8)
    torch.testing.assert_close(blocks[0](x), x)
    padded = torch.zeros(2, 32, 4, 4)
    padded[:, 8:24] = x[:, :, ::2, ::2]
    torch.testing.assert_close(blocks[3](x), padded)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_resnet_activation(activation: str) -> None:
    network = make(f"resnet20(activation={activation})")
    kinds = {type(module) for module in network.modules()} & {nn.ReLU, nn.Sigmoid}
    assert kinds == {nn.ReLU if activation == "relu" else nn.Sigmoid}


@pytest.mark.parametrize("spec", MODES)
def test_the_weights_come_from_the_seed(spec: str) -> None:
    first, again, other = (tensors_of(make(spec, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("defense", ["noise", "precode(k=4)", "keylock(length=5)", "norm-only"])
def test_what_a_defended_network_shares_with_the_plain_one_has_the_same_weights(defense: str) -> None:
    model = models.parse("lenet")
    plain = build(model, defenses.parse("none"), (1, 8, 8), 4, "key")
    defended = build(model, defenses.parse(defense), (1, 8, 8), 4, "key")

    def kernels(network: nn.Module) -> list[Tensor]:
        return [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]

    assert all(torch.equal(a, b) for a, b in zip(kernels(plain), kernels(defended), strict=True))
    ends = [list(linears(network).values())[-1].weight for network in (plain, defended)]
    assert torch.equal(ends[0], ends[1])


def save(network: nn.Module, path: Path, wrapped: bool = False) -> str:
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path)
    return str(path)


@pytest.mark.parametrize("file", ["net.pt", "wrapped.pth", "net.safetensors"])
@pytest.mark.parametrize("spec", ["lenet", "lenet-bn", "resnet20", "resnet32"])
def test_a_checkpoint_is_loaded(spec: str, file: str, tmp_path: Path) -> None:
    trained = make(spec, seed=5)
    path = save(trained, tmp_path / file, wrapped=file.startswith("wrapped"))
    model = models.registry.build(spec, {"weights": path})
    loaded, fresh = model.build(RGB, 10).state_dict(), make(spec, seed=6).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in trained.state_dict().items())
    assert not all(torch.equal(value, loaded[name]) for name, value in fresh.items())


def test_a_checkpoint_is_identified_by_its_content_and_not_by_its_path(tmp_path: Path) -> None:
    first = save(make("lenet", seed=1), tmp_path / "a.safetensors")
    twin = save(make("lenet", seed=1), tmp_path / "b.safetensors")
    other = save(make("lenet", seed=2), tmp_path / "c.safetensors")
    found = [models.registry.build("lenet", {"weights": path}).settings() for path in (first, twin, other)]
    assert found[0] == found[1] != found[2]
    assert str(tmp_path) not in str(found)


def test_bad_checkpoints_are_told(tmp_path: Path) -> None:
    def attempt(path: Path | str) -> None:
        models.registry.build("lenet", {"weights": str(path)}).build(RGB, 10)

    with pytest.raises(MissingAsset, match="does not exist"):
        attempt(tmp_path / "nothing.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(CorruptAsset):
        attempt(tmp_path / "junk.pt")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(CorruptAsset):
        attempt(tmp_path / "junk.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CorruptAsset, match="state dict"):
        attempt(tmp_path / "list.pt")
    with pytest.raises(BadOption, match="shape"):
        attempt(save(make("lenet", classes=11), tmp_path / "classes.pt"))
    with pytest.raises(BadOption, match="extra tensor 'weight'"):
        attempt(save(nn.Linear(2, 2), tmp_path / "linear.pt"))
    network = make("lenet")
    network.extra = nn.Linear(2, 2)
    with pytest.raises(BadOption, match="extra"):
        attempt(save(network, tmp_path / "extra.pt"))


@pytest.mark.parametrize("name", models.names())
def test_fresh_weights_and_a_checkpoint_exclude_each_other(name: str) -> None:
    with pytest.raises(BadOption) as error:
        models.parse(f"{name}(fresh=true, weights=net.pt)")
    for part in (repr(name), "fresh=true", "weights='net.pt'", "keep one"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert models.parse(f"{name}(fresh=false, weights=net.pt)").fresh_weights() is False


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("import pathlib; pathlib.Path('evil').touch()",))


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CorruptAsset):
        models.registry.build("lenet", {"weights": str(tmp_path / "evil.pt")}).build(RGB, 10)
    assert not (tmp_path / "evil").exists()


def own(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4))


def test_ones_own_module_is_a_copy_with_its_weights_and_mode() -> None:
    network = own().eval()
    built = OwnModule("mine", network).build((1, 8, 8), 4)
    assert built is not network
    assert not built.training
    x = rand(2, 1, 8, 8)
    assert torch.equal(built(x), network(x))
    with torch.no_grad():
        next(built.parameters()).zero_()
    assert float(next(network.parameters()).detach().abs().sum()) > 0


def test_checking_ones_own_module_does_not_change_it() -> None:
    network = own().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    OwnModule("mine", network).build((1, 8, 8), 4)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_ones_own_module_is_identified_by_values_mode_and_architecture() -> None:
    def identity(network: nn.Module) -> object:
        return OwnModule("mine", network).settings()

    assert identity(own()) == identity(own())
    assert identity(own()) != identity(own(seed=1))
    assert identity(own()) != identity(own().eval())
    statistics = own()
    statistics[1].running_mean += 1
    assert identity(own()) != identity(statistics)
    assert identity(nn.Sequential(nn.ReLU())) != identity(nn.Sequential(nn.Sigmoid()))


def test_a_module_that_does_not_fit_is_told() -> None:
    with pytest.raises(Unsupported, match="not \\(1, 5\\)"):
        OwnModule("mine", own()).build((1, 8, 8), 5)
    with pytest.raises(Unsupported, match="takes no image"):
        OwnModule("mine", own()).build((3, 8, 8), 4)
    with pytest.raises(Unsupported, match="logits"):
        OwnModule("mine", nn.Conv2d(1, 3, 3)).build((1, 8, 8), 4)


def test_models_are_frozen() -> None:
    for name in models.names():
        with pytest.raises(dataclasses.FrozenInstanceError):
            models.parse(name).fresh = True  # type: ignore[attr-defined]


def test_the_linear_layers_in_order() -> None:
    network = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Sequential(nn.Linear(7, 3)))
    assert {name: layer.out_features for name, layer in linears(network).items()} == {"0": 7, "2.0": 3}
    assert list(linears(network)) == ["0", "2.0"]
    assert linears(nn.ReLU()) == {}


class Mark(nn.Module):
    def __init__(self, channels: int, old: nn.Module | None) -> None:
        super().__init__()
        self.channels = channels
        self.old = type(old)

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x + self.channels


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6), nn.GroupNorm(2, 6), nn.InstanceNorm2d(6)])
def test_the_first_normalisation_is_replaced(norm: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), norm, nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)).eval()
    text = str(network)
    new = replace_norms(network, Mark)
    assert str(network) == text
    assert isinstance(new[2], Mark)
    assert new[2].channels == 6
    assert new[2].old is type(norm)
    assert isinstance(new[4], nn.BatchNorm2d)
    assert not new[2].training


@pytest.mark.parametrize(
    "rest",
    [
        (nn.Sigmoid(),),
        (nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)),  # that normalisation belongs to the second convolution
        (nn.BatchNorm2d(5),),  # of other channels
    ],
)
def test_a_normalisation_is_inserted_after_the_first_convolution(rest: tuple[nn.Module, ...]) -> None:
    network = nn.Sequential(nn.Identity(), nn.Conv2d(1, 6, 3), *rest)
    new = replace_norms(network, Mark)
    assert isinstance(new[1], nn.Sequential)
    assert isinstance(new[1][1], Mark)
    close(new[1](rand(1, 1, 8, 8)).detach(), torch.full((1, 6, 6, 6), 6.0), 1e-6)
    assert [type(module) for module in new[2:]] == [type(module) for module in rest]


def test_all_normalisations_are_replaced_and_none_is_inserted_beside_others() -> None:
    squeeze = nn.Conv2d(5, 2, 1)  # as in a squeeze-and-excitation block: no normalisation of its own
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), squeeze, nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)
    )
    new = replace_norms(network, Mark, "all")
    found = [(name, module.channels) for name, module in new.named_modules() if isinstance(module, Mark)]
    assert found == [("0.1", 6), ("2", 5), ("5", 4)]
    bare = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 5, 3))
    found = [name for name, module in replace_norms(bare, Mark, "all").named_modules() if isinstance(module, Mark)]
    assert found == ["0.1", "2.1"]


class Crossed(nn.Module):
    """A network whose layers are registered in another order than they run in."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.branch = branch
        self.head = nn.Linear(6, 4)
        self.bn2 = nn.BatchNorm2d(6)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3)
        self.conv1 = nn.Conv2d(1, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.branch and float(x.detach().sum()) < 0:
            x = -x
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(self.bn2(self.conv2(x)).mean((2, 3)))


def test_blocks_are_those_that_run() -> None:
    def marks(network: nn.Module, layers: str) -> list[str]:
        new = replace_norms(network, Mark, layers)  # type: ignore[arg-type]
        return [name for name, module in new.named_modules() if isinstance(module, Mark)]

    assert marks(Crossed(), "first") == ["bn1"]
    assert set(marks(Crossed(), "all")) == {"bn1", "bn2"}
    # what cannot be traced is taken as it is registered
    assert marks(Crossed(branch=True), "first") == ["conv2.1"]


def test_looking_for_blocks_leaves_no_trace_in_the_network() -> None:
    class Keeper(Crossed):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            return super().forward(x)

    network = Keeper()
    new = replace_norms(network, Mark)
    assert not hasattr(network, "seen")
    assert not hasattr(new, "seen")
    shared = {value.data_ptr() for value in network.parameters()} & {value.data_ptr() for value in new.parameters()}
    assert shared == set()


def test_a_lone_convolution_and_a_float64_network_are_served() -> None:
    new = replace_norms(nn.Conv2d(1, 3, 2), plain_norm)
    assert new(rand(1, 1, 4, 4)).shape == (1, 3, 3, 3)
    network = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3)).double()
    assert replace_norms(network, plain_norm)(rand(1, 1, 4, 4).double()).dtype == torch.float64


def test_a_plain_normalisation_takes_over_what_it_replaces() -> None:
    old = nn.BatchNorm2d(3, eps=1e-2, momentum=0.3)
    old(randn(4, 3, 5, 5))
    new = plain_norm(3, old).eval()
    assert (new.eps, new.momentum, new.affine) == (1e-2, 0.3, False)
    x = randn(2, 3, 4, 4, seed=1)
    torch.testing.assert_close(new(x), old.eval()(x))  # old's scale is 1 and its shift 0
    assert new.running_mean is not old.running_mean
    assert not plain_norm(3, nn.BatchNorm2d(3, track_running_stats=False)).track_running_stats
    assert plain_norm(3, nn.GroupNorm(3, 3)).track_running_stats


def test_surgery_needs_a_convolution() -> None:
    with pytest.raises(Unsupported, match="no 2-d convolution"):
        replace_norms(nn.Linear(2, 2), Mark)


def test_a_non_persistent_buffer_counts_in_a_modules_identity() -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.register_buffer("factor", torch.tensor(factor), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.factor).flatten(1)

    assert OwnModule("a", Scaled(1.0)).settings() != OwnModule("a", Scaled(2.0)).settings()


class Once(nn.Module):
    """Layers that are listed alike, whatever ``forward`` does with them."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.last = nn.Linear(12, 3)
        self._scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x.flatten(1)) * self._scale


def test_a_module_is_identified_by_what_its_forward_computes() -> None:
    def found(scale: float, dtype: torch.dtype = torch.float32) -> dict[str, str]:
        torch.manual_seed(0)
        return OwnModule("a", Once(scale).to(dtype)).behaviour((3, 2, 2))

    assert found(1.0) == found(1.0)
    assert found(1.0) != found(1.001)
    assert found(1.0)["behaviour"]
    assert OwnModule("a", Once(1.0)).behaviour((3, 5, 5)) == {"behaviour": ""}  # it takes no such image
