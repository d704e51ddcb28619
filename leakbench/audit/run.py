"""Audit a network on images, or one recorded update: run the attackers, and collect what they found."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from leakbench import attacks, datasets, defenses
from leakbench.analysis.ensemble import UNPROVEN, UNSCORED, attacker_names, ensemble_results, floor_share
from leakbench.analysis.recovery import caveat, judged
from leakbench.analysis.verdict import CONTROL, control_flaw
from leakbench.attacks import Attack
from leakbench.attacks.known_draws import read_draws
from leakbench.attacks.peeling.exposure import Exposure
from leakbench.attacks.peeling.lattice import CONVOLUTIONS
from leakbench.audit.batch import DISAGGREGATE, batch_findings, counted, estimated_counts
from leakbench.audit.exposure import has_relus, predicted, rule_in_words
from leakbench.audit.fail_rule import FailRule
from leakbench.audit.findings import Audit, DefenseFindings, ImageFinding, NetworkFacts
from leakbench.audit.fixes import reworded
from leakbench.audit.given import (
    NORMALISE,
    TRIED,
    AuditedNetwork,
    Recorded,
    RecordedKind,
    Update,
    audited,
    classes_of,
    classes_words,
    output_note,
    read_update,
)
from leakbench.audit.layers import RESIDUAL_TOLERANCE, ClosedFormLeaks, InferredLabels, closed_forms, shares
from leakbench.audit.members import (
    ComparedImages,
    Returned,
    check_truth,
    compared,
    nearest_copies,
    pixels_of,
    read_labels_file,
)
from leakbench.audit.pace import expected_time
from leakbench.audit.randomness import Randomness, randomness
from leakbench.audit.recipe import RecordedFolder, StatedRecipe, check_recording
from leakbench.audit.update_facts import UpdateFacts, update_facts, without_decay
from leakbench.core.device import device_named
from leakbench.core.text import english, part, plural
from leakbench.core.types import PRESETS, ThreatModel
from leakbench.datasets import Dataset
from leakbench.datasets.folder import Folder
from leakbench.defenses import Defense
from leakbench.engine import run as engine
from leakbench.engine.progress import NullProgress
from leakbench.engine.run import RunOptions
from leakbench.engine.worker import ClientData, png
from leakbench.errors import BadOption, Unsupported
from leakbench.gradients.evaluate import architecture, working
from leakbench.metrics import NOT_LEAKAGE, Metric, of_run
from leakbench.models.module import OwnModule
from leakbench.observation import Observation
from leakbench.plan.matrix import RECOVERY, Matrix, expand, load_suite, numbers_of, override
from leakbench.store.records import MetricInfo
from leakbench.store.run_file import FILE, Store
from leakbench.victim import Client, layer_inputs, observe

CLOSED_FORM_ATTACK = "analytic"
"""The attack whose answer is proven by the update itself if a layer that takes the pixels leaves no residual."""

EXPECTED = "exposed by size"
"""The fact that says which convolutions are expected to expose their input."""

RELU_ATTACK = "log-cosine"
"""The search for ReLU networks, which other networks are not attacked by."""

LISTED = "Listed by --truth or --labels"
"""What says how many images there are if only the list of the private ones does; no attack sees it."""

UPDATE = "the recorded update"
"""What stands in place of a defense in the findings of a recorded update."""

JUDGED = "judged"
"""A column of trials: the ``RECOVERY`` score; without a truth, 1 for a proven answer and 0 for any other."""


@dataclass(frozen=True)
class AuditOptions:
    """What both kinds of audit take.

    Attributes:
        budget: which stages of the suite ``audit`` are run.
        threshold: the ``ssim_aligned`` from which an image counts as recovered; the suite's by default.
        rule: the condition under which the audit fails.
        command: the command line, for the run file.
        salt: see ``leakbench.engine.run.RunOptions``.
    """

    budget: Literal["quick", "standard", "thorough"] = "standard"
    threshold: float | None = None
    rule: FailRule | None = None
    command: str = ""
    salt: str | None = None

    def matrix(
        self,
        scale: str,
        given: Mapping[str, Any],
        *,
        joint_labels: bool = False,
        relus: bool = True,
        unrolled: bool = False,
    ) -> Matrix:
        """Return the matrix of a scale of the suite, with the axes that are given in place of its own.

        With ``joint_labels``, attacks that would infer the label in closed form optimise it with the image. Without
        ``relus``, the stages of ``RELU_ATTACK`` are left out. With ``unrolled``, attacks that can repeat local training
        do.
        """
        limit = {} if self.threshold is None else {"threshold": self.threshold}
        axes = override(expand(load_suite("audit"), scale)[0], {**given, **limit})
        if not relus:
            named = [[attacks.parse(one).name for one in stage["attacks"]] for stage in axes["stages"]]
            axes["stages"] = [stage for stage, names in zip(axes["stages"], named) if names != [RELU_ATTACK]]
        if joint_labels:
            axes["stages"] = [{**stage, "attacks": list(map(_jointly, stage["attacks"]))} for stage in axes["stages"]]
        if unrolled:
            axes["stages"] = [{**stage, "attacks": list(map(_unrolled, stage["attacks"]))} for stage in axes["stages"]]
        return Matrix(**axes)


def _unrolled(spec: str | Attack) -> Attack:
    """Return an attack that repeats the client's steps, if it has this option."""
    attack = attacks.parse(spec)
    return replace(attack, local="unrolled") if "local" in attack.options() else attack  # type: ignore[type-var]


