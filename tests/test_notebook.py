"""What a notebook shows: a run as HTML, its charts and grids by name, reconstructions beside their truth."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rand
from PIL import Image
from test_charts import stored

import leakbench
from leakbench import Reconstruction
from leakbench.errors import BadOption, ForeignRun
from leakbench.report.figures import CHARTS
from leakbench.report.notebook import MAX_SHOWN
from leakbench.store.run_file import FILE


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> leakbench.Run:
    return leakbench.Run(stored(tmp_path_factory.mktemp("run")))


def shown(drawn: object) -> Image.Image:
    """Return the picture that a notebook makes of a figure."""
    return Image.open(io.BytesIO(drawn._repr_png_()))  # type: ignore[attr-defined]


def words(drawn: object) -> list[str]:
    return [text.get_text() for text in drawn.texts]  # type: ignore[attr-defined]


def test_a_notebook_shows_the_heat_map_and_what_is_recovered_without_other_files(run: leakbench.Run) -> None:
    page = run._repr_html_()
    assert "20 of 20 trials finished" in page
    assert re.findall(r'(?:src|href)="(.{22})', page) == ["data:image/png;base64,"]
    assert "<script" not in page
    rows = [re.findall(r"<td>(?:<code>)?(.*?)(?:</code>)?</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert [row[:2] for row in rows if row] == [["guard", "1 of 3"], ["none", "3 of 3"]]
    assert [row[3] for row in rows if row] == ["search: 1", "form: 3, search: 1"]
    assert "the best of the attackers that ran, not the worst case" in page


def test_what_is_not_a_run_is_told_in_the_page(tmp_path: Path) -> None:
    page = leakbench.Run(tmp_path / "<b>")._repr_html_()
    assert "there is no run file" in page
    assert "<b>" not in page


@pytest.mark.parametrize("chart", ["heatmap", "recovery", "ssim", "psnr", "threshold", "evaluations"])
def test_every_chart_is_drawn_by_its_name(run: leakbench.Run, chart: str) -> None:
    image = shown(run.plot(chart, dataset="tiny-data"))
    assert min(image.size) > 100
    assert np.asarray(image.convert("L")).std() > 5


def test_the_figure_is_the_chart_of_that_name(run: leakbench.Run) -> None:
    assert "Images recovered, tiny-data · tiny-model" in words(run.plot())
    assert run.plot("psnr").axes[0].get_ylabel() == "best PSNR after alignment, dB"
    assert [label.get_text() for label in run.plot("recovery").axes[0].get_yticklabels()] == ["guard", "none"]


def test_a_wrong_choice_of_a_chart_is_told_in_one_line(run: leakbench.Run, tmp_path: Path) -> None:
    with pytest.raises(BadOption) as wrong:
        run.plot("heat")
    assert str(wrong.value) == f"chart 'heat' is unknown; known: {', '.join(CHARTS)}"
    with pytest.raises(BadOption, match=r"has no chart 'utility' .*; it has: recovery, heatmap, ssim, psnr, threshold"):
        run.plot("utility")
    with pytest.raises(BadOption, match=r"none fit; name one by dataset=, .* of: tiny-data · tiny-model"):
        run.plot("heatmap", model="resnet")
    with pytest.raises(ForeignRun, match="there is no run file"):
        leakbench.Run(tmp_path).plot()


def test_a_grid_has_the_chosen_columns_and_images(run: leakbench.Run) -> None:
    whole = run.grid()
    found = words(whole)
    assert {"search", "form", "grey (floor)", "image 0", "image 3"} <= set(found)
    assert min(shown(whole).size) > 300
    part = words(run.grid(attacks=["form"], defenses="guard", images=2, seed=0))
    assert {"form", "guard", "image 0", "image 1"} <= set(part)
    assert not {"search", "none", "image 2"} & set(part)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"attacks": ["ig"]}, "attack 'ig' is not in this grid; it has: .*search.*form"),
        ({"seed": 7}, "seed 7 is not in this grid; it has: 0"),
        ({"page": 2}, "page 2 is not in this grid; it has pages 1 to 1"),
        ({"images": 0}, "images is 0; give at least 1"),
        ({"threat": "T3"}, "none fit; .*of: tiny-data · tiny-model · paper"),
    ],
)
def test_a_wrong_choice_of_a_grid_is_told_in_one_line(run: leakbench.Run, choice: dict, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        run.grid(**choice)


def test_several_datasets_must_be_chosen_from(run: leakbench.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from leakbench.report import notebook
    from leakbench.report.run import RunData

    def both(store: object, folder: str) -> RunData:
        import dataclasses

        import pandas as pd

        one = original(store, folder)
        return dataclasses.replace(one, trials=pd.concat([one.trials, one.trials.assign(dataset="other(size=8)")]))

    original = RunData.of
    monkeypatch.setattr(notebook.RunData, "of", both)
    several = "2 scenes fit; name one by dataset=, model= and threat=, of: tiny-data · tiny-model.*; other"
    with pytest.raises(BadOption, match=several):
        run.plot("heatmap")
    with pytest.raises(BadOption, match=several):
        run.grid()
    assert "Images recovered, other(size=8) · tiny-model" in words(run.plot("heatmap", dataset="other"))
    assert any("other(size=8)" in one for one in words(run.grid(dataset="other")))
    assert run._repr_html_().count("<img") == 2


def test_reconstructions_are_drawn_below_their_truth_with_the_scores() -> None:
    truth = rand(3, 3, 16, 16, seed=1)
    images = truth.clone()
    images[1] = 0.5 + (truth[1] - 0.5) / 100  # brightness and contrast are lost, and nothing else
    images[2] = rand(1, 3, 16, 16, seed=2)[0]
    found = Reconstruction(images, torch.tensor([4, 5, 6]), failed=torch.tensor([False, False, True]))
    drawn = found.show(truth)
    assert words(drawn)[::2] == ["0, label 4", "1, label 5", "2, label 6"]
    first, second, third = words(drawn)[1::2]
    assert first == "100.0 dB\nSSIM 1.00"
    assert second.endswith("SSIM 1.00\naligned")
    assert third.endswith("diverged")
    above, below = (drawn.axes[place].images[0].get_array() for place in (2, 3))
    assert np.allclose(above, below, atol=1e-4)  # the second: drawn aligned
    assert np.allclose(drawn.axes[0].images[0].get_array(), truth[0].movedim(0, -1))
    assert [drawn.axes[place].get_ylabel() for place in (0, 1)] == ["private", "attack"]


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_small_or_broken_reconstructions_are_drawn(channels: int) -> None:
    images = rand(2, channels, 5, 5)
    images[0] = torch.nan
    drawn = Reconstruction(images, failed=torch.tensor([True, False])).show(np.full(images.shape, 0.25))
    assert "not finite\ndiverged" in words(drawn)
    assert not any("SSIM" in one for one in words(drawn))
    assert drawn.axes[3].images[0].get_array().shape == (5, 5, 3)


def test_no_more_than_some_reconstructions_are_drawn() -> None:
    drawn = Reconstruction(rand(MAX_SHOWN + 3, 1, 2, 2)).show()
    assert f"the first {MAX_SHOWN} of {MAX_SHOWN + 3}" in words(drawn)
    assert len(drawn.axes) == MAX_SHOWN


def test_one_private_image_needs_no_batch_and_another_shape_is_told() -> None:
    found = Reconstruction(rand(1, 1, 8, 8))
    assert len(found.show(rand(1, 1, 8, 8)[0]).axes) == 2
    with pytest.raises(BadOption, match=r"truth \(2, 1, 8, 8\) and reconstructions \(1, 1, 8, 8\) differ in shape"):
        found.show(rand(2, 1, 8, 8))
    with pytest.raises(BadOption, match="truth range from 3 to 3; give them in"):
        found.show(torch.full((1, 1, 8, 8), 3.0))


def test_the_run_file_is_only_read(run: leakbench.Run) -> None:
    before = (run.out / FILE).read_bytes()
    run._repr_html_()
    assert (run.out / FILE).read_bytes() == before
    assert sorted(path.name for path in run.out.iterdir()) == [FILE]
