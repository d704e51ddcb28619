"""Audit a network on images, or one recorded update: run the attackers, and say what they found and needed."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from leakbench import attacks, datasets, defenses, metrics
from leakbench.analysis.ensemble import UNSCORED, AttackerStats, ensemble_results, floor_share
from leakbench.audit.findings import Audit, Behind, Sight
from leakbench.audit.gate import LABELS, Gate
from leakbench.audit.given import SCALE, Audited, Update, classes_of
from leakbench.audit.layers import EXACT, ClosedForm, Labels, closed_forms, labels_of, shares
from leakbench.core.rng import Rng, seeded
from leakbench.core.text import english, number, part
from leakbench.core.types import PRESETS, Reconstruction, ThreatModel
from leakbench.datasets import Dataset
from leakbench.defenses import Defense
from leakbench.engine import run as engine
from leakbench.engine.progress import NullProgress
from leakbench.engine.run import RunOptions
from leakbench.engine.worker import png
from leakbench.errors import BadOption, LeakbenchError, MissingAsset, Unsupported
from leakbench.gradients import full_precision
from leakbench.gradients.evaluate import architecture
from leakbench.metrics.base import Truth
from leakbench.models.module import OwnModule
from leakbench.models.surgery import linears
from leakbench.observation import Observation
from leakbench.plan.matrix import RECOVERY, Matrix, expand, load_suite, override
from leakbench.store.run_file import FILE, Store
from leakbench.victim import Client, layer_inputs, observe

Budget = Literal["quick", "standard", "thorough"]

EXACTLY = "analytic"
"""The attack whose answer needs no truth to be judged where nothing of the update is left over."""


def audit_model(
    own: OwnModule,
    data: str,
    protections: Sequence[Defense],
    out: Path,
    *,
    budget: Budget = "standard",
    images: int | Sequence[int] | None = None,
    threats: Sequence[str] = (),
    threshold: float | None = None,
    facts: Sequence[tuple[str, str]] = (),
    gate: Gate | None = None,
    device: str = "auto",
    progress: NullProgress | None = None,
    command: str = "",
) -> Audit:
    """Attack a network on images behind each defense, into the run file of a folder, and return what is found.

    Args:
        own: the network, in its mode, from images in [0, 1] to logits.
        data: the spec of a dataset; label i is the network's class i.
        protections: what the client does, each audited by itself.
        out: the folder; an audit that was stopped goes on.
        budget: which stages of the suite ``audit`` are run.
        images: how many, or which; those of the budget by default.
        threats: in place of those of the stages.
        threshold: from which ``ssim_aligned`` on an image counts as recovered; the suite's by default.
        facts: more of what the audit was done with.
        gate: the line that must not be crossed.
        device: see ``engine.run``.
        progress: see ``engine.run``.
        command: see ``engine.run``.

    Raises:
        Unsupported: behind one of the defenses no attacker could attack the network; it is not thereby safe.
        LeakbenchError: one line on what does not fit.
    """
    inner = datasets.parse(data)
    classes = classes_of(own, inner.image_shape)
    if inner.num_classes > classes:
        raise BadOption(
            f"--data {data!r} has {inner.num_classes} classes, and the network tells {classes} apart; give one "
            "subfolder a class of the network, in the order of its outputs"
        )
    dataset = Audited(datasets.spec(inner), classes)
    axes = expand(load_suite("audit"), budget)[0]
    chosen = images if images is not None else min(int(axes["images"]), len(dataset))
    given: dict[str, Any] = {"models": [own], "datasets": [dataset], "defenses": list(protections), "images": chosen}
    given |= {"threats": list(threats)} if threats else {}
    given |= {} if threshold is None else {"threshold": threshold}
    matrix = Matrix(**override(axes, given))
    assert matrix.threshold is not None
    indices = list(range(chosen)) if isinstance(chosen, int) else list(chosen)
    looked = {defenses.spec(one): _look(own, one, dataset, indices) for one in protections}
    engine.run(matrix, out, RunOptions(device), progress=progress, command=command)
    with Store.open(out / FILE, readonly=True) as store:
        wanted = {trial.id for trial in matrix.trials()}
        trials = store.trials()
        trials = trials[trials["trial"].isin(wanted)].reset_index(drop=True)
        known = [metric for metric in store.metrics() if not metric.name.startswith("paper_")]
        plain = {one.spec: one.plain for one in store.components() if one.kind == "defense"}
        behind = []
        for one in ensemble_results(trials, matrix.threshold):
            mine = trials[~trials["floor"] & (trials["defense"] == one.defense)]
            _refuse_unattacked(own.label, one.defense, mine)
            spec = plain[one.defense]
            layers, forms, labels = looked[spec]
            scores = {
                metric.name: float(values.max() if metric.higher_is_better else values.min())
                for metric in known
                if len(values := mine[mine["status"] == "ok"][metric.name].dropna())
            }
            behind.append(
                Behind(
                    defense=one.defense,
                    note=defenses.parse(spec).note(),
                    images=one.images,
                    share=one.share,
                    low=one.low,
                    high=one.high,
                    floor=floor_share(trials, matrix.threshold),
                    efforts=one.attackers,
                    layers=layers,
                    forms=forms,
                    labels=labels,
                    scores=scores,
                    sights=tuple(_sight(store, mine, index, one.attackers, matrix.threshold) for index in indices),
                    warnings=_gaps(mine, indices),
                )
            )
    order = {defenses.spec(one): place for place, one in enumerate(protections)}
    behind.sort(key=lambda one: order.get(plain[one.defense], 0))
    ran = [threat for stage in matrix.stages for threat in stage.threats]
    network = own.build(dataset.image_shape, classes)
    return Audit(
        title=own.label,
        facts=(*facts, *_about(network, dataset.image_shape, classes, budget, matrix, matrix.threshold, len(indices))),
        threats=_threats(ran, shares="gradient"),
        assumptions=_assumptions(network, behind, matrix),
        behind=tuple(behind),
        untried=_untried(matrix, ran, recorded=False),
        threshold=matrix.threshold,
        gate=gate,
    )


def _look(
    own: OwnModule, defense: Defense, dataset: Dataset, indices: Sequence[int]
) -> tuple[tuple[Any, ...], tuple[ClosedForm, ...], Labels]:
    """Return what the gradient behind a defense gives away by itself: shares of layers, closed forms, labels."""
    further = [index for index in range(len(dataset)) if index not in indices][: defense.companions]
    images, labels = dataset.load([*indices, *further])
    others = tuple((image, int(label)) for image, label in zip(images[len(indices) :], labels[len(indices) :]))
    if len(others) < defense.companions:
        raise Unsupported(
            f"defense {defense.name!r} mixes {defense.companions} further images into the attacked one, and the data "
            f"has {len(others)} that are not attacked; give more images, or --images with fewer"
        )
    clients = [
        Client(image, int(label), "weights/0", f"audit/{index}", others)
        for index, image, label in zip(indices, images, labels)
    ]
    classes = dataset.num_classes
    seen = observe(own, defense, PRESETS["paper"], clients, classes, dataset.mean())
    names = list(linears(seen.model))
    inputs = [layer_inputs(own, defense, client, classes, names) for client in clients]
    truth = {name: [row[name] for row in inputs] for name in names if all(name in row for row in inputs)}
    read = labels_of(seen, [client.label for client in clients])
    return tuple(shares(seen)), tuple(closed_forms(seen, truth)), read


def _refuse_unattacked(label: str, defense: str, trials: pd.DataFrame) -> None:
    """Raise Unsupported where no attacker came through, which says nothing of what leaks."""
    if ((trials["status"] == "ok") & trials[RECOVERY].notna()).any():
        return
    reasons = dict.fromkeys(
        f"{row['attack']}: {row['reason'] or UNSCORED}" for row in trials[trials["status"] != ""].to_dict("records")
    )
    raise Unsupported(
        f"no attacker could attack {label!r} behind {defense}, which does not make it safe; {'; '.join(reasons)}"
    )


def _gaps(trials: pd.DataFrame, indices: Sequence[int]) -> tuple[str, ...]:
    """Return warnings of what is not known behind a defense: trials that broke, images that nobody rebuilt."""
    broken = trials[trials["status"] == "error"].groupby(["attack", "threat", "reason"], sort=False).size()
    lines = [
        f"{count} trial{'s' * (count != 1)} of {attack} ({threat}) ended in an error ({reason}): what would have been "
        "seen is not known."
        for attack, threat, reason, count in broken.reset_index(name="count").itertuples(index=False, name=None)
    ]
    ended = trials[(trials["status"] == "ok") & trials[RECOVERY].notna()]
    missed = [index for index in indices if index not in set(ended["image"])]
    if missed:
        lines.append(
            f"Of {len(missed)} of the {len(indices)} images (index {english(map(str, missed))}) no attacker returned "
            "anything: every one diverged, broke or could not act, which does not make them safe."
        )
    return tuple(lines)


def _sight(store: Store, trials: pd.DataFrame, index: int, efforts: Sequence[AttackerStats], threshold: float) -> Sight:
    """Return an image with the reconstruction that comes closest to it."""
    rows = trials[trials["image"] == index]
    ended = rows[rows["status"] == "ok"].sort_values(RECOVERY, ascending=False, kind="stable")
    if not len(ended):
        held = rows[rows["status"] != ""]
        pictures = store.images(held["trial"].head(1))
        truth = next(iter(pictures.values())).truth if pictures else None
        return Sight(index, truth, None, "", "no attacker returned an image", False)
    best = ended.iloc[0]
    pictures = store.images([best["trial"]])
    found = pictures[best["trial"]]
    score = float(best[RECOVERY])
    words = f"SSIM {number(score, 2)}, PSNR {number(float(best['psnr_aligned']), 1)} dB, after alignment"
    knowing = "" if best["threat"] == "paper" else f", {best['threat']}"
    return Sight(index, found.truth, found.reconstruction, f"{best['attack']}{knowing}", words, score >= threshold)


def audit_update(
    own: OwnModule,
    update: Update,
    image_shape: tuple[int, int, int],
    *,
    budget: Budget = "standard",
    rate: float | None = None,
    local_steps: int = 1,
    truth: Tensor | None = None,
    label: int | None = None,
    threshold: float | None = None,
    facts: Sequence[tuple[str, str]] = (),
    gate: Gate | None = None,
    progress: NullProgress | None = None,
) -> Audit:
    """Attack one recorded update of a network, and return what is found.

    Args:
        own: the network, in the mode in which the client trained it.
        update: its parameters before and after, with the names that they have in ``own.module``.
        image_shape: (C, H, W) of the image that the client trained on.
        budget: which stages of the suite ``audit`` are run; others where the learning rate is not known.
        rate: the learning rate, where it is known.
        local_steps: how many steps the client took.
        truth: [C, H, W] in [0, 1], the private image, to be compared with alone; no attacker sees it.
        label: the true label, likewise.
        threshold: see ``audit_model``.
        facts: see ``audit_model``.
        gate: the line that must not be crossed.
        progress: is told a line for every attacker.

    Raises:
        Unsupported: no attacker could attack the update; it is not thereby safe.
    """
    classes = classes_of(own, image_shape)
    network = own.build(image_shape, classes)
    network.load_state_dict({**network.state_dict(), **update.before})
    threat = ThreatModel(
        shares="weights", learning_rate=rate, local_steps=local_steps, rate="hidden" if rate is None else "known"
    )
    observation = _observed(network, update, image_shape, classes, threat)
    scale = budget if rate is not None else f"{budget}-update"
    matrix = Matrix(**override(expand(load_suite("audit"), scale)[0], {"threats": [threat]}))
    limit = matrix.threshold if threshold is None else threshold
    assert limit is not None
    steps = replace(observation, threat=replace(threat, shares="gradient"))
    unit = (1.0 if rate is None else rate) * local_steps
    sent = replace(steps, gradient={name: value / unit for name, value in observation.gradient.items()})
    telling = _telling(network, sent)
    forms = tuple(replace(one, tells=one.tells and one.layer in telling) for one in closed_forms(sent, None))
    labels = labels_of(steps, None if label is None else [label])
    certain = truth is None and any(form.pixels and form.exact and not form.factor for form in forms)
    efforts, guesses, broken = _attack(matrix, observation, truth, certain, limit, progress or NullProgress())
    if not guesses:
        reasons = "; ".join(f"{one.attacker}: {', '.join(one.unscored)}" for one in efforts)
        raise Unsupported(
            f"no attacker could attack the update of {own.label!r}, which does not make it safe; {reasons}"
        )
    scores: dict[str, float] = {}
    best = 0
    if truth is not None:
        rows = [_scores(guess, truth, label) for _, guess in guesses]
        for name, higher in _known_metrics().items():
            values = [row[name] for row in rows if name in row and not math.isnan(row[name])]
            if values:
                scores[name] = max(values) if higher else min(values)
        best = max(range(len(rows)), key=lambda index: _worth(rows[index]))
    warnings = (*_doubts(forms, update), *broken)
    attacker, guess = guesses[best]
    recovered, words = None, "no truth was given"
    if RECOVERY in scores:
        recovered, words = scores[RECOVERY] >= limit, f"SSIM {number(scores[RECOVERY], 2)} after alignment"
    elif truth is not None:
        words = UNSCORED
    elif certain and attacker == EXACTLY:
        recovered, words = True, "read off in closed form; the update leaves no room for another image"
    sight = Sight(
        0, None if truth is None else png(truth), png(guess.images[0].float().cpu()), attacker, words, recovered
    )
    share = math.nan if recovered is None else float(recovered)
    behind = Behind(
        defense="the update as it was recorded",
        note="",
        images=1,
        share=share,
        low=math.nan,
        high=math.nan,
        floor=math.nan,
        efforts=efforts,
        layers=tuple(shares(observation)),
        forms=forms,
        labels=labels,
        scores=scores,
        sights=(
            sight,
            *(
                Sight(0, None, png(one.images[0].float().cpu()), name, "what this attacker returned", None)
                for name, one in (guesses if truth is None else [])
                if one is not guess
            ),
        ),
        warnings=warnings,
    )
    return Audit(
        title=own.label,
        facts=(*facts, *_about(network, image_shape, classes, budget, matrix, limit, 1)),
        threats=((threat.spec(), threat.granted().describe(), True), *_threats([], shares="weights")),
        assumptions=_assumptions_of_update(network, forms, labels, rate, local_steps, label),
        behind=(behind,),
        untried=_untried(matrix, [threat], recorded=True),
        threshold=limit,
        gate=gate,
    )


def _observed(
    network: nn.Module, update: Update, image_shape: tuple[int, int, int], classes: int, threat: ThreatModel
) -> Observation:
    """Return what the server saw of an update: the weights before, and what changed."""
    buffers = {name: buffer.detach().clone() for name, buffer in network.named_buffers()}
    parameters = {name: value.detach()[None] for name, value in network.named_parameters()}
    trained = [name for name, value in network.named_parameters() if value.requires_grad]
    return Observation(
        model=architecture(network),
        weights={**parameters, **buffers},
        gradient={name: (update.before[name] - update.after[name])[None] for name in trained},
        secrets=(),
        labels=None,
        image_shape=image_shape,
        num_classes=classes,
        mean_image=torch.full(image_shape, 0.5),
        threat=threat.granted(),
    )


def _telling(network: nn.Module, observation: Observation) -> set[str]:
    """Return the linear layers in which two images would leave something over: a control of the test of one image.

    Two public images, of unlike classes, are mixed as a batch mixes them; a layer in which they too look like one (of
    a stack of linear layers before two classes, say) tells nothing.
    """
    probe = copy.deepcopy(network)
    named = {name: value for name, value in probe.named_parameters() if value.requires_grad}
    total = {name: torch.zeros_like(value) for name, value in named.items()}
    with seeded("audit", "control"):
        coarse = torch.rand(2, observation.image_shape[0], 3, 3)
        for label, image in enumerate(nn.functional.interpolate(coarse, observation.image_shape[1:])):
            loss = nn.functional.cross_entropy(probe(image[None]), torch.tensor([label]))
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            total = {name: total[name] if by is None else total[name] + by for name, by in zip(named, found)}
    mixed = replace(observation, gradient={name: value[None] for name, value in total.items()})
    return {form.layer for form in closed_forms(mixed, None) if form.tells and form.leftover > EXACT}


def _attack(
    matrix: Matrix,
    observation: Observation,
    truth: Tensor | None,
    certain: bool,
    threshold: float,
    progress: NullProgress,
) -> tuple[tuple[AttackerStats, ...], list[tuple[str, Reconstruction]], list[str]]:
    """Run every attack of the stages on one observation; after a recovery the others are skipped.

    Args:
        matrix: its stages.
        observation: the update.
        truth: see ``audit_update``.
        certain: whether the answer of ``EXACTLY`` is the image, as the update itself shows.
        threshold: see ``audit_update``.
        progress: see ``audit_update``.

    Returns:
        What each did, what those returned that did not diverge, and a warning for each that broke.
    """
    efforts, guesses, broken = [], [], []
    settled = False
    for attack in dict.fromkeys(attack for stage in matrix.stages for attack in stage.attacks):
        name = attacks.spec(attack)
        if settled:
            efforts.append(AttackerStats(name, 0, 0, 0, 1, 0, {}, None, 0.0))
            continue
        begin = time.perf_counter()
        reason = ""
        guess: Reconstruction | None = None
        try:
            attack.preflight(observation)
            with full_precision():
                guess = attack(observation, Rng(("audit/update",), observation.device))
        except Unsupported as error:
            reason = str(error)
        except (Exception, SystemExit) as error:  # whatever an attack raises on this network is its reason
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            broken.append(f"{name} ended in an error ({reason}): what it would have seen is not known.")
        seconds = time.perf_counter() - begin
        failed = guess is not None and (
            not bool(torch.isfinite(guess.images).all()) or (guess.failed is not None and bool(guess.failed.any()))
        )
        hit = False
        if guess is not None and not failed:
            guesses.append((name, guess))
            close = truth is not None and _scores(guess, truth, None).get(RECOVERY, -1.0) >= threshold
            hit = close or (certain and name == EXACTLY)
            settled = hit
        counted = None if guess is None or guess.evaluations is None else int(guess.evaluations.sum())
        tried = int(guess is not None)
        unscored = {reason: 1} if reason else {}
        efforts.append(AttackerStats(name, tried, int(hit), int(failed), 0, 0, unscored, counted, seconds))
        progress.note(f"{name}: {reason or ('diverged' if failed else 'recovered the image' if hit else 'done')}")
    return tuple(efforts), guesses, broken


def _known_metrics() -> Mapping[str, bool]:
    """Return the metrics that can be computed here: name -> whether higher means more leakage."""
    found = {}
    for name in metrics.names():
        metric = metrics.parse(name)
        try:
            metric.check()
        except MissingAsset:
            continue
        if not name.startswith("paper_"):
            found[name] = metric.higher_is_better
    return found


def _scores(guess: Reconstruction, truth: Tensor, label: int | None) -> dict[str, float]:
    """Return the metrics of one reconstruction, without those that its size does not allow; it meets the truth here."""
    known = Truth(truth[None].to(guess.images.device), torch.tensor([-1 if label is None else label]))
    found = {}
    with torch.no_grad():
        for name in _known_metrics():
            if name == "label_correct" and label is None:
                continue
            with contextlib.suppress(ValueError):  # the image is smaller than the metric's window
                found[name] = float(metrics.parse(name).score(replace(guess, images=guess.images.float()), known)[0])
    return found


def _worth(scores: Mapping[str, float]) -> float:
    """Return by what the closest of several reconstructions is found; a score that is not defined comes last."""
    value = scores.get(RECOVERY, math.nan)
    return -math.inf if math.isnan(value) else value


def _doubts(forms: Iterable[ClosedForm], update: Update) -> tuple[str, ...]:
    """Return a warning where the update is not that of one image in one step, beyond the rounding of its numbers."""
    known = [(form.leftover, update.rounding(f"{form.layer}.weight"), form.tells) for form in forms]
    if not known:
        return ("No linear layer tells whether the update is that of one image: the attackers assume so.",)
    coarse = min(rounding for _, rounding, _ in known)
    if coarse > EXACT:
        return (
            f"The update is so small beside the weights that rounding alone may be {part(min(1.0, coarse))} of it: "
            "whether it is that of one image cannot be told, and attackers see it as through noise.",
        )
    worst = max((leftover for leftover, rounding, _ in known if leftover > max(EXACT, rounding)), default=0.0)
    if not worst:
        if any(tells and rounding <= EXACT for _, rounding, tells in known):
            return ()
        return (
            "Whether the update is that of one image was not tested: of no linear layer would several images leave "
            "anything over, as with two classes. The attackers assume one.",
        )
    return (
        f"{part(worst)} of the update of a linear layer cannot come from one image in one step: it is of several "
        "images or steps, or noise was added. Attackers of one image are the wrong ones for several; what they miss is "
        "not thereby safe.",
    )


def _about(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    classes: int,
    budget: str,
    matrix: Matrix,
    threshold: float,
    images: int,
) -> tuple[tuple[str, str], ...]:
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    stages = "; ".join(", ".join(attacks.spec(attack) for attack in stage.attacks) for stage in matrix.stages)
    shape = " x ".join(map(str, image_shape))
    mode = "training" if _in_training(network) else "evaluation"
    return (
        ("network", f"{parameters:,} trained parameters, {classes} classes, in {mode} mode"),
        ("images", f"{images} of shape {shape}, values in [0, 1]"),
        ("budget", f"{budget}: {stages}"),
        ("recovered", f"an SSIM of at least {threshold:g} after the best fit of brightness and contrast"),
    )


def _in_training(network: nn.Module) -> bool:
    return any(module.training for module in network.modules() if not list(module.children()))


def _threats(ran: Sequence[ThreatModel], shares: str) -> tuple[tuple[str, str, bool], ...]:
    """Return what a server sees under each threat model that this kind of audit can be asked for, and what was run."""
    models = {"paper": PRESETS["paper"], "known-label": PRESETS["known-label"]}
    models["informed=true"] = replace(PRESETS["paper"], informed=True, name="")
    models["weights"] = PRESETS["weights"]
    models["weights, rate known"] = replace(PRESETS["weights"], rate="known", name="")
    found = [(name, threat.describe(), threat in ran) for name, threat in models.items()]
    others = [threat for threat in dict.fromkeys(ran) if threat not in models.values()]
    found += [(threat.spec(), threat.describe(), True) for threat in others]
    return tuple(row for row in found if shares == "gradient" or row[0] in ("paper", "known-label"))


def _normalises(network: nn.Module) -> str:
    batch = nn.modules.batchnorm._BatchNorm
    kinds = (batch, nn.modules.instancenorm._InstanceNorm)
    layers = [module for name, module in network.named_modules() if name != SCALE]
    trained = sum(isinstance(one, kinds) and one.training for one in layers)
    fixed = sum(isinstance(one, batch) and not one.training for one in layers)
    if trained:
        return (
            f"layers that normalise by the statistics of the one image: {trained}, which hide its brightness "
            "and contrast and no more; a batch of several would mix images"
        )
    if fixed:
        return f"layers that normalise by running statistics, which are public: {fixed}"
    return "no layer normalises over a batch"


def _assumptions(network: nn.Module, behind: Sequence[Behind], matrix: Matrix) -> tuple[tuple[str, str], ...]:
    granted = {threat.labels for stage in matrix.stages for threat in stage.threats}
    rows = []
    for one in behind:
        read = "cannot be read off" if one.labels.read is None else f"{one.labels.right} of {one.forms_images} read off"
        rows.append(f"{one.defense}: {read}")
    label = "inferred, never given" if granted == {"inferred"} else "given, where the threat model grants it"
    shared = {threat.shares for stage in matrix.stages for threat in stage.threats}
    rate = "not needed: the gradient itself is sent" if shared == {"gradient"} else "as the threat model grants it"
    return (
        ("the label", f"{label}; {'; '.join(rows)}"),
        ("one image a step", "so it was: every client trained on a single image"),
        ("the mode", f"training mode {'on' if _in_training(network) else 'off'}; {_normalises(network)}"),
        ("the learning rate", rate),
        ("the weights", "public, exact: the server handed them out"),
        ("images", "values in [0, 1] and the shape are public; no other image of the client's was used"),
    )


def _assumptions_of_update(
    network: nn.Module, forms: Sequence[ClosedForm], labels: Labels, rate: float | None, steps: int, label: int | None
) -> tuple[tuple[str, str], ...]:
    read = "cannot be read off" if labels.read is None else f"read off the update: class {labels.read[0]}"
    check = (
        "" if label is None or labels.right is None else (", which is right" if labels.right else ", which is wrong")
    )
    leftover = max((form.leftover for form in forms), default=math.nan)
    untold = leftover <= EXACT and not any(form.tells for form in forms)
    one = (
        "not tested: no linear layer that runs once was sent"
        if math.isnan(leftover)
        else "not tested: of no linear layer would several images leave anything over"
        if untold
        else f"tested: a single image in one step explains all but {part(leftover)} of the linear layers' update"
    )
    return (
        ("the label", f"inferred; {read}{check}"),
        ("one image, in all steps", one),
        ("the mode", f"training mode {'on' if _in_training(network) else 'off'} (--mode); {_normalises(network)}"),
        ("the learning rate", "not known" if rate is None else f"known: {rate:g}; {steps} local step(s) of plain SGD"),
        ("the weights before", "public, exact, as recorded"),
    )


def _untried(matrix: Matrix, ran: Sequence[ThreatModel], recorded: bool) -> tuple[str, ...]:
    """Return what was not tried, so that nobody takes silence for safety."""
    tried = {attack.name for stage in matrix.stages for attack in stage.attacks}
    others = [name for name in attacks.names() if name not in tried and not attacks.get(name).floor]
    lines = [f"Attacks: {english(others)}."] if others else []
    lines.append("Several images in a step, momentum or Adam on the client, text.")
    if not recorded:
        missed = [name for name, _, done in _threats(ran, "gradient") if not done]
        lines += [f"Threat models: {english(missed)} (--threat runs one)."] if missed else []
        lines.append("Other weights than these: what leaks changes while a network is trained.")
    lines.append("More steps and restarts than the budget has: an attacker with more time may see more.")
    return tuple(lines)


def refuse_unmeasured(audit: Audit) -> None:
    """Raise where what the line is about was not measured, or could not be judged.

    Raises:
        LeakbenchError: the line is neither crossed nor kept, as far as is known.
    """
    missing = audit.unmeasured()
    if missing and not audit.crossings():
        unread = [one.defense for one in audit.behind if one.labels.read is None]
        why = (
            "no rule reads labels off what was sent, which hides none; judge by another line"
            if audit.gate is not None and audit.gate.name == LABELS and unread
            else "it was not measured; give --truth (--label for labels), images as large as the metric needs, or "
            "fetch what it needs"
        )
        raise LeakbenchError(f"--fail-if '{audit.gate}' cannot be judged for {', '.join(missing)}: {why}")
    doubts = [one for one in audit.behind if one.warnings]
    if audit.gate is not None and doubts and not audit.crossings():
        raise LeakbenchError(f"--fail-if '{audit.gate}' cannot be judged: {doubts[0].warnings[0]}")
