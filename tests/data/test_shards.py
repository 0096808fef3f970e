import errno
import json
import tarfile
import tracemalloc

import numpy as np
import pytest
import webdataset

from data import manifest as manifests
from data import shards, storage, stream
from data.errors import UserError
from data.sources import SourceOptions, open_source


def array_source(tmp_path, n=500, shape=(6,), seed=0, dtype=np.float32, name="x"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, *shape)) if dtype == np.float32 else rng.integers(0, 256, (n, *shape))
    path = tmp_path / f"{name}.npz"
    np.savez(path, x=x.astype(dtype), y=np.arange(n))
    return open_source(f"array:{path}", SourceOptions())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def everything(manifest):
    blocks = [block for split in manifest.splits for block in stream.read_blocks(manifest, split, raw=True)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in ("x", "label")}


def test_pack_and_load(tmp_path):
    source = array_source(tmp_path)
    calls = []
    kinds = {"rows_per_block": 30, "shard_bytes": 3000}
    packed = shards.pack(source, str(tmp_path / "p"), progress=lambda *call: calls.append(call), **kinds)
    assert calls[-1] == (500, 500)
    assert sorted(calls) == calls
    manifest = manifests.load_manifest(str(tmp_path / "p"))
    assert manifest == packed
    assert manifest.fingerprint == manifests.load_manifest(str(tmp_path / "p" / "manifest.json")).fingerprint
    assert manifest.n_samples("train") == 400
    assert len(manifest.splits["train"].shards) > 3
    manifests.verify(manifest)
    got = everything(manifest)
    order = np.argsort(got["label"])
    with np.load(tmp_path / "x.npz") as stored:
        np.testing.assert_array_equal(got["x"][order], stored["x"])


def test_the_webdataset_library_reads_a_pack(tmp_path):
    manifest = shards.pack(array_source(tmp_path), str(tmp_path / "p"), rows_per_block=30)
    url = manifest.shard_url(manifest.splits["train"].shards[0])
    samples = list(webdataset.WebDataset([url], shardshuffle=False).decode())
    assert sum(len(sample["x.npy"]) for sample in samples) == 400


