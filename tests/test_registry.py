"""Specs: what is written is what is built, and what is built can be written again."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from conftest import watch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from leakbench import attacks, datasets, defenses, metrics, models
from leakbench.attacks.ig import IG
from leakbench.core.component import Component
from leakbench.core.registry import Registry, load_plugin, option_text, split_options, split_spec
from leakbench.core.rng import Rng
from leakbench.errors import BadOption


class Thing(Component):
    """The base of the components of this file."""


@dataclass(frozen=True)
class Full(Thing):
    """One option of every type."""

    text: str = "a"
    number: float = 1.0
    count: Annotated[int, Field(ge=-5, le=10**9)] = 1
    flag: bool = False
    choice: Literal["none", "relu", "a b"] = "relu"
    level: Literal[1, 2, 30] = 1
    maybe: int | None = None
    share: float | None = 0.5


@pytest.fixture(scope="module")
def things() -> Registry[Thing]:
    registry: Registry[Thing] = Registry("thing", "leakbench.nothing", Thing)
    registry.register("full")(Full)
    return registry


ALL: list[Registry[Any]] = [attacks.registry, datasets.registry, defenses.registry, metrics.registry, models.registry]

TEXT = st.text(min_size=0, max_size=30)
FULL = st.builds(
    Full,
    text=TEXT,
    number=st.floats(allow_nan=False),
    count=st.integers(-5, 10**9),
    flag=st.booleans(),
    choice=st.sampled_from(["none", "relu", "a b"]),
    level=st.sampled_from([1, 2, 30]),
    maybe=st.none() | st.integers(),
    share=st.none() | st.floats(allow_nan=False),
)


@given(thing=FULL)
def test_what_is_built_can_be_written_and_read_again(things: Registry[Thing], thing: Full) -> None:
    spec = things.spec(thing)
    again = things.parse(spec)
    assert again == thing
    assert repr(again) == repr(thing), "types included"
    assert things.spec(again) == spec


@given(
    text=st.lists(st.sampled_from([",", "'", '"', "\\", "(", ")", "[", "=", " ", ":", "none", "\n", "é", "a"])).map(
        "".join
    )
)
def test_awkward_text_survives(things: Registry[Thing], text: str) -> None:
    assert things.parse(things.spec(Full(text=text))) == Full(text=text)


@given(value=st.floats())
def test_every_float_survives(things: Registry[Thing], value: float) -> None:
    again = things.parse(f"full(number={option_text(value)})").number  # type: ignore[attr-defined]
    assert again == value or (again != again and value != value)


def test_the_spec_holds_only_what_differs(things: Registry[Thing]) -> None:
    assert things.spec(Full()) == "full"
    assert things.spec(Full(count=3, flag=True)) == "full(count=3, flag=true)"
    assert things.spec(Full(share=None, choice="none")) == 'full(choice="none", share=none)'
    assert things.parse("full(choice=none)") == Full(choice="none")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("full", Full()),
        ("  full ( ) ", Full()),
        ("full(text='it, is (so)')", Full(text="it, is (so)")),
        ('full(text="a \\"b\\" c", count = 2)', Full(text='a "b" c', count=2)),
        ("full(text=uniform(0.5), count=2)", Full(text="uniform(0.5)", count=2)),
        ("full:hello", Full(text="hello")),
        ("full:/a/b(c).pt", Full(text="/a/b(c).pt")),
        ("full:'a(b)'", Full(text="a(b)")),
        ("full:x(count=3)", Full(text="x", count=3)),
        ("full(number=1e-3)", Full(number=1e-3)),
        ("full(number=2)", Full(number=2.0)),
        ("full(flag=True)", Full(flag=True)),
        ("full(maybe=none)", Full()),
        ("full(level=30)", Full(level=30)),
    ],
)
def test_specs(things: Registry[Thing], spec: str, expected: Full) -> None:
    found = things.parse(spec)
    assert found == expected
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ful", "did you mean 'full'"),
        ("zzzz", "known: full"),
        ("full(cuont=3)", "did you mean 'count'"),
        ("full(zzzz=3)", "known: "),
        ("full(count=ten)", "count='ten' is not valid"),
        ("full(count=-6)", "is not valid"),
        ("full(count=1.5)", "is not valid"),
        ("full(choice=tanh)", "is not valid"),
        ("full(level=3)", "is not valid"),
        ("full(count=1, count=2)", "given twice"),
        ("full(count)", "is not option=value"),
        ("full(count=)", "is not option=value"),
        ("full(=3)", "is not option=value"),
        ("full(count=1,)", "is not option=value"),
        ("full(text=(a)", "is not option=value"),
        ("full(text='a)", "brackets"),
        ("full(text=[a))", "brackets"),
        ("full(text=[a)", "not closed"),
        ("full)", "is not a spec"),
        ("(count=1)", "is not a spec"),
        ("full:", "a value is missing after"),
        ("", "is not a spec"),
        ("full(count=1) x", "is not a spec"),
        (3, "is of type int"),
        (None, "is of type NoneType"),
    ],
)
def test_bad_specs_are_told_in_one_line(things: Registry[Thing], spec: Any, message: str) -> None:
    with pytest.raises(BadOption) as raised:
        things.parse(spec)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def attempt(registry: Registry[Any], spec: str) -> Any:
    """Parse, and return the component or the message of the one error that is allowed."""
    try:
        return registry.parse(spec)
    except BadOption as error:
        return str(error)


@given(text=st.text())
def test_junk_only_ever_raises_bad_option(things: Registry[Thing], text: str) -> None:
    for spec in (text, f"full({text})", f"full:{text}", f"full(text={text})", f"full(count={text})"):
        found = attempt(things, spec)
        assert isinstance(found, Full) or "\n" not in found


PIECES = [
    "full",
    "(",
    ")",
    "=",
    ",",
    ":",
    "count",
    "text",
    "'",
    '"',
    "\\",
    "[",
    "]",
    "{",
    "}",
    " ",
    "1",
    "none",
    "\x00",
]


@given(parts=st.lists(st.sampled_from(PIECES), max_size=12))
def test_junk_made_of_the_grammar_only_ever_raises_bad_option(things: Registry[Thing], parts: list[str]) -> None:
    found = attempt(things, "".join(parts))
    assert isinstance(found, Full) or "\n" not in found


@pytest.mark.parametrize("registry", ALL, ids=lambda registry: registry.kind)
@given(text=st.text(max_size=40))
def test_junk_options_of_registered_components_only_ever_raise_bad_option(registry: Registry[Any], text: str) -> None:
    for name in registry.names():
        for option in registry.fields(registry.get(name)):
            spec = f"{name}({option}={option_text(text)})"
            found = attempt(registry, spec)
            assert isinstance(found, registry.base) or "\n" not in found


def test_a_component_is_checked_and_returned() -> None:
    attack = attacks.parse("ig(steps=7)")
    assert attacks.parse(attack) is attack
    with pytest.raises(BadOption, match="steps"):
        attacks.parse(dataclasses.replace(attack, steps=0))
    with pytest.raises(BadOption, match="of type NoDefense"):
        attacks.parse(defenses.parse("none"))  # type: ignore[arg-type]


def test_names_are_registered_once() -> None:
    registry: Registry[Thing] = Registry("thing", "leakbench.nothing", Thing)

    @registry.register("one")
    class One(Thing):
        """Has an option without a decorator of its own."""

        size: int = 3

    assert dataclasses.is_dataclass(One)
    assert registry.parse("one(size=4)") == One(size=4)  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        registry.parse("one").size = 5  # type: ignore[attr-defined]
    with pytest.raises(BadOption, match="registered twice"):
        registry.register("one")(type("Other", (Thing,), {"__module__": "elsewhere"}))
    assert registry.get("one") is One
    with pytest.raises(BadOption, match=r"derive it from leakbench\.Thing"):
        registry.register("two")(int)
    assert registry.names() == ["one"]


def test_a_subclass_without_a_decorator_keeps_the_options_of_its_base() -> None:
    registry: Registry[Thing] = Registry("thing", "leakbench.nothing", Thing)

    @registry.register("more")
    class More(Full):
        """Adds one option."""

        extra: int = 7

    assert next(iter(registry.fields(More))) == "text"
    assert registry.parse("more(count=2, extra=8)") == More(count=2, extra=8)  # type: ignore[call-arg]


def test_an_option_without_a_default_must_be_given() -> None:
    registry: Registry[Thing] = Registry("thing", "leakbench.nothing", Thing)

    @registry.register("need")
    class Need(Thing):
        """Needs a path."""

        path: str

    with pytest.raises(BadOption, match="needs the option 'path'"):
        registry.parse("need")
    assert registry.spec(registry.parse("need:x")) == "need(path=x)"


def test_a_constructor_may_refuse() -> None:
    registry: Registry[Thing] = Registry("thing", "leakbench.nothing", Thing)

    @registry.register("even")
    @dataclass(frozen=True)
    class Even(Thing):
        """Takes even numbers."""

        size: int = 2

        def __post_init__(self) -> None:
            if self.size % 2:
                raise ValueError(f"size {self.size}\nis odd")

    with pytest.raises(BadOption, match="size 3 is odd"):
        registry.parse("even(size=3)")


def test_no_options_no_value() -> None:
    with pytest.raises(BadOption, match="no options"):
        defenses.parse("none:3")
    with pytest.raises(BadOption, match="it has no options"):
        defenses.parse("none(scale=3)")


def test_types_in_words(things: Registry[Thing]) -> None:
    assert things.type_text(Full, "choice") == "none | relu | a b"
    assert things.type_text(Full, "maybe") == "int | none"
    assert things.type_text(Full, "count") == "int >= -5, <= 1000000000"
    assert attacks.registry.type_text(attacks.get("ig"), "lr") == "float > 0"


def test_splitting() -> None:
    assert split_spec(" a:b ( c = 'd, e' , f=[1, 2] ) ", "thing") == ("a", "b", {"c": "d, e", "f": "[1, 2]"})
    assert split_options("", "here") == {}
    assert split_options(r'a="\\x\""', "here") == {"a": '\\x"'}


PLUGIN = '''
from leakbench import attacks
from leakbench.attacks import Attack
from leakbench.core.types import Reconstruction


@attacks.register("from-a-file")
class FromAFile(Attack):
    """Returns the mean image."""

    gain: float = 2.0

    def run(self, observation, rng):
        return Reconstruction(observation.mean_image.expand(observation.trials, -1, -1, -1) * self.gain)
'''


@pytest.fixture
def _unregistered() -> Iterator[None]:
    before = dict(attacks.registry._classes)
    modules = set(sys.modules)
    yield
    attacks.registry._classes.clear()
    attacks.registry._classes.update(before)
    for name in set(sys.modules) - modules:
        if name.startswith("leakbench_plugin_"):
            del sys.modules[name]


@pytest.mark.usefixtures("_unregistered")
def test_a_plugin_file_adds_a_component(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    load_plugin(tmp_path / "mine.py")
    assert attacks.parse("from-a-file(gain=3)").options() == {"gain": 3.0}
    load_plugin(tmp_path / "mine.py")  # again: the same component, not a second one
    assert attacks.names().count("from-a-file") == 1


def test_bad_plugin_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="does not exist"):
        load_plugin(tmp_path / "none.py")
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(BadOption, match="ZeroDivisionError"):
        load_plugin(tmp_path / "broken.py")
    (tmp_path / "text.txt").write_text("x = 1")
    with pytest.raises(BadOption, match=r"\.py"):
        load_plugin(tmp_path / "text.txt")
    assert not [name for name in sys.modules if name == "leakbench_plugin_broken"]


def test_specs_are_never_evaluated(tmp_path: Path) -> None:
    target = tmp_path / "evil"
    with pytest.raises(BadOption):
        attacks.parse(f"dlg(steps=__import__('pathlib').Path('{target}').touch())")
    assert not target.exists()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, leakbench; assert 'torch' not in sys.modules; assert 'pandas' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class Keeps(Component):
    """An option that is no field stays out."""

    kind: ClassVar[str] = "x"


def test_a_component_that_is_no_dataclass_has_no_options() -> None:
    assert Keeps().options() == {}
    assert Keeps.summary() == "An option that is no field stays out."
    assert Keeps().settings() == {"name": Keeps().name, "version": 1}


def test_text_in_a_python_component_is_not_let_through() -> None:
    attack = attacks.parse(IG(steps="3"))  # type: ignore[arg-type]
    assert attack(watch("lenet"), Rng(("a", "b"))).images.shape == (2, 1, 8, 8)


def test_a_checkpoint_called_none_survives_its_spec() -> None:
    model = models.registry.build("lenet", {"weights": "./none"})
    assert models.parse(models.spec(model)) == model
    odd = replace(model, weights="none")
    assert models.parse(models.spec(odd)) == odd