def _jointly(spec: str | Attack) -> Attack:
    """Return an attack that optimises the label with the image, if it has this option."""
    attack = attacks.parse(spec)
    return replace(attack, labels="joint") if attack.options().get("labels") == "analytic" else attack  # type: ignore[type-var]


def audit_model(
    network: AuditedNetwork,
    inner: Dataset,
    protections: Sequence[Defense],
    out: Path,
    options: AuditOptions | None = None,
    *,
    images: int | Sequence[int] | None = None,
    first: int | None = None,
    order: str | None = None,
    threats: Sequence[str] = (),
    device: str = "auto",
    progress: NullProgress | None = None,
) -> Audit:
    """Attack a network on images behind each defense, and return what leaks.

    Args:
        network: the network.
        inner: the images; label i is the network's class i, unless ``first`` or ``order`` says otherwise (``audited``).
        protections: the defenses, each audited by itself.
        out: the folder of the run file; an existing run is resumed.
        options: see ``AuditOptions``.
        images: how many, or which; those of the budget by default.
        threats: in place of those of the budget's stages.
        device: see ``engine.run``.
        progress: see ``engine.run``.

    Raises:
        Unsupported: behind one of the defenses no attacker could attack the network; that does not make it safe.
        LeakbenchError: one line on the first thing that cannot be used.
    """
    options, network = options or AuditOptions(), network.at(inner.image_shape)
    own = network.model(inner.image_shape[0])
    classes = classes_of(own, inner.image_shape)
    dataset = audited(inner, classes, first, order)
    usual = int(expand(load_suite("audit"), options.budget)[0]["images"])
    chosen = min(usual, len(dataset)) if images is None else images
    given: dict[str, Any] = {"models": [own], "datasets": [dataset], "defenses": list(protections), "images": chosen}
    built = own.build(inner.image_shape, classes)
    relus = has_relus(built, inner.image_shape)
    given |= {"threats": list(threats)} if threats else {}
    indices = list(numbers_of(chosen))
    each = {defenses.spec(one): one for one in protections}
    drawn = randomness(built, inner.image_shape)
    expected = predicted(built, inner.image_shape)
    rule = rule_in_words(expected, inner.image_shape)
    if progress is not None:
        progress.note(f"{EXPECTED}: {rule}")
    leaks = {spec: _leaks(own, one, dataset, indices, drawn) for spec, one in each.items()}
    joint = all(one.labels.inferred is None for one, _ in leaks.values())
    matrix = options.matrix(options.budget, given, joint_labels=joint, relus=relus)
    if progress is not None:
        clients, place = _clients(protections[0], dataset, indices), device_named(device)
        seen = observe(own, protections[0], PRESETS["paper"], clients, classes, dataset.mean(), place)
        _announce(matrix, seen, progress)
    run_options = RunOptions(device, salt=options.salt)
    engine.run(matrix, out, run_options, progress=progress, command=options.command)
    with Store.open(out / FILE, readonly=True) as store:
        trials = _planned(store, matrix)
        floor = floor_share(trials, _threshold(matrix))
        found = {spec: _findings(store, trials, spec, leaks[spec][0], matrix, indices) for spec in each}
        control = control_flaw([own.result.share for spec, own in found.items() if each[spec].name == CONTROL])
        behind = []
        for spec, one in found.items():
            flaw = control or (UNPROVEN if one.result.unproven else "")
            behind.append(_doubted(replace(one, note=each[spec].note(), floor=floor), leaks[spec][1], flaw))
    facts = (
        *network.facts(own.head(inner.image_shape).words),
        *_output_facts(own, inner.image_shape, progress),
        *drawn.facts(known=not any(doubt for _, doubt in leaks.values())),
        ("weights", network.checkpoint or "as the factory makes them, with a fixed seed"),
        ("data", _data_words(inner, first, order)),
        *([("pixels", inner.note())] if inner.note() and isinstance(inner, Folder) else []),
        (EXPECTED, rule),
    )
    return _audit(own, dataset, facts, matrix, behind, options, len(indices), expected)


