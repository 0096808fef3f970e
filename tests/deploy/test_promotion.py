"""A champion is followed by what is not worse, and by nothing else unless it is forced."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from cluster.promotion import Protocol, promote
from data.errors import UserError
from data.shards import pack
from data.sources import SourceOptions, open_source
from deploy.registry import find_entry
from eval import challenge
from eval.metrics import ndb
from trainer.models.mfa import MFA

PROTOCOL = Protocol(n=3000, seed=1)


@pytest.fixture(scope="module")
def champion(shelf):
    return shelf.mixture()


@pytest.fixture(scope="module")
def thinned_pack(tmp_path_factory):
    """The digits, no 3 among those of training."""
    options = SourceOptions(class_ratios={"3": 0})
    return pack(open_source("digits", options), str(tmp_path_factory.mktemp("thinned")), rows_per_block=200)


def test_a_missing_digit_is_refused_even_with_a_yardstick_of_its_own(shelf, champion, thinned_pack, call):
    """The candidate's own reference lacks the digit, too: by it the candidate would be the better one."""
    name = "missing"
    shelf.put(champion, name, alias="champion")
    shelf.put(shelf.mixture(left_out=[3]), name, manifest=thinned_pack, reference=shelf.reference_of(thinned_pack))
    outcome = promote(name, PROTOCOL, tracking_uri=shelf.uri)
    assert not outcome.promoted
    worse = {contest.score: contest for contest in outcome.worse}
    assert set(worse) >= {"NDB (Holm)", "JS (nats)"}
    assert worse["NDB (Holm)"].difference >= 1
    assert find_entry(name, shelf.uri, "champion").version == 1
    assert not any(key.startswith("promotion") for key in find_entry(name, shelf.uri, "candidate").tags)

    command = ("promote", name, "--tracking-uri", shelf.uri, "-n", 3000, "--seed", 1)
    refused = call(*command)
    assert refused.code == 3
    line = refused.err.strip().splitlines()[-1]
    assert line.startswith("manymodes: refused: NDB (Holm) is ")
    assert "JS is +" in line
    forced = call(*command, "--force")
    assert forced.code == 0
    assert "promoted by force" in forced.err
    entry = find_entry(name, shelf.uri, "champion")
    assert entry.version == 2
    assert "NDB" in entry.tags["promotion.forced"]
    assert "@" in entry.tags["promotion.by"]
    assert entry.tags["promotion.over"] == "1"


def test_a_candidate_within_the_interval_is_promoted_with_its_lineage(shelf, champion):
    """The same mixture, its means moved by far less than a sample's noise: no recorded score tells them apart."""
    name = "within"
    near = _moved(champion, 1e-3)
    shelf.put(champion, name, alias="champion")
    shelf.put(near, name)
    outcome = promote(name, PROTOCOL, tracking_uri=shelf.uri)
    assert outcome.promoted
    assert not outcome.worse
    assert [contest.score for contest in outcome.contests] == ["NDB (Holm)", "JS (nats)", "test log-likelihood (nats)"]
    tags = find_entry(name, shelf.uri, "champion").tags
    assert {"run", "recipe", "recipe.fingerprint", "data.fingerprint", "promotion.at", "promotion.bins"} <= set(tags)
    assert "promotion.forced" not in tags
    assert promote(name, PROTOCOL, tracking_uri=shelf.uri).promoted  # the same version: nothing to do


def test_held_out_data_that_is_at_hand_is_compared_in_pairs(shelf, champion):
    """Pairs tell models apart that means do not; the margin says from where on that matters."""
    shelf.put(champion, "pairs", alias="champion", data=True)
    shelf.put(_moved(champion, 1e-3), "pairs")
    outcome = promote("pairs", PROTOCOL, tracking_uri=shelf.uri)
    assert "in pairs" in outcome.contests[2].text
    assert [contest.score for contest in outcome.worse] == ["test log-likelihood (nats)"]
    assert -0.1 < outcome.worse[0].difference < 0
    assert promote("pairs", replace(PROTOCOL, margin=0.2), tracking_uri=shelf.uri).promoted


