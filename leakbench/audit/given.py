"""The user's side of an audit: a network with its weights and input normalisation, images, a recorded update."""

import importlib
import math
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from leakbench import datasets
from leakbench.core.images import centre
from leakbench.core.rng import seeded
from leakbench.datasets import Dataset
from leakbench.datasets.folder import SUFFIXES
from leakbench.errors import BadOption, CorruptAsset, MissingAsset, Unsupported, one_line
from leakbench.models import weights
from leakbench.models.module import OwnModule

NORMALISE, NETWORK = "normalise", "network"
"""The names of an input normalisation and of the network after it."""

ClientMode = Literal["train", "eval"]


def factory(target: str, plugins: Sequence[Path] = ()) -> nn.Module:
    """Return the network that a callable without arguments makes; its draws are seeded, so that it is always the same.

    Args:
        target: ``package.module:name``, looked up in the current folder too; or just ``name`` if exactly one plugin
            has it.
        plugins: Python files that were loaded before (``load_plugin``).

    Raises:
        BadOption: there is no such callable, it fails, or it does not return an ``nn.Module``.
    """
    module_name, colon, name = target.rpartition(":")
    if not name or (colon and not module_name):
        raise BadOption(f"--model {target!r} is not package.module:factory; write one such as my_app.models:build")
    maker: Any
    if colon:
        if str(Path.cwd()) not in sys.path and "" not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            maker = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:  # whatever the user's module raises while it is imported
            raise BadOption(
                f"--model {target!r} (package.module:NAME): import failed: {type(error).__name__}: {one_line(error)}"
            ) from error
        for part in name.split("."):
            maker = getattr(maker, part, None)
    else:
        files = {str(Path(path).resolve()) for path in plugins}
        loaded = [module for module in list(sys.modules.values()) if str(getattr(module, "__file__", "")) in files]
        found = [module for module in loaded if hasattr(module, name)]
        if len(found) != 1:
            raise BadOption(
                f"--model {target!r} is in {len(found)} of the plugins; write package.module:factory, or give "
                "the one --plugin that defines it"
            )
        maker = getattr(found[0], name)
    if not callable(maker):
        raise BadOption(f"--model {target!r}: {module_name!r} has no callable {name!r}; name a function or a class")
    try:
        with seeded("audit", "model"):
            made = maker()
    except (Exception, SystemExit) as error:  # whatever the user's factory raises
        raise BadOption(
            f"--model {target!r} cannot be called without arguments: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not isinstance(made, nn.Module):
        raise BadOption(f"--model {target!r} returns {type(made).__name__}; return an nn.Module")
    return made


@dataclass(frozen=True)
class AuditedNetwork:
    """A network to audit, as its user describes it.

    Attributes:
        label: what pages call it.
        module: from normalised images to logits, with its weights.
        mode: the mode in which clients train it.
        normalise: the input normalisation ``MEAN/STD``, with one number for each channel or one for all, such as
            ``0.5/0.5`` or ``0.49,0.46,0.41/0.23,0.22,0.23``; empty without one.
        checkpoint: the file of its weights; empty if the factory made them.

    Raises:
        BadOption: the normalisation is not of this form, or a standard deviation is not positive.
    """

    label: str
    module: nn.Module
    mode: ClientMode = "train"
    normalise: str = ""
    checkpoint: str = ""

    def __post_init__(self) -> None:
        if self.normalise:
            self._statistics()

    def model(self, channels: int) -> OwnModule:
        """Return the network in its mode, after its input normalisation, as a model of a matrix; it is not copied."""
        module = self.module.train(self.mode == "train")
        if self.normalise:
            mean, std = self._statistics()
            if len(mean) not in (1, channels):
                raise BadOption(f"--normalise has {len(mean)} means, and the images have {channels} channels")
            layer = nn.BatchNorm2d(channels, eps=1e-12, affine=False).eval()  # its statistics stay as they are
            layer.load_state_dict({"running_mean": mean.expand(channels), "running_var": std.square().expand(channels)})
            module = nn.Sequential(OrderedDict({NORMALISE: layer, NETWORK: module}))
        return OwnModule(self.label, module)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each [1] or [channels] float64."""
        try:
            mean, std = (
                torch.tensor([float(n) for n in half.split(",")]).double() for half in self.normalise.split("/")
            )
        except ValueError:
            raise BadOption(
                f"--normalise {self.normalise!r} is not MEAN/STD; write one such as 0.485,0.456,0.406/0.229,0.224,0.225"
            ) from None
        if len(mean) != len(std) or not bool(torch.isfinite(torch.cat([mean, std])).all()) or not bool((std > 0).all()):
            raise BadOption(f"--normalise {self.normalise!r}: give as many means as positive standard deviations")
        return mean, std

    def facts(self) -> list[tuple[str, str]]:
        """Return what a page states of the network, as (name, value)."""
        return [("model", self.label), *([("input normalisation", self.normalise)] if self.normalise else [])]


def load_network(
    target: str, plugins: Sequence[Path] = (), *, mode: ClientMode = "train", normalise: str = "", checkpoint: str = ""
) -> AuditedNetwork:
    """Return the network of a factory (see ``factory``), with the weights of a checkpoint if one is given."""
    found = AuditedNetwork(target, factory(target, plugins), mode, normalise, checkpoint)
    if checkpoint:
        weights.load(found.module, checkpoint)
    return found


def classes_of(own: OwnModule, image_shape: tuple[int, int, int]) -> int:
    """Return how many classes a network has, after one training step on a grey image.

    Raises:
        Unsupported: the network cannot be run, or trained, on one image of this shape; the message says why.
    """
    classes = int(own.logits(torch.full((1, *image_shape), 0.5)).shape[1])
    if classes < 2:
        raise Unsupported(
            f"model {own.label!r} returns {classes} logit; give it one output for each class, at least two"
        )
    network = own.build(image_shape, classes)
    with seeded("audit", "step"):
        try:
            loss = nn.functional.cross_entropy(network(torch.full((1, *image_shape), 0.5)), torch.tensor([0]))
            parameters = [p for p in network.parameters() if p.requires_grad]
            if not parameters:
                raise Unsupported(f"model {own.label!r} has no trained parameter; a client would share nothing")
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            words = one_line(f"{type(error).__name__}: {error}")
            if "more than 1 value per channel" in words:
                raise Unsupported(
                    f"model {own.label!r} normalises by statistics over a batch, which a single image does not have "
                    f"at the smallest layer ({words}); give larger images, or --mode eval"
                ) from error
            raise Unsupported(f"model {own.label!r} cannot take a training step on one image: {words}") from error
    if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
        raise Unsupported(f"model {own.label!r} has a gradient of zeros: no trained parameter changes its loss")
    return classes


@dataclass(frozen=True)
class Audited(Dataset):
    """A dataset whose labels are classes of the audited network, which may have more.

    Attributes:
        inner: the dataset; label i is class i.
        classes: of the network.
    """

    name: ClassVar[str] = "data"
    inner: str
    classes: int

    @property
    def _inner(self) -> Dataset:
        return datasets.parse(self.inner)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self._inner.image_shape

    @property
    def num_classes(self) -> int:
        """How many classes the network has."""
        return self.classes

    def __len__(self) -> int:
        """How many images there are."""
        return len(self._inner)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images [N, C, H, W] in [0, 1] and labels [N] at these indices."""
        return self._inner.load(indices)

    def group(self, index: int) -> int:
        """Return the group of an image."""
        return self._inner.group(index)

    def mean(self) -> Tensor:
        """Return the mean of the public images, [C, H, W]."""
        return self._inner.mean()

    def settings(self) -> dict[str, Any]:
        """Return what identifies the images, and the number of classes."""
        return {**super().settings(), "inner": self._inner.settings()}


def images_of(spec: str, size: int | None) -> Dataset:
    """Return the dataset of a spec such as ``folder:PATH``, with images of this size if one is given."""
    dataset = datasets.parse(spec)
    if size is None:
        return dataset
    if "size" not in datasets.registry.fields(type(dataset)):
        raise BadOption(f"--size {size}: the dataset {dataset.name!r} has one size; leave --size out")
    return datasets.registry.build(dataset.name, {**dataset.options(), "size": size})


@dataclass(frozen=True)
class Recorded(Dataset):
    """The one image of a client whose update was recorded; it need not be known.

    Attributes:
        update: a hash of the update and of what is known of the image.
        shape: (C, H, W) of the image.
        classes: of the network.
    """

    name: ClassVar[str] = "recorded"
    update: str
    shape: tuple[int, int, int] = field(repr=False)
    classes: int = field(repr=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the image."""
        return self.shape

    @property
    def num_classes(self) -> int:
        """How many classes the network has."""
        return self.classes

    def __len__(self) -> int:
        """There is one image."""
        return 1

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Raise Unsupported: the server has seen an update and no image."""
        raise Unsupported(f"dataset {self.name!r} has no images: the server recorded an update; audit it again")

    def mean(self) -> Tensor:
        """Return the grey image: no public image is known."""
        return torch.full(self.shape, 0.5)


@dataclass(frozen=True)
class Update:
    """A recorded update.

    Attributes:
        before: the parameters before a client's local training, by name, and the network's buffers.
        after: the parameters after it; the attacks leave out values that are not finite.
        eps: the relative distance of neighbouring numbers in the coarser of the types that they were recorded in.
    """

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    eps: float

    def rounding(self, name: str) -> float:
        """Return the share of a parameter's change, in norm, that may be rounding of the recorded numbers."""
        finite = torch.isfinite(self.after[name])
        before, after = self.before[name][finite].double(), self.after[name][finite].double()
        change = float((after - before).norm())
        return self.eps * float(before.norm()) / change if change else math.inf


def read_update(network: AuditedNetwork, before: str, after: str) -> Update:
    """Return a recorded update, with the names that the parameters have after the network's input normalisation.

    Each file is a ``.safetensors`` file, a state dict of ``torch.save`` (read with ``weights_only=True``), or an
    ``.npz`` of NumPy arrays; by name, or numbered from 0 in the order of the network's state dict, as Flower sends
    arrays. The file before must have every tensor of the network, the file after it every trained parameter.

    Raises:
        MissingAsset: a file does not exist.
        CorruptAsset: a file cannot be read.
        BadOption: its tensors are not those of the network, or nothing changed between the two.
        Unsupported: no parameter of the network is trained.
    """
    state = network.module.state_dict()
    trained = [name for name, value in network.module.named_parameters() if value.requires_grad]
    if not trained:
        raise Unsupported("the network has no trained parameter: nothing is trained, and a client would share nothing")
    found = []
    eps = 0.0
    for option, path in (("--before", before), ("--after", after)):
        tensors = _read(path, option, list(state))
        weights.check_names(tensors, state, state if option == "--before" else trained, f"{option} {path!r}")
        for name, value in tensors.items():
            if name in trained and not value.is_floating_point():
                raise BadOption(f"{option} {path!r}: {name!r} holds {value.dtype}, no real numbers; record it again")
            if option == "--before" and not bool(torch.isfinite(value).all()):
                raise BadOption(f"{option} {path!r}: {name!r} holds values that are not finite; record it again")
        eps = max(eps, *(torch.finfo(tensors[name].dtype).eps for name in trained))
        found.append({name: value.to(state[name].dtype) for name, value in tensors.items()})
    moves = {name: (found[0][name] - found[1][name]).nan_to_num(0.0, 0.0, 0.0) for name in trained}
    if not any(bool(move.any()) for move in moves.values()):
        raise BadOption(
            f"--before {before!r} and --after {after!r} hold the same trained parameters (values that are not finite "
            "do not count); nothing was trained"
        )
    prefix = f"{NETWORK}." if network.normalise else ""
    arms = [{prefix + name: value for name, value in arm.items()} for arm in found]
    return Update(arms[0], arms[1], eps)


def _read(path: str, option: str, names: Sequence[str]) -> dict[str, Tensor]:
    """Return a file's tensors by the names of the network's state dict."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingAsset(f"{option} {path!r} does not exist; give a .safetensors, a .npz or a state dict")
    state: Mapping[str, Tensor]
    if file.suffix == ".npz":
        try:
            with np.load(file, allow_pickle=False) as arrays:
                state = {key.removeprefix("arr_"): torch.from_numpy(np.array(arrays[key])) for key in arrays.files}
        except Exception as error:  # whatever a damaged or hostile file makes the reader raise
            raise CorruptAsset(
                f"{option} {path!r} cannot be read as plain arrays ({type(error).__name__}); save them with numpy.savez"
            ) from error
    else:
        state = weights.state_dict_of(file, f"{option} {path!r}")
    if set(state) != {str(place) for place in range(len(state))}:
        return dict(state)
    if len(state) != len(names):
        raise BadOption(
            f"{option} {path!r} has {len(state)} arrays without names, and the network's state dict {len(names)}; it "
            "is of another network"
        )
    return {name: state[str(place)] for place, name in enumerate(names)}


def read_image(path: str, image_shape: tuple[int, int, int]) -> Tensor:
    """Return [C, H, W] in [0, 1]: an image file, scaled on its short side, its centre cut out.

    Raises:
        MissingAsset: there is no such file.
        CorruptAsset: it is no image.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingAsset(f"--truth {path!r} does not exist; give an image file ({', '.join(SUFFIXES)})")
    channels, height, width = image_shape
    try:
        image = centre(file, "L" if channels == 1 else "RGB", (width, height))
    except Exception as error:  # whatever a damaged or hostile file makes Pillow raise
        raise CorruptAsset(f"--truth {path!r} cannot be read as an image ({type(error).__name__})") from None
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
