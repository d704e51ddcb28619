"""The verdict on the weights that a server sent, in words."""

from leakbench.audit.received import ReceivedWeights
from leakbench.core.text import plural

FALSE_ALARMS = "none of 200 honest networks, untrained and trained, was taken for crafted (95 % interval: 0 to 1.9 %)"
"""The rate of false alarms, as ``reports/malicious`` measures it."""


def lines(found: ReceivedWeights, layers: bool = False) -> list[str]:
    """Return the lines of a verdict: what was found, why, the rate of false alarms, and on request all scores."""
    count = len(found.layers)
    judged = "1 weight matrix" if count == 1 else f"{count} weight matrices"
    small = f"; {plural(found.skipped, 'smaller one')} not judged" if found.skipped else ""
    if found.crafted:
        names = ", ".join(repr(one.name) for one in found.crafted[:3])
        more = f" and {len(found.crafted) - 3} more" if len(found.crafted) > 3 else ""
        said = [f"CRAFTED: {names}{more} of {judged} in {found.file}: do not train on these weights"]
        said += [f"  {one.name}: {reason}" for one in found.crafted for reason in one.reasons]
        said.append(f"False alarms: {FALSE_ALARMS}.")
    else:
        said = [
            f"No sign of crafting in {judged} of {found.file}{small}; largest score {found.score:.2f}, the limit is 1",
            f"False alarms: {FALSE_ALARMS}. A server that knows this test can avoid it: this is no proof of honesty.",
        ]
    if layers:
        said.append("layer | rows x inputs | copies | evenness | balance | dead rows")
        said += [
            f"{one.name} | {one.rows} x {one.inputs} | {one.copies:.0%} | {one.evenness:.1f} | {one.balance:.2f} | "
            f"{one.dead:.0%}"
            for one in found.layers
        ]
    return said
