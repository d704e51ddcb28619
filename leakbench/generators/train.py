"""Train a class-conditional DCGAN on the split of a dataset that is not attacked.

The losses are the hinge losses of Lim and Ye 2017 (arXiv 1705.02894); the decoder that is kept is the exponential
moving average of the trained one. Every step draws from its own seed, so that a training that was stopped is resumed
with the same weights.
"""

import copy
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
from pydantic import Field, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from leakbench import datasets
from leakbench.core.files import draft
from leakbench.core.lock import alone
from leakbench.core.rng import generator, seeded
from leakbench.datasets import Dataset
from leakbench.datasets.images import ByteImages, read
from leakbench.datasets.stored import Stored
from leakbench.errors import BadOption, CorruptAsset
from leakbench.generators.dcgan import SIDE, ConditionalNorm, Decoder, Trained, write

WEIGHTS = "generator.safetensors"
CHECKPOINT = "checkpoint.pt"

OnStep = Callable[[int, float, float], None]
"""Called after every step with the number of steps done and the losses of critic and decoder."""


@dataclass(frozen=True)
class GeneratorRecipe:
    """Everything that the weights depend on.

    Attributes:
        dataset: the spec of a dataset with a training and a test split.
        steps: updates of the decoder; the critic is updated as often.
        batch: number of real images in a step, and of generated ones.
        seed: of weights and draws.
        lr: the step size of Adam (betas 0.5, 0.999) for both networks.
        flip: mirror half of the real images.
        latent: the size of the latent, N(0, I).
        width: the channels of both networks at 4 x 4 pixels.
        ema: the decay of the moving average of the decoder's weights.
        precision: ``bfloat16`` runs convolutions and products in it, several times as fast if the processor has
            instructions for it; weights, losses and Adam stay in float32.
    """

    dataset: str
    steps: PositiveInt = 7000
    batch: Annotated[int, Field(ge=2)] = 64
    seed: Annotated[int, Field(ge=0)] = 0
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    flip: bool = False
    latent: PositiveInt = 64
    width: Annotated[int, Field(ge=8, multiple_of=4)] = 192
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(GeneratorRecipe, include_extras=True).items():
            value = getattr(self, name)
            try:
                TypeAdapter(hint).validate_python(value)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise BadOption(f"training: {name}={value!r} is not valid: {reason}") from None


def splits(spec: str) -> tuple[Stored, Stored]:
    """Return the dataset's training split, which a generator may see, and its test split, which is attacked.

    Raises:
        BadOption: the dataset has no two splits, or the spec asks for the split that is attacked.
    """
    dataset: Dataset = datasets.parse(spec)
    if not isinstance(dataset, Stored):
        known = [name for name in datasets.names() if issubclass(datasets.get(name), Stored)]
        raise BadOption(
            f"dataset {spec!r} has no training split, only attacked images; datasets with one: {', '.join(known)}"
        )
    if "split" in spec and dataset.split != "train":
        raise BadOption(
            f"dataset {spec!r} asks for the test split, whose images are attacked; leave split out: generators are "
            "trained only on the training split"
        )
    dataset = replace(dataset, size=SIDE if dataset.image_shape[1] != SIDE else dataset.size)
    return replace(dataset, split="train"), replace(dataset, split="test")


def overlap(first: ByteImages, second: ByteImages) -> int:
    """Return how many images of the second set are in the first, pixel by pixel."""
    seen = {hashlib.sha256(image.numpy().tobytes()).digest() for image in first.pixels}
    return sum(hashlib.sha256(image.numpy().tobytes()).digest() in seen for image in second.pixels)


