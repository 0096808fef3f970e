import uuid

import numpy as np
import pytest
import torch

from data import manifest as manifests
from data import shards, storage, stream
from data.errors import UserError
from data.sources import SourceOptions, open_source

N_TRAIN = 1000


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """1000 + 100 images of 2x3x1 pixels; the label is the sample's number."""
    folder = tmp_path_factory.mktemp("stream")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (1100, 2, 3, 1), dtype=np.uint8)
    np.savez(folder / "x.npz", x=x, y=np.arange(1100))
    source = open_source(f"array:{folder / 'x.npz'}", SourceOptions(test_fraction=100 / 1100))
    return shards.pack(source, str(folder / "p"), rows_per_block=27, shard_bytes=1000)


def batches(manifest, epoch=0, start=0, **options):
    options = {"batch_size": 40, "seed": 3, **options}
    return list(stream.ShardStream(manifest, "train", **options).epoch(epoch, start))


def same(a, b):
    return len(a) == len(b) and all(
        p.keys() == q.keys() and all(torch.equal(p[name], q[name]) for name in p) for p, q in zip(a, b, strict=True)
    )


def labels(found):
    return torch.cat([batch["label"] for batch in found]).tolist()


def test_order_is_a_pure_function_of_seed_and_epoch(manifest):
    first = batches(manifest, dequantise=True)
    assert same(first, batches(manifest, dequantise=True))
    assert not same(first, batches(manifest, epoch=1, dequantise=True))
    assert not same(first, batches(manifest, seed=4, dequantise=True))
    assert labels(first) != labels(batches(manifest, epoch=1))


def test_an_epoch_has_every_sample_once(manifest):
    found = batches(manifest)
    assert len(found) == 25
    assert len(set(labels(found))) == N_TRAIN
    assert labels(found) != sorted(labels(found))
    x = torch.cat([batch["x"] for batch in found])
    assert x.dtype == torch.float32
    assert x.shape == (N_TRAIN, 2, 3, 1)
    with np.load(manifest.source.spec.removeprefix("array:")) as stored:
        np.testing.assert_allclose(x.numpy(), stored["x"][labels(found)] / 255, atol=1e-7)


@pytest.mark.parametrize(("lanes", "group"), [(1, 8), (4, 2), (8, 1), (40, 8)])
def test_what_is_dropped_is_less_than_a_batch(manifest, lanes, group):
    found = labels(batches(manifest, lanes=lanes, group=group))
    assert len(set(found)) == len(found) > N_TRAIN - 40


@pytest.mark.parametrize("dequantise", [False, True])
def test_resume_is_equal_to_the_bit_at_any_step(manifest, dequantise):
    whole = batches(manifest, lanes=2, dequantise=dequantise)
    for start in range(len(whole) + 1):
        assert same(whole[start:], batches(manifest, start=start, lanes=2, dequantise=dequantise))


def test_resuming_reads_no_skipped_data(manifest, monkeypatch):
    read = []
    real = stream.SplitReader.read
    monkeypatch.setattr(stream.SplitReader, "read", lambda self, block: read.append(block) or real(self, block))
    batches(manifest, start=24)
    assert 0 < len(read) <= 16


def test_global_batches_do_not_depend_on_the_world(manifest):
    alone = batches(manifest, lanes=4, dequantise=True)
    for world in (2, 4):
        ranks = [batches(manifest, lanes=4, dequantise=True, rank=rank, world_size=world) for rank in range(world)]
        assert {len(rank) for rank in ranks} == {len(alone)}
        for step, whole in enumerate(alone):
            quarter = len(whole["x"]) // 4
            for lane in range(4):
                part, place = ranks[lane % world][step], lane // world
                for name in whole:
                    mine = part[name][place * quarter : (place + 1) * quarter]
                    assert torch.equal(mine, whole[name][lane * quarter : (lane + 1) * quarter])


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_workers_change_nothing(manifest, workers):
    reader = stream.ShardStream(manifest, "train", batch_size=40, seed=3, dequantise=True)
    assert same(list(reader.epoch(1, 4)), list(reader.loader(1, 4, workers)))


