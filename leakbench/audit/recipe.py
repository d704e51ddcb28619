"""What is stated of a client's local training, by options or by a recording, and what of it an update contradicts."""

import hashlib
import json
import math
import re
import reprlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from leakbench.audit.update_facts import SIGN_RULES, UpdateFacts, layers_in_words
from leakbench.clients.local import Local
from leakbench.core.text import english, plural
from leakbench.core.types import ThreatModel
from leakbench.errors import BadOption, CorruptAsset, MissingAsset
from leakbench.optim.client import ClientOptimiser

Optimiser = Literal["sgd", "adam", "adamw", "rmsprop", "adagrad", "signsgd", "other"]
OPTIMISERS: tuple[Optimiser, ...] = ("sgd", "adam", "adamw", "rmsprop", "adagrad", "signsgd", "other")

FACTS = "facts.json"

DECAY_TOLERANCE = 1.5
"""A stated weight decay is contradicted if the measured one differs by more than this factor."""

MOST = 1_000_000
"""The most images, epochs and steps that a recipe states."""

LONGEST = 1_000
"""The most steps that attackers repeat: the time and memory of each of their evaluations grow with them."""

_NAMES = {
    "images": "examples",
    "local_batch": "batch",
    "local_epochs": "epochs",
    "local_steps": "steps",
    "optimizer": "optimizer",
    "momentum": "momentum",
    "weight_decay": "weight_decay",
    "rate": "lr",
}
"""The fields of a recipe, and what ``facts.json`` calls them."""

_WHOLE = ("images", "local_batch", "local_epochs", "local_steps")


