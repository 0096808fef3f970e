"""Passes over partitions: the same result however the set is cut, and what is kept of partitions is not read again."""

import json
from dataclasses import replace

import cloudpickle
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from data.errors import UserError
from data.partitions import MemoryPartitions, Piece, position
from eval.bins import BinCounts, Bins, BinSettings, CentreSums, fit_bins, label_bins
from eval.comparison import Comparison, judge_set
from eval.comparison_report import bins_table, row_sections, scores_table
from eval.evaluate import Rule
from eval.features import Extractor
from eval.measure import View, local_pass, observe_partition
from eval.observed import Extent, Nearest, Observed, Sketch, Spread, sample_ids
from eval.reference import Reference, fit_reference
from eval.scores import ScoreSettings, Summary, parse_scores
from eval.stored import observe_stored

SETTINGS = BinSettings(n_bins=7, n_init=1)


def samples(n=900, seed=0, shape=(6, 5, 1), name="blobs", labels=False):
    rng = np.random.default_rng(seed)
    which = rng.integers(0, 7, n)
    x = np.random.default_rng(9).random((7, *shape))[which] + 0.05 * rng.standard_normal((n, *shape))
    return MemoryPartitions(x.astype(np.float32), name=name, scale="0..1", labels=which if labels else None)


def cut(partitions, monkeypatch, rows):
    """The same set in partitions of so many rows."""
    monkeypatch.setattr("data.partitions._PARTITION_BYTES", rows * partitions.x[0].nbytes)
    return MemoryPartitions(partitions.x, name=partitions.name, scale=partitions.scale, labels=partitions.labels)


def observed(x, start=0, key="k"):
    n = len(x)
    return Observed(x, x.reshape(n, -1), sample_ids(key, n, start), position(0, np.arange(start, start + n)))


def test_blocks_do_not_matter(monkeypatch):
    whole = samples()
    bins = fit_bins(local_pass(whole), [SETTINGS], name="a", fingerprint="f").bins[0]
    observers = {"extent": Extent(), "spread": Spread(), "sketch": Sketch(40), "bins": BinCounts(bins)}
    once = local_pass(whole)(observers)
    monkeypatch.setattr("eval.measure._BLOCK_ROWS", 1)
    monkeypatch.setattr(MemoryPartitions, "pieces", lambda self, number: (
        Piece(self.x[i : i + 64], None, i, list) for i in range(0, len(self.x), 64)
    ))  # fmt: skip
    pieces = local_pass(whole)(observers)
    np.testing.assert_array_equal(once["bins"].counts, pieces["bins"].counts)
    np.testing.assert_array_equal(once["bins"].members(), pieces["bins"].members())
    np.testing.assert_array_equal(once["sketch"].positions(), pieces["sketch"].positions())
    np.testing.assert_allclose(once["spread"].std(), whole.x.reshape(900, -1).std(0), rtol=1e-5)
    np.testing.assert_allclose(pieces["spread"].std(), once["spread"].std(), rtol=1e-6)
    assert pieces["extent"].root_mean_square == pytest.approx(float(np.sqrt(np.square(whole.x).mean())), rel=1e-5)


def test_partitions_merge_in_their_order(monkeypatch):
    """Merging partitions by hand gives what the pass gives, to the bit: what workers share is a pass."""
    parts = cut(samples(), monkeypatch, 100)
    assert len(parts) == 9
    bins = fit_bins(local_pass(parts), [SETTINGS], name="a", fingerprint="f").bins[0]
    one = fit_bins(local_pass(samples()), [SETTINGS], name="a", fingerprint="f").bins[0]
    np.testing.assert_array_equal(bins.counts, one.counts)
    np.testing.assert_allclose(bins.centres, one.centres, atol=1e-6)
    assert bins.counts.sum() == 900


