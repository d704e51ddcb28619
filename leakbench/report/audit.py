"""``audit.md`` and ``audit.html``: what an audit found, in plain words; pure functions of its findings."""

from __future__ import annotations

import math
from collections.abc import Sequence

from leakbench.audit.findings import Audit, Behind
from leakbench.core.text import ABSENT, number, part, percent
from leakbench.report.md import escape, table
from leakbench.report.page import STYLES, picture, render

LISTED = 12
"""The layers that are listed by themselves, those with the largest shares."""

FILES = ("audit.md", "audit.html")


def verdict(one: Behind) -> str:
    """Return in one sentence what is seen behind a defense."""
    if one.images == 0:
        return "No attacker could attack it, which does not make it safe."
    if math.isnan(one.share):
        return "Attackers returned images; without the truth nobody can say how close they are. Look at them."
    low, high = percent_of(one.low), percent_of(one.high)
    interval = "" if math.isnan(one.low) else f" (95 % interval {low} to {high}, of {one.images} images)"
    first = next((effort.attacker for effort in one.efforts if effort.recovered), "")
    if one.share > 0:
        return f"The server sees {percent(one.share)} of the images{interval}, first by {first}."
    return f"These attackers recovered no image{interval}. That is no proof of safety: see below what was not tried."


def percent_of(share: float) -> str:
    """Return a share in whole per cent; a dash where there is none."""
    return ABSENT if math.isnan(share) else f"{100 * share:.0f} %"


def gate_words(audit: Audit) -> str:
    """Return whether the line is crossed; empty without one."""
    if audit.gate is None:
        return ""
    crossed = audit.crossings()
    if crossed:
        places = "; ".join(f"{defense}: {value:.3g}" for defense, value in crossed)
        return f"The line '{audit.gate}' is crossed ({places})."
    if audit.unmeasured() or any(one.warnings for one in audit.behind):
        return f"The line '{audit.gate}' cannot be judged."
    return f"The line '{audit.gate}' is not crossed."


def leaks(one: Behind) -> list[str]:
    """Return in words what leaks without any search."""
    lines = []
    for form in one.forms:
        what = "the image itself" if form.pixels else f"its {form.inputs:,} inputs (features of the image)"
        but = ", but for a factor (no bias was sent)" if form.factor else ""
        check = "" if math.isnan(form.error) else f"; measured against the truth, they are off by {form.error:.1g}"
        if form.exact:
            lines.append(f"Layer {form.layer} gives away {what} exactly, in closed form, for every image{but}{check}.")
        elif not form.tells and math.isnan(form.error):
            lines.append(
                f"Layer {form.layer} gives away {what} if the update is of one image, which its gradient, of too few "
                "independent rows, cannot tell."
            )
        else:
            lines.append(
                f"Layer {form.layer} does not give {what} away exactly: {part(form.leftover)} of its gradient is "
                f"explained by no single input{check}."
            )
    if one.labels.read is None:
        lines.append("The label cannot be read off what was sent.")
    elif one.labels.right is None:
        lines.append(f"The label is read off what was sent: class {', '.join(map(str, one.labels.read))}.")
    else:
        lines.append(
            f"The label is read off what was sent, rightly for {one.labels.right} of {one.forms_images} images."
        )
    top = sorted(one.layers, key=lambda layer: -layer.share)[:3]
    shares = ", ".join(f"{layer.layer} ({percent(layer.share)})" for layer in top if layer.share > 0)
    lines.append(f"Most of what a search matches lies in: {shares}.")
    withheld = [layer.layer for layer in one.layers if layer.withheld]
    lines += [f"Withheld by the defense: {', '.join(withheld)}."] if withheld else []
    return lines


