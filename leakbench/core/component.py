"""The base of every registered component: a name, a version, options, and settings that identify it."""

import dataclasses
import functools
import inspect
import json
import reprlib
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of leakbench."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""An option above zero."""
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""An option of zero or more."""
Count = Annotated[int, Field(ge=1)]
"""An option of one or more."""

LATER = {"later": True}
"""The metadata of an option (``dataclasses.field``) that was added when there were results without it."""

STATED = {"stated": True}
"""The metadata of an option that a spec names even at its default, after the others: readers need not know it."""


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as plain JSON values; a value without a JSON form, such as a path, becomes text."""
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


class Component:
    """A frozen dataclass whose fields are its options; the first docstring line describes it in listings.

    Attributes:
        name: the name it was registered under.
        version: raised whenever its numbers change, so that older results are not mistaken for new ones.
        reference: the paper, section or URL-free citation behind it.
        assumes: the conditions under which it works, in a sentence, as are ``cost`` and ``fails``.
        cost: its time and memory.
        fails: the known ways to defeat it.
    """

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    reference: ClassVar[str] = ""
    assumes: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    fails: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """Name a subclass after itself until it is registered; nothing of these but version is inherited."""
        super().__init_subclass__()
        cls.name = cls.__dict__.get("name", cls.__qualname__)
        for words in ("reference", "assumes", "cost", "fails"):
            setattr(cls, words, cls.__dict__.get(words, ""))

    def options(self) -> dict[str, Any]:
        """Return every option with its value, defaults written out."""
        if not dataclasses.is_dataclass(self):
            return {}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}

    def settings(self) -> dict[str, Any]:
        """Return the identity of the component in a trial: name, version and every option.

        An option that was added later (``LATER``) is left out at its default: the ids of earlier trials stay the same.
        """
        options = self.options()
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        for own in fields:
            if own.metadata == LATER and options[own.name] == own.default:
                del options[own.name]
        return {"name": self.name, "version": self.version, **options}

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the class's own docstring, empty without one."""
        text = (cls.__dict__.get("__doc__") or "").strip().split("\n")[0]
        return "" if text.startswith(f"{cls.__name__}(") else text  # written by dataclass if there is none


def shipped(cls: type) -> bool:
    """Return whether a class, its bases and all their functions are defined in leakbench."""
    own = [part for part in cls.__mro__ if issubclass(part, Component)]
    others = [part for part in cls.__mro__ if part not in own and part.__module__ not in ("builtins", "abc", "typing")]
    return not others and all(_in_package(part) for part in own)


def _in_package(cls: type) -> bool:
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).resolve().is_relative_to(PACKAGE):
        return False
    if functools.reduce(lambda at, name: getattr(at, name, None), cls.__qualname__.split("."), module) is not cls:
        return False
    functions = [value for value in vars(cls).values() if inspect.isfunction(value)]
    files = {function.__code__.co_filename for function in functions}
    files -= {"<string>", dataclasses.__file__, reprlib.__file__}  # what a dataclass generates
    return all(Path(name).resolve().is_relative_to(PACKAGE) for name in files)


def source_file(cls: type) -> Path | None:
    """Return the file that defines a class; None for a class of a notebook or a prompt."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return None if file is None else Path(file)