def audit_update(
    network: AuditedNetwork,
    before: str,
    after: str,
    image_shape: tuple[int, int, int],
    out: Path,
    options: AuditOptions | None = None,
    *,
    recipe: StatedRecipe | None = None,
    recording: RecordedFolder | None = None,
    truth: Tensor | None = None,
    truths: Tensor | None = None,
    label: int | None = None,
    labels: str | None = None,
    names: Sequence[str] | None = None,
    kind: RecordedKind = "weights",
    finite: bool = False,
    progress: NullProgress | None = None,
) -> Audit:
    """Attack one recorded update of a network, and return what leaks.

    Args:
        network: the network, in the mode in which the client trained it.
        before: the file of the weights that the client was given; ``after``: of those that it sent (``read_update``).
        image_shape: (C, H, W) of the image that the client trained on.
        out: the folder of the run file; an existing run is resumed.
        options: see ``AuditOptions``.
        recipe: what is stated of the client's training, by options or by the recording.
        recording: the recording that states part of the recipe; None without one.
        truth: [C, H, W] in [0, 1], the private image. Reconstructions are compared with it; no attacker sees it.
        truths: [B, C, H, W] in [0, 1], all private images, if there are several; likewise.
        label: the true label, likewise.
        labels: the file of the labels of all private images (``read_labels_file``), likewise.
        names: of the files of ``truths``.
        kind: what the file ``after`` holds.
        finite: attack the other values of an update with values that are not finite.
        progress: see ``engine.run``.

    Raises:
        Unsupported: no attacker could attack the update; that does not make it safe.
        LeakbenchError: one line on the first thing that cannot be used.
    """
    options, recipe = options or AuditOptions(), recipe or StatedRecipe()
    if options.threshold is not None and truth is None and truths is None:
        raise BadOption("--threshold is for the comparison with --truth; give that too")
    if kind == "gradient" and not recipe.one_step:
        raise BadOption(
            "--gradient is the gradient of one step, which has no rate, momentum or weight decay; leave --rate, "
            "--local-steps, --local-epochs, --local-batch, --optimizer, --momentum and --weight-decay out"
        )
    known = len(truths) if truths is not None else 1 if truth is not None else None
    if recipe.images is not None and known is not None and known != recipe.images:
        raise BadOption(
            f"--truth has {plural(known, 'image')}, and --images or the recording states {recipe.images}; give a "
            "folder of all images that the client trained on"
        )
    network = network.at(image_shape)
    update = read_update(network, before, after, kind, finite=finite)
    initial = network.model(image_shape[0])
    classes = classes_of(initial, image_shape, recipe.images or 1)
    if label is not None and not 0 <= label < classes:
        raise BadOption(f"--label {label} is no class of the network; give 0 to {classes - 1}")
    true = None if labels is None else read_labels_file(labels, classes, names)
    if true is not None and recipe.images is not None and len(true) != recipe.images:
        raise BadOption(
            f"--labels {labels!r} has {len(true)} labels, and {recipe.images} images are stated; give as many"
        )
    module = initial.build(image_shape, classes).to(working(network.module))
    module.load_state_dict({**module.state_dict(), **update.before})
    own = OwnModule(network.label, module, network.loss)
    threat, factor = PRESETS["paper"], 1.0
    if kind != "gradient":
        threat, factor = recipe.threat()
    shown = update_facts(module, update, _observation(module, update, image_shape, classes, threat))
    if recording is not None:
        check_recording(recording, shown)
    listed = known if true is None else len(true)
    if recipe.images is None and listed is not None and listed > 1:
        beside_them = StatedRecipe(images=listed).contradictions(shown, LISTED)
    else:
        beside_them = ()
    contradictions = (
        *recipe.contradictions(shown),
        *beside_them,
        *shown.contradictions(1 if kind == "gradient" else threat.local_steps),
    )
    plain = update
    update = without_decay(plain, shown)
    if update is not plain and all(share >= 1 for share in update.rounding.values()):
        raise BadOption(
            f"--after {after!r} differs from --before {before!r} by weight decay alone, beside rounding; give the "
            "weights after a training on images"
        )
    observation = _observation(module, update, image_shape, classes, threat, factor)
    batch = batch_findings(observation, plain, shown, factor)
    everything = batch is not None and batch.recovered
    own_images = torch.zeros(0, *image_shape) if batch is None else batch.images
    if truths is not None:
        check_truth(own_images, truths, recipe.local_epochs)
        own_images = (nearest_copies(own_images, truths) if everything else own_images)[: len(truths)]
    if progress is not None:
        for words in contradictions:
            progress.note(words)
    step = recipe.local_batch or recipe.images or 1
    drawn = randomness(module, image_shape, min(step, TRIED))
    expected = predicted(module, image_shape, step)
    rule = rule_in_words(expected, image_shape, step)
    if progress is not None:
        progress.note(f"{EXPECTED}: {rule}")
    leaks = _redrawn(_leaks_of_update(observation, label, shown, recipe.several), drawn)
    counts = estimated_counts(module, observation, plain, shown, batch, recipe, factor)
    leaks = replace(leaks, labels=counted(leaks.labels, counts, true, classes))
    doubt = drawn.doubt() if drawn.layers and not read_draws(observation).complete else ""
    proven = truth is None and any(form.pixels and form.exact and not form.factor for form in leaks.forms)
    if truth is None and not (proven or everything):
        observation = together(observation, recipe, shown, () if counts.several else counts.counts, factor)
    threat = observation.threat
    unrolled = observation.client is not None and observation.client.several_steps
    dataset = Recorded(_digest(observation, truth, label), image_shape, classes)
    given: dict[str, Any] = {"models": [own], "datasets": [dataset], "threats": [threat], "images": 1}
    if proven or everything:  # without a truth: the other attackers have nothing left to find
        given["attacks"] = [CLOSED_FORM_ATTACK]
    scale = f"{options.budget}-update" if threat.unit is None else options.budget
    joint = leaks.labels.inferred is None if observation.count == 1 else observation.counts is None
    relus = has_relus(module, image_shape)
    matrix = options.matrix(scale, given, joint_labels=joint, relus=relus, unrolled=unrolled)
    data = ClientData(
        images={} if truth is None else {0: truth},
        labels={} if label is None else {0: label},
        mean=observation.mean_image,
        num_classes=classes,
        observed=observation,
    )
    if truths is not None and everything:
        _check_client(own_images, truths, _threshold(matrix))
    if progress is not None:
        _announce(matrix, observation, progress)
    run_options = RunOptions("cpu", salt=options.salt)
    try:
        engine.run(matrix, out, run_options, progress=progress, command=options.command, data=data)
    except Unsupported as error:
        raise Unsupported(reworded(str(error))) from error
    with Store.open(out / FILE, readonly=True) as store:
        trials = _planned(store, matrix)
        trials["reason"] = trials["reason"].map(reworded)
        measured = bool(trials[RECOVERY].notna().any())
        if not measured:
            trials[JUDGED] = np.where(trials["floor"], math.nan, float(proven))
        found = _findings(store, trials, defenses.spec(*matrix.defenses), leaks, matrix, [0])
        returned = list(_returned(store, trials, image_shape[0]))
    result = replace(found.result, defense=UPDATE, low=math.nan, high=math.nan)
    result = result if measured or proven else replace(result, share=math.nan)
    floor = floor_share(trials, _threshold(matrix)) if measured else math.nan
    found = replace(found, result=result, floor=floor, batch=batch)
    missed: list[str] = []
    if truths is not None:
        beside = compared(
            [Returned(DISAGGREGATE, own_images), *returned],
            truths,
            _threshold(matrix),
            list(filter(_of_leakage, of_run())),
        )
        found = _compared(found, beside, {attack: short for (attack, _), short in attacker_names(trials).items()})
        if batch is not None and not found.together:
            missed.append(
                f"None of the {len(own_images)} images that {DISAGGREGATE} returned is one of --truth: they are "
                "wrong, or --truth has the images of another client. Compare them by eye, without --truth."
            )
        if batch is not None and len(batch.images) > len(own_images):
            missed.append(
                f"The update gives {len(batch.images)} different inputs, and --truth has "
                f"{plural(len(truths), 'image')}: the client changed images from epoch to epoch, or --truth lacks "
                "some. Each image of --truth is compared with one input."
            )
    elif batch is not None and batch.recovered:
        if truth is not None:
            missed.append(
                "The private image of --truth is not compared, since the update shows several; give a folder of all."
            )
        nan = math.nan
        each = enumerate(batch.pictures())
        pictures = tuple(ImageFinding(place, None, one, DISAGGREGATE, nan, nan, True) for place, one in each)
        found = replace(found, pictures=pictures)
    elif observation.count > 1 and not proven:
        found = replace(found, pictures=tuple(_uncompared(returned)))
    flaw = "Inconclusive: an update has no positive control." if found.result.share == 0 else ""
    one = shown.shown
    if one is not None and one.pixels and one.rank > 1 and not everything and found.together < one.rank:
        missed.append(
            f"The {one.rank} images were not all separated from each other in the change of layer {one.layer}, which "
            "takes the pixels. That does not make them safe."
        )
    assumed = observation.count
    if listed is not None and listed > 1 and assumed == 1 and recipe.images is None and not everything:
        missed.append(
            f"{listed} images are listed, and attacks do not see how many. If the server knows the number, give "
            f"--images {listed}: attacks that search then look for all of them."
        )
    warnings = (*([doubt] if doubt else []), *_doubts(shown, update, assumed), *missed, *found.warnings)
    found = replace(found, inconclusive=flaw, warnings=warnings)
    words = f"{before} to {after}" if kind == "weights" else f"{after}, a {kind}, of the weights {before}"
    if len(update.change) < update.trained:
        words += f"; {len(update.change)} of the {update.trained} trained parameters (tensors) were sent"
    stated = (
        [("stated", recipe.words() + ("" if recording is None else f" ({recording.folder})"))] if recipe.stated else []
    )
    ends = _output_facts(initial, image_shape, progress)
    facts = (
        *network.facts(own.head(image_shape).words),
        *ends,
        *drawn.facts(known=not doubt),
        ("update", words),
        *stated,
        (EXPECTED, rule),
    )
    found_by = _audit(own, dataset, facts, matrix, [found], options, 1, expected, threat)
    untried = tuple(name for name in found_by.untried if batch is None or name != DISAGGREGATE)
    if batch is not None:
        found_by = replace(found_by, needs=(*found_by.needs, (DISAGGREGATE, attacks.get(DISAGGREGATE).assumes)))
    return replace(
        found_by,
        recorded=shown,
        contradictions=contradictions,
        recipe=recipe,
        untried=untried,
        together=observation.count,
        search=search_words(observation, unrolled, recipe),
        searched=not (proven or everything),
    )


