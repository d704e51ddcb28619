"""The user's side of an audit: a network with its weights and input normalisation, images, a recorded update."""

import importlib
import inspect
import math
import sys
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from leakbench import datasets
from leakbench.core.component import LATER
from leakbench.core.rng import generator, seeded
from leakbench.core.text import plural
from leakbench.datasets import Dataset
from leakbench.datasets.arrays import SUFFIXES as ARRAY_SUFFIXES
from leakbench.datasets.folder import SUFFIXES, Folder
from leakbench.datasets.images import READ_AT_ONCE, check_indices, sides
from leakbench.datasets.pixels import read_image_file
from leakbench.errors import BadOption, MissingAsset, Unsupported, one_line
from leakbench.gradients.evaluate import working
from leakbench.gradients.losses import (
    CROSS_ENTROPY,
    LossFunction,
    last_function,
    loss_named,
    main_output,
    raw_outputs,
    training_loss,
)
from leakbench.gradients.normalisation import lone_value
from leakbench.gradients.plain import without_checkpointing
from leakbench.models import weights
from leakbench.models.module import OwnModule, network_dtype, unwrapped

NORMALISE, NETWORK = "normalise", "network"
"""The names of an input normalisation and of the network after it."""

ClientMode = Literal["train", "eval"]

SHOWN_CLASSES = 4
"""The most names of classes in an error."""


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
        loss: what clients train it with: a name in ``LOSSES``, or a function of one's own (``Head``).

    Raises:
        BadOption: the normalisation is not of this form, or a standard deviation is not positive.
    """

    label: str
    module: nn.Module
    mode: ClientMode = "train"
    normalise: str = ""
    checkpoint: str = ""
    loss: str | LossFunction = CROSS_ENTROPY

    def __post_init__(self) -> None:
        if self.normalise:
            self._statistics()

    @property
    def lazy(self) -> bool:
        """Whether layers take their shapes, and their values, only from the first image."""
        return any(map(is_lazy, self.module.parameters()))

    def at(self, image_shape: tuple[int, int, int]) -> "AuditedNetwork":
        """Return the network with its lazy layers initialised for images of a shape, and then its checkpoint loaded."""
        if not self.lazy:
            return self
        module = OwnModule(self.label, self.module).initialised(image_shape)
        if self.checkpoint:
            weights.load(module, self.checkpoint)
        return replace(self, module=module)

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
        return OwnModule(self.label, module, self.loss)

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

    def facts(self, loss: str) -> list[tuple[str, str]]:
        """Return what a page states of the network, as (name, value); ``loss`` is its loss in words."""
        kind, exact = (str(one).removeprefix("torch.") for one in (network_dtype(self.module), working(self.module)))
        precision = f"{kind}, in which clients compute; the attackers compute in {exact} or finer"
        return [
            ("model", self.label),
            *([("input normalisation", self.normalise)] if self.normalise else []),
            *([("precision", precision)] if kind != "float32" else []),
            *([("loss", loss)] if self.loss != CROSS_ENTROPY else []),
        ]


def load_network(
    target: str,
    plugins: Sequence[Path] = (),
    *,
    mode: ClientMode = "train",
    normalise: str = "",
    checkpoint: str = "",
    loss: str = CROSS_ENTROPY,
) -> AuditedNetwork:
    """Return the network of a factory (see ``factory``), with the weights of a checkpoint if one is given.

    Args:
        target: of the network.
        plugins: as for ``factory``.
        mode: see ``AuditedNetwork``, also for ``normalise`` and ``checkpoint``.
        normalise: see there.
        checkpoint: see there.
        loss: a name in ``LOSSES``, or ``package.module:function``.

    Raises:
        BadOption: one of them cannot be used.
    """
    module = unwrapped(factory(target, plugins), f"--model {target!r}")
    found = AuditedNetwork(target, module, mode, normalise, checkpoint, loss_function(loss))
    if checkpoint and not found.lazy:
        weights.load(found.module, checkpoint)
    return found


def loss_function(target: str) -> str | LossFunction:
    """Return a loss by its name in ``LOSSES``, or the function ``package.module:name``.

    Raises:
        BadOption: there is none.
    """
    if ":" not in target:
        return loss_named(target)
    module_name, _, name = target.rpartition(":")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except (Exception, SystemExit) as error:  # whatever the user's module raises while it is imported
        raise BadOption(f"--loss {target!r}: import failed: {type(error).__name__}: {one_line(error)}") from error
    if not inspect.isfunction(found):
        raise BadOption(f"--loss {target!r}: {module_name!r} has no function {name!r}; name a function")
    return found


def output_note(own: OwnModule, image_shape: tuple[int, int, int]) -> str:
    """Return what a page says of a network that ends in a softmax or sigmoid and is trained by a loss on logits.

    It is empty if there is nothing to say, or if the network cannot be run.
    """
    network = own.initialised(image_shape).eval()
    try:
        with without_checkpointing(), raw_outputs():
            last = last_function(main_output(network(torch.full((1, *image_shape), 0.5, dtype=own.dtype))))
    except Exception:  # whatever the user's network raises
        return ""
    head = own.head(image_shape)
    if head.loss == "nll" and last != "log_softmax":
        return "the loss nll takes log-probabilities, and the network does not end in a log-softmax: check the loss"
    if last not in ("softmax", "sigmoid") or head.loss not in (CROSS_ENTROPY, "bce"):
        return ""
    return (
        f"the network ends in a {last}, and the loss, {head.words}, applies one again; its gradients are small. If "
        "clients train with another loss, state it (--loss); if they train like this, remove the last layer"
    )


TRIED = 4
"""The most images of noise on which a training step of several is tried."""


def classes_of(own: OwnModule, image_shape: tuple[int, int, int], images: int = 1) -> int:
    """Return how many classes a network has, after one training step on a grey image, or on images of noise.

    Args:
        own: the network.
        image_shape: of an image.
        images: on how many images clients train, as far as that is stated.

    Raises:
        Unsupported: the network cannot be run, or trained, on these; the message says why.
    """
    classes = int(own.logits(torch.full((1, *image_shape), 0.5)).shape[1])
    if images == 1:
        tried = torch.full((1, *image_shape), 0.5, dtype=own.dtype)
    else:
        rng = generator("audit", "noise")
        tried = torch.rand(min(images, TRIED), *image_shape, generator=rng).to(own.dtype)
    network = own.build(image_shape, classes)
    with seeded("audit", "step"):
        try:
            with without_checkpointing():
                loss = training_loss(network, tried, torch.zeros(len(tried), dtype=torch.int64))
            parameters = [p for p in network.parameters() if p.requires_grad]
            if not parameters:
                raise Unsupported(f"model {own.label!r} has no trained parameter; a client would share nothing")
            gradients = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
        except Unsupported:
            raise
        except Exception as error:  # whatever the user's network raises
            words = one_line(f"{type(error).__name__}: {error}")
            if lone_value(error):
                raise Unsupported(
                    f"model {own.label!r} normalises by statistics over a batch, which a single image does not have "
                    f"at the smallest layer ({words}); give larger images, --images if an update is of several, or "
                    "--mode eval"
                ) from error
            on = "one image" if images == 1 else f"{len(tried)} images"
            raise Unsupported(f"model {own.label!r} cannot take a training step on {on}: {words}") from error
    if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
        raise Unsupported(f"model {own.label!r} has a gradient of zeros: no trained parameter changes its loss")
    return classes


LEFT_OUT = -1
"""In ``Audited.outputs``: the class is left out."""


@dataclass(frozen=True)
class Audited(Dataset):
    """A dataset whose labels are classes of the audited network, which may have more.

    Attributes:
        inner: the dataset.
        classes: of the network.
        outputs: for each class of the dataset the network's output, or ``LEFT_OUT``, whose images do not count; empty
            if class i is output i.
    """

    name: ClassVar[str] = "data"
    inner: str
    classes: int
    outputs: tuple[int, ...] = field(default=(), metadata=LATER)

    @property
    def _inner(self) -> Dataset:
        return datasets.parse(self.inner)

    @cached_property
    def _kept(self) -> Sequence[int]:
        """The indices of the images whose classes are not left out."""
        everything = range(len(self._inner))
        if LEFT_OUT not in self.outputs:
            return everything
        labels = labels_of_images(self._inner)
        return [index for index in everything if self.outputs[labels[index]] != LEFT_OUT]

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
        return len(self._kept)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images [N, C, H, W] in [0, 1] and labels [N] at these indices."""
        check_indices(self.inner, len(self), indices)
        images, labels = self._inner.load([self._kept[index] for index in indices])
        return images, torch.tensor(self.outputs)[labels] if self.outputs else labels

    def group(self, index: int) -> int:
        """Return the group of an image."""
        return self._inner.group(self._kept[index])

    def note(self) -> str:
        """Return the dataset's warning."""
        return self._inner.note()

    def mean(self) -> Tensor:
        """Return the mean of the public images, [C, H, W]."""
        return self._inner.mean()

    def settings(self) -> dict[str, Any]:
        """Return what identifies the images, and the number of classes."""
        return {**super().settings(), "inner": self._inner.settings()}


