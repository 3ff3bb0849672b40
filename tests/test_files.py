"""Writing: what is there is replaced whole or not at all, and what is no file is left alone."""

import os

import pytest

from nengram.files import sync_file, write_atomic


def test_a_pipe_or_device_is_refused_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/null"):
        with pytest.raises(OSError, match="is no regular file"):
            write_atomic(path, "text")
    assert not pipe.is_file() and not os.path.isfile("/dev/null")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_what_a_link_points_to_is_written_and_the_link_stays(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "file")
    for text in ("one", "two"):
        write_atomic(link, text)
        assert link.is_symlink() and (tmp_path / "there" / "file").read_text() == text


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_finished_file_can_be_read_by_whom_new_files_can(tmp_path):
    (tmp_path / "new").touch()
    (tmp_path / "own").touch(mode=0o600)
    sync_file(tmp_path / "own")
    assert (tmp_path / "own").stat().st_mode == (tmp_path / "new").stat().st_mode
