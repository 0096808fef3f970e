"""Figures are valid, small PNGs for every kind of sample; the report is one file that needs no network."""

import io
import re
from functools import partial

import numpy as np
import pytest
from PIL import Image

from data.errors import UserError
from data.partitions import MemoryPartitions
from eval import canvas, figures
from eval.arrays import bins_of, judge_array
from eval.bins import BinSettings
from eval.gallery import bins_gallery
from eval.reference import bin_members
from eval.report import ReportFigure, ReportSection, ReportTable, render_report

SHAPES = [(8, 8, 1), (6, 9, 3), (12,), (8, 8), (3, 5, 4), (2,)]


def opened(png):
    assert len(png) < 400_000
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    return image


def judged(shape, n_bins, seed=0):
    rng = np.random.default_rng(seed)
    reference, samples = rng.random((n_bins * 12, *shape)), rng.random((n_bins * 8, *shape)) ** 1.3
    settings = BinSettings(n_bins=n_bins, n_init=1)
    bins = bins_of(reference, settings, name="noise")
    return bins, reference, samples, judge_array(bins, samples, name="model", scale="0..1")


@pytest.mark.parametrize("n_bins", [2, 200])
def test_binning_proportions(n_bins):
    evaluation = judged((12,), n_bins)[3]
    one, three = figures.binning_proportions([evaluation]), figures.binning_proportions([evaluation] * 3)
    assert opened(three).height > opened(one).height


@pytest.mark.parametrize("shape", SHAPES)
def test_gallery_and_grid_draw_samples_of_every_shape(shape):
    bins, reference, samples, evaluation = judged(shape, 5)
    known = partial(bin_members, MemoryPartitions(reference, name="noise", scale=""), bins.members)
    put = partial(bin_members, MemoryPartitions(samples, name="model", scale=""), evaluation.members)
    opened(bins_gallery(bins, known, put, evaluation.result, max_rows=3))
    opened(bins_gallery(bins, known, lambda rows: [samples[:0]] * len(rows), evaluation.result, max_rows=3))
    opened(figures.sample_grid(samples, 3, 4, "samples"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("k", "factors"), [(1, 1), (5, 4)])
def test_components(shape, k, factors):
    rng = np.random.default_rng(0)
    means, loadings = rng.random((k, *shape)), rng.standard_normal((k, *shape, factors)) / 9
    opened(figures.components(means, np.zeros((k, *shape)), loadings, np.full(k, 1 / k), 4, 3))


def test_training_curve_bridges_values_that_are_not_finite():
    losses = 3 + np.exp(-np.arange(500) / 50)
    losses[[3, 250]] = np.nan, np.inf
    opened(figures.training_curve(range(500), losses, validation=([100, 400], [3.2, 3.1])))
    opened(figures.training_curve([1], [2.0]))


def test_tile_places_images_row_by_row(tmp_path):
    x = np.stack([np.full((4, 5, 1), value) for value in (0.0, 0.5, 2.0)])
    sheet = canvas.tile(x, 2)
    assert (sheet.shape, sheet.dtype) == ((9, 11, 3), np.uint8)
    assert [sheet[at][0] for at in ((0, 0), (0, 6), (5, 0), (5, 6), (4, 0))] == [0, 128, 255, 255, 255]
    canvas.save_png(str(tmp_path / "sheet.png"), sheet)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), sheet)
    with pytest.raises(UserError, match="not images"):
        canvas.tile(np.zeros((3, 7)), 2)


def page():
    picture = canvas.png(canvas.new_figure(1, 1))
    rows = [["<script>alert(1)</script>", 3, 0.01234], ["b", 1200, None]]
    summary = ReportTable("Models", ["model", "NDB", "JS"], rows)
    section = ReportSection("A & B", "text", [ReportFigure("F", picture, "caption", 'an "alt"')], beside=True)
    stages = ReportTable("Stages", ["stage", "seconds"], [["fit", 1.5]], note="two cores")
    facts = {"reference": '"><img src=http://example.org>', "shape": [28, 28, 1], "whiten": False}
    return render_report("Coverage of <digits>", summary, [section], facts, stages, lead="lead")


def test_report_stands_alone_and_escapes():
    html = page()
    assert "<script" not in html
    assert "Coverage of &lt;digits&gt;" in html
    assert 'alt="an &#34;alt&#34;"' in html
    sources = re.findall(r"<[^>]*\b(?:src|href)\s*=\s*[\"']?([^\"' >]*)", html)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"@import|url\(|<link|<script|<iframe", html)
    for words in ("28 × 28 × 1", "1,200", "0.01234", "–", "two cores", "prefers-color-scheme: dark"):
        assert words in html


def test_report_aligns_numbers_and_refuses_ragged_rows():
    table = ReportTable("t", ["a", "b", "c"], [["x", "-12.3 ± 0.4", "good"], ["y", None, "1"]])
    assert table.numeric() == [False, True, False]
    with pytest.raises(ValueError, match="2 cells under 3 columns"):
        render_report("t", ReportTable("t", ["a", "b", "c"], [["x", 1]]), [], {})
