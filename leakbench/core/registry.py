"""Registries of components, and the one grammar by which they are named: ``noise(scale=0.01, kind=laplace)``.

A spec is ``NAME``, ``NAME(option=value, ...)`` or ``NAME:VALUE`` (short for the component's first option). Values are
typed by the component's dataclass fields; a value that holds commas, brackets or spaces may be quoted. Specs are
parsed, never evaluated.
"""

import dataclasses
import difflib
import hashlib
import importlib.metadata
import importlib.util
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from leakbench.core.component import STATED, Component
from leakbench.errors import BadOption, one_line

T = TypeVar("T", bound=Component)
C = TypeVar("C", bound=type[Any])

_PLUGIN = "leakbench_plugin_"
"""The beginning of the names of plugin files' modules."""
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_QUOTES = ("'", '"')
_OPTION = re.compile(r"\s*(\w+\s*=|\)$)")
_QUOTED = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.DOTALL)


class Registry(Generic[T]):
    """The components of one kind by name: those of the package, of entry points and of ``--plugin`` files.

    Args:
        kind: the name of an entry in messages (``attack``).
        group: the entry-point group through which other packages add entries (``leakbench.attacks``).
        base: the class that every entry derives from.
    """

    def __init__(self, kind: str, group: str, base: type[T]) -> None:
        self.kind = kind
        self.group = group
        self.base = base
        self._classes: dict[str, type[T]] = {}
        self._entry_points_loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """Return a class decorator that adds a component under this name; its fields become its options."""

        def add(cls: C) -> C:
            if not (isinstance(cls, type) and issubclass(cls, self.base)):
                raise BadOption(f"{self.kind} {name!r} is {cls!r}; derive it from leakbench.{self.base.__name__}")
            if "__dataclass_fields__" not in cls.__dict__:
                cls = dataclasses.dataclass(frozen=True)(cls)  # type: ignore[assignment]
            known = self._classes.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise BadOption(
                    f"{self.kind} {name!r} is registered twice, by {known.__module__} and {cls.__module__}; rename one"
                )
            cls.name = name
            self._classes[name] = cls
            return typing.cast(C, cls)

        return add

    def names(self) -> list[str]:
        """Return every registered name, in order of registration."""
        self._load_entry_points()
        return list(self._classes)

    def get(self, name: str) -> type[T]:
        """Return the class registered under this name; raise BadOption, with a suggestion, if there is none."""
        self._load_entry_points()
        if name not in self._classes:
            raise BadOption(f"unknown {self.kind} {name!r}; {suggest(name, self._classes)}")
        return self._classes[name]

    def parse(self, spec: str | T) -> T:
        """Return the component that a spec names; a component is checked and returned as it is."""
        if isinstance(spec, self.base):
            return self._checked(spec)
        if not isinstance(spec, str):
            raise BadOption(
                f"{self.kind} {spec!r} is of type {type(spec).__name__}; give a spec such as 'name(option=1)'"
            )
        name, first, options = split_spec(spec, self.kind)
        cls = self.get(name)
        fields = self.fields(cls)
        if first is not None:
            if not fields:
                raise BadOption(f"{self.kind} {name!r} takes no value after ':' ({spec!r}); it has no options")
            options = {next(iter(fields)): first, **options}
        return self.build(name, options)

    def build(self, name: str, options: Mapping[str, object]) -> T:
        """Return the component of this name with these options, each checked against its type and range."""
        cls = self.get(name)
        fields = self.fields(cls)
        for option in options:
            if option not in fields:
                raise BadOption(f"{self.kind} {name!r} has no option {option!r}; {suggest(option, fields)}")
        missing = [option for option in self.required(cls) if option not in options]
        if missing:
            raise BadOption(f"{self.kind} {name!r} needs the option {missing[0]!r}; write {name}({missing[0]}=...)")
        hints = typing.get_type_hints(cls, include_extras=True)
        values = {option: self._convert(name, option, hints[option], value) for option, value in options.items()}
        try:
            return cls(**values)
        except ValueError as error:
            said, words = f"{self.kind} {name!r}: ", one_line(error)
            raise BadOption(words if words.startswith(said) else said + words) from None

    def spec(self, component: T) -> str:
        """Return the spec that parses to this component, of the options off their defaults and those ``STATED``."""
        parts: list[str] = []
        stated: list[str] = []
        for field in self.fields(type(component)).values():
            if not field.repr:
                continue
            value = getattr(component, field.name)
            differs = field.default is dataclasses.MISSING or value != field.default
            if differs or field.metadata == STATED:
                (parts if differs else stated).append(f"{field.name}={option_text(value)}")
        parts += stated
        return f"{component.name}({', '.join(parts)})" if parts else component.name

    @staticmethod
    def fields(cls: type[Component]) -> dict[str, dataclasses.Field[Any]]:
        """Return a component's options by name."""
        if not dataclasses.is_dataclass(cls):
            return {}
        return {field.name: field for field in dataclasses.fields(cls) if field.init}

    @classmethod
    def required(cls, component: type[Component]) -> list[str]:
        """Return the names of a component's options that have no default."""
        none = dataclasses.MISSING
        fields = cls.fields(component).items()
        return [name for name, field in fields if field.default is none and field.default_factory is none]

    @staticmethod
    def type_text(cls: type[Component], option: str) -> str:
        """Return an option's type in words: the choices, or the type with its bounds."""
        return _type_text(typing.get_type_hints(cls, include_extras=True)[option])

    def _checked(self, component: T) -> T:
        """Return a component whose options are of their types, as if a spec had named it."""
        hints = typing.get_type_hints(type(component), include_extras=True)
        changed = {}
        for option in self.fields(type(component)):
            given = getattr(component, option)
            value = self._convert(component.name, option, hints[option], given)
            if type(value) is not type(given) or value != given:
                changed[option] = value
        return dataclasses.replace(component, **changed) if changed else component  # type: ignore[type-var]

    def _convert(self, name: str, option: str, hint: Any, value: object) -> object:
        try:
            adapter: TypeAdapter[object] = TypeAdapter(hint)
        except PydanticSchemaGenerationError:  # a type of the plugin's own: its constructor checks it
            return value
        quoted = isinstance(value, _Quoted)
        value = str(value) if quoted else value
        candidates = [None, value] if value == "none" and not quoted else [value]
        candidates += [choice for choice in _choices(hint) if str(choice) == value]
        message = ""
        for candidate in candidates:
            try:
                return adapter.validate_python(candidate)
            except ValidationError as error:
                message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise BadOption(f"{self.kind} {name!r}: option {option}={value!r} is not valid: {one_line(message)}")

    def _load_entry_points(self) -> None:
        if self._entry_points_loaded:
            return
        self._entry_points_loaded = True  # a plugin may use the registry while it is imported
        for entry in importlib.metadata.entry_points(group=self.group):
            try:
                entry.load()
            except (Exception, SystemExit) as error:
                self._entry_points_loaded = False
                raise BadOption(
                    f"the plugin {entry.value!r} (entry point {entry.name!r} of {self.group}) does not import: "
                    f"{_moved(error) or one_line(error)}; repair or uninstall it"
                ) from error


