"""A network's weights: drawn from a named distribution, or loaded from a checkpoint, which can state its training."""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

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
    state = state_dict_of(_existing(path), f"the checkpoint {path!r}")
    expected = {**model.state_dict(), **(dict(model.named_buffers()) if secrets else {})}
    check_names(state, expected, expected, f"the checkpoint {path!r}")
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(state[name])


def state_dict_of(file: Path, words: str) -> Mapping[str, Tensor]:
    """Return the tensors of a file that ``words`` names in errors; pickled code is never run (``weights_only=True``).

    Raises:
        CorruptAsset: the file is no state dict.
    """
    try:
        state: object = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # whatever a damaged or hostile file makes the readers raise
        raise CorruptAsset(
            f"{words} cannot be read as plain tensors ({type(error).__name__}); "
            "save model.state_dict() with torch.save or safetensors"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CorruptAsset(f"{words} is not a state dict; save model.state_dict()")
    return state


def check_names(state: Mapping[str, Tensor], known: Mapping[str, Tensor], needed: Collection[str], words: str) -> None:
    """Raise BadOption unless a state holds every needed tensor and no unknown one, of the shapes that are known."""
    for name in needed:
        if name not in state:
            raise BadOption(f"{words} has no tensor {name!r}; it is of another network")
    for name, value in state.items():
        if name not in known:
            raise BadOption(f"{words} has the extra tensor {name!r}; it is of another network")
        if value.shape != known[name].shape:
            raise BadOption(
                f"{words} has {name!r} of shape {tuple(value.shape)}, not {tuple(known[name].shape)}; it is of another "
                "network, class count or image size"
            )


def fingerprint(path: str) -> str:
    """Return 16 hex digits of the file's SHA-256, so that a changed checkpoint makes new trials."""
    with _existing(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingAsset(f"the checkpoint {path!r} does not exist; give weights= the path of a state dict")
    return file