def test_packing_twice_gives_the_same_bytes(tmp_path):
    source = array_source(tmp_path)
    for name in ("a", "b"):
        shards.pack(source, str(tmp_path / name), rows_per_block=30, shard_bytes=3000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_packing_again_replaces_the_old_pack(tmp_path):
    first = shards.pack(array_source(tmp_path), str(tmp_path / "p"))
    (tmp_path / "p" / "notes.txt").write_text("the user's own")
    for seed in (1, 2):
        second = shards.pack(array_source(tmp_path, seed=seed), str(tmp_path / "p"))
        manifests.verify(second)
        files = {shard.file for record in second.splits.values() for shard in record.shards}
        assert set(storage.names(str(tmp_path / "p"))) == files | {"manifest.json", "notes.txt"}
    assert first.fingerprint != second.fingerprint


def test_foreign_files_of_the_same_name_are_left_alone(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "train-000000.tar").write_text("the user's own")
    manifests.verify(shards.pack(array_source(tmp_path), str(tmp_path / "p")))
    assert (tmp_path / "p" / "train-000000.tar").read_text() == "the user's own"


class Broken:
    """A source that fails after some blocks."""

    def __init__(self, source, error):
        self.source, self.error = source, error

    def __getattr__(self, name):
        return getattr(self.source, name)

    def blocks(self, split, rows):
        for number, block in enumerate(self.source.blocks(split, rows)):
            if number == 7:
                raise self.error
            yield block


@pytest.mark.parametrize("error", [UserError("bad.png: corrupt"), KeyboardInterrupt(), MemoryError()])
def test_a_failed_pack_leaves_nothing_and_spares_the_old_one(tmp_path, error):
    source = array_source(tmp_path)
    kinds = {"rows_per_block": 30, "shard_bytes": 1500}
    with pytest.raises(type(error)):
        shards.pack(Broken(source, error), str(tmp_path / "p"), **kinds)
    assert storage.names(str(tmp_path / "p")) == []
    old = shards.pack(source, str(tmp_path / "p"), **kinds)
    before = contents(tmp_path / "p")
    with pytest.raises(type(error)):
        shards.pack(Broken(array_source(tmp_path, seed=9), error), str(tmp_path / "p"), **kinds)
    assert contents(tmp_path / "p") == before
    manifests.verify(old)


@pytest.mark.parametrize("name", ["test-000000.tar", "manifest.json"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, name):
    real = storage.os.replace

    def full(source, target):
        if str(target).endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(storage.os, "replace", full)
    with pytest.raises(UserError, match="disk is full"):
        shards.pack(array_source(tmp_path), str(tmp_path / "p"))
    assert storage.names(str(tmp_path / "p")) == []


def test_the_next_pack_clears_up_after_a_killed_one(tmp_path):
    source = array_source(tmp_path)
    old = shards.pack(source, str(tmp_path / "p"))
    kept = old.splits["train"].shards[0].file
    left = ["train-1-000000.tar", "train-1-000001.tar.partial-77"]
    for name in left:
        (tmp_path / "p" / name).write_text("half")
    listed = ["train-1-000000.tar", "train-1-000001.tar", kept]
    (tmp_path / "p" / "packing.json").write_text(json.dumps(listed))
    new = shards.pack(source, str(tmp_path / "p"))
    manifests.verify(new)
    files = {shard.file for record in new.splits.values() for shard in record.shards}
    assert set(storage.names(str(tmp_path / "p"))) == files | {"manifest.json"}


def test_large_images_are_members_of_their_own(tmp_path):
    source = array_source(tmp_path, n=5, shape=(200, 200, 3), dtype=np.uint8)
    manifest = shards.pack(source, str(tmp_path / "p"), rows_per_block=1000)
    with tarfile.open(manifest.shard_url(manifest.splits["train"].shards[0])) as tar:
        assert tar.getnames()[:3] == ["00000000.cls", "00000000.png", "00000001.cls"]
    got = everything(manifests.load_manifest(str(tmp_path / "p")))
    with np.load(tmp_path / "x.npz") as stored:
        np.testing.assert_array_equal(got["x"], stored["x"][got["label"]])


def test_one_shard_from_uneven_blocks(tmp_path):
    blocks = [{"x": np.full((n, 2), n, np.float32), "index": np.arange(n)} for n in (1, 5, 0, 12, 3)]
    record = shards.write_shard(str(tmp_path / "a.tar"), blocks, rows_per_block=4)
    assert [rows for rows, _ in record.members] == [4, 4, 4, 4, 4, 1]
    splits = {"train": manifests.SplitRecord(samples=21, shards=[record])}
    manifest = manifests.Manifest(
        name="m", shape=(2,), dtype="float32", source=manifests.Origin(spec="none"), splits=splits
    )
    manifest = manifests.save_manifest(manifest, str(tmp_path))
    manifests.verify(manifest)
    assert not manifest.has_labels
    got = np.concatenate([block["x"] for block in stream.read_blocks(manifest, "train")])
    np.testing.assert_array_equal(got, np.concatenate([block["x"] for block in blocks]))
    with pytest.raises(UserError, match="no samples"):
        shards.write_shard(str(tmp_path / "b.tar"), [])
    assert not (tmp_path / "b.tar").exists()


def test_faulty_manifests_are_refused(tmp_path):
    shards.pack(array_source(tmp_path), str(tmp_path / "p"))
    path = tmp_path / "p" / "manifest.json"
    good = json.loads(path.read_text())

    def refused(pattern, **changes):
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises(UserError, match=pattern) as caught:
            manifests.load_manifest(str(tmp_path / "p"))
        assert "\n" not in str(caught.value)

    refused("format 2 is unknown", format=2)
    refused("extra", extra=1)
    refused("levels", levels=256)
    refused("class", **{"class\names": 1})
    mixed = json.loads(json.dumps(good["splits"]))
    del mixed["train"]["shards"][0]["members"][0][1]["label.npy"]
    refused("some have none", splits=mixed)
    outside = json.loads(json.dumps(good["splits"]))
    outside["train"]["shards"][0]["file"] = "../x.tar"
    refused("outside of the folder", splits=outside)
    wrong = json.loads(json.dumps(good["splits"]))
    wrong["train"]["samples"] += 1
    refused("do not add up", splits=wrong)
    endless = json.loads(json.dumps(good["splits"]))
    shard = endless["train"]["shards"][0]
    shard["members"][0][0] = 10**18
    endless["train"]["samples"] = shard["samples"] = sum(rows for rows, _ in shard["members"])
    refused("more rows than bytes", splits=endless)
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match="no JSON"):
            manifests.load_manifest(str(tmp_path / "p"))
    path.unlink()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        manifests.load_manifest(str(tmp_path / "p"))


def test_verify_names_the_shard(tmp_path):
    manifest = shards.pack(array_source(tmp_path), str(tmp_path / "p"))
    path = tmp_path / "p" / manifest.splits["test"].shards[0].file
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"test-000000\.tar.*pack again"):
        manifests.verify(manifest)


