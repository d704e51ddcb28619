"""Files and specs that other people made: what comes out of the readers is an answer or one line."""

from __future__ import annotations

import io
import random
import sqlite3
import struct
import subprocess
import sys
import zlib
from contextlib import closing
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import EpsImagePlugin, Image
from rich.console import Console

import leakbench
from leakbench import Matrix, datasets, defenses
from leakbench.analysis.integrity import check
from leakbench.assets import archives
from leakbench.audit.given import read_image
from leakbench.core.images import decoded
from leakbench.engine.progress import Display
from leakbench.errors import BadOption, CorruptAsset, ForeignRun, LeakbenchError
from leakbench.report import show
from leakbench.report.figure import plain, saved
from leakbench.report.files import write
from leakbench.report.page import sentence
from leakbench.store.merge import merge
from leakbench.store.run_file import FILE, Store
from leakbench.training import Accuracy
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
        ("UPDATE cells SET settings = '[]' WHERE id = 1", "malformed JSON in column settings"),
        ("UPDATE cells SET settings = '{\"dataset\": 3}' WHERE id = 1", "malformed JSON in column settings"),
        ("UPDATE sessions SET packages = '[1]'", "malformed JSON in column packages"),
        ("DELETE FROM truths", "private image"),
        ("DROP TABLE scores", "no table 'scores'"),
        ("ALTER TABLE results DROP COLUMN path", "columns"),
        ("ALTER TABLE sessions ADD COLUMN more BLOB AS (zeroblob(900000000)) VIRTUAL", "computed column"),
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


@pytest.mark.parametrize(
    ("name", "place"), [(b"truthstruths", 0), (b"truthstruths", 6), (b"CREATE TABLE truths", 14)], ids=str
)
@pytest.mark.parametrize("readonly", [True, False])
def test_a_name_that_is_no_text_is_refused_in_one_line(run, name, place, readonly):
    """One byte of the name, of the table that it belongs to, or of the SQL of an entry of ``sqlite_master``."""
    content = (run / FILE).read_bytes()
    assert content.count(name) == 1
    at = content.index(name) + place
    (run / FILE).write_bytes(content[:at] + b"\x80" + content[at + 1 :])
    with pytest.raises(ForeignRun) as caught:
        Store.open(run / FILE, readonly=readonly)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(LeakbenchError):
        check(run)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


HEADER = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
PIXELS = zlib.compress(bytes(8 * (1 + 3 * 8)))
PARTS = [(b"IHDR", HEADER), (b"IDAT", PIXELS), (b"iCCP", b""), (b"IEND", b"")]
PROFILE = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in PARTS)
"""A picture whose colour profile is empty, for which Pillow raises IndexError as it reads to the end."""


@pytest.mark.parametrize("png", [b"\0", PROFILE], ids=["bytes", "profile"])
def test_a_picture_that_is_none_leaves_its_place_empty(run, png):
    with closing(sqlite3.connect(run / FILE)) as db, db:
        db.execute("UPDATE images SET png = ?", (png,))
    assert write(run)
    state = check(run)
    assert len(state.faults) == sum(state.ended.values()) > 0
    assert all("its image is not a PNG of the size" in fault for fault in state.faults)


def test_whatever_an_image_makes_its_reader_raise_is_one_line(tmp_path):
    with pytest.raises(IndexError), Image.open(io.BytesIO(PROFILE)) as image:
        image.load()
    file = tmp_path / "a" / "x.png"
    file.parent.mkdir()
    file.write_bytes(PROFILE)
    with pytest.raises(CorruptAsset, match=r"x\.png cannot be read as an image \(IndexError\)"):
        datasets.parse(f"folder:{tmp_path}").load([0])
    with pytest.raises(CorruptAsset, match=r"cannot be read as an image \(IndexError\)"):
        read_image(str(file), (3, 8, 8))


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


def test_what_sqlite_says_of_a_damaged_schema_is_printable(run):
    content = (run / FILE).read_bytes()
    (run / FILE).write_bytes(content.replace(b"CREATE TABLE sessions", b"CREATE TABLE \x1d\x1b[1m ns", 1))
    with pytest.raises(ForeignRun, match="malformed database schema") as caught:
        Store.open(run / FILE, readonly=True)
    assert str(caught.value).isprintable()


def test_a_trial_of_no_session_is_not_shown(run):
    with closing(sqlite3.connect(run / FILE)) as db, db:
        db.execute("UPDATE results SET session_id = 7")
    with Store.open(run / FILE, readonly=True) as store, pytest.raises(ForeignRun, match="malformed"):
        show.show(store, min(store.planned()))


