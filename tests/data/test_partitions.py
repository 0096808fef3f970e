import io
import math
import os
import tarfile

import cloudpickle
import numpy as np
import pytest
from PIL import Image

from data import shards
from data.errors import UserError
from data.manifest import Manifest, Origin, ShardRecord, SplitRecord, load_manifest
from data.partitions import PackPartitions, ReshapedPartitions, open_partitions, position
from data.pixels import scale
from data.sources import SourceOptions, open_source


def gathered(parts):
    """Positions, keys, samples on the scale of the scores, and labels of a whole set."""
    pieces = [(number, piece) for number in range(len(parts)) for piece in parts.pieces(number)]
    return (
        np.concatenate([position(number, np.arange(p.start, p.start + len(p.x))) for number, p in pieces]),
        [key for _, piece in pieces for key in piece.keys()],  # noqa: SIM118
        np.concatenate([scale(piece.x, parts.levels) for _, piece in pieces]),
        None if pieces[0][1].label is None else np.concatenate([piece.label for _, piece in pieces]),
    )


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 6, 6, 3), dtype=np.uint8)


def write_tar(path, arrays):
    with tarfile.open(path, "w") as tar:
        for i, array in enumerate(arrays):
            stream = io.BytesIO()
            Image.fromarray(array).save(stream, "PNG")
            info = tarfile.TarInfo(f"{i:03d}.png")
            info.size = stream.tell()
            stream.seek(0)
            tar.addfile(info, stream)


def test_the_same_pixels_from_everywhere_are_the_same_samples(tmp_path, pixels):
    np.save(tmp_path / "x.npy", pixels)
    (tmp_path / "png").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "png" / f"{i:03d}.png")
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "s-0.tar", pixels[:12])
    write_tar(tmp_path / "tars" / "s-1.tar", pixels[12:])
    source = open_source(f"array:{tmp_path / 'x.npy'}", SourceOptions(test_fraction=0, shuffle=False))
    shards.pack(source, str(tmp_path / "pack"), rows_per_block=7)
    places = ["x.npy", "png", "tars", "tars/s-{0..1}.tar", "pack", "pack/manifest.json"]
    chosen = np.array([19, 0, 7])
    expected = np.divide(pixels, np.float32(255), dtype=np.float32)
    for place in places:
        parts = open_partitions(str(tmp_path / place), split="train")
        positions, keys, x, _ = gathered(parts)
        assert (x.dtype, parts.scale) == (np.float32, "uint8 / 255")
        np.testing.assert_array_equal(x, expected)
        np.testing.assert_array_equal(parts.fetch(positions[chosen]), expected[chosen])
        assert len(set(keys)) == 20
        assert parts.n in (20, None)
        assert (np.diff(positions) > 0).all()


def test_splits_labels_and_real_numbers(tmp_path):
    digits = open_partitions("digits", split="test")
    assert digits.scale == "uint8 / 16"
    _, _, x, labels = gathered(digits)
    assert x.max() == 1
    assert labels.dtype == np.int64
    manifest = shards.pack(open_source("digits"), str(tmp_path / "digits"))
    packed = open_partitions(str(tmp_path / "digits"), split="test")
    assert packed.n == manifest.n_samples("test")
    np.testing.assert_array_equal(gathered(packed)[3], labels)
    np.save(tmp_path / "x.npy", np.full((4, 2), -3.5))
    real = open_partitions(str(tmp_path / "x.npy"))
    assert real.scale == "float32 as stored"
    assert (gathered(real)[2] == -3.5).all()


def test_the_cut_follows_the_data_and_every_sample_comes_once(tmp_path, monkeypatch):
    monkeypatch.setattr("data.partitions._PARTITION_BYTES", 500)
    x = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    source = open_source(f"array:{tmp_path / 'x.npy'}", SourceOptions(test_fraction=0, shuffle=False))
    shards.pack(source, str(tmp_path / "pack"), rows_per_block=9, shard_bytes=2000)
    for place in ("x.npy", "pack"):
        parts = open_partitions(str(tmp_path / place), split="train")
        assert len(parts) > 5
        assert len(set(parts.keys)) == len(parts)
        assert sum(parts.sizes) == 300
        positions, keys, found, _ = gathered(cloudpickle.loads(cloudpickle.dumps(parts)))
        np.testing.assert_array_equal(found, x)
        np.testing.assert_array_equal(parts.fetch(positions[::-7]), x[::-7])
        assert len(set(keys)) == 300


def test_images_of_different_shapes(tmp_path, pixels):
    write_tar(tmp_path / "s.tar", [pixels[0], pixels[1][:, :4]])
    (tmp_path / "png").mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / "png" / "a.png")
    Image.fromarray(pixels[1][:, :4]).save(tmp_path / "png" / "b.png")
    for place in ("s.tar", "png"):
        with pytest.raises(UserError, match="set size"):
            gathered(open_partitions(str(tmp_path / place)))
        assert gathered(open_partitions(str(tmp_path / place), size=3, grey=True))[2].shape == (2, 3, 3, 1)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="nothing is there"):
        open_partitions(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="no PNG or JPEG"):
        open_partitions(str(tmp_path))
    with pytest.raises(UserError, match="no split 'validation'"):
        open_partitions("digits", split="validation")


def touched(path):
    os.utime(path, (1, 1))
    return path


