"""The command that makes one trial again."""

import itertools
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from leakbench import defenses
from leakbench.core.registry import option_text
from leakbench.defenses import Defense
from leakbench.errors import BadOption
from leakbench.plan.matrix import parse_threat
from leakbench.plan.trial import split_label
from leakbench.store.records import RunSession, StoredComponent

_AXES = ("dataset", "model", "defense", "attack")
_OWN = "module"


@dataclass(frozen=True)
class Reproduction:
    """How the trials of one cell are made again.

    Attributes:
        head: the start of the command: a line for the shell, or Python if the network was given in Python.
        tail: the rest, with ``{image}``, ``{seed}`` and ``{trial}`` (its id) in place of these.
        note: what else the command needs; may be empty.
    """

    head: str
    tail: str
    note: str

    def command(self, trial: str, images: Sequence[int], seed: int) -> str:
        """Return the command for one trial, of one image or of a batch; its result lies in ``runs/again-TRIAL``."""
        tail = (
            self.tail.replace("{image}", ",".join(map(str, images)))
            .replace("{seed}", str(seed))
            .replace("{trial}", trial)
        )
        return self.head + tail


def reproduction(
    cell: Mapping[str, object], components: Sequence[StoredComponent], sessions: Sequence[RunSession]
) -> Reproduction:
    """Return the command whose run has trials of the same id and the same salt: the same settings and draws.

    Args:
        cell: the five specs, by axis: a row of ``Store.results`` or ``Store.trials`` has them.
        components: what each spec stands for (``Store.components``).
        sessions: every start of the run; plugins, the device and the salt are taken from them.
    """
    known = {(one.kind, one.spec): one for one in components}
    own = {axis: known[axis, str(cell[axis])] for axis in _AXES}
    specs = {axis: spec_of(one) for axis, one in own.items()}
    client = split_label(own["dataset"].spec)[1]
    salt = sessions[-1].provenance.salt if sessions else ""
    note = " ".join(
        f"The {axis} {spec} had version {own[axis].version}; repeating it needs a leakbench with that version."
        for axis, spec in specs.items()
        if own[axis].variant.startswith("version")
    )
    if own["model"].options.keys() == {"label", _OWN}:
        note = f"The network {own['model'].options['label']} was given in Python and has to be given again. {note}"
        axes = ", ".join(f"{axis}s=[{specs[axis]!r}]" for axis in ("attack", "defense", "dataset"))
        head = f"leakbench.run(leakbench.Matrix({axes}, models=[network], threats=[{str(cell['threat'])!r}]"
        head += f", clients=[{client!r}]" * bool(client)
        return Reproduction(
            head,
            f', images=[{{image}}], seeds=[{{seed}}], floors=False), "runs/again-{{trial}}", salt={salt!r})',
            note.strip(),
        )
    others = owners(known.values(), own["defense"], str(cell["threat"]))
    if others:
        note = f"{', '.join(others)} runs too, so that a defense has the secret that is revealed. {note}".strip()
    options = [("--plugin", path) for path in _plugins(sessions)]
    options += [(f"--{axis}", specs[axis]) for axis in ("attack", "defense", "model", "dataset")]
    options += [*(("--defense", spec) for spec in others), ("--threat", str(cell["threat"]))]
    options += [("--clients", client)] if client else []
    words = ["leakbench", "run", "matrix", *itertools.chain(*options)]
    same = f"--device {_device(sessions)} --salt {shlex.quote(salt)}"
    tail = f" --images {{image}}, --seeds {{seed}}, --no-floors {same} --out runs/again-{{trial}}"
    return Reproduction(shlex.join(words), tail, note)


def spec_of(one: StoredComponent) -> str:
    """Return a spec that parses to the component, with every option if the component has a variant."""
    if not one.variant:
        return one.plain
    options = ", ".join(f"{name}={_option(value)}" for name, value in one.options.items())
    return f"{one.name}({options})" if options else one.plain


def owners(components: Iterable[StoredComponent], own: StoredComponent, threat: str) -> list[str]:
    """Return the specs of the run's other kinds of defenses with secrets, if the threat model reveals some.

    A matrix must hold a defense that has what a threat model reveals.
    """
    found: dict[str, str] = {}
    if not parse_threat(threat).reveals:
        return []
    for one in components:
        if one.kind == "defense" and one.name != own.name and _keeps_secrets(one.name):
            found.setdefault(one.name, spec_of(one))
    return list(found.values())


def _keeps_secrets(name: str) -> bool:
    """Return whether a defense has secrets; one that is not installed may have."""
    try:
        return defenses.registry.get(name).secrets is not Defense.secrets
    except BadOption:
        return True


def _option(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_option, value)) + "]"
    return option_text(value)


def _plugins(sessions: Sequence[RunSession]) -> list[str]:
    """Return the files that the run's commands named as plugins."""
    found: dict[str, None] = {}
    for session in sessions:
        with suppress(ValueError):  # not a command line: a program gave it a name of its own
            words = shlex.split(session.provenance.command)
            found |= dict.fromkeys(path for word, path in itertools.pairwise(words) if word == "--plugin")
            found |= dict.fromkeys(word.partition("=")[2] for word in words if word.startswith("--plugin="))
    return list(found)


def _device(sessions: Sequence[RunSession]) -> str:
    """Return the kind of device that the last start of the run had, as ``--device`` takes it."""
    device = sessions[-1].provenance.device if sessions else "cpu"
    return "cuda" if device.startswith("cuda") else "cpu"