def test_a_run_whose_count_of_trials_is_none_is_not_continued(run):
    axes = {"attacks": ["grey"], "defenses": ["none"], "models": ["lenet"], "datasets": ["samples"], "floors": False}
    with closing(sqlite3.connect(run / FILE)) as db, db:
        db.execute("UPDATE meta SET value = '{}' WHERE key = 'planned'")
    with pytest.raises(ForeignRun, match="malformed"):
        leakbench.run(Matrix(**axes, images=3), run, device="cpu")


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


def test_a_journal_that_names_another_file_deletes_nothing(run, tmp_path):
    """SQLite plays a journal back that somebody else made, and deletes the file that it names as its own journal."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    journal = tmp_path / f"{FILE}-journal"
    script = (
        "import os, sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "db.execute('PRAGMA cache_size = 1'); db.execute('BEGIN'); db.execute('DELETE FROM images'); "
        "db.execute('DELETE FROM scores'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(run / FILE)], check=False)
    name, page = str(victim).encode(), int.from_bytes((run / FILE).read_bytes()[16:18], "big")
    words = (2**30 // page + 1).to_bytes(4, "big") + name + len(name).to_bytes(4, "big") + sum(name).to_bytes(4, "big")
    journal.write_bytes(journal.read_bytes() + words + bytes.fromhex("d9d505f920a163d7"))
    for readonly in (True, False):
        with pytest.raises(ForeignRun, match="names another file"):
            Store.open(run / FILE, readonly)
    assert victim.read_text() == "mine"


def test_a_name_of_control_characters_is_refused_in_one_line():
    with pytest.raises(BadOption) as caught:
        defenses.parse("\x0b11:")
    assert len(str(caught.value).splitlines()) == 1


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch ran) (w) file\n%%EOF\n"


def test_a_picture_of_a_format_that_runs_programs_is_none(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript, whatever the name of its file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **more: pytest.fail("it was run"))
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "x.png").write_bytes(POSTSCRIPT)
    with pytest.raises(CorruptAsset, match="cannot be read as an image"):
        datasets.parse("folder:images").load([0])
    assert decoded(POSTSCRIPT) is None


def test_a_picture_of_too_many_pixels_is_none():
    stream = io.BytesIO()
    Image.new("1", (2**14, 2**11)).save(stream, "PNG")
    assert decoded(stream.getvalue()) is None
    assert decoded(stream.getvalue()[:-40]) is None


def test_what_a_terminal_would_obey_is_not_printed(run, capsys):
    words = "\x1b]0;title\x07 \x1b[2J\r\nfault"
    with closing(sqlite3.connect(run / FILE)) as db, db:
        db.execute("UPDATE results SET status = 'error', reason = ? WHERE rowid = 1", (words,))
        db.execute("DELETE FROM scores")
        db.execute("DELETE FROM images")
        db.execute("UPDATE cells SET attack = attack || ?", (words,))
    lines = sentence("run_check.j2", "lines", check(run), 10).split("\n")
    assert any("]0;title" in line for line in lines)
    assert all(line.isprintable() for line in lines)
    with Store.open(run / FILE, readonly=True) as store:
        shown = show.show(store, min(store.planned()))
    texts = [shown.command, shown.note, *(part for _, words in shown.facts for part in words.split("\n"))]
    assert all(text.isprintable() for text in texts)
    Display(Console()).note(words)
    assert capsys.readouterr().out == "]0;title [2J fault\n"


@pytest.mark.parametrize("axes", [{"images": 2**62}, {"seeds": 2**62}, {"images": 20, "seeds": 10**6}])
def test_a_matrix_that_no_memory_holds_is_refused(axes):
    plan = {"attacks": ["grey"], "defenses": ["none"], "models": ["lenet"], "datasets": ["samples"]}
    with pytest.raises(BadOption, match="too many; give fewer"):
        Matrix(**plan, **axes).trials()
    del plan["attacks"]
    with pytest.raises(BadOption, match="too many; give fewer"):
        Accuracy(**plan, seeds=2**62).arms()


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_a_formula_in_a_name_is_no_formula_in_a_figure(kind):
    """Matplotlib parses text between dollars, raises if it is no formula, and warns of letters that the font lacks."""
    figure = Figure()
    figure.suptitle(plain("folder:/$\\frac{$ 中"))
    assert saved(figure, kind)