def labels_of_images(dataset: Dataset) -> list[int]:
    """Return the label of every image of a dataset."""
    if isinstance(dataset, Folder):
        return [label for _, label in dataset.listing().attacked]
    indices = range(len(dataset))
    blocks = [dataset.load(indices[start : start + READ_AT_ONCE])[1] for start in indices[::READ_AT_ONCE]]
    return [int(label) for labels in blocks for label in labels]


def audited(inner: Dataset, outputs: int, first: int | None = None, order: str | None = None) -> Audited:
    """Return a dataset as one of a network's classes.

    Args:
        inner: the dataset.
        outputs: how many classes the network has.
        first: how many classes of the dataset count, the first ones; they are the first outputs of the network.
        order: a text file with the name of one class of a folder in each line, in the order of the outputs; of a line
            with tabs, the text before the first counts.

    Raises:
        BadOption: the classes are not as many as the outputs, and neither ``first`` nor ``order`` says what they are.
    """
    spec, classes = datasets.spec(inner), inner.num_classes
    if first is not None and order is not None:
        raise BadOption(f"--first {first} and --classes {order!r} are both given; leave one of them out")
    if order is not None:
        return Audited(spec, outputs, _ordered(inner, outputs, order))
    if first is not None:
        if not 1 <= first <= min(classes, outputs):
            raise BadOption(
                f"--first {first}: the data has {classes_words(classes)} and the network {outputs} outputs; give 1 to "
                f"{min(classes, outputs)}"
            )
        left = classes - first
        return Audited(spec, outputs, (*range(first), *[LEFT_OUT] * left) if left else ())
    if classes != outputs:
        raise BadOption(
            f"--data {spec!r} has {classes_words(classes)}{_named(inner)}, and the network {outputs} outputs; give "
            "--classes FILE with the folder's name of each output, or --first N if the first N classes are the first N "
            "outputs"
        )
    return Audited(spec, outputs)


