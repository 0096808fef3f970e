"""Counting at scale: assignment against raw FAISS, memory and time per sample from 1 to 10 million embeddings, workers.

Embeddings are 64-dimensional float32 around 1,000 centres, in shards; K = 1,000 bins. One line each:

1. assignment of a block in memory against `faiss.IndexFlatL2.search` on the same block, alternating, best of five;
2. a pass over 1 and over 10 million embeddings in shards by one process of its own: time per sample and peak memory;
3. the same 4 million by one and by two Ray workers of one thread each.

Argument: a folder for the shards (default: a temporary one; 3 GB).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import ray

from cluster.counting import ray_pass
from data.manifest import Manifest, Origin, SplitRecord, load_manifest, save_manifest
from data.partitions import PackPartitions
from data.shards import write_shard
from eval.arrays import bins_of
from eval.bins import BinCounts, Bins, BinSettings
from eval.measure import View, local_pass
from eval.observed import Observed, sample_ids

D, K, PER_SHARD = 64, 1000, 250_000


def embeddings(n: int, seed: int) -> np.ndarray:
    centres = np.random.default_rng(0).standard_normal((K, D)).astype(np.float32)
    rng = np.random.default_rng([1, seed])
    return centres[rng.integers(0, K, n)] + 0.3 * rng.standard_normal((n, D), dtype=np.float32)


def shards(folder: Path, n: int) -> Manifest:
    if (folder / "manifest.json").exists():
        return load_manifest(str(folder))
    records = [
        write_shard(str(folder / f"test-{i:06d}.tar"), [{"x": embeddings(PER_SHARD, i)}], rows_per_block=16_384)
        for i in range(n // PER_SHARD)
    ]
    split = SplitRecord(samples=n, shards=records)
    facts = {"name": "embeddings", "shape": (D,), "dtype": "float32", "source": Origin(spec="made")}
    return save_manifest(Manifest(**facts, splits={"test": split}), str(folder))


def assignment(bins: Bins) -> None:
    x = embeddings(200_000, 999)
    index = faiss.IndexFlatL2(D)
    index.add(bins.centres)
    seen = Observed(x, x, sample_ids("a", len(x)), np.arange(len(x)))
    raw, ours = [], []
    for _ in range(5):
        began = time.perf_counter()
        index.search(x, 1)
        raw.append(time.perf_counter() - began)
        began = time.perf_counter()
        bins.assign(seen)
        ours.append(time.perf_counter() - began)
    rate = len(x) / min(ours) / 1e6
    print(f"assignment {rate:.2f} million/s, raw FAISS {len(x) / min(raw) / 1e6:.2f}: ratio {min(ours) / min(raw):.3f}")


def one_pass(shard_folder: str, bin_folder: str) -> None:
    """In a process of its own: prints samples, seconds, and peak memory in MiB."""
    bins, parts = Bins.load(bin_folder), PackPartitions(load_manifest(shard_folder), "test")
    began = time.perf_counter()
    counts = local_pass(parts)({"bins": BinCounts(bins)})["bins"].counts
    seconds = time.perf_counter() - began
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(counts.sum(), seconds, int(peak.split()[1]) / 1024)


def no_view() -> View:
    return View()


def by_workers(manifest: Manifest, bins: Bins, workers: int) -> tuple[float, np.ndarray]:
    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        parts = PackPartitions(manifest, "test")
        over = ray_pass(parts, no_view)
        over({"bins": BinCounts(bins)})  # workers are up, files are cached
        began = time.perf_counter()
        counts = over({"bins": BinCounts(bins)})["bins"].counts
        return time.perf_counter() - began, counts
    finally:
        ray.shutdown()


def main(place: Path) -> None:
    bins = bins_of(embeddings(100_000, 1000), BinSettings(n_bins=K, n_init=1), name="embeddings")
    bins.save(str(place / "bins"))
    assignment(bins)
    found = []
    for n in (1_000_000, 10_000_000):
        shards(place / str(n), n)
        command = [sys.executable, __file__, "--pass", str(place / str(n)), str(place / "bins")]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        seconds, peak = float(told[1]), float(told[2])
        found.append((seconds / n, peak))
        print(f"{n:>10,} embeddings: {seconds:.1f} s, {1e9 * seconds / n:.0f} ns each, peak {peak:.0f} MiB")
    time_ratio, peak_ratio = found[1][0] / found[0][0], found[1][1] / found[0][1]
    print(f"ten times the data: time per sample x{time_ratio:.3f}, peak memory x{peak_ratio:.3f}")
    manifest = shards(place / "4000000", 4_000_000)
    (one, counts), (two, again) = by_workers(manifest, bins, 1), by_workers(manifest, bins, 2)
    assert np.array_equal(counts, again)
    print(f"4 million by one worker {one:.1f} s, by two {two:.1f} s: {one / two:.2f} times as fast")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--pass"]:
        one_pass(*sys.argv[2:])
    elif len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
