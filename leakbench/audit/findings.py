"""The findings of an audit as plain values; its pages are a function of these."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from leakbench.analysis.ensemble import EnsembleResult
from leakbench.attacks.peeling.exposure import Exposure
from leakbench.audit.batch import DISAGGREGATE, BatchFindings
from leakbench.audit.fail_rule import LABELS, SHARE_RECOVERED, FailRule
from leakbench.audit.layers import ClosedFormLeaks
from leakbench.audit.recipe import StatedRecipe
from leakbench.audit.update_facts import UpdateFacts
from leakbench.core.types import ThreatModel
from leakbench.errors import LeakbenchError
from leakbench.gradients.losses import CROSS_ENTROPY, LOSSES


@dataclass(frozen=True)
class ImageFinding:
    """One reconstruction beside its private image.

    Attributes:
        image: the index of the image.
        truth: the private image as a PNG; None if it is not known.
        guess: the reconstruction as a PNG (``Pictures.fitted``); None if no attacker returned one.
        attacker: the attack (and its threat model) that returned the reconstruction.
        ssim: ``ssim_aligned`` of the reconstruction; NaN if it was not measured.
        psnr: ``psnr_aligned`` in dB; NaN if it was not measured.
        recovered: whether the image counts as recovered (``analysis.recovery``); None if that was not measured.
    """

    image: int
    truth: bytes | None
    guess: bytes | None
    attacker: str
    ssim: float
    psnr: float
    recovered: bool | None


@dataclass(frozen=True)
class DefenseFindings:
    """What leaks behind one defense.

    Attributes:
        result: what the attackers recovered; its share is NaN if that was not measured, and so is the interval of a
            recorded update, whose ``defense`` is ``UPDATE``.
        leaks: what leaks without any optimisation.
        note: what the defense states of itself.
        floor: the share that the best floor recovers without any gradient; NaN if none was run.
        scores: metric -> its largest leakage over all images and attackers.
        pictures: the best reconstruction of every image; every attacker's if the private image is not known.
        warnings: why the figures are in doubt.
        inconclusive: why it shows nothing that no image was recovered, in one sentence; empty if it does, or if images
            were recovered.
        batch: the images of a recorded update of several images; None if no layer leaks them.
        compared: whether the share is of all private images of an update, which were given.
    """

    result: EnsembleResult
    leaks: ClosedFormLeaks
    note: str
    floor: float
    scores: Mapping[str, float]
    pictures: tuple[ImageFinding, ...]
    warnings: tuple[str, ...] = ()
    inconclusive: str = ""
    batch: BatchFindings | None = None
    compared: bool = False

    @property
    def together(self) -> int:
        """How many images follow together from one layer: compared with the private ones, or shown by the update."""
        if self.batch is None:
            return 0
        if self.compared:
            return sum(bool(one.recovered) and one.attacker == DISAGGREGATE for one in self.pictures)
        return len(self.batch.images) if self.batch.recovered else 0

    def value(self, rule: FailRule) -> float | None:
        """Return the value that a rule judges; None if it was not measured."""
        if rule.name == SHARE_RECOVERED and math.isnan(self.result.share) and self.batch and self.batch.recovered:
            return 1.0
        if rule.name == SHARE_RECOVERED:
            return None if math.isnan(self.result.share) else self.result.share
        if rule.name == LABELS:
            return self.leaks.labels.accuracy
        return self.scores.get(rule.name)

    def judged(self, rule: FailRule) -> bool:
        """Return whether a rule's value is of all private images of an update, or of all their labels."""
        if rule.name == LABELS:
            return self.leaks.labels.counted is not None
        return self.compared


@dataclass(frozen=True)
class NetworkFacts:
    """The audited network.

    Attributes:
        parameters: how many are trained.
        classes: how many outputs it has.
        image_shape: (C, H, W) of an image.
        training: whether any layer is in training mode.
        image_norms: layers that normalise by the statistics of the image itself.
        running_norms: layers that normalise by running statistics.
    """

    parameters: int
    classes: int
    image_shape: tuple[int, int, int]
    training: bool
    image_norms: int
    running_norms: int


