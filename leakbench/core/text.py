"""Numbers and names as text."""

import math
import re
from collections.abc import Iterable

ABSENT = "–"
"""The text in place of a missing number."""
FEDKL = "Ren et al. 2023, FedKL, arXiv 2305.04095"
"""The paper that proposes key-lock; every citation of it in the package is made of this."""


def decimals(values: Iterable[float]) -> int | None:
    """Return how many decimals suit a column; None asks for scientific notation.

    The largest value has about four digits; one decimal more is given if a small one would have only one digit.
    """
    sizes = [abs(value) for value in values if math.isfinite(value) and value != 0]
    if not sizes:
        return 2
    largest, smallest = max(sizes), min(sizes)
    if largest >= 1e5 or largest < 1e-3:
        return None
    places = 2 if largest >= 10 else 3 if largest >= 0.1 else 4 if largest >= 0.01 else 5
    return places + 1 if places > 2 and smallest < 10.0 ** (1 - places) else places


def number(value: float, places: int | None, sign: bool = False) -> str:
    """Return the value with ``places`` decimals, in scientific notation if that is None."""
    if math.isnan(value):
        return ABSENT
    if math.isinf(value):
        return f"{'+' if sign else ''}∞" if value > 0 else "−∞"
    code = f"{'+' if sign else ''}.{2 if places is None else places}{'e' if places is None else 'f'}"
    text = format(value, code)
    if float(text) == 0:
        text = format(0.0, code)
    return text.replace("-", "−", 1) if text.startswith("-") else text


def with_interval(value: float, low: float, high: float, places: int | None, sign: bool = False) -> str:
    """Return ``value [low, high]``, ``value [–]`` if the interval is undefined."""
    if math.isnan(value):
        return ABSENT
    if math.isnan(low) or math.isnan(high):
        return f"{number(value, places, sign)} [{ABSENT}]"
    return f"{number(value, places, sign)} [{number(low, places, sign)}, {number(high, places, sign)}]"


def english(names: Iterable[str]) -> str:
    """Return ``a, b and c``."""
    *rest, last = list(names)
    return f"{', '.join(rest)} and {last}" if rest else last


def p_value(value: float) -> str:
    """Return a p with three decimals."""
    return ABSENT if math.isnan(value) else "<0.001" if value < 0.001 else number(value, 3)


def percent(share: float) -> str:
    """Return a share in whole per cent; 0 % and 100 % mean none and all exactly."""
    rounded = round(100 * share)
    bounded = rounded if share in (0, 1) else min(99, max(1, rounded))
    return f"{bounded} %"


def part(share: float) -> str:
    """Return a share in per cent with three digits, however small; below a hundredth of a per cent it says so."""
    return "less than 0.01 %" if share < 1e-4 else f"{100 * share:.3g} %"


def name_of(spec: str) -> str:
    """Return the registered name that a spec begins with, without options and without ``[version 2]`` behind it."""
    return re.split(r"[\s(\[]", spec, maxsplit=1)[0]


def slug(parts: Iterable[str]) -> str:
    """Return a file name's part made of names."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(part[:30] for part in parts)).strip("-.")


def plural(count: int, noun: str) -> str:
    """Return ``1 image`` or ``4 images``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def in_groups(images: int, groups: int, noun: str = "") -> str:
    """Return ``32``, or ``32 in 7 groups`` if the images are in fewer groups; with a noun ``32 images in 7 groups``."""
    counted = plural(images, noun) if noun else f"{images:,}"
    return counted if images == groups else f"{counted} in {plural(groups, 'group')}"