def classes_words(count: int) -> str:
    """Return ``1 class`` or ``4 classes``."""
    return f"{count} class{'es' * (count != 1)}"


def _named(inner: Dataset) -> str:
    """Return the first names of a folder's classes, and its split, in brackets; empty for another dataset."""
    if not isinstance(inner, Folder):
        return ""
    listing = inner.listing()
    names = ", ".join(listing.classes[:SHOWN_CLASSES]) + (", ..." if len(listing.classes) > SHOWN_CLASSES else "")
    return f" ({names}{f'; split {listing.split}' if listing.split else ''})"


def _ordered(inner: Dataset, outputs: int, order: str) -> tuple[int, ...]:
    """Return the output of each class of a folder by the file of names."""
    if not isinstance(inner, Folder):
        raise BadOption(f"--classes {order!r} names folders, and the dataset {inner.name!r} has none; give --first N")
    try:
        lines = Path(order).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadOption(
            f"--classes {order!r} cannot be read ({type(error).__name__}); write one class folder a line, in UTF-8"
        ) from None
    names = [line.partition("\t")[0].strip() for line in lines if line.strip()]
    if len(names) != outputs or len(set(names)) != outputs:
        raise BadOption(
            f"--classes {order!r} names {len(set(names))} different classes in {plural(len(names), 'line')}, and the "
            f"network has {outputs} outputs; write one line for each output"
        )
    place = {name: output for output, name in enumerate(names)}
    if unknown := [name for name in inner.listing().classes if name not in place]:
        raise BadOption(
            f"--classes {order!r} does not name the class folder {unknown[0]!r}; add it or remove the folder"
        )
    found = tuple(place[name] for name in inner.listing().classes)
    return () if found == tuple(range(len(found))) else found


