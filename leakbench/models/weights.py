"""A network's weights: drawn from a named distribution, or loaded from a checkpoint, which can state its training."""

import argparse
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leakbench.core.files import draft
from leakbench.errors import BadOption, CorruptAsset, LeakbenchError, MissingAsset, one_line

TRAINING = "leakbench-training-1"
"""The entry of a ``.safetensors`` file's metadata that holds its ``Training``, as JSON."""

_UNIFORM = re.compile(r"uniform\(\s*([0-9.eE+-]+)\s*\)")


def _check_init(init: str) -> str:
    if init != "default":
        _half_width(init)
    return init


def _half_width(init: str) -> float:
    match = _UNIFORM.fullmatch(init)
    try:
        width = float(match[1]) if match else 0.0
    except ValueError:
        width = 0.0
    if not 0 < width < float("inf"):
        raise ValueError(f"{init!r} is no initialisation; write default or uniform(0.5)")
    return width


Init = Annotated[str, AfterValidator(_check_init), Field(description="default | uniform(A)")]
"""``default`` (torch's own) or ``uniform(a)``: every weight and bias drawn from U(-a, a)."""


def initialise(model: nn.Module, init: Init) -> None:
    """Draw every parameter of a new network from torch's global generator, which the caller seeds."""
    if init == "default":
        return
    width = _half_width(init)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-width, width)


@dataclass(frozen=True)
class Training:
    """How far a network was trained, in the words of who trained it.

    Attributes:
        stage: the stage of the training, such as ``untrained`` or ``epoch 12 of 200``.
        test_accuracy: the share of the test images that the network classifies rightly, in [0, 1].
        dataset: the spec of the dataset whose training images it saw and whose test images it was tested on.
        defense: the spec of the defense that it was trained behind; the file then holds the network with the layers
            that the defense adds, and one client's secrets. Empty for a network as the model builds it.

    Raises:
        BadOption: an invalid value.
    """

    stage: str
    test_accuracy: float
    dataset: str
    defense: str = ""

    def __post_init__(self) -> None:
        for name in ("stage", "dataset"):
            text = getattr(self, name)
            if not (isinstance(text, str) and text.strip()):
                raise BadOption(f"{name}={text!r} is not valid; give a word, such as 'epoch 12 of 200' or 'cifar10'")
        accuracy = self.test_accuracy
        if not (isinstance(accuracy, (int, float)) and 0 <= accuracy <= 1):
            raise BadOption(f"test_accuracy={accuracy!r} is not valid; give a share of the test images, from 0 to 1")


@dataclass(frozen=True)
class Checkpoint:
    """A file of trained weights.

    Attributes:
        file: its path, as it was given.
        training: what the file states of its training; None if it states nothing.
    """

    file: str
    training: Training | None = None

    @property
    def defense(self) -> str:
        """The spec of the defense that the network was trained behind; empty for none."""
        return "" if self.training is None else self.training.defense


def save(
    network: nn.Module, path: str | Path, *, stage: str, test_accuracy: float, dataset: str, defense: str = ""
) -> None:
    """Write a network's state dict as a file that ``weights=`` takes and that states how far the network was trained.

    Of a network behind a ``defense`` all tensors are written, secrets that no state dict holds included: the file is
    what a client keeps, and is attacked only behind that defense.

    The same state and words give the same bytes. A file that was there is replaced in one step.

    Args:
        network: any network; it is not changed.
        path: ends in ``.safetensors``; folders are made where needed.
        stage: see ``Training``.
        test_accuracy: see ``Training``; in [0, 1].
        dataset: see ``Training``.
        defense: see ``Training``.

    Raises:
        BadOption: an invalid value, or a path that ends otherwise.
        LeakbenchError: the file cannot be written.
    """
    training = Training(stage, test_accuracy, dataset, defense)
    file = Path(path).expanduser()
    if file.suffix != ".safetensors":
        raise BadOption(f"the path {str(path)!r} does not end in .safetensors; only such a file states its training")
    own = {**network.state_dict(), **dict(network.named_buffers())} if defense else network.state_dict()
    state = {name: value.detach().cpu().clone().contiguous() for name, value in own.items()}
    try:
        # one entry: several would come in another order each time, and a file is known by its bytes
        words = {name: value for name, value in asdict(training).items() if name != "defense" or value}
        with draft(file) as own_file:
            save_file(state, own_file, {TRAINING: json.dumps(words)})
    except (OSError, SafetensorError) as error:
        raise LeakbenchError(f"{path} cannot be written: {one_line(error)}; choose another folder") from None