def layer_rows(one: Behind) -> list[list[str]]:
    """Return the layers with the largest shares, in order of registration; the others together."""
    kept = sorted(range(len(one.layers)), key=lambda place: -one.layers[place].share)[:LISTED]
    exact = {form.layer for form in one.forms if form.exact}
    rows = []
    for place in sorted(kept):
        layer = one.layers[place]
        given = "its input, exactly" if layer.layer in exact else "nothing was sent" if not layer.parameters else ""
        rows.append([layer.layer, layer.kind, f"{layer.parameters:,}", f"{100 * layer.share:.2f} %", given])
    others = [one.layers[place] for place in range(len(one.layers)) if place not in kept]
    if others:
        count, share = sum(other.parameters for other in others), sum(other.share for other in others)
        rows.append([f"{len(others)} others", "", f"{count:,}", f"{100 * share:.2f} %", ""])
    return rows


LAYERS = ("layer", "kind", "parameters sent", "share of the squared gradient", "in closed form")
EFFORTS = ("attacker", "recovered", "tried", "diverged", "skipped", "evaluations", "seconds", "why not")


def effort_rows(one: Behind) -> list[list[str]]:
    """Return what each attacker did."""
    return [
        [
            effort.attacker,
            str(effort.recovered),
            str(effort.tried),
            str(effort.failed),
            str(effort.skipped),
            ABSENT if effort.evaluations is None else f"{effort.evaluations:,}",
            number(effort.seconds, 1),
            "; ".join(effort.unscored),
        ]
        for effort in one.efforts
    ]


def markdown(audit: Audit, command: str) -> str:
    """Return the audit as Markdown, without pictures."""
    parts = [f"# Audit of {escape(audit.title)}", *([f"**{escape(gate_words(audit))}**"] if audit.gate else [])]
    parts.append("\n".join(f"- **{escape(one.defense)}**: {escape(verdict(one))}" for one in audit.behind))
    parts.append(table(["audited", ""], [[escape(a), escape(b)] for a, b in audit.facts], left=2))
    for one in audit.behind:
        parts.append(f"## Behind {escape(one.defense)}")
        parts += [escape(one.note)] if one.note else []
        parts += [f"**{escape(warning)}**" for warning in one.warnings]
        parts.append("\n".join(f"- {escape(line)}" for line in leaks(one)))
        parts.append(_table(LAYERS, layer_rows(one)))
        parts.append(_table(EFFORTS, effort_rows(one)))
        if not math.isnan(one.floor):
            parts.append(f"Without any gradient, floors recover {percent(one.floor)} of the images.")
        rows = [[str(s.image), escape(s.attacker) or ABSENT, escape(s.words)] for s in one.sights]
        parts.append(table(["image", "closest by", "how close"], rows, left=3))
    parts.append("## What the server sees")
    parts.append(
        "\n".join(f"- **{escape(spec)}**{'' if ran else ' (not run)'}: {escape(w)}" for spec, w, ran in audit.threats)
    )
    parts.append("## What the attackers assumed")
    parts.append("\n".join(f"- **{escape(label)}**: {escape(words)}." for label, words in audit.assumptions))
    parts.append("## What was not tried")
    parts.append("\n".join(f"- {escape(line)}" for line in audit.untried))
    parts.append(f"Made by {escape(command)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table(list(headers), [[escape(cell) or " " for cell in row] for row in rows], left=len(headers))


def html(audit: Audit, command: str) -> str:
    """Return the audit as one page."""
    context = {
        "title": f"Audit of {audit.title}",
        "audit": audit,
        "gate": gate_words(audit),
        "crossed": bool(audit.crossings()),
        "command": command,
        "behind": [
            {
                "one": one,
                "verdict": verdict(one),
                "leaks": leaks(one),
                "layers": layer_rows(one),
                "efforts": effort_rows(one),
                "floor": None if math.isnan(one.floor) else percent(one.floor),
                "sights": [
                    (sight, sight.truth and picture(sight.truth), sight.guess and picture(sight.guess))
                    for sight in one.sights
                ],
            }
            for one in audit.behind
        ],
        "headers": {"layers": LAYERS, "efforts": EFFORTS},
    }
    return render("audit.html.j2", context, styles=(*STYLES, "audit.css"))