def members(manifest, split="train"):
    return [rows for shard in manifest.splits[split].shards for rows, _ in shard.members]


def test_many_vectors_are_packed_in_large_members(tmp_path):
    """A 64th of the split, up to 16,384 rows and 4 MiB; never smaller than the members of images."""
    for n, width, rows in ((5000, 3, 1000), (192_000, 3, 3000), (1_200_000, 1, 16_384), (6000, 2000, 131)):
        np.save(tmp_path / "x.npy", np.zeros((n, width), np.float32))
        source = open_source(f"array:{tmp_path / 'x.npy'}", SourceOptions(test_fraction=0, shuffle=False))
        manifest = shards.pack(source, str(tmp_path / "p"))
        assert set(members(manifest)[:-1]) == {rows}
        assert sum(members(manifest)) == n
        assert len(members(manifest)) >= min(64, n // 1000) or width == 2000
        manifests.verify(manifest)
    manifest = shards.pack(source, str(tmp_path / "p"), rows_per_block=400)
    assert members(manifest)[0] == 400
    manifest = shards.pack(source, str(tmp_path / "p"), rows_per_block=100_000)
    assert members(manifest)[0] == (4 << 20) // 8000
    routed = shards.write_shard(str(tmp_path / "a.tar"), source.blocks("train", 700), n_samples=6000)
    assert routed.members[0][0] == 131


def test_images_are_packed_as_ever(tmp_path):
    """Bytes of packs that exist: a changed fingerprint would make jobs start anew."""
    x = (np.arange(3000 * 20 * 20 * 3) % 251).astype(np.uint8).reshape(3000, 20, 20, 3)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(3000) % 7)
    manifest = shards.pack(open_source(f"array:{tmp_path / 'x.npz'}"), str(tmp_path / "p"))
    assert members(manifest) == [873, 873, 654]
    assert manifest.fingerprint.startswith("a27e01e867b403bb")


def test_what_is_read_may_be_written_to(tmp_path):
    manifest = shards.pack(array_source(tmp_path), str(tmp_path / "p"))
    first, second = (next(stream.read_blocks(manifest, "train")) for _ in range(2))
    for name in ("x", "label"):
        first[name][:] = 0
        assert first[name].flags.aligned
        assert second[name].any()


def test_memory_of_packing_does_not_grow_with_the_file(tmp_path):
    """Beyond the row numbers (8 bytes a sample, at most three times at once) nothing grows with the file."""
    peaks = []
    for n in (20_000, 200_000):
        np.save(tmp_path / "x.npy", np.ones((n, 128), np.float32))
        tracemalloc.start()
        source = open_source(f"array:{tmp_path / 'x.npy'}", SourceOptions())
        shards.pack(source, str(tmp_path / "p"), rows_per_block=1000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 3 * 8 * 180_000 + (1 << 20)
