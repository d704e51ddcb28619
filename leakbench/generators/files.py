"""The file of a trained DCGAN: its weights, its training data, and two mean images, in one safetensors file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from leakbench.core.files import draft
from leakbench.errors import BadOption, CorruptAsset, one_line
from leakbench.generators.networks import Decoder

FORMAT = "leakbench-dcgan-1"


@dataclass(frozen=True)
class Trained:
    """The description of the decoder in a file.

    Attributes:
        data: the spec of the dataset on whose training split it was trained.
        licence: the terms of the weights.
        command: the command that made it.
        steps: number of training steps.
        seed: of every draw of the training.
        latent: the size of the latent, which follows N(0, I).
        classes: number of classes.
        channels: 1 or 3.
        width: the channels at 4 x 4 pixels.
    """

    data: str
    licence: str
    command: str
    steps: int
    seed: int
    latent: int
    classes: int
    channels: int
    width: int

    def decoder(self) -> Decoder:
        """Return the network, its weights still to be filled in."""
        return Decoder(self.latent, self.classes, self.channels, self.width)


def write(file: Path, trained: Trained, decoder: Decoder, seen: Tensor, unseen: Tensor) -> None:
    """Write a decoder in half precision.

    Args:
        file: replaced in one step.
        trained: its description.
        decoder: the network, in evaluation mode.
        seen: [C, H, W], the mean of the images it was trained on, at their own size.
        unseen: [C, H, W], the mean of the other split, which is attacked.
    """
    tensors = {
        f"decoder.{name}": (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in decoder.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    tensors |= {"mean.seen": seen.float().contiguous(), "mean.unseen": unseen.float().contiguous()}
    # one entry: several would come in another order each time, and the same weights must give the same file
    with draft(file) as own:
        save_file(tensors, own, {FORMAT: json.dumps(asdict(trained))})


def read(file: Path) -> tuple[Trained, dict[str, Tensor], dict[str, Tensor]]:
    """Return a file's description, its decoder's state (float32), and its mean images ``seen`` and ``unseen``.

    Raises:
        BadOption: the file does not exist.
        CorruptAsset: ``leakbench train generator`` did not write the file, or it is damaged.
    """
    if not file.is_file():
        raise BadOption(
            f"the weight file {str(file)!r} does not exist; give a file written by `leakbench train generator`"
        )
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            if FORMAT not in metadata:
                raise ValueError(f"it is not of the format {FORMAT!r}")
            trained = Trained(**json.loads(metadata[FORMAT]))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        state = {
            name.removeprefix("decoder."): value.float()
            for name, value in tensors.items()
            if name.startswith("decoder.")
        }
        means = {name: tensors[f"mean.{name}"].float() for name in ("seen", "unseen")}
        with torch.device("meta"):
            shapes = {
                name: value.shape
                for name, value in trained.decoder().state_dict().items()
                if not name.endswith("num_batches_tracked")
            }
        if {name: value.shape for name, value in state.items()} != shapes:
            raise ValueError("its tensors do not belong to the network that it describes")
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            raise ValueError("it holds values that are not finite")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptAsset(
            f"the weight file {str(file)!r} cannot be used: {one_line(error)}; "
            "train it again with `leakbench train generator`"
        ) from None
    return trained, state, means


def decoder_of(trained: Trained, state: dict[str, Tensor]) -> Decoder:
    """Return the decoder with its weights, in evaluation mode and without gradients."""
    decoder = trained.decoder()
    decoder.load_state_dict(state, strict=False)
    return decoder.eval().requires_grad_(False)