def images_of(
    spec: str, size: str | None = None, channels: int | None = None, network: AuditedNetwork | None = None
) -> Dataset:
    """Return the dataset of a spec such as ``folder:PATH``, of the path of a folder, or of that of an ``.npz`` file.

    Args:
        spec: the spec or path.
        size: the size of the images (``datasets.images.sides``); that of the spec, or the dataset's own, by default.
        channels: of the images; those of the spec, of the network's first layer, or the dataset's own, by default.
        network: the network that takes them.

    Raises:
        BadOption: there is no such dataset, or it has no images of this size and with these channels.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        dataset: Dataset = datasets.registry.build("folder", {"path": spec})
    elif path.suffix in ARRAY_SUFFIXES and (path.is_file() or ":" not in spec):
        dataset = datasets.registry.build("npz", {"path": spec})
    else:
        dataset = datasets.parse(spec)
    known = datasets.registry.fields(type(dataset))
    for option, value in (("size", size), ("channels", channels)):
        if value is not None and option not in known:
            raise BadOption(f"--{option} {value}: the dataset {dataset.name!r} has one {option}; leave --{option} out")
    options = dataset.options()
    given = {} if size is None else {"size": str(size)}
    if channels is not None:
        given["channels"] = str(channels)
    elif network is not None and "channels" in known and options["channels"] == known["channels"].default:
        own = first_channels(network.module)
        if own is not None and own != dataset.image_shape[0]:
            given["channels"] = str(own)
    return datasets.registry.build(dataset.name, {**options, **given}) if given else dataset


def first_channels(module: nn.Module, pixels: int | None = None) -> int | None:
    """Return how many channels a network takes, by its first layer; None if that does not show it.

    Args:
        module: the network.
        pixels: of a channel of its images, by which a linear layer shows it; None if that is not known.
    """
    first = next((one for one in module.modules() if next(one.parameters(recurse=False), None) is not None), None)
    if isinstance(first, nn.Linear) and pixels and first.in_features in (pixels, 3 * pixels):
        return first.in_features // pixels
    if not isinstance(first, nn.Conv2d) or isinstance(first, nn.LazyConv2d):
        return None
    return first.in_channels


def shape_of(size: str, channels: int | None, network: AuditedNetwork) -> tuple[int, int, int]:
    """Return (C, H, W) of the image of a recorded update.

    Raises:
        BadOption: the size is not one.
    """
    try:
        height, width = sides(size)
    except ValueError as error:
        raise BadOption(f"--size {size}: {error}") from None
    if min(height, width) < 1:
        raise BadOption(f"--size {size}: the sides are at least 1")
    return channels or first_channels(network.module, height * width) or 3, height, width


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


RecordedKind = Literal["weights", "delta", "gradient"]
"""What ``--after`` holds: the weights after the training, these less the weights before, or the loss's gradient."""

SAME_WEIGHTS = 0.5
"""Weights before and after a client's training have at least this cosine; other values than weights have less."""


@dataclass(frozen=True)
class Update:
    """A recorded update.

    Attributes:
        before: the parameters before a client's local training, by name, and the network's buffers.
        change: for each parameter that was sent, its value before less that after, or its gradient; the attacks leave
            out values that are not finite.
        rounding: for each of these the share of the change, in norm, that may be rounding of the recorded numbers.
        trained: how many parameters (tensors) are trained; the others of these were not sent.
        sent: the buffers that were sent, such as running statistics, by name.
        kind: what the file after holds.
        precision: the name of the coarsest number type that holds every value of one of the two files, such as
            ``float16``, whatever the type in which the file stores them.
    """

    before: Mapping[str, Tensor]
    change: Mapping[str, Tensor]
    rounding: Mapping[str, float]
    trained: int
    sent: Mapping[str, Tensor] = field(default_factory=dict)
    kind: RecordedKind = "weights"
    precision: str = "float32"

    @property
    def eps(self) -> float:
        """The relative distance between neighbouring numbers of ``precision``."""
        return float(torch.finfo(getattr(torch, self.precision)).eps)