@pytest.mark.parametrize("world", [1, 3, 7])
def test_evaluation_has_every_sample_once(manifest, world):
    ranks = [list(stream.read_blocks(manifest, "train", rank=rank, world_size=world)) for rank in range(world)]
    index = np.concatenate([block["index"] for rank in ranks for block in rank])
    assert sorted(index) == list(range(N_TRAIN))
    label = np.concatenate([block["label"] for rank in ranks for block in rank])
    assert len(set(label)) == N_TRAIN


def test_evaluation_noise_does_not_depend_on_the_world(manifest):
    def noisy(world):
        blocks = [
            block
            for rank in range(world)
            for block in stream.read_blocks(manifest, "test", rank=rank, world_size=world, dequantise_seed=5)
        ]
        return np.concatenate([block["x"] for block in sorted(blocks, key=lambda block: block["index"][0])])

    np.testing.assert_array_equal(noisy(1), noisy(3))
    raw = np.concatenate([block["x"] for block in stream.read_blocks(manifest, "test", raw=True)])
    assert raw.dtype == np.uint8
    np.testing.assert_array_equal(np.floor(noisy(1) * 256).astype(np.uint8), raw)


def test_dequantised_pixels_stay_in_their_level():
    x = np.full(1_000_000, 255, np.uint8)
    out = stream.dequantise(x, 256, [1])
    assert out.dtype == np.float32
    assert out.max() < 1
    assert out.min() >= 255 / 256
    noise = out * 256 - 255
    assert noise.mean() == pytest.approx(0.5, abs=2e-3)
    assert noise.var() == pytest.approx(1 / 12, abs=1e-3)


def test_numbers_that_do_not_fit_are_named(manifest):
    with pytest.raises(UserError, match="3 lanes .* 2 workers"):
        batches(manifest, lanes=3, world_size=2, batch_size=6)
    with pytest.raises(UserError, match="40 rows .* 3 lanes"):
        batches(manifest, lanes=3)
    with pytest.raises(UserError, match="1000 samples"):
        batches(manifest, batch_size=1001)
    with pytest.raises(UserError, match="choose one of train, test"):
        next(stream.read_blocks(manifest, "validation"))


def test_real_numbers_in_memory_storage(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    source = open_source(f"array:{tmp_path / 'x.npy'}", SourceOptions(test_fraction=0, shuffle=False))
    base = f"memory://{uuid.uuid4()}"
    try:
        shards.pack(source, base, rows_per_block=7)
        manifest = manifests.load_manifest(base)
        manifests.verify(manifest)
        got = np.concatenate([block["x"] for block in stream.read_blocks(manifest, "train")])
        np.testing.assert_array_equal(got, x)
        found = list(stream.ShardStream(manifest, "train", batch_size=5, seed=0).loader(0, workers=1))
        assert len(found) == 10
        assert set(found[0]) == {"x"}
        with pytest.raises(UserError, match="dequantise"):
            stream.ShardStream(manifest, "train", batch_size=5, seed=0, dequantise=True)
        shards.pack(source, base, rows_per_block=5)
        assert len(storage.names(base)) == 2
    finally:
        storage.remove(base)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["cut", "flip", "missing"])