def load_plugin(path: str | Path) -> None:
    """Import a Python file that registers components; the file runs with the user's rights.

    Raises:
        BadOption: the file does not exist or fails while it is imported.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise BadOption(f"the plugin file {str(path)!r} does not exist; give the path of a Python file")
    name = f"{_PLUGIN}{file.stem}_{hashlib.sha256(bytes(file)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise BadOption(f"the plugin file {str(path)!r} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        reason = _moved(error) or f"{type(error).__name__}: {one_line(error)}"
        raise BadOption(f"the plugin {str(path)!r} does not import: {reason}") from error


_MOVED = {
    "leakbench.types": "leakbench.core.types, or Observation from leakbench",
    "leakbench.component": "leakbench.core.component",
    "leakbench.registry": "leakbench.core.registry",
    "leakbench.rng": "leakbench.core.rng",
    "leakbench.curve": "leakbench.core.loss_curve",
    "leakbench.matrix": "leakbench.plan.matrix",
    "leakbench.trial": "leakbench.plan.trial",
    "leakbench.store": "leakbench.store.run_file, leakbench.store.records or leakbench.store.provenance",
    "leakbench.engine": "leakbench.engine.run, or run from leakbench",
    "leakbench.work": "leakbench.engine.worker",
}
"""Modules that plugins may have imported under a name of old, and where their content is now."""


def _moved(error: BaseException) -> str:
    """Return where a plugin finds what it failed to import from a module of old; empty for any other error."""
    name = (error.name or "") if isinstance(error, ImportError) else ""
    return f"{name} has moved; import from {_MOVED[name]}" if name in _MOVED else ""


def plugins() -> list[Path]:
    """Return the files that ``load_plugin`` has imported, in their order."""
    modules = [module for name, module in sys.modules.items() if name.startswith(_PLUGIN)]
    return [Path(module.__file__) for module in modules if module.__file__ is not None]


def split_spec(spec: str, kind: str) -> tuple[str, str | None, dict[str, str]]:
    """Split ``name:value(option=value, ...)`` into its name, the value after the colon, and its options."""
    text = spec.strip()
    options: dict[str, str] = {}
    start = _matching_open(text) if text.endswith(")") and "(" in text else None
    valued = ":" in text.partition("(")[0]  # brackets behind NAME:VALUE may belong to the value, as in folder:scan (1)
    if text.endswith(")") and "(" in text and not (valued and not (start and _OPTION.match(text, start + 1))):
        if start is None:
            raise BadOption(f"{kind} {spec!r}: the brackets do not match; write name(option=value, ...)")
        options = split_options(text[start + 1 : -1], f"{kind} {spec!r}")
        text = text[:start].strip()
    name, colon, first = text.partition(":")
    if not name or not name.isprintable() or any(c in name for c in "()[]{}=, '\""):
        raise BadOption(f"{kind} {spec!r} is not a spec; write name or name(option=value, ...)")
    if colon and not first:
        raise BadOption(f"{kind} {spec!r}: a value is missing after ':'; write {name}:VALUE")
    return name, _unquote(first) if colon else None, options


def split_options(text: str, where: str) -> dict[str, str]:
    """Split ``a=1, b="x, y"`` into {name: value text}, with quotes taken off."""
    options: dict[str, str] = {}
    for part in _split(text, where):
        name, equals, value = part.partition("=")
        name, value = name.strip(), value.strip()
        if not equals or not name or not value:
            raise BadOption(f"{where}: {part.strip()!r} is not option=value")
        if name in options:
            raise BadOption(f"{where}: the option {name!r} is given twice; keep one")
        options[name] = _unquote(value)
    return options


def _token(text: str, place: int) -> str:
    """Return the quoted text at a place or, if none is closed there, the character."""
    quoted = _QUOTED.match(text, place)
    return quoted[0] if quoted else text[place]


def _split(text: str, where: str) -> Iterable[str]:
    """Yield the parts between the commas outside brackets and quotes."""
    if not text.strip():
        return
    closing: list[str] = []
    place = begin = 0
    while place < len(text):
        token = _token(text, place)
        if token in _CLOSING:
            closing.append(_CLOSING[token])
        elif token in _CLOSING.values() and (not closing or closing.pop() != token):
            raise BadOption(f"{where}: the brackets do not match")
        elif token == "," and not closing:
            yield text[begin:place]
            begin = place + 1
        elif token in _QUOTES:
            break
        place += len(token)
    if closing or place < len(text):
        raise BadOption(f"{where}: a quote or bracket is not closed")
    yield text[begin:]


def _matching_open(text: str) -> int | None:
    """Return the index of the bracket that the last character closes, or None; quotes count only within brackets."""
    opened: list[int] = []
    place, start = 0, None
    while place < len(text):
        token = _token(text, place) if opened else text[place]
        if token == "(":
            opened.append(place)
        elif (token == ")" and not opened) or (token in _QUOTES and opened):
            return None
        start = opened.pop() if token == ")" else None
        place += len(token)
    return start


class _Quoted(str):
    """The text of a quoted value: ``"none"`` in quotes is text."""

    __slots__ = ()


def _unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return _Quoted(re.sub(r"\\(.?)", r"\1", value[1:-1], flags=re.DOTALL))
    return value


def option_text(value: object) -> str:
    """Return an option's value as a spec writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    text = str(value)
    plain = text and all(c.isalnum() or c in "_-+./" for c in text)
    if plain and text != "none":
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _choices(hint: Any) -> list[object]:
    """Return the values that the Literals in a type admit."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return list(parts)
    return [choice for part in parts for choice in _choices(part)]


def _type_text(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(str, parts))
    if origin is typing.Annotated:
        described = [extra.description for extra in parts[1:] if getattr(extra, "description", None)]
        if described:
            return str(described[0])
        bounds = [
            f"{sign} {value}"
            for extra in parts[1:]
            for constraint in getattr(extra, "metadata", [])
            for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
            if (value := getattr(constraint, name, None)) is not None
        ]
        return " ".join([_type_text(parts[0]), ", ".join(bounds)]).strip()
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_text(part) for part in parts)
    return "none" if hint is type(None) else str(getattr(hint, "__name__", hint))


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the hint of an error about an unknown name: the closest known one, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(sorted(names))}" if names else "it has no options"
