"""Files and specs that other people made: what comes out of the readers is an answer or one line."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from leakbench import defenses
from leakbench.assets import archives
from leakbench.errors import BadOption, CorruptAsset, ForeignRun, LeakbenchError
from leakbench.merge import merge
from leakbench.report.files import write
from leakbench.store import FILE, Store
from tools import fuzz


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def hostile(work):
    with fuzz.targets(work) as known:
        yield known


@pytest.mark.parametrize("name", fuzz.SHARES)
def test_only_the_documented_error_comes_out(hostile, name):
    target, start = hostile[name]
    rng = random.Random(name)
    for number in range(4 if name.endswith(("-bytes", "-values")) else 60):
        data = bytearray(rng.choice(start))
        for _ in range(rng.randrange(1 + min(number, 12))):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
        fuzz.tried(target, bytes(data))


@pytest.fixture
def run(hostile, work, tmp_path):
    """A sound run, for a test to spoil; ``targets`` has made it."""
    (tmp_path / FILE).write_bytes((work / "run" / FILE).read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("UPDATE truths SET png = 'text'", "truths"),
        ("UPDATE trials SET image = 'many'", "trials"),
        ("UPDATE cells SET settings = '[]' WHERE id = 1", "words of another form"),
        ("UPDATE cells SET settings = '{\"dataset\": 3}' WHERE id = 1", "words of another form"),
        ("UPDATE sessions SET packages = '[1]'", "words of another form"),
        ("DELETE FROM truths", "private image"),
        ("DROP TABLE scores", "no table 'scores'"),
        ("ALTER TABLE results DROP COLUMN path", "columns"),
        ("CREATE VIEW other AS SELECT 1", "view"),
        ("CREATE TRIGGER other AFTER INSERT ON results BEGIN DELETE FROM results; END", "trigger"),
    ],
)
def test_a_spoilt_run_is_refused_in_one_line(run, change, words):
    with closing(sqlite3.connect(run / FILE)) as db, db:
        db.execute(change)
    with pytest.raises(ForeignRun) as caught:
        write(run)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_none_leaves_its_place_empty(run):
    with closing(sqlite3.connect(run / FILE)) as db, db:
        db.execute("UPDATE images SET png = x'00'")
    assert write(run)


def test_a_trigger_is_refused_by_who_writes_too(run):
    with closing(sqlite3.connect(run / FILE)) as db, db:
        db.execute("CREATE TRIGGER other AFTER INSERT ON results BEGIN DELETE FROM results; END")
    with pytest.raises(LeakbenchError, match="trigger"):
        Store.open(run / FILE)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE sessions SET matrix = '[]'",
        "UPDATE sessions SET matrix = 'x'",
        "INSERT OR REPLACE INTO meta VALUES ('planned', 'x')",
        "DELETE FROM cells",
    ],
)
def test_a_spoilt_run_is_not_merged(run, change, tmp_path):
    with closing(sqlite3.connect(run / FILE)) as db, db:
        db.execute("PRAGMA foreign_keys = OFF")
        db.execute(change)
    with pytest.raises(LeakbenchError) as caught:
        merge([run], tmp_path / "whole")
    assert len(str(caught.value).splitlines()) == 1
    assert not Path(tmp_path / "whole" / FILE).exists() or not Store.open(tmp_path / "whole" / FILE).planned()


@pytest.mark.parametrize("size", [b"-60       ", b"-1000     "])
def test_a_package_whose_member_has_a_negative_size_is_refused(tmp_path, size):
    (tmp_path / "package").write_bytes(
        b"!<arch>\n" + b"control.tar     0           0     0     100644  " + size + b"`\n"
    )
    with pytest.raises(CorruptAsset, match="negative"):
        archives.read(tmp_path / "package", ["wanted"])


def test_the_half_of_a_killed_migration_is_undone(tmp_path):
    """A journal that a killed writer left is played back, also for who only reads."""
    path = tmp_path / FILE
    path.write_bytes((Path(__file__).parent / "schemas" / "1.sqlite").read_bytes())
    with Store.open(path, readonly=True) as store:
        before = len(store.results())
    script = (
        "import os, sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "db.execute('PRAGMA cache_size = 1'); db.execute('BEGIN'); db.execute('DELETE FROM scores'); "
        "db.execute('DELETE FROM images'); db.execute('DELETE FROM results'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert path.with_name(f"{FILE}-journal").stat().st_size
    with Store.open(path, readonly=True) as store:
        assert len(store.results()) == before


def test_a_name_of_control_characters_is_refused_in_one_line():
    with pytest.raises(BadOption) as caught:
        defenses.parse("\x0b11:")
    assert len(str(caught.value).splitlines()) == 1
