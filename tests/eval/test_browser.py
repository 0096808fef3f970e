"""The report in a browser: pictures show, nothing runs over the side, and nothing is asked of the network."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from cluster.scoring import comparison_report
from data.partitions import MemoryPartitions
from eval.bins import BinSettings
from eval.comparison import Comparison, judge_set
from eval.evaluate import Rule
from eval.measure import local_pass
from eval.reference import fit_reference
from eval.scores import ScoreSettings

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=4000",
)  # fmt: skip
# Written into a copy of the report, whose own policy forbids scripts: what the page looks like to its reader.
PROBE = """<script>addEventListener("load", () => { document.documentElement.setAttribute("data-found", JSON.stringify({
  width: innerWidth, scroll: document.scrollingElement.scrollWidth,
  images: [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]),
  tables: [...document.querySelectorAll("table")].length,
  cut: [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).map(e => e.ariaLabel),
  hints: [...document.querySelectorAll(".sideways")].filter(e => e.checkVisibility()).length,
  sideways: [...document.querySelectorAll(".picture")].filter(e => e.scrollWidth > e.clientWidth).length,
})) })</script></head>"""


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine")
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    def images(n, seed, name):
        rng = np.random.default_rng(seed)
        x = np.random.default_rng(1).random((9, 12, 12, 3))[rng.integers(0, 9 - seed, n)]
        noisy = np.clip(x + 0.1 * rng.standard_normal(x.shape), 0, 1).astype(np.float32)
        return MemoryPartitions(noisy, name=name, scale="0..1")

    known, held = images(900, 0, "known"), images(300, 0, "held out")
    scores = ScoreSettings(subsample=100)
    reference = fit_reference(known, local_pass(known), [BinSettings(n_bins=12, n_init=1)], scores)
    rows = []
    for seed, name in ((1, "a model <with> a rather long & odd name"), (3, "model-b")):
        samples = images(400, seed, name)
        more = {"over_reference": local_pass(known), "held_out": (held, local_pass(held))}
        rows.append(judge_set(samples, local_pass(samples), reference, name=name, rule=Rule(), scores=scores, **more))
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(comparison_report(Comparison(reference, rows), {"score": 1.25}))
    return path


def shown(browser, page, width, tmp_path):
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path}/profile", f"--window-size={width},2000", "--dump-dom"]
    found = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=90, check=True)
    text = re.search(r'data-found="([^"]*)"', found.stdout)[1]
    return json.loads(text.replace("&quot;", '"'))


@pytest.mark.parametrize("width", [1280, 400])
def test_pictures_show_and_fit_the_window(browser, report, tmp_path, width):
    html = report.read_text()
    assert html.count("<img") >= 7
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html).replace("</head>", PROBE)
    (tmp_path / "probed.html").write_text(probed)
    found = shown(browser, tmp_path / "probed.html", width, tmp_path)
    assert len(found["images"]) == html.count("<img")
    assert all(complete and natural > 50 and drawn > 50 for complete, natural, drawn in found["images"])
    assert found["tables"] >= 3
    # No value of a table is out of sight, and what pictures scroll say so.
    assert found["cut"] == []
    assert found["sideways"] == found["hints"] == (0 if width == 1280 else html.count('class="sideways"'))
    # Wide pictures scroll in boxes of their own; the page itself does not.
    assert found["scroll"] <= found["width"]


def test_nothing_is_fetched(browser, report, tmp_path):
    log = tmp_path / "net.json"
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path}/profile", f"--log-net-log={log}", "--dump-dom"]
    subprocess.run([*command, report.as_uri()], capture_output=True, timeout=90, check=True)
    urls = set(re.findall(r'"url":"([^"]*)"', log.read_text()))
    outside = {url for url in urls if url.startswith(("http:", "https:", "//", "ws")) and "google" not in url}
    assert not outside
    assert not re.search(r'(?:src|href)="(?!data:|#)', report.read_text())