def read_update(
    network: AuditedNetwork, before: str, after: str, kind: RecordedKind = "weights", *, finite: bool = False
) -> Update:
    """Return a recorded update, with the names that the parameters have after the network's input normalisation.

    Each file is a ``.safetensors`` file, an ``.npz`` of NumPy arrays or a file of ``torch.save`` (``state_dict_of``);
    by name, or numbered from 0 in the order of the network's state dict, as Flower sends arrays, or of its parameters.
    The file before must have every tensor of the network. The parameters that the file after lacks were not sent. With
    ``finite``, its other values may be NaN or infinite.

    Raises:
        MissingAsset: a file does not exist.
        CorruptAsset: a file cannot be read.
        BadOption: its tensors are not those of the network, nothing changed between the two, or the file after holds
            something else than ``kind`` says.
        Unsupported: no parameter of the network is trained.
    """
    state = network.module.state_dict()
    trained = [name for name, value in network.module.named_parameters() if value.requires_grad]
    if not trained:
        raise Unsupported("the network has no trained parameter: nothing is trained, and a client would share nothing")
    first = _tensors(network.module, before, "--before", state)
    second = _tensors(network.module, after, "--after", ())
    for name, value in first.items():
        if not bool(torch.isfinite(value).all()):
            raise BadOption(f"--before {before!r}: {name!r} holds values that are not finite; record it again")
    sent = [name for name in trained if name in second]
    if not sent:
        raise BadOption(f"--after {after!r} holds none of the network's {len(trained)} trained parameters; record them")
    for option, path, tensors in (("--before", before, first), ("--after", after, second)):
        if wrong := next((name for name in sent if not _is_real(tensors[name].dtype)), None):
            kept = tensors[wrong].dtype
            raise BadOption(
                f"{option} {path!r}: {wrong!r} holds {kept}, no real numbers of at least 16 bits; record it again"
            )
    unknown = {name: int((~torch.isfinite(second[name])).sum()) for name in sent}
    if (wrong := next((name for name, count in unknown.items() if count), None)) and not finite:
        raise BadOption(
            f"--after {after!r}: {sum(unknown.values()):,} values are not finite (NaN or infinite), the first in "
            f"{wrong!r}; record it again, or give --finite to attack the other values"
        )
    _check_kind(network.module, kind, {name: (first[name], second[name]) for name in sent}, f"--after {after!r}")
    change, rounding = {}, {}
    precision = max((_precision([tensors[name] for name in sent]) for tensors in (first, second)), key=_eps)
    eps = _eps(precision)
    for name in sent:
        old, new = first[name].double(), second[name].double()
        change[name] = {"weights": old - new, "delta": -new, "gradient": new}[kind]
        size = float(change[name].nan_to_num(0.0, 0.0, 0.0).norm())
        whole = torch.isfinite(new)
        held = float(old[whole].norm()) if kind == "weights" else size
        rounding[name] = eps * held / size if size else math.inf
    if kind == "weights" and not any(bool(second[name].nan_to_num(0.0, 0.0, 0.0).any()) for name in sent):
        raise BadOption(f"--after {after!r} holds only zeros, which no training leaves; record it again")
    if not any(bool(value.nan_to_num(0.0, 0.0, 0.0).any()) for value in change.values()):
        problem = f"--before {before!r} and --after {after!r} hold the same trained parameters"
        problem = problem if kind == "weights" else f"--after {after!r} holds only zeros"
        raise BadOption(f"{problem} (values that are not finite do not count); nothing was trained")
    prefix, exact = f"{NETWORK}." if network.normalise else "", working(network.module)
    return Update(
        {prefix + name: value.to(exact) if value.is_floating_point() else value for name, value in first.items()},
        {prefix + name: value.to(exact) for name, value in change.items()},
        {prefix + name: value for name, value in rounding.items()},
        len(trained),
        {prefix + name: second[name] for name, _ in network.module.named_buffers() if name in second},
        kind,
        str(precision).removeprefix("torch."),
    )