def together(
    observation: Observation, recipe: StatedRecipe, shown: UpdateFacts, counts: Sequence[int], factor: float
) -> Observation:
    """Return an update as attackers that search see it: as that of all its images, if these are known to be several.

    Args:
        observation: as that of one image, without weight decay.
        recipe: what is stated of the training. If all of it is, attackers repeat it.
        shown: what the update shows by itself.
        counts: how often each class occurs, by an estimate; empty without one.
        factor: what the update was divided by, since momentum enlarges it.
    """
    seen = shown.images if shown.shown is not None and shown.shown.conclusive else None
    count = recipe.images or seen or 1
    if count == 1:
        return observation
    known = torch.tensor([list(counts)]) if sum(counts) == count else None
    client = recipe.client() if observation.threat.shares == "weights" else None
    if client is None:
        return replace(observation, count=count, counts=known)
    gradient = {name: value * factor for name, value in observation.gradient.items()}
    threat = replace(observation.threat, learning_rate=recipe.rate, rate="known", local_steps=client.steps)
    return replace(observation, count=count, counts=known, client=client, threat=threat, gradient=gradient)


def search_words(observation: Observation, unrolled: bool, recipe: StatedRecipe) -> str:
    """Return what attackers that search assume of an update of several images; empty for one image.

    Args:
        observation: as they see it.
        unrolled: whether they repeat the client's steps.
        recipe: what is stated of these.
    """
    if observation.count == 1:
        return ""
    labels = "with the estimated label counts" if observation.counts is not None else "whose labels they search for too"
    rate, client, steps = observation.threat.learning_rate, observation.client, observation.threat.local_steps
    end = "" if rate is None or observation.threat.shares == "gradient" else f" at learning rate {rate:g}"
    words = f"{observation.count} images at once, {labels}"
    if client is not None:
        order = ", whose order of images they guess" if unrolled and client.steps > 1 else ""
        return f"{words}, and {client.recipe()}{end}{order}"
    if observation.threat.shares == "gradient":
        return f"{words}, and one gradient of all of them"
    mean = ", of which they match the mean" if steps > 1 else ""
    return f"{words}, and {plural(steps, 'step')} of plain SGD{end}, each on all of them{mean}{recipe.division()}"