def stated(path: str) -> Checkpoint:
    """Return the training that a checkpoint states; a file that ``torch.save`` wrote states nothing.

    Raises:
        MissingAsset: the file does not exist.
        CorruptAsset: the file cannot be read, or its statements are invalid.
    """
    file = _existing(path)
    if file.suffix != ".safetensors":
        return Checkpoint(path)
    try:
        with safe_open(file, "pt") as opened:
            words = (opened.metadata() or {}).get(TRAINING)
        return Checkpoint(path, None if words is None else Training(**json.loads(words)))
    except (OSError, SafetensorError, TypeError, ValueError, RecursionError) as error:
        raise CorruptAsset(
            f"the training that the checkpoint {path!r} states cannot be read: {one_line(error)}; "
            "write it with leakbench.models.weights.save"
        ) from None


def load(model: nn.Module, path: str, *, secrets: bool = False) -> None:
    """Load a checkpoint into a network: a ``.safetensors`` file, or a state dict that ``torch.save`` wrote.

    With ``secrets`` the file is that of a network behind a defense, whose every buffer it holds (see ``save``).

    Pickled code is never run: torch files are read with ``weights_only=True``.

    Raises:
        MissingAsset: the file does not exist.
        CorruptAsset: the file is no state dict.
        BadOption: its tensors are not those of this network.
    """
    words = f"the checkpoint {path!r}"
    expected = {**model.state_dict(), **(dict(model.named_buffers()) if secrets else {})}
    state = named_as(state_dict_of(_existing(path), words), model, expected, expected, words)
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(state[name])


WRAPPERS = ("state_dict", "model_state_dict", "model", "ema", "module", "net", "network", "weights", "params")
"""The keys under which checkpoints keep a state dict beside other things, in the order of preference."""

PREFIXES = ("module.", "_module.", "_orig_mod.", "model.", "net.", "network.", "_forward_module.", "base_model.")
"""What wrappers put before the names of a network's tensors."""

_ARRAYS: tuple[Any, ...] = (np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0])
"""The functions that unpickle an array and a number."""

_SAFE: list[Any] = [
    *(np.ndarray, np.dtype, argparse.Namespace),
    *((make, f"numpy.{core}.multiarray.{make.__name__}") for make in _ARRAYS for core in ("core", "_core")),
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
]
"""Harmless types of pickles beside tensors: plain NumPy arrays and numbers, and the options of command lines."""


def state_dict_of(file: Path, words: str) -> dict[str, Tensor]:
    """Return the tensors of a file that ``words`` names in errors; pickled code is never run (``weights_only=True``).

    A ``.safetensors`` file, an ``.npz`` of NumPy arrays, or what ``torch.save`` wrote: a dict of tensors or NumPy
    arrays, also one under a usual key (``WRAPPERS``), or a list of them, which gets the names 0, 1, ... in its order.

    Raises:
        CorruptAsset: the file is no such thing.
    """
    try:
        if file.suffix == ".safetensors":
            state: object = load_file(file)
        elif file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                state = {key.removeprefix("arr_"): np.array(arrays[key]) for key in arrays.files}
        else:
            with torch.serialization.safe_globals(_SAFE):
                state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the readers raise
        raise CorruptAsset(
            f"{words} cannot be read as plain tensors ({type(error).__name__}); "
            "save model.state_dict() with torch.save or safetensors"
        ) from error
    for _ in WRAPPERS:  # a wrapper may hold another one
        if isinstance(state, dict) and not all(isinstance(value, (Tensor, np.ndarray)) for value in state.values()):
            inner = (state[key] for key in WRAPPERS if isinstance(state.get(key), (dict, list, tuple)))
            state = next(inner, state)
    if isinstance(state, (list, tuple)):
        state = {str(place): value for place, value in enumerate(state)}
    if not isinstance(state, dict):
        raise CorruptAsset(f"{words} is not a state dict but {type(state).__name__}; save model.state_dict()")
    for name, value in state.items():
        if not isinstance(value, (Tensor, np.ndarray)) or not isinstance(name, str):
            raise CorruptAsset(
                f"{words} is not a state dict: {name!r} holds {type(value).__name__}; save model.state_dict()"
            )
    return {name: torch.as_tensor(value) for name, value in state.items()}