def _moved(model, distance):
    moved = MFA(**model.config)
    moved.load_state_dict(model.state_dict())
    with torch.no_grad():
        moved.means.add_(torch.randn(moved.means.shape, generator=torch.Generator().manual_seed(0)), alpha=distance)
    return moved


def test_a_worse_likelihood_alone_is_refused(shelf, champion):
    """Twice the noise hardly moves the bins; recorded means are compared where the data is not at hand."""
    shelf.put(champion, "noisy", alias="champion")
    shelf.put(shelf.mixture(noise=2.0), "noisy")
    outcome = promote("noisy", PROTOCOL, tracking_uri=shelf.uri)
    assert "test log-likelihood (nats)" in {contest.score for contest in outcome.worse}
    assert not outcome.promoted


def test_the_first_champion_has_to_be_complete(shelf, champion):
    shelf.put(champion, "first", failed=True)
    with pytest.raises(UserError, match="failed, not finished"):
        promote("first", PROTOCOL, tracking_uri=shelf.uri)
    assert find_entry("first", shelf.uri, "champion") is None
    broken = MFA(**champion.config)
    broken.load_state_dict(champion.state_dict())
    with torch.no_grad():
        broken.means[0, 0] = math.nan
    shelf.put(broken, "first")
    with pytest.raises(UserError, match="NaN or infinite"):
        promote("first", PROTOCOL, tracking_uri=shelf.uri)
    shelf.put(champion, "first")
    assert promote("first", PROTOCOL, tracking_uri=shelf.uri).promoted
    assert find_entry("first", shelf.uri, "champion").aliases == ("candidate", "champion")
    with pytest.raises(UserError, match="no version with the alias nobody"):
        promote("first", PROTOCOL, source="nobody", tracking_uri=shelf.uri)
    with pytest.raises(UserError, match="missing-name"):
        promote("missing-name", PROTOCOL, tracking_uri=shelf.uri)


def test_a_champion_without_a_reference_needs_one(shelf, champion, thinned_pack, digits_reference):
    shelf.put(champion, "bare", alias="champion", reference=None)
    shelf.put(champion, "bare", manifest=thinned_pack)
    with pytest.raises(UserError, match="keeps no reference"):
        promote("bare", PROTOCOL, tracking_uri=shelf.uri)
    given = Protocol(n=3000, reference=digits_reference)
    outcome = promote("bare", given, tracking_uri=shelf.uri)
    assert outcome.promoted
    assert any("different data" in note for note in outcome.notes)


def test_equal_generators_are_hardly_ever_refused():
    """Pairs of one distribution, itself apart from the data: NDB's rule is to refuse at most 5 %, JS's 2.5 %.

    More refusals than are allowed here have odds of below 0.3 % each.
    """
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.full(30, 20.0))
    model = truth * rng.uniform(0.8, 1.25, 30)
    reference = rng.multinomial(3000, truth)
    pairs = rng.multinomial(2000, model / model.sum(), (300, 2))
    scores = [[ndb.score(reference, counts) for counts in pair] for pair in pairs]
    by_ndb = sum(challenge.contest_ndb(*pair).worse for pair in scores)
    by_js = sum(challenge.contest_js(*pair).worse for pair in scores[:60])
    print(f"refused: NDB {by_ndb} of 300, JS {by_js} of 60")
    assert by_ndb <= stats.binom.isf(0.003, 300, 0.05)
    assert by_js <= stats.binom.isf(0.003, 60, 0.025)


def test_pairs_see_what_two_means_do_not():
    """Against SciPy's paired t statistic, and in the direction in which the score is better."""
    rng = np.random.default_rng(0)
    champion = rng.normal(50, 20, 1000)
    candidate = champion - rng.normal(0.5, 1, 1000)
    paired = challenge.contest_paired("score", candidate, champion)
    assert paired.worse
    assert paired.difference == pytest.approx((candidate - champion).mean())
    assert abs(stats.ttest_rel(candidate, champion).statistic) > 1.96
    means = [(x.mean(), x.std(ddof=1) / math.sqrt(1000)) for x in (candidate, champion)]
    assert not challenge.contest_means("score", *means).worse
    assert not challenge.contest_paired("loss", candidate, champion, higher_is_better=False).worse
    assert challenge.contest_paired("loss", champion, candidate, higher_is_better=False).worse
