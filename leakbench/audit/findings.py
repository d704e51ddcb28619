"""What an audit finds, as plain values: its pages are a function of these alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from leakbench.analysis.ensemble import AttackerStats
from leakbench.audit.gate import LABELS, RECOVERED, Gate
from leakbench.audit.layers import ClosedForm, Labels, Share


@dataclass(frozen=True)
class Sight:
    """One private image, and what attackers made of it.

    Attributes:
        image: its index.
        truth: a PNG; None where it is not known.
        guess: a PNG of the reconstruction that comes closest to it, or of one attacker's where the truth is not known;
            None where no attacker returned one.
        attacker: whose.
        words: how close it is, or what else is known of it.
        recovered: whether it counts as recovered; None without a truth.
    """

    image: int
    truth: bytes | None
    guess: bytes | None
    attacker: str
    words: str
    recovered: bool | None


@dataclass(frozen=True)
class Behind:
    """What is found behind one defense.

    Attributes:
        defense: its spec.
        note: what it states of itself.
        images: how many at least one attacker could attack.
        share: of these, recovered by at least one attacker; NaN without a truth.
        low: of the share's 95 % interval (Wilson's); ``high`` likewise.
        floor: the share that the best floor recovers, without any gradient; NaN where none was run.
        efforts: what each attacker did, in the order in which they came.
        layers: where the size of what is sent lies.
        forms: what linear layers give away in closed form.
        labels: those that are read off.
        scores: metric -> its value for the image that leaks most, by the attacker that shows most of it.
        sights: the images.
        warnings: what makes the figures doubtful.
    """

    defense: str
    note: str
    images: int
    share: float
    low: float
    high: float
    floor: float
    efforts: tuple[AttackerStats, ...]
    layers: tuple[Share, ...]
    forms: tuple[ClosedForm, ...]
    labels: Labels
    scores: Mapping[str, float]
    sights: tuple[Sight, ...]
    warnings: tuple[str, ...] = ()

    def value(self, gate: Gate) -> float | None:
        """Return what a line is compared with; None where it was not measured."""
        if gate.name == RECOVERED:
            return None if self.share != self.share else self.share
        if gate.name == LABELS:
            return None if self.labels.right is None else self.labels.right / max(1, self.forms_images)
        return self.scores.get(gate.name)

    @property
    def forms_images(self) -> int:
        """How many images were looked at for labels."""
        return len(self.labels.read or ())


@dataclass(frozen=True)
class Audit:
    """An audit.

    Attributes:
        title: what was audited.
        facts: what it was done with: labels and words.
        threats: threat model -> what the server sees under it, in words, and whether it was run.
        assumptions: what the attackers needed, and whether that was so.
        behind: one for each defense.
        untried: what was not tried.
        threshold: from which ``ssim_aligned`` on an image counts as recovered.
        gate: the line that must not be crossed; None without one.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    threats: tuple[tuple[str, str, bool], ...]
    assumptions: tuple[tuple[str, str], ...]
    behind: tuple[Behind, ...]
    untried: tuple[str, ...]
    threshold: float
    gate: Gate | None = None

    def crossings(self) -> list[tuple[str, float]]:
        """Return the defenses behind which the line is crossed, with the values that cross it."""
        if self.gate is None:
            return []
        values = [(one.defense, one.value(self.gate)) for one in self.behind]
        return [(defense, value) for defense, value in values if value is not None and self.gate.crossed(value)]

    def unmeasured(self) -> list[str]:
        """Return the defenses behind which what the line is about was not measured."""
        return [] if self.gate is None else [one.defense for one in self.behind if one.value(self.gate) is None]
