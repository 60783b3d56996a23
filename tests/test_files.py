"""Reading files that stay open."""

import os
from pathlib import Path

import pytest

from varedit_runtime.files import HeldFile


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no reads at a place")
def test_reading_does_not_use_the_position_that_forked_processes_share(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"A" * 1000 + b"B" * 1000)
    file = HeldFile(tmp_path / "file")
    descriptor = file._file.fileno()  # pyright: ignore[reportPrivateUsage]
    os.lseek(descriptor, 7, os.SEEK_SET)
    assert file.read(1000, 1000) == b"B" * 1000
    assert os.lseek(descriptor, 0, os.SEEK_CUR) == 7


@pytest.mark.parametrize("without", [False, True])
def test_systems_without_reads_at_a_place_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: bool
) -> None:
    if without:
        monkeypatch.delattr(os, "preadv", raising=False)
    (tmp_path / "file").write_bytes(bytes(range(200)))
    file = HeldFile(tmp_path / "file")
    assert file.read(50, 100) == bytes(range(100, 150))
    assert file.read(500, 150) == bytes(range(150, 200))
    assert file.read(9, 300) == b""
