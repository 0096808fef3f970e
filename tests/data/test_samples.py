import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from data import shards
from data.errors import UserError
from data.samples import load_samples
from data.sources import SourceOptions, open_source


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
    found = [load_samples(str(tmp_path / place), split="train") for place in places]
    for samples in found:
        assert samples.x.dtype == np.float32
        assert samples.scale == "uint8 / 255"
        np.testing.assert_array_equal(samples.x, np.divide(pixels, np.float32(255), dtype=np.float32))
    assert len({samples.fingerprint for samples in found}) == 1
    for place in places:
        few = load_samples(str(tmp_path / place), split="train", max_samples=5, seed=1)
        again = load_samples(str(tmp_path / place), split="train", max_samples=5, seed=1)
        assert few.x.shape == (5, 6, 6, 3)
        assert few.fingerprint == again.fingerprint != found[0].fingerprint


def test_splits_labels_and_real_numbers(tmp_path):
    digits = load_samples("digits", split="test")
    assert digits.scale == "uint8 / 16"
    assert digits.x.max() == 1
    assert digits.labels.dtype == np.int64
    manifest = shards.pack(open_source("digits"), str(tmp_path / "digits"))
    packed = load_samples(str(tmp_path / "digits"), split="test")
    assert packed.fingerprint == digits.fingerprint
    np.testing.assert_array_equal(packed.labels, digits.labels)
    assert len(packed.x) == manifest.n_samples("test")
    np.save(tmp_path / "x.npy", np.full((4, 2), -3.5))
    real = load_samples(str(tmp_path / "x.npy"))
    assert real.scale == "float32 as stored"
    assert (real.x == -3.5).all()


def test_images_of_different_shapes(tmp_path, pixels):
    write_tar(tmp_path / "s.tar", [pixels[0], pixels[1][:, :4]])
    (tmp_path / "png").mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / "png" / "a.png")
    Image.fromarray(pixels[1][:, :4]).save(tmp_path / "png" / "b.png")
    for place in ("s.tar", "png"):
        with pytest.raises(UserError, match="set size"):
            load_samples(str(tmp_path / place))
        assert load_samples(str(tmp_path / place), size=3, grey=True).x.shape == (2, 3, 3, 1)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="nothing is there"):
        load_samples(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="no PNG or JPEG"):
        load_samples(str(tmp_path))
    with pytest.raises(UserError, match="no split 'validation'"):
        load_samples("digits", split="validation")
