"""``leakbench doctor``: whether this installation can run, and the command for what it lacks."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import typer

from leakbench.version import __version__

IMPORTED = ("torch", "torchvision", "lpips", "piq", "nevergrad")
"""The packages that can be installed in the right version and still fail to import."""

INSTALLED_EXTRAS = ("fl", "ray", "dp", "biggan", "wandb", "tensorboard", "mlflow")
"""The extras for users; the others are for those who work on leakbench."""


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        state: ``ok``, ``absent`` (optional), or ``fault`` (leakbench cannot run).
        advice: the command that mends it; empty if there is nothing to mend.
    """

    name: str
    state: str
    words: str
    advice: str = ""


def doctor() -> None:
    """Print versions, device, cache, what is missing, and the command that installs or fetches it.

    The exit code is 1 if a required package is missing, has a version that leakbench does not work with, or cannot be
    imported.
    """
    faults = 0
    for check in (_python(), *_required(), *_imports(), *_devices(), *_extras(), *_assets()):
        faults += check.state == "fault"
        typer.echo(f"{check.state:8}{check.name}: {check.words}{f'; {check.advice}' if check.advice else ''}")
    raise SystemExit(1 if faults else 0)


def _python() -> Check:
    return Check("leakbench", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")


def _required() -> Iterator[Check]:
    """Yield a fault for each required package that is missing or of a wrong version; one line if there is none."""
    faults = [check for check in map(_package, _requirements("")) if check.state != "ok"]
    yield from faults
    if not faults:
        yield Check("packages", "ok", "every required package is installed in a version that fits")


def _requirements(extra: str) -> list[str]:
    """Return the requirements of leakbench, or of one of its extras; none if leakbench is not installed."""
    from packaging.requirements import Requirement

    try:
        found = [Requirement(text) for text in importlib.metadata.requires("leakbench") or []]
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return []
    chosen = [one for one in found if one.marker is None or one.marker.evaluate({"extra": extra})]
    if extra:
        chosen = [one for one in chosen if one.marker is not None and not one.marker.evaluate({"extra": ""})]
    return [str(Requirement(str(one).split(";")[0])) for one in chosen]


def _package(requirement: str) -> Check:
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    advice = f'pip install "{requirement}"'
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(wanted.name, "fault", "is not installed", advice)
    if not wanted.specifier.contains(version, prereleases=True):
        return Check(wanted.name, "fault", f"{version} is installed, and {wanted.specifier} is required", advice)
    return Check(wanted.name, "ok", version)


def _imports() -> Iterator[Check]:
    """Yield the versions of the packages that the numbers depend on, or why one cannot be imported."""
    for name in IMPORTED:
        try:
            importlib.import_module(name)
            yield Check(name, "ok", importlib.metadata.version(name))
        except Exception as error:
            reason = " ".join(str(error).split())
            yield Check(name, "fault", f"cannot be imported ({reason})", f"pip install --force-reinstall {name}")


def _devices() -> Iterator[Check]:
    try:
        import torch

        from leakbench.attacks import doubling
        from leakbench.core.compiled import Absent, compiled
        from leakbench.core.device import free_memory
        from leakbench.gradients.lanes.library import Kernels, found_or_reason
        from leakbench.optim import solvers
    except Exception:  # reported by _imports
        return
    free = free_memory(torch.device("cpu")) / 2**30
    yield Check("cpu", "ok", f"{torch.get_num_threads()} threads, {free:.1f} GiB of memory free")
    kernels = found_or_reason()
    others = [compiled(source) for source in (solvers.SOURCE, doubling.SOURCE)]
    if absent := [one for one in (kernels, *others) if isinstance(one, Absent)]:
        yield Check("kernels", "absent", f"{absent[0].reason}; attacks take longer", "")
    elif isinstance(kernels, Kernels):
        yield Check("kernels", "ok", f"compiled for this processor ({kernels.words})")
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Check("cuda", "absent", f"no device ({built}); runs use the CPU")
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield Check(f"cuda:{index}", "ok", f"{about.name}, {about.total_memory / 2**30:.0f} GiB")


def _extras() -> Iterator[Check]:
    for extra in INSTALLED_EXTRAS:
        absent = [check for check in map(_package, _requirements(extra)) if check.state != "ok"]
        words = "; ".join(f"{check.name} {check.words}" for check in absent) or "installed"
        advice = " ".join(check.advice.removeprefix("pip install ") for check in absent)
        yield Check(f"extra {extra}", "absent" if absent else "ok", words, advice and f"pip install {advice}")


def _assets() -> Iterator[Check]:
    from leakbench import assets

    yield Check("cache", "ok", f"{assets.home()} (set LEAKBENCH_HOME to move it)")
    for name in assets.names():
        asset = assets.get(name)
        if assets.present(name):
            yield Check(f"{asset.kind} {name}", "ok", "present")
        elif asset.sources:
            yield Check(f"{asset.kind} {name}", "absent", "not fetched", f"leakbench assets fetch {name}")
        else:
            yield Check(f"{asset.kind} {name}", "absent", "cannot be downloaded", asset.carried)
