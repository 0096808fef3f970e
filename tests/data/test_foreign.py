import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.errors import UserError
from data.foreign import MAX_MEMBER_BYTES, expand_urls, read_webdataset


def png(value, shape=(4, 5, 3)):
    stream = io.BytesIO()
    Image.fromarray(np.full(shape, value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def npy(array, **kinds):
    stream = io.BytesIO()
    np.save(stream, array, **kinds)
    return stream.getvalue()


def write(path, files):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard(path, first=0, n=8):
    files = []
    for i in range(first, first + n):
        files += [(f"{i:04d}.cls", str(i).encode()), (f"{i:04d}.png", png(i)), (f"{i:04d}.txt", b"a caption")]
    return write(path, files)


def read(*urls, **share):
    return list(read_webdataset([str(url) for url in urls], **share))


def test_images_and_labels(tmp_path):
    for i in range(3):
        shard(tmp_path / f"s-{i:03d}.tar", first=8 * i)
    found = read(tmp_path / "s-{000..002}.tar")
    assert [sample["label"] for sample in found] == list(range(24))
    assert all((sample["x"] == sample["label"]).all() and sample["x"].shape == (4, 5, 3) for sample in found)
    parts = [read(tmp_path / "s-{000,001,002}.tar", rank=rank, world_size=2) for rank in range(2)]
    assert [len(part) for part in parts] == [16, 8]
    assert len(read(tmp_path / "s-000.tar", rank=1, world_size=2)) == 0


def test_arrays_and_json(tmp_path):
    files = [("a.json", json.dumps({"label": 5}).encode()), ("a.npy", npy(np.arange(6.0))), ("b.jpg", png(9, (4, 4)))]
    found = read(write(tmp_path / "s.tar", files))
    assert found[0]["label"] == 5
    np.testing.assert_array_equal(found[0]["x"], np.arange(6.0))
    assert found[1]["x"].shape == (4, 4, 1)
    assert "label" not in found[1]


def test_braces():
    assert expand_urls(["/d/{08..11}.tar"]) == [f"/d/{i:02d}.tar" for i in range(8, 12)]
    assert expand_urls(["s3://b/{a,b}-{1..2}.tar"]) == [f"s3://b/{c}-{i}.tar" for c in "ab" for i in (1, 2)]
    many = ("/d/{0..999}{0..9999}.tar", "/d/" + "{a,b}" * 500, f"/d/{{0..{'9' * 5000}}}.tar")
    for wrong in ("/d/{5..1}.tar", "/d/{x}.tar", "/d/{0..99999999}.tar", *many):
        with pytest.raises(UserError):
            expand_urls([wrong])
    with pytest.raises(UserError, match="no shards"):
        expand_urls([])


@pytest.mark.parametrize("url", ["pipe:touch {mark}", "{{pipe:touch {mark},x}}", "{{p,q}}ipe:touch {mark}", "a::b"])
def test_no_url_starts_a_program(tmp_path, url):
    mark = tmp_path / "mark"
    with pytest.raises(UserError):
        read(shard(tmp_path / "s.tar"), url.format(mark=mark))
    assert not mark.exists()


def test_every_cut_is_noticed(tmp_path):
    whole = shard(tmp_path / "s.tar", n=3).read_bytes()
    end = whole.rstrip(b"\0")
    assert len(read(tmp_path / "s.tar")) == 3
    # At every boundary of 512 bytes and inside of headers, payloads and padding.
    for at in {*range(0, len(end) + 1, 512), *range(100, len(end), 1100)}:
        (tmp_path / "s.tar").write_bytes(whole[:at])
        with pytest.raises(UserError, match=r"s\.tar"):
            read(tmp_path / "s.tar")


@pytest.mark.parametrize("fault", ["zero", "flip", "garbage"])
def test_a_damaged_header_in_the_middle_is_noticed(tmp_path, fault):
    path = shard(tmp_path / "s.tar")
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[10].offset
    data = bytearray(path.read_bytes())
    if fault == "flip":
        data[offset + 3] ^= 1
    else:
        data[offset : offset + 512] = b"\0" * 512 if fault == "zero" else b"x" * 512
    path.write_bytes(data)
    with pytest.raises(UserError, match="fetch it again"):
        read(path)


def special(path, **fields):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        for name, value in fields.items():
            setattr(info, name, value)
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("b.cls"))
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "b.cls"},
        {"type": tarfile.GNUTYPE_SPARSE, "size": 0},
        {"type": tarfile.FIFOTYPE},
        {"size": MAX_MEMBER_BYTES + 1},
        {"size": 1 << 40},
    ],
)
def test_special_and_huge_members_are_refused(tmp_path, fields):
    with pytest.raises(UserError, match=r"s\.tar"):
        read(special(tmp_path / "s.tar", **fields))


def test_pax_sparse_members_are_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.npy")
        info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0",
                            "GNU.sparse.size": str(1 << 31)}  # fmt: skip
        tar.addfile(info)
    with pytest.raises(UserError, match="refused"):
        read(tmp_path / "s.tar")


def test_compressed_tars_are_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.cls"))
    with pytest.raises(UserError, match=r"s\.tar"):
        read(tmp_path / "s.tar")


@pytest.mark.parametrize(
    "files",
    [
        [("a.pkl", b"cos\nsystem\n(S'true'\ntR."), ("a.cls", b"1")],
        [("a.npy", npy(np.array([{}]), allow_pickle=True))],
        [("a.npy", npy(np.zeros(4))[:-3])],
        [("a.npy", npy(np.zeros(4)).replace(b"(4,)", b"(9999999999999,)"))],
        [("a.png", b"no image")],
        [("a.png", png(1)), ("a.cls", b"cat")],
        [("a.png", png(1)), ("a.json", b"{")],
        [("a.png", png(1)), ("a.cls", b"9" * 30)],
        [("a.png", png(1)), ("a.json", b'{"label": 99999999999999999999}')],
        [("a.npy", npy(np.ones(3) * 1j))],
        [("a.npy", npy(np.array(["a", "b"])))],
        [("a.npy", npy(np.zeros(3, "V8")))],
        [("a.npy", npy(np.zeros(3, [("a", "f4"), ("b", "f4")])))],
        [("a.png", png(1)), ("a.png", png(2))],
        [("a.png", png(1)), ("a.__bad__", b"1")],
    ],
)
def test_samples_that_cannot_be_decoded_are_refused(tmp_path, files):
    with pytest.raises(UserError, match=r"s\.tar"):
        read(write(tmp_path / "s.tar", files))
