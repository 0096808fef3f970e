import socket
import threading

import pytest

from data import storage
from data.errors import UserError


@pytest.mark.parametrize(
    "url",
    [
        *("pipe:touch /tmp/x", "PIPE:cat", "ssh://host/x", "simplecache::s3://b/k", "a::b", ""),
        *("a\0b", "\ud800", "a/" + "b" * 256, "http://[/x"),
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


def test_a_store_without_credentials_is_told_in_one_line(monkeypatch):
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    for asked in (storage.exists, storage.names, storage.read_bytes, storage.size):
        with pytest.raises(UserError, match="s3://bucket/x: Unable to locate credentials; check"):
            asked("s3://bucket/x")
    with pytest.raises(UserError, match="cannot write s3://bucket/x"):
        storage.write_text("s3://bucket/x", "text")


def test_a_connection_that_breaks_is_told_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up():
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=hang_up, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.npy"
        with pytest.raises(UserError, match="cannot read .*x.npy"):
            storage.read_bytes(url)
        server.shutdown(socket.SHUT_RDWR)


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
