"""The model card: a page that stands alone, and whose example runs."""

import html
import json
import re
import subprocess
import sys

from trainer.tracking import log_artifact_text, mlflow_client


def test_the_card_says_what_the_registry_knows_and_its_example_runs(shelf, call, tmp_path):
    registered = shelf.put(shelf.mixture(), "carded", alias="champion")
    client = mlflow_client(shelf.uri)
    run = client.get_model_version("carded", str(registered.version)).run_id
    protocol = {"bins": 20, "bins_fingerprint": "abc123", "n_samples": 2000}
    log_artifact_text(shelf.uri, run, json.dumps({"models": [{}, {"protocol": protocol}]}), "summary.json")
    client.set_model_version_tag("carded", str(registered.version), "ndb", "3")
    client.set_registered_model_tag("carded", "licence", "CC-BY-4.0 <script>alert(1)</script>")
    out = tmp_path / "card.html"
    found = call("card", "carded", "--out", out, "--tracking-uri", shelf.uri)
    assert found.code == 0, found.err
    page = out.read_text()
    tags = client.get_model_version("carded", str(registered.version)).tags
    fingerprint, score = tags["data.fingerprint"], tags["test_log_likelihood"]
    for text in ("Version 1 (champion)", score, "abc123", run, fingerprint, "by hand"):
        assert text in page
    assert "3 of 20" in page
    assert "`" not in page.partition("<style>")[0] + page.partition("</style>")[2]
    assert "CC-BY-4.0 &lt;script&gt;" in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)

    snippet = html.unescape(re.search(r"<pre[^>]*><code>(.*?)</code></pre>", page, re.DOTALL).group(1))
    ran = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    shapes = ["(3,)", "(3, 10)", "(3, 6)", "(3, 8, 8, 1)", "(3, 8, 8, 1)", "(3, 8, 8, 1)"]
    assert ran.stdout.split("\n")[:6] == shapes


def test_the_card_loads_the_model_as_it_was_asked_for(shelf, call, tmp_path):
    registered = shelf.put(shelf.mixture(), "twice", alias="candidate")
    mlflow_client(shelf.uri).set_registered_model_alias("twice", "champion", str(registered.version))
    for asked, place in (
        *(("twice@champion", "twice@champion"), ("twice@candidate", "twice@candidate")),
        *(("twice", "twice@champion"), (f"twice@{registered.version}", f"twice/{registered.version}")),
    ):
        found = call("card", asked, "--out", tmp_path / "card.html", "--tracking-uri", shelf.uri)
        assert found.code == 0, found.err
        assert f"models:/{place}&#34;" in (tmp_path / "card.html").read_text()


def test_a_card_of_nothing_is_refused(shelf, call, tmp_path):
    shelf.put(shelf.mixture(), "aliased", alias="other")
    for name, message in (("aliased", "champion or candidate"), ("aliased@9", "9"), ("no-such", "no-such")):
        found = call("card", name, "--out", tmp_path / "card.html", "--tracking-uri", shelf.uri)
        assert found.code == 2
        assert message in found.err
    assert not (tmp_path / "card.html").exists()