def _uncompared(returned: Iterable[Returned]) -> Iterable[ImageFinding]:
    """Yield every image that attackers returned of a client of whose images none is known."""
    nan = math.nan
    for one in returned:
        for place, image in enumerate(() if one.floor else one.images):
            yield ImageFinding(place, None, png(image), one.attacker, nan, nan, None)


def _output_facts(
    own: OwnModule, image_shape: tuple[int, int, int], progress: NullProgress | None
) -> list[tuple[str, str]]:
    """Return the fact that the network's output does not suit the loss, and say it; nothing if it does."""
    note = output_note(own, image_shape)
    if note and progress is not None:
        progress.note(f"output: {note}")
    return [("output", note)] if note else []


def _check_client(images: Tensor, truths: Tensor, threshold: float) -> None:
    """Raise BadOption if none of the images that an update shows to be right is one of the private ones."""
    if not any(compared([Returned(DISAGGREGATE, images)], truths, threshold).recovered.values()):
        raise BadOption(
            f"none of the {len(images)} images that follow from the update is one of the {len(truths)} of --truth; "
            "give the images of the client that sent it, or leave --truth out"
        )


def _announce(matrix: Matrix, seen: Observation, progress: NullProgress) -> None:
    """Say how long the searches may take."""
    words = expected_time(matrix, seen)
    if words:
        progress.note(words)


def _returned(store: Store, trials: pd.DataFrame, channels: int) -> Iterable[Returned]:
    """Yield the images that each attack and floor of an update returned."""
    ended = trials[trials["status"] == "ok"]
    pictures, members = store.images(ended["trial"]), store.members(ended["trial"])
    for trial, attack, floor in ended[["trial", "attack", "floor"]].itertuples(index=False, name=None):
        each = [one.pictures for one in members.get(trial, ())] or [pictures[trial]]
        known = (pixels_of(one.reconstruction, channels) for one in each if one.reconstruction is not None)
        pixels = [one for one in known if one is not None]
        if pixels:
            yield Returned(attack, torch.cat(pixels), bool(floor))


def _compared(found: DefenseFindings, beside: ComparedImages, names: Mapping[str, str]) -> DefenseFindings:
    """Return findings with what was returned beside all private images, and the share that is recovered.

    Args:
        found: the findings without the private images.
        beside: what was returned beside these.
        names: of each attack, the short one in the findings.
    """
    pictures = tuple(
        ImageFinding(
            place,
            png(one.truth),
            None if one.guess is None else png(one.guess),
            one.attacker,
            one.ssim,
            one.psnr,
            one.recovered,
        )
        for place, one in enumerate(beside.members)
    )
    scores = {name: values.best for name, values in beside.scores.items()}
    count = len(pictures)
    recovered = {names.get(attack, attack): count for attack, count in beside.recovered.items()}
    attackers = tuple(
        replace(one, recovered=recovered[one.attacker], tried=count) if one.attacker in recovered else one
        for one in found.result.attackers
    )
    result = replace(
        found.result, images=count, groups=count, targets=count, share=beside.share, by_floor=0, attackers=attackers
    )
    return replace(found, result=result, pictures=pictures, scores=scores, floor=beside.floor, compared=True)


