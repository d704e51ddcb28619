"""Every figure of the texts is the one that the committed data give, and a wrong one is caught in one line."""

import re
import shutil

import pandas as pd
import pytest

from benchmarks import committed, recheck, relu
from benchmarks.recheck import COMPUTATIONS, ROOT, TABLES, TEXTS
from leakbench.analysis.statistics import wilson_interval

CACHED = (recheck.load, recheck.matching, recheck.ensembles, recheck.computed)
MARK = "<!-- figures: reports/some/results.csv; attack=peel\n{}\n-->\n"


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A run of two defenses with four images each: ``none`` with scores of 0.445, ``clip`` with scores from 1 to 4."""
    monkeypatch.setattr(recheck, "ROOT", tmp_path)
    monkeypatch.setattr(committed, "ROOT", tmp_path)
    for cached in CACHED:
        cached.cache_clear()
    rows = [
        {
            **{"trial": f"{defense}{image}", "dataset": "samples", "model": "lenet", "defense": defense},
            **{"attack": "peel", "threat": "paper", "image": image, "seed": 0, "status": "ok", "seconds": 1.0},
            **{"psnr_aligned": score, "ssim_aligned": ssim, "reason": "", "objective": 0.0, "evaluations": 0},
        }
        for defense, scores in {"none": [0.445] * 4, "clip": [1.0, 2.0, 3.0, 4.0]}.items()
        for image, (score, ssim) in enumerate(zip(scores, [0.7, 0.8, 0.9, 0.1], strict=True))
    ]
    folder = tmp_path / "reports" / "some"
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    (folder / "page.md").write_text("| none | 0.4451 |\n| clip | 2.50 |\n")
    yield
    for cached in CACHED:
        cached.cache_clear()


def faults(text, *lines):
    return recheck.recheck("TEXT.md", f"{text}\n{MARK.format(chr(10).join(lines))}").faults


# The texts of the repository


@pytest.mark.parametrize("name", TEXTS)
def test_the_figures_of_a_text_are_those_of_the_data(name):
    text = text_of(name)
    assert recheck.recheck(name, text).faults + recheck.rechecked_tables(name, text)[0] == []


def test_the_figures_of_the_reports_are_recomputed_not_excused():
    found = recheck.recheck("reports/README.md", text_of("reports/README.md"))
    assert found.count > 450
    excused = sum(len(line.split(": ")[1].split()) for line in found.others)
    assert 0 < excused < found.count / 8


def test_every_computation_is_that_of_a_figure():
    marks = "\n".join(re.findall(r"<!-- figures:(.*?)-->", "".join(map(text_of, TEXTS)), re.DOTALL))
    words = {
        word.strip("[]") for names in re.findall(r"^ *([a-z_ \[\]]+):", marks, re.MULTILINE) for word in names.split()
    }
    assert set(COMPUTATIONS) <= words


@pytest.mark.parametrize(
    ("right", "wrong", "line"),
    [
        ("51.2 [", "51.3 [", "51.3 stated, 51.2455 recomputed"),  # rounded to 51.25, then to 51.3
        ("all 16 images are recovered", "all 15 images are recovered", "15 stated, 16 recomputed"),
        ("LeNet is 10.45 %", "LeNet is 10.54 %", "10.54 stated, 10.45 in the mark"),
        ("SSIM 1.00 and", "SSIM 1.01 and", "1.01 stated, 1.00 in the mark"),
    ],
)
def test_a_changed_digit_of_the_reports_is_caught_in_one_line(right, wrong, line):
    text = text_of("reports/README.md")
    assert text.count(right) == 1
    (found,) = recheck.recheck("reports/README.md", text.replace(right, wrong)).faults
    number = 1 + text[: text.index(right)].count("\n")
    assert found.startswith(f"reports/README.md:{number}: {line} (")
    assert "\n" not in found


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.begin.split()[1])
def test_a_changed_digit_of_a_table_is_caught_and_repaired(table):
    name = next(name for name in TEXTS if table.begin in text_of(name))
    text = text_of(name)
    row = next(line for line in text.partition(table.begin)[2].splitlines() if line.startswith("|") and "%" in line)
    wrong = text.replace(row, re.sub(r"\d %", "3.5 %", row, count=1))
    (found,), repaired = recheck.rechecked_tables(name, wrong)
    assert found.startswith(f"{name}:{1 + text[: text.index(row)].count(chr(10))}: |")
    assert repaired == text


def test_trials_that_an_ensemble_skipped_are_planned_again():
    place = {"dataset": "samples", "model": "lenet", "image": 0, "group": 0, "seed": 0, "status": "ok", "floor": False}
    ran = [
        ("precode", "peel", "paper"),
        ("clip", "peel", "paper"),
        ("clip", "lb", "paper"),
        ("clip", "lb", "informed=true"),
    ]
    rows = [{**place, "defense": defense, "attack": attack, "threat": threat} for defense, attack, threat in ran]
    trials = committed.planned(pd.DataFrame(rows))
    known = list(trials[["defense", "attack", "threat", "status"]].itertuples(index=False, name=None))
    skipped = [
        ("precode", "lb", threat, "") for threat in ("paper", "informed=true", "informed=splice", "informed=omit")
    ]
    assert set(known) == {(*one, "ok") for one in ran} | set(skipped)
    assert [attack for _, attack, _, _ in known] == ["peel"] * 2 + ["lb"] * 6


# One mark


@pytest.mark.parametrize("stated", ["0.4", "0.445", "0.4450", "0", "+0.4"])
def test_a_value_that_is_rounded_once_is_right(data, stated):
    assert faults(f"It is {stated} dB.", "mean: defense=none") == []


@pytest.mark.parametrize("stated", ["0.5", "0.46", "0.446", "−0.4", "1"])
def test_a_value_that_is_rounded_twice_or_wrong_is_caught(data, stated):
    line = f"TEXT.md:1: {stated} stated, 0.445 recomputed (mean: defense=none)"
    assert faults(f"It is {stated} dB.", "mean: defense=none") == [line]


def test_a_figure_in_the_middle_may_be_rounded_either_way(data):
    assert faults("It is 2 or 3 dB.", "mean: defense=clip", "mean: defense=clip") == []


def test_intervals_alternatives_and_several_values(data):
    low, high = (100 * end for end in wilson_interval(0.75, 4))
    text = f"3 of 4 [{low:.0f}, {high:.0f}], {75:.0f} %; 0.445 and 2.50 dB; at most 2.50"
    lines = ["recovered images [share]: defense=clip", "share: defense=none"]
    lines += ["mean: defense=none / clip", "most_mean: defense=c* | none"]
    assert faults(text, *lines) == []


def test_a_difference_of_two_arms_keeps_its_sign(data):
    assert faults("Clipping gains +2.06 dB (−2.06).", "difference: defense=clip vs none / none vs clip") == []
    assert len(faults("Clipping gains −2.06 dB.", "difference: defense=clip vs none")) == 1


def test_wrong_figures_are_replaced_and_keep_their_form(data):
    text = "Line one.\nIt is +0.5 dB, and −9.99.\n" + MARK.format(
        "mean: defense=none\ndifference: defense=none vs clip"
    )
    found = recheck.recheck("TEXT.md", text)
    assert [line.partition(" ")[0] for line in found.faults] == ["TEXT.md:2:", "TEXT.md:2:"]
    assert found.text == text.replace("+0.5", "+0.4").replace("9.99", "2.06")
    assert recheck.recheck("TEXT.md", found.text).faults == []


def test_code_links_names_and_headings_hold_no_figures():
    text = "# Part 1\n\nResNet-20 at commit 3c29177 of `x(3)` [here](a#4), seed 0, T5, 95 % intervals, Python 3.11.4\n"
    assert recheck.recheck("TEXT.md", text + "\n```\n17\n```\n").faults == []


@pytest.mark.parametrize("text", ["It is 3 dB.", "| a | 3 |", "- one\n- two: 3 %"])
def test_a_figure_without_a_mark_is_a_fault(text):
    (fault,) = recheck.recheck("TEXT.md", f"Words.\n\n{text}\n\nMore words.\n").faults
    assert fault.endswith("3 stated, without a mark")


def test_a_mark_belongs_to_its_own_paragraph_only(data):
    found = recheck.recheck("TEXT.md", f"First 7.\n\nThen 0.445.\n{MARK.format('mean: defense=none')}")
    assert found.faults == ["TEXT.md:1: 7 stated, without a mark"]
    assert found.count == 1


def test_figures_that_are_not_recomputed_are_listed_with_the_reason(data):
    lines = ["settings: 8", "unrecorded: 52 7; no file has the time", "printed: reports/some/page.md; none; 0.445"]
    found = recheck.recheck("TEXT.md", f"With 8, in 52 minutes 7 seconds, 0.445.\n{MARK.format(chr(10).join(lines))}")
    assert (found.faults, found.count) == ([], 0)
    assert found.others == [
        "TEXT.md:1: 52 7: not recomputable: no file has the time",
        "TEXT.md:1: 0.445: not recomputable: only reports/some/page.md has it",
    ]


@pytest.mark.parametrize(("stated", "caught"), [("2.5", 0), ("2.50", 0), ("3", 1), ("2", 1), ("2.6", 1), ("0.4451", 1)])
def test_a_printed_figure_is_on_its_line_and_not_rounded_again(data, stated, caught):
    assert len(faults(f"It is {stated}.", f"printed: reports/some/page.md; clip; {stated}")) == caught


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("mean: defense=prune", "no row has defense=prune"),
        ("mean: shade=blue", "there is no column 'shade'"),
        ("mean: of=gain; defense=none", "has no column 'gain'"),
        ("mean:", "2 cells meet the conditions"),
        ("share:", "2 ensembles meet the conditions"),
        ("difference: defense=none", "a difference needs two arms"),
        ("accuracy: defense=none", "has no column 'best', and accuracy needs it"),
        ("__import__('os').getcwd(): defense=none", "is unknown; known: mean, "),
        ("mean[]", "has no colon; write COMPUTATION: conditions"),
        ("mean: none", "'none' is no condition; write column=value"),
        ("trials[]: defense=none", "trials has no interval"),
        ("mean[]: defense=none", "1 figure stated (0.445), 3 in the mark"),
        ("settings: 0.446", "0.445 stated, 0.446 in the mark"),
        ("unrecorded: 0.445", "write unrecorded: FIGURES; WHY"),
        ("printed: reports/some/page.md; 0.445", "write printed: PAGE; TEXT OF ITS LINE; FIGURES"),
        ("printed: reports/none.md; none; 0.445", "reports/none.md is no committed page"),
        ("printed: reports/some/page.md; prune; 0.445", "no line of reports/some/page.md has 'prune'"),
        ("from reports/none.csv\nmean: defense=none", "there is no file 'reports/none.csv' that ends in .csv"),
        ("from reports/some/page.md\nmean: defense=none", "there is no file 'reports/some/page.md' that ends in .csv"),
    ],
)
def test_a_mark_that_is_wrong_is_one_line(data, line, fault):
    (found,) = faults("It is 0.445.", line)
    assert found.startswith("TEXT.md:1: ")
    assert fault in found
    assert "\n" not in found


def test_an_empty_mark_is_a_fault():
    (fault,) = recheck.recheck("TEXT.md", "It is 3.\n<!-- figures: -->\n").faults
    assert fault == "TEXT.md:1: the mark is empty; name the file that has the figures"


def test_the_command_ends_with_1_and_repairs_if_asked(data, monkeypatch, capsys):
    monkeypatch.setattr(recheck, "TEXTS", ("TEXT.md",))
    file = recheck.ROOT / "TEXT.md"
    file.write_text("It is 0.5 dB.\n" + MARK.format("mean: defense=none"))
    for arguments, code in ([[], 1], [["--write"], 1], [["--quiet"], 0]):
        monkeypatch.setattr("sys.argv", ["recheck", *arguments])
        with pytest.raises(SystemExit) as ended:
            recheck.main()
        assert ended.value.code == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "TEXT.md:1: 0.5 stated, 0.445 recomputed (mean: defense=none)"
    assert lines[-1] == "TEXT.md: 1 figure recomputed, 0 faults"
    assert file.read_text().startswith("It is 0.4 dB.")


def test_the_tables_on_relu_networks_are_what_their_files_give(tmp_path):
    for file in (ROOT / "reports" / "relu").glob("*.csv"):
        shutil.copy(file, tmp_path)
    relu.page(tmp_path / "no runs", tmp_path)
    made, committed_ = ((folder / "relu.md").read_text() for folder in (tmp_path, ROOT / "reports" / "relu"))
    assert made.partition("\n## ")[2] == committed_.partition("\n## ")[2]
