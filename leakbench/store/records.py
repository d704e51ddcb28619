"""Records of a run file beside results: sessions, metrics, components and what they state of themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from leakbench.core.component import Component, shipped, source_file
from leakbench.core.text import name_of
from leakbench.defenses import Defense
from leakbench.defenses.base import by_informed
from leakbench.errors import BadOption
from leakbench.models.weights import Checkpoint
from leakbench.plan.trial import split_label
from leakbench.store.provenance import Provenance


def threshold_of(sessions: Sequence[RunSession]) -> float | None:
    """Return the score from which an image counted as recovered in the last session; None if all trials were run."""
    try:
        return float(json.loads(sessions[-1].provenance.matrix)["threshold"])
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def run_name(sessions: Sequence[RunSession], folder: str) -> str:
    """Return the name that the matrix of the last session gives the run, or else that of its folder."""
    try:
        name = json.loads(sessions[-1].provenance.matrix)["name"]
    except (IndexError, KeyError, TypeError, ValueError):
        return folder
    return name if isinstance(name, str) and name.strip() else folder


@dataclass(frozen=True)
class RunSession:
    """One start of a run: its provenance, when it started and, unless it was killed, when it ended (UTC)."""

    id: int
    provenance: Provenance
    started: str
    ended: str | None


@dataclass(frozen=True)
class MetricInfo:
    """The description of a metric; kept in the run, so that a report needs no plugin."""

    name: str
    higher_is_better: bool
    convention: str
    note: str


@dataclass(frozen=True)
class Statement:
    """The description that a defense or a dataset gives of itself; kept in the run, so that a report needs no plugin.

    Attributes:
        note: what a reader must know of its options (``Defense.note``), or its images (``Dataset.note``).
        informed: the description of each adaptive attacker of a defense, by ``informed`` as a threat model writes it.
    """

    note: str
    informed: Mapping[str, str]

    @classmethod
    def of(cls, defense: Defense) -> Statement:
        """Return the statement of a defense; raise BadOption if it is malformed."""
        attackers, note = by_informed(defense), defense.note()
        if not isinstance(note, str):
            raise BadOption(f"defense {defense.name!r}: note() returned {note!r}; return text")
        return cls(note, {str(name).lower(): one.description for name, one in attackers.items()})


@dataclass(frozen=True)
class PluginFile:
    """A component of a run that is not part of leakbench, and the file that defines it.

    Attributes:
        kind: ``attack``, ``defense``, ``model``, ``dataset``, ``metric`` or ``generator``.
        name: the name of the component.
        file: the name of the file; empty for a component of a notebook or a prompt.
        sha256: the SHA-256 of the file when the run was started.
    """

    kind: str
    name: str
    file: str
    sha256: str

    @classmethod
    def of(cls, kind: str, component: Component) -> PluginFile | None:
        """Return the file of a component; None if it is part of leakbench."""
        if shipped(type(component)):
            return None
        file = source_file(type(component))
        try:
            digest = "" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError:  # it was deleted since
            digest = ""
        return cls(kind, component.name, file.name if file is not None and digest else "", digest)

    @property
    def words(self) -> str:
        """The component and its file in words."""
        where = f"{self.file}, SHA-256 {self.sha256}" if self.file else "not in a file"
        return f"{self.kind} {self.name} ({where})"


@dataclass(frozen=True)
class StoredComponent:
    """A component that a run was planned with.

    Attributes:
        kind: ``dataset``, ``model``, ``defense`` or ``attack``.
        spec: its name in ``Store.results``: the spec, with ``variant`` in brackets unless that is empty.
        options: every option's value.
        checkpoint: what a model's file of trained weights stated when the run was started.
        statement: what a defense states of itself, or a dataset that has a note; None for others, and in old
            runs.
        variant: what sets it apart from another component of the run with the same spec: ``version 2``, or
            ``settings`` with a hash; empty if there is none.
    """

    kind: str
    spec: str
    version: int
    options: Mapping[str, object]
    checkpoint: Checkpoint | None = None
    statement: Statement | None = None
    variant: str = ""

    @property
    def plain(self) -> str:
        """The spec as a matrix has it, without the variant and, of a dataset, without the client."""
        plain = self.spec.removesuffix(f" [{self.variant}]")
        return split_label(plain)[0] if self.kind == "dataset" else plain

    @property
    def name(self) -> str:
        """The registered name that the spec begins with."""
        return name_of(self.plain)


@dataclass(frozen=True)
class TrialRecord:
    """Everything that identifies a planned trial, and the session of its result.

    Attributes:
        cell: the settings of its cell (``Cell.key``), JSON.
        threat: the description of its threat model.
        label: the true label; None if it is not known, or, like ``session`` (its number), if the trial has no
            result.
        finished: when, in UTC; empty without a result.
        others: the indices of the further images of a batch.
        specs: axis (``defense``, ``threat``, ...) -> the spec as its matrix has it, without any variant.
    """

    cell: str
    threat: str
    label: int | None
    session: int | None
    finished: str
    others: tuple[int, ...] = ()
    specs: Mapping[str, str] = field(default_factory=dict)


ALIGNED_GAIN = 10.0
"""The dB that ``psnr_aligned`` is above ``psnr`` where brightness and contrast are all that a reconstruction lacks."""


@dataclass(frozen=True)
class Pictures:
    """The PNGs of a trial: the private image if it is known, and the reconstruction if there is one.

    Attributes:
        aligned: the reconstruction after the best fit of brightness and contrast to the private image, if it is not the
            same fit of ``reconstruction`` (``Result.aligned``); None otherwise, and in runs before schema 6.
    """

    truth: bytes | None
    reconstruction: bytes | None
    aligned: bytes | None = None

    @property
    def fitted(self) -> bytes | None:
        """The picture that shows what the aligned scores measure, as far as the run has one."""
        return self.aligned or self.reconstruction

    def drawn(self, psnr: float, psnr_aligned: float) -> tuple[bytes | None, bool]:
        """Return the picture to draw beside these scores in dB, and whether that is ``aligned``.

        The reconstruction is drawn as it is, unless only its brightness and contrast are lost.
        """
        lost = self.aligned is not None and psnr_aligned - psnr >= ALIGNED_GAIN
        return (self.aligned if lost else self.reconstruction), lost


@dataclass(frozen=True)
class StoredMember:
    """An image of a batch, with the reconstruction that was assigned to it.

    Attributes:
        image: its index in the dataset.
        label: its label; None if it is not known.
        pictures: the private image, and the reconstruction if one was left for it.
        scores: metric name -> value.
    """

    image: int
    label: int | None
    pictures: Pictures
    scores: Mapping[str, float]