def _doubted(found: DefenseFindings, doubt: str, flaw: str) -> DefenseFindings:
    """Return findings with the doubt that clients draw random numbers, and why a share of 0 shows nothing.

    Args:
        found: the findings.
        doubt: see ``Randomness.doubt``; empty if every draw is known.
        flaw: of the positive control; empty if it has none.
    """
    flaw = "Inconclusive: clients draw random numbers that the attackers do not know." if doubt else flaw
    warnings = (*([doubt] if doubt else []), *found.warnings)
    return replace(found, warnings=warnings, inconclusive="" if found.result.share > 0 else flaw)


def _data_words(inner: Dataset, first: int | None, order: str | None) -> str:
    """Return a dataset in words, with the split that is attacked and what its classes are."""
    split = inner.listing().split if isinstance(inner, Folder) else ""
    name = datasets.spec(inner) + (f", split {split}" if split else "")
    if order is not None:
        return f"{name}, classes in the order of {order}"
    return name + ("" if first is None else f", its first {classes_words(first)}")


def _planned(store: Store, matrix: Matrix) -> pd.DataFrame:
    """Return the trials of a matrix in the order of planning, with the column ``JUDGED``."""
    trials = store.trials()
    trials = trials[trials["trial"].isin({trial.id for trial in matrix.trials()})].reset_index(drop=True)
    return trials.assign(**{JUDGED: trials[RECOVERY]})


def _threshold(matrix: Matrix) -> float:
    assert matrix.threshold is not None  # the suite states one
    return matrix.threshold


def _findings(
    store: Store, trials: pd.DataFrame, spec: str, leaks: ClosedFormLeaks, matrix: Matrix, indices: Sequence[int]
) -> DefenseFindings:
    """Return what leaks behind the defense of a spec, without its note and the floors.

    Raises:
        Unsupported: no attacker returned anything, which says nothing about what leaks.
    """
    plain = {one.spec: one.plain for one in store.components() if one.kind == "defense"}
    shown = trials[trials["floor"] | (trials["defense"].map(plain) == spec)]
    every = ensemble_results(trials.assign(**{RECOVERY: trials[JUDGED]}), _threshold(matrix))
    (found,) = [one for one in every if plain[one.defense] == spec]
    behind = judged(shown.assign(**{RECOVERY: shown[JUDGED]}), _threshold(matrix))
    mine = behind[~behind["floor"]].assign(**{RECOVERY: shown[RECOVERY]})
    ended = mine[(mine["status"] == "ok") & mine[JUDGED].notna()]
    if not len(ended):
        reasons = dict.fromkeys(
            f"{row['attack']}: {row['reason'] or UNSCORED}" for row in mine[mine["status"] != ""].to_dict("records")
        )
        raise Unsupported(
            f"no attacker could attack {found.model} behind {found.defense}, which does not make it safe; "
            f"{'; '.join(reasons)}"
        )
    scores = {
        metric.name: float(values.max() if metric.higher_is_better else values.min())
        for metric in store.metrics()
        if _of_leakage(metric) and len(values := ended[metric.name].dropna())
    }
    pictures = [picture for index in indices for picture in _pictures(store, mine, index)]
    doubts = [caveat(shown)] if mine[RECOVERY].notna().any() and caveat(shown) else []
    return DefenseFindings(found, leaks, "", math.nan, scores, tuple(pictures), (*_gaps(mine, indices), *doubts))


def _of_leakage(metric: Metric | MetricInfo) -> bool:
    """Return whether a metric is one of those that ``--fail-if`` may name, and that a page compares."""
    return not metric.name.startswith("paper_") and metric.name not in NOT_LEAKAGE


def _pictures(store: Store, trials: pd.DataFrame, index: int) -> list[ImageFinding]:
    """Return an image with its best reconstruction, or with every one if the private image is not known."""
    rows = trials[trials["image"] == index]
    ended = rows[(rows["status"] == "ok") & rows[JUDGED].notna()]
    pictures = store.images(rows[rows["status"] != ""]["trial"])
    truth = next(iter(pictures.values())).truth if pictures else None
    if not len(ended):
        return [ImageFinding(index, truth, None, "", math.nan, math.nan, False)]
    ended = ended.sort_values(["recovered", JUDGED], ascending=False, kind="stable")
    several = trials["threat"].nunique() > 1
    return [
        ImageFinding(
            image=index,
            truth=truth,
            guess=pictures[row["trial"]].fitted,
            attacker=row["attack"] + (f", {row['threat']}" if several and row["threat"] != "paper" else ""),
            ssim=row[RECOVERY],
            psnr=row["psnr_aligned"],
            recovered=None if math.isnan(row[RECOVERY]) and not row[JUDGED] else row["recovered"],
        )
        for row in ended.head(len(ended) if truth is None else 1).to_dict("records")
    ]