@dataclass(frozen=True)
class StatedRecipe:
    """A client's local training as far as it is stated; None for what is not.

    Attributes:
        images: how many different images it trained on.
        local_batch: the images of a batch.
        local_epochs: how often it went through its images.
        local_steps: how many batches it trained on.
        optimizer: the name of its optimiser, one of ``OPTIMISERS``.
        momentum: of SGD, in [0, 1).
        weight_decay: of the optimiser.
        rate: the learning rate.

    Raises:
        BadOption: a value is out of range, or two contradict each other.
    """

    images: int | None = None
    local_batch: int | None = None
    local_epochs: int | None = None
    local_steps: int | None = None
    optimizer: Optimiser | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        for name in _WHOLE:
            value = getattr(self, name)
            if value is not None and not (_real(value) and isinstance(value, int) and 1 <= value <= MOST):
                raise BadOption(f"{option(name)} {_shown(value)} must be a whole number from 1 to {MOST:,}")
        if self.rate is not None and not (_real(self.rate) and 0 < self.rate <= sys.float_info.max):
            raise BadOption(f"--rate {_shown(self.rate)} must be a finite learning rate above 0")
        if self.optimizer is not None and self.optimizer not in OPTIMISERS:
            raise BadOption(f"--optimizer {_shown(self.optimizer)} is none of {', '.join(OPTIMISERS)}; write 'other'")
        if self.momentum is not None and not (_real(self.momentum) and 0 <= self.momentum < 1):
            raise BadOption(f"--momentum {_shown(self.momentum)} must be from 0 to below 1")
        decay = self.weight_decay
        if decay is not None and not (_real(decay) and 0 <= decay <= sys.float_info.max):
            raise BadOption(f"--weight-decay {_shown(decay)} must be a finite number from 0 on")
        if self.momentum and self.optimizer in ("adam", "adamw", "adagrad"):
            raise BadOption(
                f"--momentum {self.momentum:g} is of SGD, and --optimizer is {self.optimizer}; leave one of them out"
            )
        if self.images is not None and self.local_batch is not None and self.local_batch > self.images:
            raise BadOption(
                f"--local-batch {self.local_batch} is larger than --images {self.images}; give at most {self.images}"
            )
        steps = self.step_range
        if steps is not None and self.local_steps is not None and not steps[0] <= self.local_steps <= steps[1]:
            raise BadOption(f"--local-steps {self.local_steps} contradicts {self._batches()}; leave --local-steps out")
        if self.local_steps is not None and self.local_epochs is not None and self.local_steps < self.local_epochs:
            raise BadOption(
                f"--local-steps {self.local_steps} are fewer than --local-epochs {self.local_epochs}, and every epoch "
                "has a step; leave one of them out"
            )
        if steps is not None and steps[1] > MOST:
            raise BadOption(f"{self._batches()}, more than {MOST:,}; leave --local-epochs out")

    @property
    def stated(self) -> bool:
        """Whether anything is stated."""
        return any(getattr(self, one.name) is not None for one in fields(self))

    @property
    def steps(self) -> int | None:
        """How many batches the client trained on; None if that is not stated."""
        steps = self.step_range
        return self.local_steps if self.local_steps is not None else None if steps is None else steps[1]

    @property
    def step_range(self) -> tuple[int, int] | None:
        """The fewest (without incomplete batches) and most batches by images, batch and epochs; None if not stated."""
        if self.images is None or self.local_epochs is None:
            return None
        batch = self.images if self.local_batch is None else self.local_batch
        if self.local_batch is None and self.images > 1:
            return None
        return self.local_epochs * (self.images // batch), self.local_epochs * math.ceil(self.images / batch)

    def _batches(self) -> str:
        steps = self.step_range
        assert steps is not None
        return (
            f"{plural(self.images or 0, 'image')} in batches of {self.local_batch} for "
            f"{plural(self.local_epochs or 0, 'epoch')}, which makes {_batches(steps[1])}"
        )

    def optimiser(self) -> ClientOptimiser | None:
        """Return SGD with the stated values; None if the rate is not stated, or another optimiser is."""
        if self.rate is None or self.optimizer not in (None, "sgd"):
            return None
        return ClientOptimiser(lr=self.rate, momentum=self.momentum or 0.0, weight_decay=self.weight_decay or 0.0)

    @property
    def one_step(self) -> bool:
        """Whether nothing is stated that the gradient of one step does not have."""
        given = (self.rate, self.local_batch, self.optimizer, self.momentum, self.weight_decay)
        return all(one is None for one in given) and self.local_steps in (None, 1) and self.local_epochs in (None, 1)

    def client(self) -> Local | None:
        """Return the training as attackers repeat it; None unless images, batches, steps and the rate are stated.

        Nor is one of more than ``LONGEST`` steps repeated.
        Weight decay of SGD is left out: it is removed from an update before any attack.
        """
        batched = self.local_batch is not None or self.steps == 1
        if self.rate is None or self.images is None or self.images < 2 or self.steps is None or not batched:
            return None
        if self.steps > LONGEST:
            return None
        if self.optimizer not in (None, "sgd", "adam", "adamw"):
            return None
        kind = self.optimizer or "sgd"
        return Local(
            images=self.images,
            local_batch=self.local_batch,
            local_epochs=1 if self.local_steps is not None else self.local_epochs or 1,
            local_steps=self.local_steps,
            optimizer=kind,
            momentum=(self.momentum or 0.0) if kind == "sgd" else 0.0,
            weight_decay=0.0 if kind == "sgd" else self.weight_decay or 0.0,
        )

    def threat(self) -> tuple[ThreatModel, float]:
        """Return what attackers that search assume, and the factor by which momentum enlarges the update.

        They assume plain SGD, and are not granted the rate of another optimiser.
        """
        steps, optimiser = self.steps or 1, self.optimiser()
        if optimiser is None:
            return ThreatModel(shares="weights", learning_rate=None, local_steps=steps), 1.0
        unit = optimiser.unit(steps)
        assert unit is not None
        threat = ThreatModel(shares="weights", learning_rate=optimiser.lr, local_steps=steps, rate="known")
        return threat, unit / (optimiser.lr * steps)

    def division(self) -> str:
        """Return how an update by momentum is made one of plain SGD, as the end of a sentence; empty if it is not."""
        factor = self.threat()[1]
        if factor == 1:
            return ""
        return (
            f", after division of the update by {factor:.3g}, by which momentum {self.momentum:g} enlarges that of a "
            "constant gradient"
        )

    def words(self) -> str:
        """Return what is stated, in words; empty if nothing is."""
        decay = self.weight_decay
        parts = [
            plural(self.images, "image") if self.images is not None else "",
            f"batches of {self.local_batch}" if self.local_batch is not None else "",
            plural(self.local_epochs, "epoch") if self.local_epochs is not None else "",
            _batches(self.local_steps) if self.local_steps is not None else "",
            f"optimiser {self.optimizer}" if self.optimizer is not None else "",
            f"learning rate {self.rate:g}" if self.rate is not None else "",
            f"momentum {self.momentum:g}" if self.momentum is not None else "",
            "" if decay is None else f"weight decay {decay:g}" if decay else "no weight decay",
        ]
        return english([part for part in parts if part])

    def contradictions(self, shown: UpdateFacts, by: str = "Stated") -> tuple[str, ...]:
        """Return in sentences what the update shows that cannot be as stated; ``by`` begins those on images."""
        return tuple(self._contradictions(shown, by))

    def _contradictions(self, shown: UpdateFacts, by: str) -> Iterator[str]:
        yield from self._images(shown, by)
        steps = self.step_range or (None if self.local_steps is None else (self.local_steps, self.local_steps))
        if shown.steps is not None and steps is not None and not steps[0] <= shown.steps <= steps[1]:
            words = self._batches() if self.step_range is not None else _batches(steps[1])
            yield f"Stated: {words}. The counters of the BatchNorm layers show {_batches(shown.steps)}."
        elif steps == (1, 1) and shown.several_steps:
            yield "Stated: one step. Layers above the first one changed by several inputs, as after several steps."
        if self.optimizer == "sgd" and shown.rule == "sign":
            yield f"Stated: SGD. The changed values have nearly one size, as {SIGN_RULES} leave them."
        if self.optimizer not in (None, "sgd", "other") and shown.rule == "sgd":
            yield (
                f"Stated: {self.optimizer}. The changes of linear layers have low ranks, as SGD leaves them, and "
                f"{self.optimizer} only if each of its steps is nearly in proportion to the gradient (an eps far above "
                "it)."
            )
        yield from self._decay(shown)

    @property
    def several(self) -> bool:
        """Whether several images are stated."""
        return self.images is not None and self.images > 1

    def _images(self, shown: UpdateFacts, by: str) -> Iterator[str]:
        stated, found, one = self.images, shown.images, shown.shown
        if stated is None:
            return
        if self.several and shown.one_image is not False:
            yield f"{by}: {plural(stated, 'image')}. What holds for the update from one image does not apply."
        if found is None or one is None:
            return
        if found > stated and self.optimizer in (None, "sgd"):
            words = f"{by}: {plural(stated, 'image')}. Under SGD, the update shows at least {found} different inputs"
            if self.most_inputs is not None and found > self.most_inputs:
                yield f"{words}, more than {self._epochs()} can have, even if every epoch changes the images."
            else:
                yield f"{words}: the client used more images, or changed them from epoch to epoch (augmentation)."
        elif found < stated and one.pixels and one.conclusive:
            yield (
                f"{by}: {plural(stated, 'image')}. The change of layer {one.layer} shows {found} beyond the rounding "
                "of the record: the others are copies of these, were not used, or had next to no gradient."
            )

    def _decay(self, shown: UpdateFacts) -> Iterator[str]:
        shrunk = [group for group in shown.decays if group[0].decay > 0]
        if not shrunk or shown.kind == "gradient" or self.weight_decay is None:
            return
        if not self.weight_decay:
            sizes = english(
                [f"those of {layers_in_words(group)} by {group[0].decay_in_words} of their size" for group in shrunk]
            )
            yield f"Stated: no weight decay. Beside the gradients, weights shrank: {sizes}."
            return
        optimiser, steps = self.optimiser(), self.steps
        if optimiser is None or steps is None or self.momentum is None:
            return
        expected = optimiser.decayed(steps)
        for group in shrunk:
            found = group[0].decay
            if max(expected, found) > DECAY_TOLERANCE * min(expected, found):
                yield (
                    f"Stated: weight decay {self.weight_decay:g}, with which SGD at learning rate {optimiser.lr:g} and "
                    f"momentum {optimiser.momentum:g} shrinks the weights by {expected:.3g} of their size in "
                    f"{plural(steps, 'step')}. Those of {layers_in_words(group)} shrank by {group[0].decay_in_words}."
                )

    @property
    def most_inputs(self) -> int | None:
        """The most different inputs that the stated images can be, if every epoch changes them; None if not stated."""
        epochs = self.local_epochs
        if epochs is None and self.local_batch is not None and self.local_steps is not None:
            return self.local_batch * self.local_steps
        return None if self.images is None or epochs is None else self.images * epochs

    def _epochs(self) -> str:
        if self.local_epochs is None:
            return f"{_batches(self.local_steps or 0)} of {self.local_batch}"
        return f"{plural(self.images or 0, 'image')} in {plural(self.local_epochs, 'epoch')}"

    def joined(self, other: "StatedRecipe", source: str) -> "StatedRecipe":
        """Return this recipe with what only ``other`` states, of a recording.

        Raises:
            BadOption: the two state different values; ``source`` names the other one.
        """
        new: dict[str, Any] = {}
        for one in fields(self):
            mine, its = getattr(self, one.name), getattr(other, one.name)
            if mine is not None and its is not None and mine != its:
                raise BadOption(
                    f"{option(one.name)} {mine} contradicts {source}, which states {_NAMES[one.name]} {its}; leave "
                    f"{option(one.name)} out, or --recording"
                )
            if mine is None and its is not None:
                new[one.name] = its
        return replace(self, **new)


@dataclass(frozen=True)
class RecordedFolder:
    """A folder that ``leakbench.flower.record`` wrote.

    Attributes:
        folder: its path, as it was given.
        before: the file of the arrays that the client was given.
        after: the file of those that it sent.
        recipe: what ``facts.json`` states of its training.
    """

    folder: str
    before: str
    after: str
    recipe: StatedRecipe


def read_recording(folder: str) -> RecordedFolder:
    """Return the files of a recording, and what it states.

    Raises:
        MissingAsset: the folder has no ``facts.json``, or not the arrays.
        BadOption: it states something impossible, or is of other arrays than those in the folder.
        CorruptAsset: ``facts.json`` cannot be read.
    """
    path = Path(folder).expanduser()
    files = {arm: path / f"{arm}.safetensors" for arm in ("before", "after")}
    for file in (path / FACTS, *files.values()):
        if not file.is_file():
            raise MissingAsset(
                f"--recording {folder!r} has no {file.name}; give the folder of one client, such as "
                "updates/round-0001/client-1"
            )
    try:
        facts = json.loads((path / FACTS).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CorruptAsset(
            f"--recording {folder!r}: {FACTS} is malformed JSON ({type(error).__name__}); record it again, or give "
            "--before and --after"
        ) from None
    if not isinstance(facts, dict):
        raise CorruptAsset(f"--recording {folder!r}: {FACTS} is no JSON object; record it again")
    for arm, digest in (facts.get("sha256") or {}).items() if isinstance(facts.get("sha256"), dict) else ():
        if arm in files and hashlib.sha256(files[arm].read_bytes()).hexdigest() != digest:
            raise BadOption(
                f"--recording {folder!r}: {FACTS} is of other arrays than {files[arm].name}; take the folder as it was "
                "recorded, or give --before and --after"
            )
    try:
        recipe = StatedRecipe(**{name: _stated(facts.get(key), name) for name, key in _NAMES.items()})
    except BadOption as error:
        words = re.sub(r"--([a-z-]+)", lambda found: _NAMES.get(found[1].replace("-", "_"), found[0]), str(error))
        raise BadOption(f"--recording {folder!r}: {FACTS} states something impossible: {words}") from None
    return RecordedFolder(folder, str(files["before"]), str(files["after"]), recipe)


def _stated(value: Any, name: str) -> Any:
    """Return a value of ``facts.json`` in the type of a recipe's field; an optimiser of unknown name is ``other``."""
    if value is None:
        return None
    if name == "optimizer":
        plain = str(value).rpartition(".")[2].lower()
        return plain if plain in OPTIMISERS else "other"
    if not _real(value):
        raise BadOption(f"{_NAMES[name]} {_shown(value)} is no number; correct it, or leave it out")
    return int(value) if name in _WHOLE and isinstance(value, float) and value.is_integer() else value


def check_recording(recording: RecordedFolder, shown: UpdateFacts) -> None:
    """Raise BadOption if what a recording states cannot be true of its arrays.

    The counters of the BatchNorm layers count the batches, and under SGD an image has one input in an epoch. The
    optimiser is left to the page: SGD leaves values of one size, too, if gradients are clipped by value, and Adam low
    ranks if its eps is far above its gradients.
    """
    recipe, folder = recording.recipe, recording.folder
    steps, most = recipe.step_range, recipe.most_inputs
    if recipe.local_steps is not None:
        steps = recipe.local_steps, recipe.local_steps
    problem = ""
    if shown.steps is not None and steps is not None and not steps[0] <= shown.steps <= steps[1]:
        problem = f"states {_batches(steps[1])}, and the counters of the BatchNorm layers show {_batches(shown.steps)}"
    elif shown.images is not None and most is not None and shown.images > most and recipe.optimizer in (None, "sgd"):
        problem = f"states at most {most} inputs, and the arrays show {shown.images} different ones"
    if problem:
        raise BadOption(
            f"--recording {folder!r}: {FACTS} {problem}; correct {FACTS}, or give --before and --after in its place"
        )


def _real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else reprlib.repr(value)


def option(name: str) -> str:
    """Return the option of a field of a recipe."""
    return f"--{name.replace('_', '-')}"


def _batches(count: int) -> str:
    return "1 batch" if count == 1 else f"{count} batches"