def test_damage_is_found_on_reading(tmp_path, fault, workers):
    np.save(tmp_path / "x.npy", np.ones((100, 4), np.float32))
    source = open_source(f"array:{tmp_path / 'x.npy'}", SourceOptions(test_fraction=0))
    manifest = shards.pack(source, str(tmp_path / "p"), rows_per_block=10)
    shard = manifest.splits["train"].shards[0]
    path = tmp_path / "p" / shard.file
    data = bytearray(path.read_bytes())
    offset, length, _ = shard.members[4][1]["x.npy"]
    if fault == "cut":
        path.write_bytes(data[:-100])
    elif fault == "flip":
        data[offset + length // 2] ^= 4
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(UserError) as caught:
        list(stream.ShardStream(manifest, "train", batch_size=10, seed=0).loader(0, workers=workers))
    assert shard.file in str(caught.value)
    assert "\n" not in str(caught.value)
    if fault != "missing":
        assert "pack again" in str(caught.value)


def test_pixels_go_to_the_model_s_scale_and_back():
    from data.pixels import dequantise, quantise, scale

    x = np.arange(256, dtype=np.uint8).reshape(4, 64)
    for levels in (17, 256):
        pixels = np.minimum(x, np.uint8(levels - 1))
        noisy = dequantise(pixels, levels, [0])
        assert noisy.min() >= 0
        assert noisy.max() < 1
        # Samples of a density are continuous: at the exact edge of a level rounding may decide either way.
        assert (quantise(noisy, levels) == scale(pixels, levels)).mean() > 0.99
        assert np.array_equal(quantise((pixels + 0.5) / levels, levels), scale(pixels, levels))
    assert np.array_equal(quantise(np.float32([-0.3, 1.7]), 256), [0, 1])
    assert np.array_equal(quantise(np.float32([-0.3, 1.7]), None), np.float32([-0.3, 1.7]))


def test_mirroring_is_fixed_by_seed_and_epoch(digits_pack):
    """About half of the images are mirrored, other ones in another epoch."""
    plain = next(iter(stream.ShardStream(digits_pack, "train", batch_size=400, seed=1).epoch(0)))["x"]
    mirrored = stream.ShardStream(digits_pack, "train", batch_size=400, seed=1, augment=["mirror"])
    first, again, other = (next(iter(mirrored.epoch(epoch)))["x"] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    same, flipped = ((first == x).flatten(1).all(1) for x in (plain, plain.flip(2)))
    assert bool((same | flipped).all())
    assert 150 < int(flipped.sum()) < 250  # 5 standard deviations


def test_vectors_cannot_be_mirrored(tmp_path, array_file):
    manifest = shards.pack(open_source(f"array:{array_file(np.zeros((20, 3), np.float32))}"), str(tmp_path / "vectors"))
    with pytest.raises(UserError, match="cannot be mirrored"):
        stream.ShardStream(manifest, "train", batch_size=5, seed=0, augment=["mirror"])


def test_large_blocks_of_vectors_mix_and_are_shared(tmp_path):
    """An unshuffled pack: each batch comes from the many blocks of a group, evenly, and all ranks have work."""
    n = 200_000
    np.savez(tmp_path / "x.npz", x=np.zeros((n, 4), np.float32), y=np.arange(n))
    source = open_source(f"array:{tmp_path / 'x.npz'}", SourceOptions(test_fraction=0, shuffle=False))
    manifest = shards.pack(source, str(tmp_path / "p"))
    reader = stream.SplitReader(manifest, "train")
    assert len(reader) == 64
    for lanes in (1, 4):
        found = list(stream.ShardStream(manifest, "train", batch_size=512, seed=0, lanes=lanes).epoch(0))
        assert len(np.unique(labels(found))) == 512 * len(found) > n - 512
        for batch in found[:4]:
            blocks = np.searchsorted(reader.starts, batch["label"].numpy(), "right")
            sizes = np.unique(blocks, return_counts=True)[1]
            # Alone a block has 64 of the 512 rows on average: below 24 has odds of 1e-6.
            assert len(sizes) == 8 * lanes
            assert lanes > 1 or sizes.min() >= 24
    shares = [sum(len(b["x"]) for b in stream.read_blocks(manifest, "train", rank=r, world_size=16)) for r in range(16)]
    assert max(shares) - min(shares) <= 3125