def test_a_sketch_is_a_uniform_subset_and_knows_its_share():
    x = np.arange(20_000, dtype=np.float32)[:, None]
    found = Sketch(500, 20_000)
    for start in range(0, 20_000, 1000):
        part = Sketch(500, 20_000)
        part.observe(observed(x[start : start + 1000], start))
        assert part.held < 120  # a part keeps little more than its share of 25: Poisson, odds far below 1e-9
        found.merge(part)
    chosen = found.features()[:, 0]
    assert len(set(chosen.tolist())) == 500
    assert (np.diff(chosen) > 0).all()
    # Mean of 500 uniform draws: 6 standard errors of 258, odds 2e-9.
    assert abs(chosen.mean() - 10_000) < 6 * 258
    whole = Sketch(500)
    whole.observe(observed(x))
    np.testing.assert_array_equal(whole.features(), found.features())
    other = Sketch(500, seed=1)
    other.observe(observed(x))
    assert len(set(other.features()[:, 0].tolist()) & set(chosen.tolist())) < 60
    np.testing.assert_array_equal(Sketch.from_arrays(found.arrays()).positions(), found.positions())
    positions = found.least(100)[1]
    assert len(positions) == 100
    assert set(positions.tolist()) <= set(found.positions().tolist())


def test_members_belong_to_their_bins(monkeypatch):
    parts = cut(samples(), monkeypatch, 100)
    bins = fit_bins(local_pass(parts), [SETTINGS], name="a", fingerprint="f").bins[0]
    for k in range(7):
        members = bins.members[k][bins.members[k] >= 0]
        x = parts.fetch(members)
        assert (bins.assign(observed(x))[0] == k).all()


def test_the_nearest_sample_is_exact_even_for_a_copy(monkeypatch):
    parts = cut(samples(), monkeypatch, 100)
    queries = np.concatenate([parts.x[[5, 640]].reshape(2, -1), np.full((1, 30), 0.5, np.float32)])
    found = local_pass(parts)({"near": Nearest(queries)})["near"]
    exact = ((parts.x.reshape(900, 1, 30).astype(float) - queries) ** 2).sum(2)
    np.testing.assert_allclose(found.distances, exact.min(0), rtol=1e-9)
    assert found.distances[:2].tolist() == [0, 0]
    nearest = parts.x[exact.argmin(0)]
    np.testing.assert_array_equal(parts.fetch(found.positions), nearest)


@pytest.mark.parametrize("removed", [0, 4])
def test_a_set_that_shrank_reads_nothing_again(tmp_path, monkeypatch, removed):
    parts = cut(samples(n=600), monkeypatch, 100)
    reference = fit_reference(parts, local_pass(parts), [SETTINGS], ScoreSettings(subsample=50))

    def judged(chosen, store):
        few = MemoryPartitions(parts.x[chosen], name="few", scale="0..1")
        few.keys = few.seeds = [f"content {first}" for first in chosen[::100]]
        few.lasting = True
        read = []

        def observe(*arguments):
            before = set(tmp_path.iterdir())
            found = observe_stored(*arguments, store=store)
            read.append(set(tmp_path.iterdir()) - before)
            return found

        over = local_pass(few, observe=observe)
        row = judge_set(few, over, reference, name="few", rule=Rule(), scores=ScoreSettings(subsample=50), stored=True)
        return row.to_dict(), sum(map(bool, read))

    everything = np.arange(600)
    assert judged(everything, str(tmp_path))[1] == 6
    kept = np.delete(everything, np.s_[100 * removed : 100 * removed + 100])
    again, read = judged(kept, str(tmp_path))
    assert read == 0
    assert again == judged(kept, None)[0]


def test_a_damaged_store_is_named(tmp_path):
    parts = samples(n=100)
    observers = {"extent": Extent()}
    with pytest.raises(UserError, match="leave out --store"):  # other samples in memory would have the same keys
        observe_stored(parts, 0, View(), observers, str(tmp_path))
    parts.lasting = True
    observe_stored(parts, 0, View(), observers, str(tmp_path))
    file = next(tmp_path.iterdir())
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # a number that is another one, and still a number
    for damaged in (b"broken", bytes(content)):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="remove it"):
            observe_stored(parts, 0, View(), observers, str(tmp_path))


