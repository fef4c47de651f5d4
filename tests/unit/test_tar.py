"""The tar reader: the same members as `tarfile` sees, and no member of a damaged tar."""

import io
import tarfile
from pathlib import Path

import pytest

from features.sources.tar import BLOCK, Member, TarFault, TarFile


def members(path: Path) -> list[Member]:
    with TarFile(path) as tar:
        return list(tar.members())


def write(path: Path, names: list[str], form: int = tarfile.PAX_FORMAT, size: int = 700) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes([number % 256]) * size))
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_places_are_those_of_tarfile(tmp_path: Path, form: int) -> None:
    long_name = "/".join(["folder" * 5] * 4) + "/image.jpg"  # 130 letters: a prefix, or a header
    path = write(tmp_path / "a.tar", ["0001.jpg", "sub/0001.json", long_name], form)
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert [member[:3] for member in members(path)] == expected


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_may_be_of_any_length_and_language(tmp_path: Path, form: int) -> None:
    names = ["ein kätzchen.jpg", "猫/写真.png", "x" * 99 + ".jpg", "y" * 300 + ".jpg", "é" * 60]
    assert [member.name for member in members(write(tmp_path / "a.tar", names, form))] == names


def test_a_name_that_is_not_utf8_is_kept_apart_from_others(tmp_path: Path) -> None:
    with tarfile.open(
        tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as tar:
        tar.addfile(tarfile.TarInfo("\xe9.jpg"))
        tar.addfile(tarfile.TarInfo("\xe8.jpg"))
    assert [member.name for member in members(tmp_path / "a.tar")] == [r"\xe9.jpg", r"\xe8.jpg"]


def test_links_folders_and_pipes_are_no_plain_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("one.jpg")
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("two.jpg"))
    assert [member.regular for member in members(tmp_path / "a.tar")] == [False] * 4 + [True]


def test_a_size_above_eight_gigabytes_is_read_in_both_of_its_spellings(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("big.jpg")
        info.size = 9 << 30
        path = tmp_path / "a.tar"
        with path.open("wb") as file:  # sparse on disk: nine gigabytes that take no room
            file.write(info.tobuf(form))
            end = file.tell() + info.size
            file.truncate(end + 2 * BLOCK)
        (member,) = members(path)
        assert (member.size, member.offset) == (9 << 30, end - (9 << 30))


@pytest.mark.parametrize("zeros", [0, 100, BLOCK, 2 * BLOCK - 1])
def test_a_tar_without_its_end_mark_is_read_and_told(tmp_path: Path, zeros: int) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg"])
    path.write_bytes(path.read_bytes()[: BLOCK + 1024] + bytes(zeros))
    with TarFile(path) as tar:
        assert [member.name for member in tar.members()] == ["a.jpg"]
        assert tar.has_end == (zeros >= BLOCK)


def test_a_tar_whose_last_block_is_not_filled_up_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg"])
    path.write_bytes(path.read_bytes()[: BLOCK + 700])
    assert [member.size for member in members(path)] == [700]


@pytest.mark.parametrize("kept", [1, 100, 699, 1024 + 1, 1024 + BLOCK - 1])
def test_a_tar_cut_off_within_a_member_or_header_is_refused(tmp_path: Path, kept: int) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg", "b.jpg"])
    path.write_bytes(path.read_bytes()[: BLOCK + kept])
    with pytest.raises(TarFault) as caught:
        members(path)
    assert (caught.value.cut_off, caught.value.byte) == (True, BLOCK + kept)


def test_a_download_of_which_only_the_room_is_there_is_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg"])
    with path.open("r+b") as file:
        file.truncate(4 << 20)
    with pytest.raises(TarFault, match="only zeros follow") as caught:
        members(path)
    assert caught.value.cut_off


def test_a_damaged_header_is_an_error_and_no_silent_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg", "b.jpg", "c.jpg"], tarfile.USTAR_FORMAT)
    content = bytearray(path.read_bytes())
    content[3 * BLOCK] ^= 1  # the first letter of the second name
    path.write_bytes(content)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 1  # which is why we do not use it
    with pytest.raises(TarFault, match="the header there is damaged") as caught:
        members(path)
    assert caught.value.byte == 3 * BLOCK


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"\x1f\x8b" + bytes(600), "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd"),
        (b"<html>" * 200, "does not begin with the header of a tar"),
    ],
)
def test_what_is_no_tar_is_called_what_it_is(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(TarFault, match=reason):
        members(path)


def test_archives_behind_each_other_are_read_one_after_the_other(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg"])
    path.write_bytes(path.read_bytes() + write(tmp_path / "b.tar", ["b.jpg"]).read_bytes())
    assert [(each.name, each.archive) for each in members(path)] == [("a.jpg", 0), ("b.jpg", 1)]
    content = path.read_bytes()
    assert all(content[each.offset :][: each.size] for each in members(path))


def test_data_behind_the_end_of_the_archive_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", ["a.jpg"])
    path.write_bytes(path.read_bytes() + b"signature" * 100)
    with TarFile(path) as tar:
        assert len(list(tar.members())) == 1
        assert tar.has_trailing_data
