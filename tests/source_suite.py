"""What every kind of source must do: a kind inherits `SourceTests`, and says how it is made."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import TypeAdapter

from features.errors import SourceError
from features.index import Index, SampleReader, build_index, find_changes
from features.sources import SOURCES, Counts, Source, SourceReader, SourceSettings
from features.storage.place import Place
from tests import tiny

IMAGES = [tiny.encoded(tiny.picture(number)) for number in range(4)]
TORN = IMAGES[1][:200]


class SourceTests(ABC):
    """Tests of one kind of source, on four images."""

    kind: ClassVar[str]
    """What `kind` is in a run file."""

    @abstractmethod
    def make(self, folder: Path, images: Sequence[bytes]) -> dict[str, Any]:
        """Write a source that holds these images in their order, and return its settings."""

    def all_used(self, folder: Path) -> dict[str, Any]:  # noqa: ARG002
        """Change a source that `make` wrote so that every setting has something to say of it."""
        return {}

    def absent(self, folder: Path) -> dict[str, Any]:
        """Return settings that lead to what is called nowhere and is not there."""
        return {"path": folder / "nowhere"}

    def held(self, images: Sequence[bytes]) -> list[bytes | None]:
        """Return what is read of the images of a source that holds these."""
        return list(images)

    @pytest.fixture
    def settings(self, tmp_path: Path) -> dict[str, Any]:
        """Settings of a source with four images."""
        return {"kind": self.kind, **self.make(tmp_path / "source", IMAGES)}

    def opened(self, folder: Path, settings: dict[str, Any]) -> SourceReader[Any]:
        return parsed(settings).open(folder=folder / "drawn")

    def built(self, folder: Path, settings: dict[str, Any]) -> Index:
        return build_index(self.opened(folder, settings), folder / "index.parquet")

    def test_keys_are_unique_and_begin_with_the_name_of_their_file(
        self, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        reader = self.opened(tmp_path, settings)
        keys = []
        for file, name in reader.files.items():
            of_file = [sample.key for sample in reader.samples(file, Counts())]
            assert all(key.startswith(f"{name}/") for key in of_file)
            keys += of_file
        assert len(set(keys)) == len(keys) == len(IMAGES)

    def test_the_order_of_files_and_samples_is_the_same_each_time(
        self, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        first, second = (self.opened(tmp_path, settings) for _ in range(2))
        assert list(first.files.items()) == list(second.files.items())
        for file in first.files:
            listed = list(first.samples(file, Counts()))
            assert listed == list(first.samples(file, Counts()))
            assert listed == list(second.samples(file, Counts()))

    def test_known_files_come_first_and_keep_their_names(
        self, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        reader = self.opened(tmp_path, settings)
        *_, last = reader.files
        known: dict[Place, str] = {tmp_path / "gone": "gone", last: "known"}
        again = reader.source.open(known)
        assert next(iter(again.files.items())) == (last, "known")
        assert again.files.keys() == reader.files.keys()
        assert all(sample.key.startswith("known/") for sample in again.samples(last, Counts()))

    def test_images_are_read_back_to_the_byte_in_any_order(
        self, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        index = self.built(tmp_path, settings)
        reader, held = SampleReader(index), self.held(IMAGES)
        assert reader.read(0, index.rows) == held
        assert reader.read(1, 3) == held[1:3]
        assert reader.read(2, 2) == []
        assert [reader.read_row(row) for row in (2, 0, 3, 1)] == [held[i] for i in (2, 0, 3, 1)]

    def test_a_broken_image_keeps_its_row(self, tmp_path: Path) -> None:
        images = [IMAGES[0], TORN, IMAGES[2]]
        settings = {"kind": self.kind, **self.make(tmp_path / "source", images)}
        assert SampleReader(self.built(tmp_path, settings)).read(0, 3) == self.held(images)

    def test_only_the_first_rows_are_taken_if_asked_for(
        self, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        index = self.built(tmp_path, settings | {"rows": 2})
        assert SampleReader(index).read(0, index.rows) == self.held(IMAGES)[:2]

    def test_shares_have_each_sample_once(self, tmp_path: Path, settings: dict[str, Any]) -> None:
        if "share" in SOURCES[self.kind].unused:
            return
        shares = [(0, 0.3), (0.3, 0.6), (0.6, 1)]
        keys = list[str]()
        for share in shares:
            try:
                index = self.built(tmp_path, settings | {"share": share})
            except SourceError as error:
                assert "samples of another `share` (left out): 4" in str(error)  # noqa: PT017
                continue
            keys += [sample.key for sample in index.samples()]
        assert sorted(keys) == sorted(each.key for each in self.built(tmp_path, settings).samples())

    def test_an_index_is_current_until_the_source_changes(
        self, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        index = self.built(tmp_path, settings)
        reader = self.opened(tmp_path, settings)
        assert not find_changes(index, reader.source.open(index.names))
        assert TypeAdapter[Source](Source).validate_python(index.source) == reader.source

    def test_paths_are_relative_to_the_run_file(
        self, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        relative = {
            name: str(Path(value).relative_to(tmp_path)) if isinstance(value, Path) else value
            for name, value in settings.items()
        }
        assert parsed(relative, context={"folder": tmp_path}) == parsed(settings)

    def test_every_setting_is_read_or_refused(
        self, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A setting that nothing reads would be accepted without effect."""
        source = parsed(settings | self.all_used(tmp_path / "source"))
        read, get = set[str](), object.__getattribute__

        def record(self: object, name: str) -> Any:
            if self is source:
                read.add(name)
            return get(self, name)

        monkeypatch.setattr(SourceSettings, "__getattribute__", record, raising=False)
        reader = source.open(folder=tmp_path / "drawn")
        reader.class_names()
        for file in reader.files:
            list(reader.samples(file, Counts()))
        source.image_reader()
        monkeypatch.undo()
        by_index = {"kind", "rows", "share"}  # which kind it is, where listing ends, what is kept
        unread = type(source).model_fields.keys() - read - source.unused
        assert unread <= by_index, unread

    def test_a_path_that_is_not_there_is_refused(
        self, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        with pytest.raises(SourceError, match="nowhere"):
            self.opened(tmp_path, settings | self.absent(tmp_path))


def parsed(settings: dict[str, Any], context: dict[str, Any] | None = None) -> Source:
    """Read settings as those of a run file are."""
    given = {
        name: str(value) if isinstance(value, Path) else value for name, value in settings.items()
    }
    source: Source = TypeAdapter(Source).validate_python(given, context=context)
    return source


def kinds_without_suite() -> set[str]:
    """Return the kinds of sources of which no suite was imported."""
    with_samples = {kind for kind, settings in SOURCES.items() if settings.has_samples}
    return with_samples - {suite.kind for suite in SourceTests.__subclasses__()}
