import pytest

from data import storage
from data.errors import UserError


@pytest.mark.parametrize(
    "url",
    [
        *("pipe:touch /tmp/x", "PIPE:cat", "ssh://host/x", "simplecache::s3://b/k", "a::b", ""),
        *("a\0b", "\ud800", "a/" + "b" * 256),
    ],
)
def test_refuses_what_is_not_a_plain_place(url):
    with pytest.raises(UserError):
        storage.check_url(url)


def test_local_and_file_urls_become_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.check_url("a/b") == str(tmp_path / "a" / "b")
    assert storage.check_url(f"file://{tmp_path}/c") == str(tmp_path / "c")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "s3://b/x"])
def test_join_stays_in_the_folder(name):
    with pytest.raises(UserError):
        storage.join("/base", name)


def test_publish_is_whole_or_not_at_all(tmp_path):
    target = tmp_path / "sub" / "file"
    storage.write_text(str(target), "old")

    def die():
        with storage.publish(str(target)) as handle:
            handle.write(b"new")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        die()
    assert target.read_text() == "old"
    assert storage.names(str(target.parent)) == ["file"]


def test_a_store_that_can_only_be_read_is_told_in_one_line():
    with pytest.raises(UserError, match="can only be read"):
        storage.write_text("http://127.0.0.1:9/x", "text")


def test_a_full_disk_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="disk is full"), storage.publish(str(tmp_path / "file")):
        raise OSError(28, "No space left on device")
    assert storage.names(str(tmp_path)) == []


def test_ranges_and_names(tmp_path):
    storage.write_text(str(tmp_path / "b"), "0123456789")
    storage.write_text(str(tmp_path / "a"), "")
    assert storage.read_range(str(tmp_path / "b"), 3, 4) == b"3456"
    assert storage.names(str(tmp_path)) == ["a", "b"]
    assert storage.names(str(tmp_path / "missing")) == []
