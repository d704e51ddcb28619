"""The nouns: what an attacker is granted, how secrets are drawn, and what an attack returns.

Every tensor of a batch has T trials as its leading axis; a trial is one private image (batch size 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from leakbench.core.loss_curve import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HONEST = "honest"
"""The server of a threat model that hands out the network as it is."""

Gradient = dict[str, Tensor]
"""Parameter name -> [T, *shape] (or [*shape] for a single client step)."""


@dataclass(frozen=True)
class ThreatModel:
    """What the attacker is granted, enforced by the content of the Observation.

    Attributes:
        labels: ``known`` hands over the label, or those of a batch; ``counts`` how often each class occurs among them;
            ``inferred`` leaves them to the attack.
        reveals: groups of the defense's secrets that are handed over, values and gradients, such as ``key``
            or ``lock``; ``GROUP-weights`` hands over only the values.
        informed: true for an adaptive attacker, who knows which defense is in use and models it; the name of another
            one of the defense's adaptive attackers (``Defense.attackers``) asks for that one. False for an oblivious
            attacker. The layers that a defense adds are part of the architecture, which every attacker sees.
        shares: what the client sends: a ``gradient``, or its ``weights`` after local training, of which the server, who
            handed out the weights before, sees the update. Only parameters are sent, unless ``statistics`` says
            otherwise: the running statistics of a normalisation move while a client trains, and stay with it.
        learning_rate: of the client's local training, under ``weights``: plain SGD on its one image. None in what an
            attacker holds who is not granted it, and if nobody knows it (a recorded update).
        local_steps: how many steps of it the client takes before it sends its weights; public.
        rate: whether the attacker is granted the learning rate: ``hidden`` or ``known``.
        server: ``honest``, or how a malicious server crafts the network that it hands out: the spec of one of
            ``leakbench.models.crafted``, such as ``imprint(bins=512)``.
        optimises: the attacker optimises, together with the image, the secrets that were not revealed and that are
            inputs of the network (a key): every attack runs with its option ``secrets=optimise``.
        count: whether the attacker is granted how many images what is sent is of: ``known`` (a client that averages
            states its number of examples) or ``hidden``.
        recipe: whether the attacker is granted how a client with several images or steps trains, all but the learning
            rate: ``known`` or ``hidden``.
        order: whether the attacker is granted which images each local step takes: ``hidden`` or, as an upper bound,
            ``known``.
        statistics: what the attacker knows of those by which the client's batch normalisations normalised: ``running``,
            the running statistics of the network that was handed out, and no more; ``sent``, those after the client's
            training too, as of a client that sends its buffers; or, as an upper bound, ``exact``, the means and
            variances of the first step's batch.
        name: the name of the preset; two threat models that differ only by name are equal.
    """

    labels: Literal["inferred", "counts", "known"] = "inferred"
    reveals: frozenset[str] = frozenset()
    informed: bool | str = False
    shares: Literal["gradient", "weights"] = "gradient"
    optimises: bool = False
    learning_rate: float | None = 0.01
    local_steps: int = 1
    rate: Literal["hidden", "known"] = "hidden"
    server: str = HONEST
    count: Literal["known", "hidden"] = "known"
    recipe: Literal["known", "hidden"] = "known"
    order: Literal["hidden", "known"] = "hidden"
    statistics: Literal["running", "sent", "exact"] = "running"
    name: str = field(default="", compare=False)

    def settings(self) -> dict[str, Any]:
        """Return every field but the name as plain JSON values; those of local training if there is any.

        Fields of ``_LATER`` that are at their defaults are left out, as in runs of before there were these fields.
        """
        local = {"learning_rate": self.learning_rate, "local_steps": self.local_steps, "rate": self.rate}
        return {
            "labels": self.labels,
            "reveals": sorted(self.reveals),
            "informed": self.informed,
            "shares": self.shares,
            "optimises": self.optimises,
            **(local if self.shares == "weights" else {}),
            **({} if self.server == HONEST else {"server": self.server}),
            **{name: getattr(self, name) for name, usual in _LATER.items() if getattr(self, name) != usual},
        }

    def granted(self) -> ThreatModel:
        """Return the threat model as an attacker may read it: without a learning rate that is hidden."""
        hidden = self.shares == "weights" and self.rate == "hidden"
        return replace(self, learning_rate=None, name="") if hidden else self  # a preset's name would tell the rate

    @property
    def unit(self) -> float | None:
        """What is sent is the mean gradient of the client's steps times this; None if that is not known."""
        if self.shares == "gradient":
            return 1.0
        return None if self.learning_rate is None else self.learning_rate * self.local_steps

    def spec(self) -> str:
        """Return the preset's name, or the fields that differ from ``paper`` as ``labels=known, reveals=key+lock``."""
        if PRESETS.get(self.name) == self:
            return self.name
        for name, preset in PRESETS.items():
            if preset == self:
                return name
        usual = {**PRESETS["weights"].settings(), **PRESETS["paper"].settings(), **_LATER, "server": HONEST}
        parts = [
            f"{name}={'+'.join(value) if name == 'reveals' else str(value).lower()}"
            for name, value in self.settings().items()
            if value != usual[name]
        ]
        return ", ".join(parts)

    def _server_words(self) -> str:
        if self.server == HONEST:
            return "An honest-but-curious server"
        return f"A malicious server, which crafted the network that it handed out ({self.server}),"

    def describe(self, images: str = "one image", recipe: str = "", lr: float | None = None) -> str:
        """Return the threat model in sentences, for a report.

        Args:
            images: what a client trains on.
            recipe: how it trains; empty: by ``local_steps`` steps of SGD.
            lr: its learning rate, if it states one.
        """
        several = "one image" not in images
        sees = "the shared gradient of" if self.shares == "gradient" else "the model before and after local training on"
        sentences = [
            f"{self._server_words()} sees {sees} {images}, the public weights, and the architecture, with "
            "the layers that a defense adds and the distribution of its secrets",
            self._on_labels(several),
            f"Revealed secrets: {', '.join(sorted(self.reveals)) or 'none'}",
        ]
        if self.optimises:
            sentences.append("The attacker optimises the secrets that are inputs of the network (a key) with the image")
        if not self.informed:
            sentences.append("The attacker is oblivious: it does not model the defense")
        else:
            named = f" ({self.informed})" if isinstance(self.informed, str) else ""
            sentences.append(f"The attacker is adaptive{named}: it knows the defense and models it")
        if self.shares == "weights":
            steps = "one step" if self.local_steps == 1 else f"{self.local_steps} steps"
            lr = self.learning_rate if lr is None else lr
            rate = "unknown learning rate" if lr is None else f"learning rate {lr:g}"
            granted = "known to the attacker" if self.rate == "known" else "which the attacker does not know"
            trains = f"{recipe}; it has" if recipe else f"{steps} of SGD on its image with"
            sentences.append(f"The client takes {trains} {rate}, {granted}" + self._keeps())
        if self.statistics != "running":
            sentences.append(_STATISTICS[self.statistics])
        if several and self.count == "hidden":
            sentences.append("The attacker does not know how many images these are")
        if recipe and self.shares == "weights":
            sentences.append(f"{_RECIPES[self.recipe]}{_ORDERS[self.order]}")
        return ". ".join(sentences) + "."

    def _keeps(self) -> str:
        return ", and sends no running statistics" if self.statistics == "running" else ""

    def _on_labels(self, several: bool) -> str:
        if not several:
            return f"The label is {'not known' if self.labels == 'inferred' else 'known'}"
        return {
            "inferred": "The labels are not known",
            "counts": "How often each label occurs is known",
            "known": "The labels are known",
        }[self.labels]