@dataclass(frozen=True)
class Audit:
    """An audit.

    Attributes:
        title: the name of the network.
        facts: what was audited, as (name, value).
        network: the network.
        images: how many images were attacked.
        budget: its name; ``stages`` are the specs of its attacks, stage by stage.
        threats: the threat models that a reader may expect, each with whether it was run.
        defenses: the findings, one for each defense, or one for a recorded update.
        untried: the attacks that were not run.
        needs: the attacks that were run, each with what it needs of the network and the client.
        threshold: the ``ssim_aligned`` from which an image counts as recovered.
        predictions: for each convolution whether it is expected to expose its input, by sizes only.
        update: the recorded update's threat model; None for an audit on images.
        rule: the condition under which the audit fails; None without one.
        recorded: what the recorded update shows by itself; None for an audit on images.
        contradictions: in sentences, what in it contradicts the assumptions of the attackers, or what is stated.
        recipe: what is stated of the client's training; None for an audit on images.
        loss: what clients train with, in words.
        together: how many images attacks on an update search for at once.
        search: what they assume of them, in words; empty if they search for one.
        searched: whether attacks that search were run: not if an update gives its images in closed form.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    network: NetworkFacts
    images: int
    budget: str
    stages: tuple[tuple[str, ...], ...]
    threats: tuple[tuple[ThreatModel, bool], ...]
    defenses: tuple[DefenseFindings, ...]
    untried: tuple[str, ...]
    needs: tuple[tuple[str, str], ...]
    threshold: float
    predictions: Mapping[str, Exposure] = field(default_factory=dict)
    update: ThreatModel | None = None
    rule: FailRule | None = None
    recorded: UpdateFacts | None = None
    contradictions: tuple[str, ...] = ()
    recipe: StatedRecipe | None = None
    loss: str = LOSSES[CROSS_ENTROPY]
    together: int = 1
    search: str = ""
    searched: bool = True

    def values(self) -> dict[str, float | None]:
        """Return by defense the value that the rule judges; None if it was not measured."""
        return {} if self.rule is None else {one.result.defense: one.value(self.rule) for one in self.defenses}

    def failures(self) -> dict[str, float]:
        """Return the defenses behind which the rule is true, each with the value that makes it true."""
        rule = self.rule
        found = self.values().items()
        return {defense: value for defense, value in found if rule and value is not None and rule.holds(value)}

    def undecided(self) -> str:
        """Return why the rule can be called neither true nor false, in one line; empty if it can."""
        if self.rule is None or self.failures():
            return ""
        missing = [defense for defense, value in self.values().items() if value is None]
        names = "; ".join(missing)
        if missing and self.rule.name == LABELS and any(one.leaks.labels.inferred is None for one in self.defenses):
            return f"no closed-form rule infers the labels ({names}), which does not hide them; choose another rule"
        if self.rule.name == SHARE_RECOVERED and any(d.result.by_floor and not d.result.images for d in self.defenses):
            return (
                f"a floor, which uses no gradient, comes as close to every image as the threshold asks ({names}); "
                "audit other images, or raise --threshold"
            )
        if missing:
            return (
                f"{self.rule.name} was not measured ({names}); give --truth (for labels, --label or --labels), larger "
                "images if the metric needs them, or fetch the files that the metric needs"
            )
        if all(one.judged(self.rule) for one in self.defenses):
            return ""
        return next((words for words in (*self.contradictions, *(w for d in self.defenses for w in d.warnings))), "")

    @property
    def empty_pass(self) -> str:
        """Why it shows nothing that the rule is false, in one sentence; empty if it does, is true, or is of labels."""
        if self.rule is None or self.rule.name == LABELS or self.failures():
            return ""
        return next((one.inconclusive for one in self.defenses if one.inconclusive), "")

    def verdict(self) -> bool | None:
        """Return whether the audit passes; None if there is no rule.

        Raises:
            LeakbenchError: the rule can be called neither true nor false.
        """
        if self.undecided():
            raise LeakbenchError(f"--fail-if '{self.rule}' cannot be judged: {self.undecided()}")
        return None if self.rule is None else not self.failures()