def _is_real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def _precision(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the coarsest number type that holds every finite value of a record as it is."""
    values = torch.cat([value.flatten().double() for value in tensors])
    values = values[torch.isfinite(values)]
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    return next((kind for kind in kinds if torch.equal(values.to(kind).double(), values)), torch.float64)


def _tensors(module: nn.Module, path: str, option: str, needed: Collection[str]) -> dict[str, Tensor]:
    """Return a file's tensors by the names of the network's state dict."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingAsset(f"{option} {path!r} does not exist; give a .safetensors, a .npz or a state dict")
    words = f"{option} {path!r}"
    tensors = {name: value.to_dense() for name, value in weights.state_dict_of(file, words).items()}
    return weights.named_as(tensors, module, module.state_dict(), needed, words)


def _check_kind(module: nn.Module, kind: RecordedKind, pairs: Mapping[str, tuple[Tensor, Tensor]], words: str) -> None:
    """Raise BadOption if the file after holds weights, a difference or a gradient, and ``kind`` says another.

    Args:
        module: the network.
        kind: what it should hold.
        pairs: for each parameter its value before, and what the file after holds.
        words: what errors call the file.
    """
    old, new = (torch.cat([pair[place].double().flatten() for pair in pairs.values()]) for place in (0, 1))
    old, new = old[torch.isfinite(new)], new[torch.isfinite(new)]
    if not bool(old.any()) or not bool(new.any()):
        return
    alike = float(torch.cosine_similarity(old, new, dim=0))
    signs = _signs(module, pairs)
    if kind == "weights" and alike < SAME_WEIGHTS:
        ways = "--delta if it is the weights after less those before, --gradient if it is a gradient"
        raise BadOption(
            f"{words} does not hold weights (their cosine with those before is {alike:.2f}), but a difference or a "
            f"gradient; give {f'--{signs}' if signs else ways}"
        )
    if kind != "weights" and alike > 1 - (1 - SAME_WEIGHTS) / 10:
        raise BadOption(f"{words} holds weights (their cosine with those before is {alike:.2f}); leave --{kind} out")
    if kind != "weights" and signs not in ("", kind):
        raise BadOption(f"{words} has the signs of a {signs} in the last layer's bias; give --{signs}, not --{kind}")


def _signs(module: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> RecordedKind | Literal[""]:
    """Return ``delta`` or ``gradient`` if the last linear layer's bias has the signs of one image's; else nothing.

    In the gradient of cross-entropy by the logits only the entry of the label is negative.
    """
    names = [f"{name}.bias" for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    bias = pairs[names[-1]][1] if names and names[-1] in pairs else torch.zeros(0)
    negative = int((bias < 0).sum())
    if len(bias) < 3 or not bool(bias.all()):
        return ""
    return "gradient" if negative == 1 else "delta" if negative == len(bias) - 1 else ""


def read_image(path: str, image_shape: tuple[int, int, int]) -> Tensor:
    """Return [C, H, W] in [0, 1]: an image file, read as the images of a folder (``read_image_file``).

    Raises:
        MissingAsset: there is no such file.
        CorruptAsset: it is no image, or the range of its pixels is not known.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingAsset(f"--truth {path!r} does not exist; give an image file ({', '.join(SUFFIXES)})")
    if image_shape[0] not in (1, 3, 4):
        raise BadOption(f"--channels {image_shape[0]}: an image file for --truth has 1, 3 or 4; leave --truth out")
    return read_image_file(file, image_shape, words=f"--truth {path!r}")


def image_names(path: str) -> tuple[str, ...]:
    """Return the image files of a folder and its subfolders, as paths within it, in their order.

    Raises:
        MissingAsset: the folder has no image file.
    """
    folder = Path(path).expanduser()
    names = sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.suffix.lower() in SUFFIXES)
    if not names:
        raise MissingAsset(f"--truth {path!r} is a folder without image files ({', '.join(SUFFIXES)}); put them there")
    return tuple(names)


def read_images(path: str, image_shape: tuple[int, int, int]) -> Tensor:
    """Return [N, C, H, W] in [0, 1]: the image files of a folder, in the order of ``image_names`` (``read_image``).

    Raises:
        MissingAsset: the folder has no image file.
    """
    folder = Path(path).expanduser()
    return torch.stack([read_image(str(folder / name), image_shape) for name in image_names(path)])