_LATER: Mapping[str, str] = {"count": "known", "recipe": "known", "order": "hidden", "statistics": "running"}
"""The fields that older runs do not have, and their defaults."""
_STATISTICS = {
    "sent": "The client also sends the running statistics of its batch normalisations after its training",
    "exact": "The attacker knows the means and variances by which the client's first step normalised its batch",
}
_RECIPES = {
    "known": "The attacker knows how the client trains, but for the learning rate",
    "hidden": "The attacker does not know how the client trains",
}
_ORDERS = {"hidden": "", "known": ", and which images each step takes"}


PRESETS: Mapping[str, ThreatModel] = {
    "paper": ThreatModel(name="paper"),
    "known-label": ThreatModel(labels="known", name="known-label"),
    "weights": ThreatModel(shares="weights", name="weights"),
    "T0": ThreatModel(name="T0"),
    "T1": ThreatModel(reveals=frozenset({"lock-weights"}), name="T1"),
    "T2": ThreatModel(reveals=frozenset({"lock-weights"}), optimises=True, name="T2"),
    "T3": ThreatModel(reveals=frozenset({"lock-weights", "key"}), name="T3"),
    "T4": ThreatModel(reveals=frozenset({"lock"}), name="T4"),
    "T5": ThreatModel(reveals=frozenset({"lock", "key"}), name="T5"),
}
"""Threat models by name. ``paper``: nothing but the gradient and the public weights; ``known-label``: and the label.
``weights``: in place of the gradient the weights after one step of SGD, whose learning rate (0.01) is hidden.

``T0`` to ``T5`` are the levels of key-lock's study, in the order of what they grant. ``T0``: neither key nor lock
(``paper``). ``T1``: the lock's weights, so that only the key is missing (what FedKL's released code runs).
``T2``: the same, and the attacker optimises the key. ``T3``: the key too. ``T4``: the lock's weights and gradients,
not the key. ``T5``: everything.
"""