def test_a_damaged_reference_is_named(tmp_path):
    parts = samples(n=300)
    place = str(tmp_path / "ref")
    fit_reference(parts, local_pass(parts), [SETTINGS], ScoreSettings(subsample=50)).save(place)
    Reference.load(place)
    files = sorted(path for path in (tmp_path / "ref").rglob("*") if path.is_file())
    assert len(files) == 5
    for file in files:
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[-9] ^= 1
        damages = [b"[" * 200_000, whole[: len(whole) // 2]]
        for content in [*damages, bytes(flipped)] if file.suffix == ".safetensors" else damages:
            file.write_bytes(content)
            with pytest.raises(UserError, match="again"):
                Reference.load(place)
        file.write_bytes(whole)


def test_a_reference_is_kept_whole(tmp_path, monkeypatch):
    parts = cut(samples(labels=True), monkeypatch, 200)
    settings = [SETTINGS, BinSettings(n_bins=4, n_init=1)]
    reference = fit_reference(parts, local_pass(parts), settings, ScoreSettings(subsample=60), name="known")
    reference.save(str(tmp_path))
    loaded = Reference.load(str(tmp_path))
    assert [bins.fingerprint for bins in loaded.bins] == [bins.fingerprint for bins in reference.bins]
    assert (loaded.name, loaded.scale) == ("known", "0..1")
    other = samples(n=500, seed=3)

    def judged(by):
        row = judge_set(other, local_pass(other), by, name="x", rule=Rule(3.0), scores=ScoreSettings(subsample=60))
        return row.to_dict()

    assert judged(loaded) == judged(reference)
    assert len(judged(loaded)["other_bins"]) == 1
    pictures = loaded.members(loaded.bins[0], np.arange(7))
    assert all(len(part) == 8 for part in pictures)
    assert (loaded.bins[0].assign(observed(pictures[2]))[0] == 2).all()
    (tmp_path / "bins-4" / "bins.json").unlink()
    with pytest.raises(UserError):
        Reference.load(str(tmp_path))


def test_given_classes_are_bins():
    known = samples(labels=True)
    bins = label_bins(local_pass(known), SETTINGS, name="classes", fingerprint="f").bins[0]
    np.testing.assert_array_equal(bins.counts, np.bincount(known.labels))
    with pytest.raises(UserError, match="no labels"):
        label_bins(local_pass(samples()), SETTINGS, name="classes")
    with pytest.raises(UserError, match="classifier"):
        local_pass(samples())({"bins": BinCounts(bins)})


@pytest.mark.parametrize(("spoilt", "words"), [
    (lambda x: np.full_like(x, np.nan), "NaN"),
    (lambda x: x * 255, "one scale"),
    (lambda x: x[:1], "1 samples for 7 bins"),
    (lambda x: x[:, :3], "bring the samples to the reference's shape"),
    (lambda x: np.where(np.arange(x.size).reshape(x.shape) == 1000, np.inf, x), "infinite"),
])  # fmt: skip
def test_samples_that_cannot_be_judged_are_refused(spoilt, words):
    known = samples()
    reference = fit_reference(known, local_pass(known), [SETTINGS], ScoreSettings(subsample=50))
    bad = MemoryPartitions(spoilt(known.x).astype(np.float32), name="gan", scale="0..1")
    with pytest.raises(UserError, match=words) as caught:
        judge_set(bad, local_pass(bad), reference, name="gan", rule=Rule(), scores=ScoreSettings(subsample=50))
    assert "gan" in str(caught.value)


def test_constant_features_and_constant_samples_have_scores():
    x = samples().x.copy()
    x[:, 0] = 0.25
    known = MemoryPartitions(x, name="k", scale="0..1")
    reference = fit_reference(known, local_pass(known), [SETTINGS], ScoreSettings(subsample=50))
    same = MemoryPartitions(np.repeat(x[:1], 300, 0), name="same", scale="0..1")
    row = judge_set(same, local_pass(same), reference, name="same", rule=Rule(), scores=ScoreSettings(subsample=50))
    assert row.evaluation.result.ndb == 7
    assert all(np.isfinite(score.value) for score in row.scores if score.reason is None)
    untaken = {score.name: score.reason for score in row.scores if score.reason}
    assert set(untaken) == {"Inception score", "MODE score", "classes reached", "memorised", "data-copying z"}


def test_a_score_that_cannot_be_taken_aborts_no_other():
    """Nine samples, a reference fitted without FID: the reasons are told; named one by one, they are errors."""
    known, few = samples(), MemoryPartitions(samples(seed=2).x[:9], name="few", scale="0..1")
    reference = fit_reference(known, local_pass(known), [SETTINGS], ScoreSettings(("kid", "sharpness"), 50))

    def judged(*names, explicit=False):
        scores = ScoreSettings(names, 50, explicit=explicit)
        return judge_set(few, local_pass(few), reference, name="few", rule=Rule(), scores=scores)

    row = judged("fid", "kid", "sharpness", "memorisation")
    told = {score.name: score.words for score in row.scores}
    assert "fitted without it" in told["Fréchet distance (pixels)"]
    assert "at least 10 samples of each are needed, got 50 and 9" in told["KID"]
    assert "samples are not at hand" in told["memorised"]
    assert row.scores[2].name == "sharpness"
    assert np.isfinite(row.scores[2].value)
    table = scores_table(Comparison(reference, [row]))
    assert [row[2] for row in table.rows[:2]] == ["not taken"] * 2
    assert "not taken: at least 10" in table.details[1]
    json.dumps(row.to_dict(), allow_nan=False)
    with pytest.raises(UserError, match="few: kid: at least 10"):
        judged("sharpness", "kid", explicit=True)
    wide = MemoryPartitions(np.zeros((20, 8193), np.float32) + np.arange(20)[:, None], name="wide", scale="0..1")
    reference = fit_reference(wide, local_pass(wide), [BinSettings(n_bins=2, n_init=1)], ScoreSettings(subsample=10))
    row = judge_set(wide, local_pass(wide), reference, name="w", rule=Rule(), scores=ScoreSettings(subsample=10))
    told = {score.name: score.words for score in row.scores}
    assert "up to 8192 features" in told["Fréchet distance (pixels)"]
    assert "no images" in told["sharpness"]
    assert "10 samples" in told["precision"]


def test_the_table_tells_how_each_set_was_scored():
    scores = ScoreSettings(("manifold", "memorisation"), 100)
    known = samples()
    reference = fit_reference(known, local_pass(known), [SETTINGS], scores)
    sets = {"large": samples(seed=2), "small": samples(60, seed=3)}
    rows = [judge_set(x, local_pass(x), reference, name=name, rule=Rule(), scores=scores) for name, x in sets.items()]
    table = scores_table(Comparison(reference, rows))
    cells, told = {row[0]: row for row in table.rows}, dict(zip((row[0] for row in table.rows), table.details))
    # What holds for all sets is said once.
    assert told["recall"] == "3 neighbours; large: 100 and 100 samples; small: 100 and 60 samples"
    assert "/" in cells["recall"][-1]
    assert cells["memorised"][2:4] == ["not taken", "not taken"]
    assert told["memorised"].startswith("not taken: the reference's samples")
    sizes = f"differ in size (60 to {sets['large'].n} samples)"
    assert sizes in bins_table(Comparison(reference, rows)).note
    assert "differ in size" not in bins_table(Comparison(reference, rows[:1])).note


def test_two_parts_of_the_reference_score_as_a_perfect_model_does():
    """Against 20 perfect models the reference's own parts lie within 5 of their spreads (the seed is fixed)."""
    rng = np.random.default_rng(0)
    scores = ScoreSettings(("kid", "manifold", "transport"), 400)
    known = MemoryPartitions(rng.normal(size=(400, 4)).astype(np.float32), name="known", scale="0..1")
    reference = fit_reference(known, local_pass(known), [BinSettings(n_bins=2, n_init=1)], scores)
    found = []
    for _ in range(20):
        perfect = MemoryPartitions(rng.normal(size=(100, 4)).astype(np.float32), name="p", scale="0..1")
        found.append(judge_set(perfect, local_pass(perfect), reference, name="p", rule=Rule(), scores=scores).scores)
    for own in zip(*found):
        values = np.array([score.value for score in own])
        assert len({score.itself for score in own}) == 1
        if own[0].name != "KID":
            assert "300 and 100 samples" in own[0].itself_protocol
            assert "400 and 100 samples" in own[0].protocol
        assert abs(own[0].itself - values.mean()) < 5 * values.std(), own[0].name
    epsilon = {score.protocol.split("ε = ")[1].split(" ")[0] for score in (row[-1] for row in found)}
    assert len(epsilon) == 1  # of the reference alone
    kid = found[0][0]
    assert "subsets of 50" in kid.protocol
    assert kid.error > 0


def looked(n, labels, of_labels, seed=0):
    """A set seen by a classifier of seven classes that looks at the first pixels."""
    parts = samples(n, seed)
    parts.labels = labels
    classifier = Extractor("c", "c", "f" * 64, lambda x: (x[:, 0, 0], 9 * x[:, 0, :2].reshape(len(x), -1) @ np.ones(
        (2, 1)) * np.arange(7)), of_labels=of_labels)  # fmt: skip
    return parts, local_pass(parts, View(classifier=classifier))


@pytest.mark.parametrize(("labels", "of_labels", "words"), [
    (np.arange(300) % 7, True, "from labels"),
    (np.arange(300) % 7, False, "from the classifier's predictions"),
    (None, True, "from the classifier's predictions"),
    (np.arange(300) % 6, True, "1 of 7 classes are absent"),
    (np.arange(300) % 9, True, "labels reach 8, the classifier knows 7"),
    (np.arange(300) % 7 - (np.arange(300) < 7), True, "1 of 300 reference samples have no label"),
])  # fmt: skip
def test_the_mode_score_s_label_distribution(labels, of_labels, words):
    """Labels count where they are the classifier's classes (an ImageNet network knows nothing of ours)."""
    scores = ScoreSettings(("classes",), 50)
    known, over = looked(300, labels, of_labels)
    reference = fit_reference(known, over, [SETTINGS], scores)
    row = judge_set(*looked(200, None, of_labels, 1), reference, name="x", rule=Rule(), scores=scores)
    found = {score.name: score for score in row.scores}
    assert words in found["MODE score"].words
    assert found["Inception score"].value >= 1
    if labels is not None and not of_labels:
        assert not len(reference.summary.labels)


def test_bins_of_classes_keep_who_labelled_them(tmp_path):
    known, over = looked(300, np.arange(300) % 7, True)
    by_classifier = label_bins(over, SETTINGS, name="k", fingerprint="f").bins[0]
    given = label_bins(local_pass(known), SETTINGS, name="k", fingerprint="f").bins[0]
    assert (by_classifier.labelled_by.name, given.labelled_by.name) == ("c", "given")
    given.save(str(tmp_path))
    assert Bins.load(str(tmp_path)).fingerprint == given.fingerprint
    assert replace(given, labelled_by=by_classifier.labelled_by).fingerprint != given.fingerprint
    with pytest.raises(UserError, match="labelled by given .*, the samples by c "):
        over({"bins": BinCounts(given)})
    for spoilt, words in ((np.full(300, 10**6), "below 1,000,000"), (np.arange(300) % 7 - 1, "43 of 300 .* no label")):
        parts = looked(300, spoilt, True)[0]
        with pytest.raises(UserError, match=words):
            label_bins(local_pass(parts), SETTINGS, name="k")


def test_nearest_pairs_need_no_held_out_data():
    known, copied = samples(), samples(seed=4)
    copied.x[7] = known.x[11]
    scores = ScoreSettings(("memorisation",), 50)
    reference = fit_reference(known, local_pass(known), [SETTINGS], scores)
    row = judge_set(
        *(copied, local_pass(copied), reference),
        name="x", rule=Rule(), scores=scores, over_reference=local_pass(known),
    )  # fmt: skip
    assert "--held-out" in row.scores[0].words
    nearest = int(np.argmin(row.copies.distances))
    assert (row.copies.samples[nearest], row.copies.reference[nearest]) == (7, 11)
    assert [section.title for section in row_sections(Comparison(reference, [row]), row)][-1] == "Copies? x"


def test_names_of_scores():
    assert parse_scores("none") == ()
    assert parse_scores("fid, kid") == ("fid", "kid")
    with pytest.raises(UserError, match="unknown scores fdi"):
        parse_scores("fdi")
    assert Summary(ScoreSettings(parse_scores("none"))).sketch is None


def test_results_do_not_carry_the_bins_back():
    """K = 2,000 bins of 3,000 features are 24 MB; what 50 samples found of them is the sums of 50 rows at most."""
    rng = np.random.default_rng(0)
    x = rng.random((50, 3000), np.float32)
    start = rng.random((2000, 3000), np.float32)
    parts = MemoryPartitions(x, name="x", scale="0..1")
    settings = BinSettings(n_bins=2000)
    counts, dimensions = np.ones(2000, np.int64), np.arange(3000)
    bins = Bins(start, dimensions, None, counts, (3000,), (0, 1), 0.5, settings, 2000, "x", "f")
    observers = {"sums": CentreSums(start, dimensions, None), "counts": BinCounts(bins), "near": Nearest(start)}
    found = observe_partition(parts, 0, View(), observers)
    sizes = {name: len(cloudpickle.dumps(each)) for name, each in found.items()}
    assert sizes["sums"] < 50 * 3000 * 8 + 50_000
    assert sizes["counts"] < 60_000
    assert sizes["near"] < 60_000
    whole = local_pass(parts)(observers)
    nearest = cdist(x, start).argmin(1)
    np.testing.assert_array_equal(whole["counts"].counts, np.bincount(nearest, minlength=2000))
    means = start.copy()
    for k in np.unique(nearest):
        means[k] = x[nearest == k].mean(0, dtype=np.float64)
    np.testing.assert_allclose(whole["sums"].means(), means, rtol=1e-6)
    assert not observers["sums"].counts.any()


def test_a_saved_reference_keeps_few_pictures_and_none_of_vectors(tmp_path, monkeypatch):
    """Reading them back may cost a request each: their number is bounded whatever the number of bins."""
    monkeypatch.setattr("eval.bins.PICTURED", 20)
    monkeypatch.setattr("eval.reference.PICTURED", 20)
    for name, shape, kept in (("images", (6, 5, 1), 20), ("vectors", (30,), 0)):
        parts = samples(shape=shape)
        read = []
        fetch = parts.fetch
        parts.fetch = lambda positions, fetch=fetch, read=read: read.extend(positions) or fetch(positions)
        settings = [BinSettings(n_bins=30, n_init=1)]
        reference = fit_reference(parts, local_pass(parts), settings, ScoreSettings(()))
        reference.save(str(tmp_path / name))
        assert len(read) == kept
        bins = Reference.load(str(tmp_path / name)).bins[0]
        assert (bins.pictures is not None) == bool(kept)
        found = Reference.load(str(tmp_path / name)).members(bins, np.arange(30))
        assert sum(map(len, found)) == kept
