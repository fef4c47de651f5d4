"""What holds for an index and the images behind it, whatever the samples."""

import io
import json
import tarfile
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from features.index import SampleReader, build_index
from features.sources.tar import TarFault, TarFile
from features.sources.webdataset import WebdatasetSource
from features.status import Status

names = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=40)
captions = st.text(st.characters(codec="utf-8"), max_size=20)
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def tar_bytes(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@settings(deadline=None, max_examples=50)
@given(
    members=st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=6),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_of_tarfile(members: list[tuple[str, bytes]], form: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(tar_bytes(members, form))
        with TarFile(path) as tar:
            found = [
                (member.name, tar.read(member.offset, member.size)) for member in tar.members()
            ]
    assert found == members


@settings(deadline=None, max_examples=50)
@given(
    samples=st.lists(st.tuples(st.sampled_from("abcd"), st.binary(max_size=900), captions)),
    form=FORMATS,
    data=st.data(),
)
def test_rows_in_are_rows_out_with_unique_keys_and_their_own_bytes(
    samples: list[tuple[str, bytes, str]], form: int, data: st.DataObject
) -> None:
    members: list[tuple[str, bytes]] = [("first.jpg", b"first")]
    for name, image, text in samples:
        members += [
            (f"{name}.jpg", image),
            (f"{name}.json", json.dumps({"caption": text}).encode()),
        ]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.tar").write_bytes(tar_bytes(members, form))
        source = WebdatasetSource(kind="webdataset", path=f"{folder}/*.tar")
        index = build_index(source.open(), Path(folder) / "index.parquet")
        start = data.draw(st.integers(0, index.rows))
        stop = data.draw(st.integers(start, index.rows))
        images = SampleReader(index).read(start, stop)
        table = index.rows_between(0, index.rows).to_pydict()
    assert index.rows == 1 + len(samples)
    assert len(set(table["key"])) == index.rows
    assert images == [b"first", *(image for _, image, _ in samples)][start:stop]
    if samples:
        assert table["caption/caption"] == ["", *(text for _, _, text in samples)]
    firsts = {name: row for row, (name, _, _) in reversed(list(enumerate(samples, 1)))}
    for row, (name, _, _) in enumerate(samples, 1):
        assert (table["problem"][row] == Status.DUPLICATE_KEY) == (row != firsts[name])


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_tar_cut_anywhere_has_whole_members_and_tells_of_its_end(
    data: st.DataObject,
) -> None:
    members = [("a.jpg", bytes(700)), ("x" * 120 + ".jpg", b"1"), ("b.json", b"{}")]
    content = tar_bytes(members)
    cut = data.draw(st.integers(0, len(content)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(content[:cut])
        try:
            with TarFile(path) as tar:
                found = list(tar.members())
        except TarFault:
            return
    names = [name for name, _ in members]
    assert [member.name for member in found] == names[: len(found)]
    assert len(found) == len(names) or not tar.has_end
    assert all(member.offset + member.size <= cut for member in found)


@settings(deadline=None, max_examples=100)
@given(place=st.integers(0, 4095), value=st.integers(0, 255), form=FORMATS)
def test_a_changed_byte_loses_no_member_in_silence(place: int, value: int, form: int) -> None:
    members = [("a.jpg", bytes(700)), ("b.json", b"{}"), ("c.jpg", b"1")]
    content = bytearray(tar_bytes(members, form))
    content[place] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(content)
        try:
            with TarFile(path) as tar:
                found = [member.name for member in tar.members()]
        except TarFault:
            return
    assert found == [name for name, _ in members]