class Distribution(ABC):
    """The distribution of a secret; public knowledge, so that an attacker can draw its own."""

    @abstractmethod
    def draw(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Return a float32 tensor of this shape drawn from it."""


@dataclass(frozen=True)
class Uniform(Distribution):
    """The uniform distribution on [low, high)."""

    low: float = 0.0
    high: float = 1.0

    def draw(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Return independent draws from U[low, high)."""
        return self.low + (self.high - self.low) * torch.rand(shape, generator=rng)


@dataclass(frozen=True)
class Normal(Distribution):
    """The normal distribution; ``std`` is a standard deviation."""

    mean: float = 0.0
    std: float = 1.0

    def draw(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Return independent draws from N(mean, std^2)."""
        return self.mean + self.std * torch.randn(shape, generator=rng)


@dataclass(frozen=True)
class Secret:
    """A tensor of the defended network that stays with the client, together with its gradient.

    Attributes:
        name: its name among the module's parameters or buffers.
        group: the name by which a threat model reveals it (``key``, ``lock``, ``noise``).
        law: its distribution.
        fresh: drawn anew at every forward pass (PRECODE's noise) instead of once for a client (a key).
        optimised: True for a tensor of a relaxed network (``AdaptiveAttacker.relax``) that every attack optimises
            together with the image, from a start drawn by its distribution.
    """

    name: str
    group: str
    law: Distribution
    fresh: bool = False
    optimised: bool = False


@dataclass(frozen=True)
class Reconstruction:
    """An attack's estimate of the private images.

    Attributes:
        images: [T, C, H, W], of any range (metrics state whether they clamp); NaN only in failed rows.
        labels: [T] int64, the labels that the attack inferred or was given; None if it infers none.
        objective: [T], the attack's own final objective (lower is better); None if it has none.
        failed: [T] bool, the trials that the attack itself knows to have diverged; None for none.
        reasons: a line for each trial on why it failed, empty for others; no lines at all if the attack gives none.
        evaluations: [T] int64, evaluations of the objective and its gradient; None if it makes none.
        path: how gradients were computed, ``lanes``, ``batched``, ``vmap`` or ``one-at-a-time``; empty if none were.
        findings: further numbers that the attack found, [T] by name; the run keeps them (``Store.findings``).
        curve: the objective at some evaluations of the optimisation; None if it makes none.
    """

    images: Tensor
    labels: Tensor | None = None
    objective: Tensor | None = None
    failed: Tensor | None = None
    evaluations: Tensor | None = None
    path: str = ""
    findings: Mapping[str, Tensor] = field(default_factory=dict)
    curve: Curve | None = None
    reasons: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Return one line of counts and shapes, with the range of the objective."""
        images = self.images
        parts = [f"images {list(images.shape)} {str(images.dtype).removeprefix('torch.')} on {images.device}"]
        if self.failed is not None:
            parts.append(f"{int(self.failed.sum())} failed")
        if self.objective is not None and self.objective.numel():
            parts.append(f"objective {float(self.objective.min()):.3g} to {float(self.objective.max()):.3g}")
        if self.labels is not None:
            parts.append(f"labels {self.labels.tolist()[:8]}{'...' * (len(self.labels) > 8)}")
        parts += [f"findings: {', '.join(self.findings)}"] * bool(self.findings)
        return f"Reconstruction({', '.join(parts)})"

    def show(self, truth: Tensor | None = None) -> Figure:
        """Return the images side by side as a figure, which a notebook shows: ``leakbench.show``."""
        import leakbench  # what draws is in a room above; the package finds its public functions by name

        return leakbench.show(self, truth)
