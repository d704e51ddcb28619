"""``audit.md`` and ``audit.html``: the findings of an audit in plain words, as pure functions of the findings."""

from collections.abc import Mapping
from math import isnan

from leakbench.analysis.ensemble import UNSCORED
from leakbench.attacks.peeling.exposure import Exposure
from leakbench.audit.batch import DISAGGREGATE
from leakbench.audit.exposure import LayerExposure
from leakbench.audit.findings import Audit, DefenseFindings
from leakbench.core.text import ABSENT, number, plural
from leakbench.report.page import STYLES, picture, render, render_markdown, sentence

MAX_LAYERS = 12
"""So many layers, those with the largest shares, have a row each; the others share one."""

FILES = ("audit.md", "audit.html")

LAYER_HEADINGS = ("layer", "kind", "parameters sent", "share of the squared gradient", "leaks in closed form")
EXPOSURE_HEADINGS = ("layer", "kernel", "input", "expected by size", "follows", "relative error", "why not by itself")
IMAGE_HEADINGS = ("image", "recovered", "attack", "similarity to the private image")
ATTACK_HEADINGS = ("attack", "recovered", "tried", "diverged", "skipped", "evaluations", "seconds", "without a result")


def verdict(one: DefenseFindings) -> str:
    """Return in one sentence or two how many images are recovered behind a defense."""
    batch = one.batch if one.together else None
    return sentence("audit.sentences.j2", "verdict", one.result, one.inconclusive, batch, one.together)


def exact_words(audit: Audit, one: DefenseFindings) -> str:
    """Return in one sentence what leaks exactly behind a defense; empty if nothing does."""
    return sentence("audit.sentences.j2", "exact", audit, one)


def mode(audit: Audit) -> str:
    """Return the mode in which clients train: it decides whose statistics batch normalisation uses."""
    return "training mode" if audit.network.training else "evaluation mode"


def rule_words(audit: Audit) -> str:
    """Return whether the audit passes by its rule; empty without a rule."""
    return sentence("audit.sentences.j2", "rule", audit)


def markdown(audit: Audit, command: str) -> str:
    """Return the audit as Markdown, without pictures."""
    return render_markdown("audit.md.j2", **_context(audit, command))


def html(audit: Audit, command: str, *, pictures: bool = True) -> str:
    """Return the audit as one page, with the private images and their reconstructions or only with their scores."""
    context = {**_context(audit, command), "pictures": pictures, "image_headings": IMAGE_HEADINGS}
    return render("audit.html.j2", context, styles=(*STYLES, "audit.css"))


def _context(audit: Audit, command: str) -> dict[str, object]:
    """Return what both templates show."""
    return {
        "title": f"Audit of {audit.title} in {mode(audit)}",
        "audit": audit,
        "rule": rule_words(audit),
        "command": command,
        "defenses": [(one, verdict(one), _layer_rows(one), _attack_rows(one)) for one in audit.defenses],
        "exposures": [_exposure_rows(one, audit.predictions) for one in audit.defenses],
        "layer_headings": LAYER_HEADINGS,
        "exposure_headings": EXPOSURE_HEADINGS,
        "attack_headings": ATTACK_HEADINGS,
        "unscored": UNSCORED,
        "picture": picture,
    }


def _layer_rows(one: DefenseFindings) -> list[list[str]]:
    """Return the layers with the largest shares, in order of registration; the others together."""
    layers = one.leaks.layers
    kept = sorted(range(len(layers)), key=lambda place: -layers[place].share)[:MAX_LAYERS]
    exact = {form.layer for form in one.leaks.forms if form.exact}
    rows = []
    for layer in (layers[place] for place in sorted(kept)):
        leaks = "its input, exactly" if layer.layer in exact else "" if layer.parameters else "nothing was sent"
        if one.batch is not None and one.together and layer.layer == one.batch.layer:
            leaks = f"its inputs: {plural(one.together, 'image')}"
        rows.append([layer.layer, layer.kind, f"{layer.parameters:,}", f"{100 * layer.share:.2f} %", leaks])
    others = [layer for place, layer in enumerate(layers) if place not in kept]
    if others:
        count, share = sum(other.parameters for other in others), sum(other.share for other in others)
        rows.append([f"{len(others)} others", "", f"{count:,}", f"{100 * share:.2f} %", ""])
    return rows


def _exposure_rows(one: DefenseFindings, expected: Mapping[str, Exposure]) -> list[list[str]]:
    """Return a row for each convolution, in order of execution."""
    return [
        [
            each.layer,
            " x ".join(map(str, each.kernel)),
            " x ".join(map(str, each.inputs)),
            expected[each.layer].verdict if each.layer in expected else ABSENT,
            _follows(each),
            ABSENT if isnan(each.error) else f"{each.error:.1g}",
            each.reason.partition(", so that")[0],
        ]
        for each in one.leaks.exposures
    ]


def _follows(one: LayerExposure) -> str:
    """Return from what the input of a convolution follows, and for how many images if several were tried."""
    found = [(one.exposed, "by itself"), (one.derived, "from other layers")]
    parts = [
        words + (f" ({count} of {one.images} images)" if one.images > 1 else "") for count, words in found if count
    ]
    if one.positions:
        parts.append(f"{one.positions} of {one.read} positions, in unknown order")
    return ", ".join(parts) or "no"


def _attack_rows(one: DefenseFindings) -> list[list[object]]:
    """Return a row for each attacker."""
    rows: list[list[object]] = []
    if one.batch is not None:
        tried = one.result.images if one.compared else len(one.batch.images)
        rows.append([DISAGGREGATE, one.together, tried, 0, 0, ABSENT, ABSENT, ""])
    for stats in one.result.attackers:
        counts = [stats.recovered, stats.tried, stats.failed, stats.skipped]
        evaluations = ABSENT if stats.evaluations is None else f"{stats.evaluations:,}"
        rows.append([stats.attacker, *counts, evaluations, number(stats.seconds, 1), "; ".join(stats.unscored)])
    return rows
