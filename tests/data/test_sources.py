import gzip
import os
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from data.errors import UserError
from data.sources import SourceOptions, open_source


def gather(source, split, rows=100):
    blocks = list(source.blocks(split, rows))
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def image(path, shape=(6, 8, 3), value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    pixels = rng.integers(0, 256, shape, dtype=np.uint8) if value is None else np.full(shape, value, np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_digits():
    source = open_source("digits")
    assert (source.shape, source.dtype, source.levels) == ((8, 8, 1), "uint8", 17)
    assert sum(source.splits.values()) == 1797
    train, test = gather(source, "train"), gather(source, "test")
    assert train["x"].max() == 16
    assert len(train["label"]) == source.splits["train"]
    again = gather(open_source("digits"), "train", rows=7)
    np.testing.assert_array_equal(train["x"], again["x"])
    other = gather(open_source("digits", SourceOptions(seed=1)), "test")
    assert not np.array_equal(test["x"], other["x"])


@pytest.mark.parametrize("spec", ["digit", "mnist:", "images", "tar:x", ""])
def test_unknown_specs_list_the_known_ones(spec):
    with pytest.raises(UserError, match="digits, mnist:FOLDER"):
        open_source(spec)


def write_idx(path, array, magic=None):
    data = struct.pack(f">I{array.ndim}I", magic or 0x800 + array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize(("dot", "end"), [("-", ""), (".", ""), ("-", ".gz")])
def test_mnist_files_of_either_name(tmp_path, dot, end):
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 30), ("t10k", 10)):
        write_idx(tmp_path / f"{prefix}-images{dot}idx3-ubyte{end}", rng.integers(0, 256, (n, 5, 4), dtype=np.uint8))
        write_idx(tmp_path / f"{prefix}-labels{dot}idx1-ubyte{end}", np.arange(n, dtype=np.uint8) % 10)
    source = open_source(f"mnist:{tmp_path}", SourceOptions(max_samples=20, shuffle=False))
    assert source.splits == {"train": 20, "test": 10}
    assert source.shape == (5, 4, 1)
    np.testing.assert_array_equal(gather(source, "test")["label"], np.arange(10))
    bad = tmp_path / f"train-images{dot}idx3-ubyte{end}"
    write_idx(bad, np.zeros((30, 5, 4), np.uint8), magic=0x801)
    with pytest.raises(UserError, match="not an IDX file"):
        open_source(f"mnist:{tmp_path}")
    write_idx(bad, np.zeros((30, 5, 4), np.uint8))
    bad.write_bytes(bad.read_bytes()[:-20])
    with pytest.raises(UserError, match="fetch it again"):
        open_source(f"mnist:{tmp_path}")
    write_idx(bad, np.zeros((30, 0, 4), np.uint8))
    with pytest.raises(UserError, match="fetch the files again"):
        open_source(f"mnist:{tmp_path}")
    write_idx(bad, np.zeros((30, 4, 5), np.uint8))
    with pytest.raises(UserError, match="different sizes"):
        open_source(f"mnist:{tmp_path}")
    bad.unlink()
    with pytest.raises(UserError, match="no file"):
        open_source(f"mnist:{tmp_path}")


def test_real_mnist(mnist_folder):
    source = open_source(f"mnist:{mnist_folder}")
    assert source.splits == {"train": 60000, "test": 10000}
    assert gather(source, "test", 1000)["label"][:5].tolist() == [7, 2, 1, 0, 4]


def test_a_tree_of_images(tmp_path):
    pixels = {name: image(tmp_path / f"{name}.png") for name in ("cat/a", "cat/b", "dog/c")}
    image(tmp_path / "dog" / "D.JPEG")
    (tmp_path / "dog" / "._c.png").write_bytes(b"left by a desktop")
    source = open_source(f"images:{tmp_path}", SourceOptions(test_fraction=0, shuffle=False))
    assert source.class_names == ("cat", "dog")
    assert source.shape == (6, 8, 3)
    got = gather(source, "train", 2)
    # Sorted paths: capital letters first.
    assert got["label"].tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(got["x"][3], pixels["dog/c"])


def test_images_in_split_folders_cropped_and_resized(tmp_path):
    for split, n in (("train", 5), ("test", 2), ("validation", 1)):
        for i in range(n):
            image(tmp_path / split / f"{i}.png", shape=(10 + i, 20, 3), value=40)
    options = SourceOptions(size=4, crop=(2, 0, 12, 9), grey=True)
    source = open_source(f"images:{tmp_path}", options)
    assert source.splits == {"train": 5, "test": 2, "validation": 1}
    assert source.class_names is None
    got = gather(source, "train")
    assert got["x"].shape == (5, 4, 4, 1)
    assert (got["x"] == 40).all()
    assert source.options == {"size": 4, "crop": [2, 0, 12, 9], "grey": True}


def test_grey_images_have_one_channel_unless_mixed(tmp_path):
    image(tmp_path / "a.png", shape=(4, 4))
    assert open_source(f"images:{tmp_path}").shape == (4, 4, 1)
    image(tmp_path / "b.png", shape=(4, 4, 3))
    source = open_source(f"images:{tmp_path}")
    assert source.shape == (4, 4, 3)
    assert gather(source, "train")["x"].shape[1:] == (4, 4, 3)


def test_faulty_images_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_source(f"images:{tmp_path / 'missing'}")
    with pytest.raises(UserError, match="no PNG or JPEG"):
        open_source(f"images:{tmp_path}")
    image(tmp_path / "a.png")
    image(tmp_path / "b.png", shape=(9, 9, 3))
    with pytest.raises(UserError, match=r"b\.png.*set size"):
        open_source(f"images:{tmp_path}")
    with pytest.raises(UserError, match=r"a\.png.*crop"):
        open_source(f"images:{tmp_path}", SourceOptions(crop=(0, 0, 9, 9)))
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"b\.png"):
        open_source(f"images:{tmp_path}")
    image(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:-60])
    source = open_source(f"images:{tmp_path}", SourceOptions(test_fraction=0))
    with pytest.raises(UserError, match=r"b\.png"):
        gather(source, "train")
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png: not a file"):
        open_source(f"images:{tmp_path}")
    (tmp_path / "b.png").unlink()
    Image.fromarray(np.zeros((10_000, 10_000), np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png.*bomb"):
        open_source(f"images:{tmp_path}")
    Image.fromarray(np.zeros((6, 8), np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="8 bits"):
        open_source(f"images:{tmp_path}")
    (tmp_path / "b.png").rename(tmp_path / "cl\udcff.png")
    with pytest.raises(UserError, match="not UTF-8"):
        open_source(f"images:{tmp_path}")
    with pytest.raises(UserError, match="not UTF-8"):
        open_source("images:\udcff")


def test_arrays(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 3))
    np.save(tmp_path / "x.npy", x)
    source = open_source(f"array:{tmp_path / 'x.npy'}", SourceOptions(test_fraction=0.3, shuffle=False))
    assert (source.shape, source.dtype, source.levels) == ((3,), "float32", None)
    assert source.splits == {"train": 35, "test": 15}
    both = np.concatenate([gather(source, split)["x"] for split in source.splits])
    np.testing.assert_array_equal(np.sort(both[:, 0]), np.sort(x[:, 0].astype(np.float32)))
    np.savez(tmp_path / "p.npz", images=(x * 10).astype(np.uint8), labels=np.arange(50))
    source = open_source(f"array:{tmp_path / 'p.npz'}")
    assert source.levels == 256
    got = gather(source, "train")
    np.testing.assert_array_equal(got["x"], (x * 10).astype(np.uint8)[got["label"]])


def test_faulty_arrays_are_refused(tmp_path):
    path = tmp_path / "x.npy"

    def refused(pattern, array, **kinds):
        np.save(path, array, **kinds)
        with pytest.raises(UserError, match=pattern):
            gather(open_source(f"array:{path}"), "train", 1000)

    x = np.ones((40, 3))
    x[[31, 12], 2] = np.nan
    refused("row 12 ", x)
    refused("row 3 ", np.where(np.arange(10)[:, None] == 3, 1e300, np.ones((10, 2))))
    refused("row 3 .* rescale", np.where(np.arange(10)[:, None] == 3, -1e30, np.ones((10, 2))))
    refused("Python objects", np.array([{}, {}]), allow_pickle=True)
    refused("int64", np.ones((4, 2), np.int64))
    refused("no samples", np.ones(4))
    refused("no samples", np.ones((0, 4)))
    np.save(path, np.ones((100, 3)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        open_source(f"array:{path}")
    np.savez(tmp_path / "y.npz", x=np.ones((4, 2)), y=np.arange(3))
    with pytest.raises(UserError, match="labels"):
        open_source(f"array:{tmp_path / 'y.npz'}")
    np.savez(tmp_path / "y.npz", a=np.ones((4, 2)), b=np.ones((4, 2)))
    with pytest.raises(UserError, match="holds a, b"):
        open_source(f"array:{tmp_path / 'y.npz'}")
    with pytest.raises(UserError, match="check the path"):
        open_source(f"array:{tmp_path / 'missing.npy'}")
    np.savez(tmp_path / "y.npz", x=np.ones((4, 2)), y=np.full(4, 2**64 - 1, np.uint64))
    with pytest.raises(UserError, match="int64"):
        open_source(f"array:{tmp_path / 'y.npz'}")


def announcing(shape):
    """A .npy file of 40 bytes that announces another shape."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + b"\0" * 40


@pytest.mark.parametrize("shape", ["(4000000000000, 4)", f"({10**30}, 4)", "(-5, 4)", "(" * 4000, "(1," * 99])
def test_arrays_that_lie_are_refused(tmp_path, shape):
    (tmp_path / "x.npy").write_bytes(announcing(shape))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", announcing(shape))
    for name in ("x.npy", "x.npz"):
        with pytest.raises(UserError, match="x.npy|x.npz") as caught:
            open_source(f"array:{tmp_path / name}")
        assert "\n" not in str(caught.value)


def test_files_under_another_s_name_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((4, 2)))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("x.npy", "hello")
    np.save(tmp_path / "b.npy", np.ones((4, 2)))
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    os.mkfifo(tmp_path / "pipe.npy")
    for name in ("a.npy", "text.npz", "b.npz", "pipe.npy"):
        with pytest.raises(UserError, match=name):
            open_source(f"array:{tmp_path / name}")


def test_svhn_reads_matlab_files(tmp_path):
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    x = {split: rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for split, n in (("train", 12), ("test", 5))}
    for split, images in x.items():
        labels = np.arange(1, len(images) + 1)[:, None] % 11
        savemat(tmp_path / f"{split}_32x32.mat", {"X": np.moveaxis(images, 0, 3), "y": labels})
    source = open_source(f"svhn:{tmp_path}", SourceOptions(shuffle=False))
    block = next(source.blocks("train", 100))
    assert np.array_equal(block["x"], x["train"])
    assert block["label"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 1]
    (tmp_path / "test_32x32.mat").write_bytes(b"nothing")
    with pytest.raises(UserError, match="test_32x32.mat"):
        open_source(f"svhn:{tmp_path}", SourceOptions())
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(UserError, match="no file test_32x32.mat"):
        open_source(f"svhn:{tmp_path}", SourceOptions())


def kept_rows(source, split="train"):
    block = gather(source, split)
    return {(int(label), int(row[0])) for label, row in zip(block["label"], block["x"])}


@pytest.fixture
def labelled(tmp_path):
    """1000 samples of four classes; the first feature is the sample's number."""
    x = np.stack([np.arange(1000), np.zeros(1000)], axis=1).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x, y=10 * (np.arange(1000) % 4))
    return f"array:{tmp_path / 'x.npz'}"


@pytest.mark.parametrize("options", [{}, {"max_samples": 300}, {"test_fraction": 0}, {"shuffle": False}])
def test_class_ratios_thin_the_training_split(labelled, options):
    def opened(ratios, seed=3):
        return open_source(labelled, SourceOptions(seed=seed, class_ratios=ratios, **options))

    whole, half, tenth = opened(None), opened({"20": 0.5}), opened({20: 0.1})
    rows = {name: kept_rows(source) for name, source in (("whole", whole), ("half", half), ("tenth", tenth))}
    of_class = {name: {row for row in found if row[0] == 20} for name, found in rows.items()}
    assert rows["whole"] - of_class["whole"] == rows["half"] - of_class["half"] == rows["tenth"] - of_class["tenth"]
    assert of_class["tenth"] < of_class["half"] < of_class["whole"]
    assert len(of_class["half"]) == round(0.5 * len(of_class["whole"]))
    assert len(of_class["tenth"]) == round(0.1 * len(of_class["whole"]))
    if options.get("test_fraction") != 0:
        assert kept_rows(whole, "test") == kept_rows(tenth, "test")
    assert rows["half"] == kept_rows(opened({"20": 0.5}))
    assert rows["half"] != kept_rows(opened({"20": 0.5}, seed=4))
    assert opened({20: 0.1, "0": 0}).options["class_ratios"] == {"20": 0.1, "0": 0.0}


def test_class_ratios_by_name(tmp_path):
    for name, n in (("cat", 6), ("dog", 6), ("1", 6)):
        for i in range(n):
            image(tmp_path / name / f"{i}.png", value=i)
    source = open_source(f"images:{tmp_path}", SourceOptions(test_fraction=0, class_ratios={"dog": 0, 1: 0.5}))
    # A name is looked for first: the folder "1" is label 0, and label 1 is the cats.
    assert np.bincount(gather(source, "train")["label"], minlength=3).tolist() == [3, 6, 0]
    by_number = open_source(f"images:{tmp_path}", SourceOptions(test_fraction=0, class_ratios={"2": 0}))
    assert np.bincount(gather(by_number, "train")["label"], minlength=3).tolist() == [6, 6, 0]
    with pytest.raises(UserError, match="'dog' twice|'2' twice"):
        open_source(f"images:{tmp_path}", SourceOptions(class_ratios={"dog": 0.5, "2": 0.5}))
    with pytest.raises(UserError, match="'cow', which is unknown: choose of 1, cat, dog"):
        open_source(f"images:{tmp_path}", SourceOptions(class_ratios={"cow": 0.5}))


def test_class_ratios_that_cannot_be_are_refused(labelled, tmp_path):
    with pytest.raises(UserError, match="'7', which is unknown: choose of 0, 10, 20, 30"):
        open_source(labelled, SourceOptions(class_ratios={"7": 0.5}))
    with pytest.raises(UserError, match="no training sample"):
        open_source(labelled, SourceOptions(class_ratios={str(label): 0 for label in (0, 10, 20, 30)}))
    np.save(tmp_path / "x.npy", np.ones((20, 3)))
    with pytest.raises(UserError, match="no labels"):
        open_source(f"array:{tmp_path / 'x.npy'}", SourceOptions(class_ratios={"0": 0.5}))
    for ratios in ({"0": 1.5}, {"0": -0.1}, {"0": float("nan")}, {"0": "much"}, {0: 0.5, "0": 0.25}):
        with pytest.raises(ValidationError, match="class_ratios"):
            SourceOptions(class_ratios=ratios)