def named_as(
    state: Mapping[str, Tensor], model: nn.Module, known: Mapping[str, Tensor], needed: Collection[str], words: str
) -> dict[str, Tensor]:
    """Return a state by the names that a network gives its tensors.

    Tensors without names (0, 1, ...) are those of the state dict or of the parameters, in their order. Names may differ
    by prefixes that wrappers add (``PREFIXES``), and by the name ``default`` of an adapter.

    Args:
        state: the tensors of a file.
        model: the network.
        known: the tensors that the file may have, by name.
        needed: the names that it must have.
        words: what errors call the file.

    Raises:
        BadOption: the tensors are not those of the network; the message says which differ.
    """
    if not state:
        raise BadOption(f"{words} has no tensor; save model.state_dict()")
    if state.keys() == {str(place) for place in range(len(state))}:
        found = _numbered([state[str(place)] for place in range(len(state))], model, known, words)
    else:
        found = _renamed(state, known, needed, words)
    for name, value in found.items():
        if value.shape != known[name].shape:
            raise BadOption(
                f"{words} has {name!r} of shape {tuple(value.shape)}, not {tuple(known[name].shape)}; it is of another "
                "network, class count or image size"
            )
    if missing := [name for name in needed if name not in found]:
        raise BadOption(
            f"{words} has {len(found)} of the network's {len(known)} tensors and lacks {_listed(missing)}; save the "
            "whole model.state_dict()"
        )
    return found


def _numbered(values: Sequence[Tensor], model: nn.Module, known: Mapping[str, Tensor], words: str) -> dict[str, Tensor]:
    """Return tensors without names by the names of the state dict, of the parameters, or of the trained ones."""
    parameters = [name for name, _ in model.named_parameters() if name in known]
    trained = [name for name, value in model.named_parameters() if name in known and value.requires_grad]
    fitting = [names for names in (list(known), parameters, trained) if len(names) == len(values)]
    for names in fitting:
        if all(value.shape == known[name].shape for name, value in zip(names, values)):
            break
    else:
        if not fitting:
            raise BadOption(
                f"{words} has {len(values)} arrays without names, and the network's state dict {len(known)} "
                f"({len(parameters)} of them parameters); it is of another network"
            )
        names = fitting[0]
    return dict(zip(names, values))


def _renamed(
    state: Mapping[str, Tensor], known: Mapping[str, Tensor], needed: Collection[str], words: str
) -> dict[str, Tensor]:
    """Return named tensors by the network's names for them."""
    best: dict[str, str] = {}  # name in the file -> the network's
    for theirs in _stripped(list(state)):
        for ours in _stripped(list(known)):
            names = {short.replace(".default.", "."): name for short, name in zip(ours, known)}
            found = {
                name: names[short.replace(".default.", ".")]
                for short, name in zip(theirs, state)
                if short.replace(".default.", ".") in names
            }
            if len(found) == len(state) and set(needed) <= set(found.values()):
                return {ours_name: state[name] for name, ours_name in found.items()}
            best = max(best, found, key=len)
    extra = [name for name in state if name not in best]
    if not extra:  # the caller says what is missing
        return {ours: state[name] for name, ours in best.items()}
    missing = [name for name in needed if name not in set(best.values())]
    problem = f"has the extra tensor {_listed(extra)}" + (f" and lacks {_listed(missing)}" if missing else "")
    more, less = _prefix(state), _prefix(known)
    if more and all(name.removeprefix(more) in known for name in state):
        problem, fix = f"has names that all begin with {more!r}", "remove this prefix"
    elif less and all(less + name in known for name in state):
        problem, fix = f"has no name that begins with {less!r}, as all of the network's do", "add this prefix"
    elif any("lora_" in name for name in extra) and not any("lora_" in name for name in known):
        fix = "these are adapters (LoRA) and the network has none: give the network with its adapters"
    else:
        fix = "it is of another network"
    raise BadOption(f"{words} {problem}; {fix}")


def _stripped(names: Sequence[str]) -> Iterator[list[str]]:
    """Yield names as they are, and then after each removal of a prefix that all of them have."""
    left = list(names)
    while True:
        yield left
        prefix = next((one for one in PREFIXES if all(name.startswith(one) for name in left)), None)
        if prefix is None:
            return
        left = [name.removeprefix(prefix) for name in left]


def _prefix(names: Collection[str]) -> str:
    """Return the beginning that all names have in common, to its last dot."""
    first, last = min(names), max(names)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last)))
    return first[: first.rfind(".", 0, same) + 1]


def _listed(names: Sequence[str]) -> str:
    """Return the first names, quoted, and how many others there are."""
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} others"


def fingerprint(path: str) -> str:
    """Return 16 hex digits of the file's SHA-256, so that a changed checkpoint makes new trials."""
    with _existing(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingAsset(f"the checkpoint {path!r} does not exist; give weights= the path of a state dict")
    return file