class Critic(nn.Module):
    """A convolutional discriminator with spectral normalisation and a projection on the label.

    Spectral normalisation is that of Miyato et al. 2018 (arXiv 1802.05957), the projection that of Miyato and Koyama
    2018 (arXiv 1802.05637).
    """

    def __init__(self, classes: int, channels: int, width: int) -> None:
        super().__init__()
        sizes = [channels, max(16, width * 3 // 16), width // 2, width]
        self.downs = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 4, 2, 1)) for before, after in itertools.pairwise(sizes)
        )
        self.score = spectral_norm(nn.Linear(width * 16, 1))
        self.match = spectral_norm(nn.Embedding(classes, width))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return [N], higher for images [N, C, 32, 32] in [-1, 1] that look real and fit their labels [N]."""
        x = images
        for down in self.downs:
            x = F.leaky_relu(down(x), 0.2)
        return self.score(x.flatten(1))[:, 0] + (self.match(labels) * x.sum((2, 3))).sum(1)


class _State:
    """The networks and their optimisers, which training changes."""

    def __init__(self, recipe: GeneratorRecipe, classes: int, channels: int, device: torch.device) -> None:
        with seeded("train generator", recipe.seed, "weights"):
            decoder = Decoder(recipe.latent, classes, channels, recipe.width)
            critic = Critic(classes, channels, recipe.width)
        layout = {"device": device, "memory_format": torch.channels_last}
        self.decoder: Decoder = decoder.to(**layout)  # type: ignore[call-overload]
        self.critic: Critic = critic.to(**layout)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.decoder).requires_grad_(False)
        self.decoder_adam = torch.optim.Adam(self.decoder.parameters(), recipe.lr, (0.5, 0.999))
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), recipe.lr, (0.5, 0.999))
        self.step = 0

    def save(self, file: Path, recipe: GeneratorRecipe) -> None:
        content: dict[str, Any] = {"recipe": asdict(recipe), "step": self.step}
        content |= {name: part.state_dict() for name, part in self._parts().items()}
        with draft(file) as own:
            torch.save(content, own)

    def load(self, file: Path, recipe: GeneratorRecipe) -> None:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            before, step = dict(content["recipe"]), int(content["step"])
            changed = [name for name, value in asdict(recipe).items() if name != "steps" and before.get(name) != value]
            if changed or step > recipe.steps:
                name = changed[0] if changed else "steps"
                was = step if name == "steps" else before.get(name)
                raise BadOption(
                    f"the checkpoint {str(file)!r} was made with {name}={was}, not {getattr(recipe, name)}; "
                    "give the same options, or another folder"
                )
            for name, part in self._parts().items():
                part.load_state_dict(content[name])
        except BadOption:
            raise
        except Exception as error:  # a damaged file, or tensors of other names and shapes
            raise CorruptAsset(
                f"the checkpoint {str(file)!r} cannot be read ({type(error).__name__}); delete it to start again"
            ) from None
        self.step = step

    def _parts(self) -> dict[str, Any]:
        names = ("decoder", "critic", "average", "decoder_adam", "critic_adam")
        return {name: getattr(self, name) for name in names}


def train(
    recipe: GeneratorRecipe,
    out: Path,
    *,
    device: str = "cpu",
    command: str = "",
    every: int = 250,
    on_step: OnStep = lambda step, critic, decoder: None,
) -> Path:
    """Train a generator, or resume a training in ``out``, and return its weight file ``out/generator.safetensors``.

    Args:
        recipe: of the training.
        out: the folder of the weights and the checkpoint.
        device: a torch device.
        command: the command line, for the file's card.
        every: steps between checkpoints.
        on_step: called after every step.

    Raises:
        BadOption: the dataset has no training split, an option has no valid value, or ``out`` holds another training.
        MissingAsset: the dataset is not in the cache.
        CorruptAsset: the checkpoint is damaged, or an attacked image is among the training images.
        LeakbenchError: another process trains in ``out``.
    """
    seen, unseen = splits(recipe.dataset)
    channels, classes = seen.image_shape[0], seen.num_classes
    state = _State(recipe, classes, channels, torch.device(device))
    out.mkdir(parents=True, exist_ok=True)
    with alone(out):
        checkpoint = out / CHECKPOINT
        if checkpoint.exists():
            state.load(checkpoint, recipe)
        images = read(seen, range(len(seen)))
        shared = overlap(images, read(unseen, range(len(unseen))))
        if shared:
            raise CorruptAsset(f"{shared} attacked images of {recipe.dataset!r} are among its training images; refused")
        while state.step < recipe.steps:
            critic, decoder = _update(state, recipe, images)
            on_step(state.step, critic, decoder)
            if state.step % every == 0 or state.step == recipe.steps:
                state.save(checkpoint, recipe)
        _settle(state.average, recipe, classes)
        trained = Trained(
            data=datasets.spec(seen),
            licence="Apache-2.0",
            command=command,
            steps=recipe.steps,
            seed=recipe.seed,
            latent=recipe.latent,
            classes=classes,
            channels=channels,
            width=recipe.width,
        )
        native = replace(seen, size=None)
        # a dataset's mean is that of the split which it does not attack
        write(out / WEIGHTS, trained, state.average.cpu().eval(), replace(native, split="test").mean(), native.mean())
        return out / WEIGHTS


def _update(state: _State, recipe: GeneratorRecipe, images: ByteImages) -> tuple[float, float]:
    """Update critic and decoder once; return their losses."""
    rng = generator("train generator", recipe.seed, "step", state.step)
    device = next(state.decoder.parameters()).device
    rows = torch.randint(len(images.labels), (recipe.batch,), generator=rng)
    real = images.pixels[rows].float().div(127.5).sub(1)
    if recipe.flip:
        mirrored = torch.rand(recipe.batch, generator=rng) < 0.5
        real = torch.where(mirrored[:, None, None, None], real.flip(3), real)
    labels = images.labels[rows].to(device)
    latent = torch.randn(recipe.batch, recipe.latent, generator=rng).to(device)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")
    with mixed:
        fake = state.decoder(latent, labels).float()
        both = torch.cat([real.to(device), fake.detach()]).contiguous(memory_format=torch.channels_last)
        scores = state.critic(both, torch.cat([labels, labels])).float()
    critic_loss = F.relu(1 - scores[: recipe.batch]).mean() + F.relu(1 + scores[recipe.batch :]).mean()
    _descend(state.critic_adam, critic_loss)
    state.critic.requires_grad_(False)
    with mixed:
        decoder_loss = -state.critic(fake, labels).float().mean()
    _descend(state.decoder_adam, decoder_loss)
    state.critic.requires_grad_(True)
    with torch.no_grad():
        for own, new in zip(state.average.parameters(), state.decoder.parameters()):
            own.lerp_(new, 1 - min(recipe.ema, (1 + state.step) / (10 + state.step)))
    state.step += 1
    return float(critic_loss.detach()), float(decoder_loss.detach())


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


@torch.no_grad()
def _settle(decoder: nn.Module, recipe: GeneratorRecipe, classes: int, batches: int = 40, size: int = 250) -> None:
    """Give the normalisations of the averaged decoder the statistics of its own activations."""
    norms = [module.norm for module in decoder.modules() if isinstance(module, ConditionalNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    decoder.train()
    device = next(decoder.parameters()).device
    rng = generator("train generator", recipe.seed, "settle")
    for _ in range(batches):
        latent = torch.randn(size, recipe.latent, generator=rng)
        decoder(latent.to(device), (torch.arange(size) % classes).to(device))
    decoder.eval()