def test_random_numbers_follow_the_data_and_never_the_place(tmp_path, monkeypatch):
    """Whoever repeats an evaluation elsewhere draws the same subsets; what is stored belongs to the content."""
    monkeypatch.setattr("data.partitions._PARTITION_BYTES", 500)
    x = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", x)
        source = open_source(f"array:{tmp_path}/{name}/x.npy", SourceOptions(test_fraction=0, shuffle=False))
        shards.pack(source, str(tmp_path / name / "pack"), rows_per_block=9, shard_bytes=2000)
    for place in ("x.npy", "pack"):
        one, other = (open_partitions(str(tmp_path / name / place), split="train") for name in ("a", "b"))
        assert list(one.seeds) == list(other.seeds)
        assert len(set(one.seeds)) == len(one) > 5
    one = open_partitions(str(tmp_path / "a/x.npy"))
    again = open_partitions(touched(str(tmp_path / "a/x.npy")))
    assert list(again.seeds) == list(one.seeds)
    assert set(again.keys).isdisjoint(one.keys)
    # The split that is read counts, not the one that was asked for.
    assert list(open_partitions(str(tmp_path / "a/x.npy"), split="train").keys) == list(again.keys)
    # A shard that is left keeps its random numbers; one that comes twice has two sets of them.
    pack = load_manifest(str(tmp_path / "a/pack"))
    fewer = pack.model_copy(deep=True)
    del fewer.splits["train"].shards[0]
    twice = pack.model_copy(deep=True)
    twice.splits["train"].shards.append(twice.splits["train"].shards[0])
    whole, rest, double = (PackPartitions(manifest, "train") for manifest in (pack, fewer, twice))
    assert list(rest.seeds) == list(whole.seeds)[-len(rest) :]
    assert len(set(double.seeds)) == len(double) > len(set(double.keys))


def test_a_tar_of_the_same_size_is_another(tmp_path, pixels):
    """Tars are padded to 10 KiB: the size tells nothing. A store that tells nothing else is not relied upon."""
    write_tar(tmp_path / "s.tar", pixels[:3])
    first = open_partitions(str(tmp_path / "s.tar"))
    assert first.lasting
    size = (tmp_path / "s.tar").stat().st_size
    write_tar(tmp_path / "s.tar", pixels[3:6])
    other = open_partitions(touched(str(tmp_path / "s.tar")))
    assert (tmp_path / "s.tar").stat().st_size == size
    assert list(first.keys) != list(other.keys) != list(open_partitions(str(tmp_path / "s.tar"), size=3).keys)
    assert list(first.seeds) == list(other.seeds)
    from fsspec.implementations.local import LocalFileSystem

    info = LocalFileSystem.info
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFileSystem, "info", lambda self, path, **k: {
            name: value for name, value in info(self, path, **k).items() if name in ("name", "size", "type")
        })  # fmt: skip
        assert not open_partitions(str(tmp_path / "s.tar")).lasting


def test_one_partition_travels_alone(tmp_path):
    """What a worker gets does not grow with the pack."""
    record = ShardRecord(
        file="s.tar", samples=200, bytes=10**9, sha256="0" * 64, members=[(1, {"x.npy": (0, 10, 0)})] * 200
    )
    sizes = []
    for n in (2, 300):
        shards_ = [record.model_copy(update={"file": f"s{i}.tar"}) for i in range(n)]
        split = SplitRecord(samples=200 * n, shards=shards_)
        pack = Manifest(name="p", shape=(2,), dtype="float32", source=Origin(spec="p"), splits={"test": split})
        parts = PackPartitions(pack, "test")
        one = parts.only(len(parts) - 1)
        assert one.keys[len(parts) - 1] == parts.keys[len(parts) - 1]
        sizes.append(len(cloudpickle.dumps(one)))
    assert sizes[1] < sizes[0] + 100


@pytest.mark.parametrize("place", ["x.npy", "png", "s.tar", "pack", "digits"])
def test_a_partition_alone_holds_the_same_samples(tmp_path, monkeypatch, pixels, place):
    monkeypatch.setattr("data.partitions._PARTITION_BYTES", 500)
    np.save(tmp_path / "x.npy", pixels)
    (tmp_path / "png").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "png" / f"{i:03d}.png")
    write_tar(tmp_path / "s.tar", pixels)
    source = open_source(f"array:{tmp_path / 'x.npy'}", SourceOptions(test_fraction=0, shuffle=False))
    shards.pack(source, str(tmp_path / "pack"), rows_per_block=3)
    parts = open_partitions("digits" if place == "digits" else str(tmp_path / place), split="train")
    flat = ReshapedPartitions(parts, (math.prod(parts.shape),))
    assert (flat.sizes, flat.lasting, flat.levels) == (parts.sizes, parts.lasting, parts.levels)
    last = len(parts) - 1
    alone = cloudpickle.loads(cloudpickle.dumps(flat.only(last)))
    found = np.concatenate([piece.x for piece in alone.pieces(last)])
    np.testing.assert_array_equal(found, np.concatenate([p.x.reshape(len(p.x), -1) for p in parts.pieces(last)]))
    for number in range(len(parts)):
        one = cloudpickle.loads(cloudpickle.dumps(parts.only(number)))
        for a, b in zip(one.pieces(number), parts.pieces(number), strict=True):
            np.testing.assert_array_equal(a.x, b.x)
            assert (a.keys(), a.start, a.noise) == (b.keys(), b.start, b.noise)