def _gaps(trials: pd.DataFrame, indices: Sequence[int]) -> Iterable[str]:
    """Yield a warning for trials that ended in an error, and for images that no attacker returned anything for."""
    broken = trials[trials["status"] == "error"].groupby(["attack", "threat", "reason"], sort=False).size()
    for attack, threat, reason, count in broken.reset_index(name="count").itertuples(index=False, name=None):
        yield (
            f"{plural(count, 'trial')} of {attack} ({threat}) ended in an error ({reason}): whether the attack would "
            "have recovered the image is not known."
        )
    ended = trials[(trials["status"] == "ok") & trials[JUDGED].notna()]
    missed = [index for index in indices if index not in set(ended["image"])]
    if missed:
        yield (
            f"No attacker returned anything for {len(missed)} of the {len(indices)} images (index "
            f"{english(map(str, missed))}): each attack diverged, ended in an error or could not act. That does not "
            "make these images safe."
        )


def _leaks(
    own: OwnModule, defense: Defense, dataset: Dataset, indices: Sequence[int], drawn: Randomness
) -> tuple[ClosedFormLeaks, str]:
    """Return what gradients leak behind a defense without any optimisation, checked, and the doubt about draws.

    Raises:
        Unsupported: the defense mixes in more images than the data has.
    """
    clients, classes = _clients(defense, dataset, indices), dataset.num_classes
    seen = observe(own, defense, PRESETS["paper"], clients, classes, dataset.mean())
    kinds = (nn.Linear, *CONVOLUTIONS)
    names = [name for name, module in seen.model.named_modules() if isinstance(module, kinds)]
    inputs = [layer_inputs(own, defense, client, classes, names) for client in clients]
    truth = {name: [row[name] for row in inputs] for name in names if all(name in row for row in inputs)}
    found = ClosedFormLeaks.of(seen, truth, [int(client.label) for client in clients])
    return _redrawn(found, drawn), drawn.doubt() if drawn.layers and not read_draws(seen).complete else ""


def _clients(defense: Defense, dataset: Dataset, indices: Sequence[int]) -> list[Client]:
    """Return the clients of the attacked images.

    Raises:
        Unsupported: the defense mixes in more images than the data has.
    """
    further = [index for index in range(len(dataset)) if index not in indices][: defense.companions]
    images, labels = dataset.load([*indices, *further])
    others = tuple((image, int(label)) for image, label in zip(images[len(indices) :], labels[len(indices) :]))
    if len(others) < defense.companions:
        raise Unsupported(
            f"defense {defense.name!r} mixes {defense.companions} further images into the attacked one, and the data "
            f"has {len(others)} that are not attacked; give more images, or --images with fewer"
        )
    return [
        Client(image, int(label), "weights/0", f"audit/{index}", others)
        for index, image, label in zip(indices, images, labels)
    ]


def _redrawn(leaks: ClosedFormLeaks, drawn: Randomness) -> ClosedFormLeaks:
    """Return leaks in which the input of a linear layer is not the image if it depends on random draws."""
    forms = (replace(form, pixels=form.pixels and form.layer not in drawn.inputs) for form in leaks.forms)
    return replace(leaks, forms=tuple(forms))


def _observation(
    network: nn.Module,
    update: Update,
    image_shape: tuple[int, int, int],
    classes: int,
    threat: ThreatModel,
    factor: float = 1.0,
) -> Observation:
    """Return what the server saw of an update: the weights before, and the change of every trained parameter.

    With momentum, the change is ``factor`` times that of as many steps of plain SGD on a constant gradient.
    """
    buffers = {name: buffer.detach().clone() for name, buffer in network.named_buffers()}
    parameters = {name: value.detach()[None] for name, value in network.named_parameters()}
    return Observation(
        model=architecture(network),
        weights={**parameters, **buffers},
        gradient={name: value[None] / factor for name, value in update.change.items()},
        secrets=(),
        labels=None,
        image_shape=image_shape,
        num_classes=classes,
        mean_image=torch.full(image_shape, 0.5),
        threat=threat.granted(),
    )


def _leaks_of_update(observation: Observation, label: int | None, shown: UpdateFacts, several: bool) -> ClosedFormLeaks:
    """Return what an update leaks without any optimisation, from the mean gradient of its steps.

    Only tensors without an unknown value count. Of an update that is not one image's, or if ``several`` are stated, no
    label and no convolution is tested; of one whose entries have one size, no closed form of SGD is.
    """
    threat = observation.threat
    unit = threat.local_steps if threat.unit is None else threat.unit
    whole = {name: value for name, value in observation.gradient.items() if bool(torch.isfinite(value).all())}
    mean = {name: value / unit for name, value in whole.items()}
    if not mean:
        mean = {name: torch.zeros_like(value) for name, value in observation.gradient.items()}
    sent = replace(observation, gradient=mean, threat=replace(threat, shares="gradient"))
    truth = None if label is None else [label]
    convolutions = any(isinstance(module, CONVOLUTIONS) for module in observation.model.modules())
    if shown.rule == "sign":
        reason = "the closed forms are for SGD" if convolutions else ""
        return ClosedFormLeaks(tuple(shares(sent)), (), InferredLabels(None, None), (), reason)
    able = {one.layer for one in shown.layers if one.conclusive}
    forms = tuple(
        replace(form, conclusive=form.layer in able and (shown.rule == "sgd" or not form.exact))
        for form in closed_forms(sent, None)
    )
    if several or shown.one_image is False or (shown.rule == "unknown" and able):
        reason = "the test is for one image in one step of SGD" if convolutions else ""
        tested = tuple(form for form in forms if form.conclusive or (shown.one_image is None and not several))
        return ClosedFormLeaks(tuple(shares(sent)), tested, InferredLabels(None, None), (), reason)
    return replace(ClosedFormLeaks.of(sent, None, truth), forms=forms)


