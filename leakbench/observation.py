"""What an attacker sees."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from leakbench.clients import LocalTraining
from leakbench.core.text import plural
from leakbench.core.types import Secret, ThreatModel
from leakbench.defenses.adaptive import AdaptiveAttacker
from leakbench.defenses.base import Defense
from leakbench.errors import BadOption


@dataclass(frozen=True)
class Observation:
    """Everything that the server may see of T client steps, and nothing else.

    Attributes:
        model: the architecture that clients run, its mode (train or eval) included; its own tensors are on the
            ``meta`` device, the values that the server knows are in ``weights``.
        weights: public parameters [T, *shape] (stride 0 along T where all trials share them), public buffers
            [*shape], and the revealed secrets [T, *shape].
        gradient: what was sent, per parameter [T, *shape]; withheld names are absent. Where the client shares its
            weights, the update: the weights before its local training less those that it sent.
        secrets: the secrets that were not revealed: their names and how they are drawn, never a value.
        labels: [T] int64, or [T, B] of batches in the clients' order; None where the threat model does not grant them.
        image_shape: (C, H, W) of the images, whose values lie in [0, 1].
        num_classes: how many logits the model returns.
        mean_image: [C, H, W] in [0, 1], the mean of public images of the same kind.
        threat: what was granted; its ``learning_rate`` is None where that is hidden.
        defense: the defense in use; None if the attacker is oblivious of it.
        slots: how many trials fit into memory at a time; None for all of them.
        count: how many images (B) what each client sent is of; 0 where that is hidden.
        counts: [T, K] int64, how often each class occurs among a batch's labels; None where that is not granted.
        client: how clients train, without a learning rate; None where that is hidden, and for a client of one image
            that trains as ``threat`` says.
        order: which images [T, b] each local step takes, by their places among the client's; empty where it is hidden.
        statistics: what the threat model grants of the batch normalisations beside ``weights``, [T, C] by name: where
            clients send their buffers, ``LAYER.running_mean`` and ``LAYER.running_var`` after their training; where
            the first batch's own are known, ``LAYER.mean`` and ``LAYER.var`` (biased). Empty where neither is granted.
        targets: [T, K], the class probabilities of the clients' losses that an adaptive attacker derived; None for
            those of the labels.
        unit: what was sent is ``gradient`` times this and ``size``; not 1 where an attack works on the mean step of an
            update.
        size: [T] powers of two, for trials whose largest entry is of no ordinary size (``attacks.base.prepare``); 1 for
            the others. None: 1 for all.
        adaptive: what the attacker knows of the defense, and models; None before an attack prepares the observation,
            and if the attacker is oblivious.
        shown: per parameter [T, *shape] bool, the entries of ``gradient`` that are known. The others are zero: they
            were not finite, or an adaptive attacker could not undo what the defense did to them. None: all are known.
        tick: called by a search with the number of evaluations so far and of all; None if nobody listens.
        note: called with a line that the user must know of the search; None if nobody listens.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    secrets: tuple[Secret, ...]
    labels: Tensor | None
    image_shape: tuple[int, int, int]
    num_classes: int
    mean_image: Tensor
    threat: ThreatModel = ThreatModel()
    defense: Defense | None = None
    slots: int | None = None
    targets: Tensor | None = None
    unit: float = 1.0
    size: Tensor | None = None
    shown: Mapping[str, Tensor] | None = None
    adaptive: AdaptiveAttacker | None = None
    tick: Callable[[int, int], None] | None = None
    note: Callable[[str], None] | None = None
    count: int = 1
    counts: Tensor | None = None
    client: LocalTraining | None = None
    order: tuple[Tensor, ...] = ()
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return one line of names, counts and shapes, without values."""
        count = sum(value[0].numel() for value in self.gradient.values())
        parts = [
            f"{plural(self.trials, 'trial')} of {type(self.model).__name__}",
            f"images {list(self.image_shape)}" + ("" if self.count == 1 else f", {self.count or 'unknown'} in a batch"),
            f"{self.num_classes} classes",
            f"{plural(len(self.gradient), 'gradient tensor')} with {count:,} values a trial",
            f"labels {'hidden' if self.labels is None else 'known'}",
            f"secrets: {', '.join(dict.fromkeys(secret.group for secret in self.secrets)) or 'none'}",
            f"threat model: {self.threat.spec() or 'own'}",
            f"defense: {'unknown' if self.defense is None else self.defense.name}",
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}",
        ]
        return f"Observation({', '.join(parts)})"

    def to(self, device: torch.device | str) -> "Observation":
        """Return the same on a device; a tensor that all trials share is held there once, too."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                shared = value.ndim > 0 and value.stride(0) == 0
                return value[:1].to(device).expand(value.shape) if shared else value.to(device)
            return {name: moved(item) for name, item in value.items()} if isinstance(value, Mapping) else value

        own = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{name: moved(item) for name, item in own.items() if isinstance(item, (Tensor, Mapping))})

    @property
    def trials(self) -> int:
        """How many trials (T) are observed."""
        return next(iter(self.gradient.values())).shape[0]

    @property
    def device(self) -> torch.device:
        """The device of every tensor."""
        return next(iter(self.gradient.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the gradient, in which an attack works."""
        return next(iter(self.gradient.values())).dtype

    @property
    def places(self) -> tuple[int, ...]:
        """The axes of an attack's tensors between trials and images: none for one image, (B,) for a batch."""
        return () if self.count == 1 else (self.count,)

    @property
    def sent_unit(self) -> float | None:
        """What was sent is the mean gradient of the client's steps times this; None if that is not known."""
        rate = self.threat.learning_rate
        if self.threat.shares == "gradient" or self.client is None:
            return self.threat.unit
        return None if rate is None else self.client.optimiser(rate).unit(self.client.steps)

    @property
    def rate_unit(self) -> float:
        """``sent_unit`` over the learning rate; 1 if it is not known how the client trains."""
        if self.threat.shares == "gradient":
            return 1.0
        if self.client is None:
            return float(self.threat.local_steps)
        return self.client.optimiser(1.0).unit(self.client.steps) or float(self.client.steps)

    def __post_init__(self) -> None:
        """Raise BadOption if no gradient is left to observe."""
        if not self.gradient:
            raise BadOption("the observation has no gradient: the defense withheld every parameter; nothing to attack")