def _doubts(shown: UpdateFacts, update: Update, images: int) -> Iterable[str]:
    """Yield a warning for values that are not finite, and if the update does not show whether it is one image's."""
    assumed = "The attackers assume one image." if images == 1 else f"The attackers that search assume {images} images."
    finite = torch.cat([torch.isfinite(value).flatten() for value in update.change.values()])
    if unknown := int((~finite).sum()):
        yield (
            f"{unknown:,} of the {len(finite):,} recorded values after the training are not finite (NaN or infinite). "
            "The attackers had only the others, so a client that sends finite values can leak more."
        )
    smallest = min((update.rounding[f"{one.layer}.weight"] for one in shown.layers), default=0.0)
    if not shown.layers:
        yield (
            "Whether the update comes from one image was not tested, which takes a linear layer that was sent and "
            f"runs once. {assumed}"
        )
    elif shown.rule == "sign":
        pass  # the page says that ranks show no number of images then
    elif smallest > RESIDUAL_TOLERANCE:
        yield (
            f"The update is small: rounding of the recorded numbers may account for {part(min(1.0, smallest))} of it. "
            "Whether it comes from one image cannot be tested, and the rounding disturbs attackers as noise would."
        )
    elif not any(one.conclusive for one in shown.layers) and shown.shown is not None and shown.shown.rank > 1:
        yield (
            "How many images the update comes from is not shown: the change of layer "
            f"{shown.shown.layer} has the largest rank that it can have. {assumed}"
        )
    elif not any(one.conclusive for one in shown.layers):
        yield (
            "Whether the update comes from one image was not tested: in this network, a step on several images looks "
            f"like one image's in every linear layer (as with two classes). {assumed}"
        )


def _digest(observation: Observation, truth: Tensor | None, label: int | None) -> str:
    """Return 16 hex digits: a hash of an update and of what is known of its image."""
    digest = hashlib.sha256(f"{label}".encode())
    if observation.count > 1:
        digest.update(f"{observation.count} {observation.client!r} {observation.threat.learning_rate}".encode())
        digest.update(b"" if observation.counts is None else observation.counts.numpy().tobytes())
    for name, value in [*observation.gradient.items(), *([] if truth is None else [("truth", truth)])]:
        digest.update(name.encode() + value.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _audit(
    own: OwnModule,
    dataset: Dataset,
    facts: Sequence[tuple[str, str]],
    matrix: Matrix,
    behind: Sequence[DefenseFindings],
    options: AuditOptions,
    images: int,
    expected: Mapping[str, Exposure],
    update: ThreatModel | None = None,
) -> Audit:
    """Return an audit from its findings and everything that its pages state of how it was done."""
    ran = list(dict.fromkeys(threat for stage in matrix.stages for threat in stage.threats))
    known = []
    if update is None:
        known = [PRESETS["paper"], PRESETS["known-label"], replace(PRESETS["paper"], informed=True, name="")]
        known += [PRESETS["weights"], replace(PRESETS["weights"], rate="known", name="")]
    used = {attack.name: attack for stage in matrix.stages for attack in stage.attacks}
    return Audit(
        title=own.label,
        facts=tuple(facts),
        network=_network_facts(own.build(dataset.image_shape, dataset.num_classes), dataset),
        images=images,
        budget=options.budget,
        stages=tuple(tuple(attacks.spec(attack) for attack in stage.attacks) for stage in matrix.stages),
        threats=tuple((threat, threat in ran) for threat in dict.fromkeys([*known, *ran])),
        defenses=tuple(behind),
        needs=tuple((attack.name, attack.assumes) for attack in used.values()),
        untried=tuple(name for name in attacks.names() if name not in used and not attacks.get(name).floor),
        threshold=_threshold(matrix),
        predictions=expected,
        update=update,
        rule=options.rule,
        loss=own.head(dataset.image_shape).words,
    )


def _network_facts(network: nn.Module, dataset: Dataset) -> NetworkFacts:
    batch = nn.modules.batchnorm._BatchNorm
    kinds = (batch, nn.modules.instancenorm._InstanceNorm)
    layers = [module for name, module in network.named_modules() if name != NORMALISE]
    return NetworkFacts(
        parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        classes=dataset.num_classes,
        image_shape=dataset.image_shape,
        training=any(module.training for module in layers if not list(module.children())),
        image_norms=sum(isinstance(one, kinds) and one.training for one in layers),
        running_norms=sum(isinstance(one, batch) and not one.training for one in layers),
    )
