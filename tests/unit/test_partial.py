"""What is being written has a name of its own; what killed writers left is told by that name."""

import os
import re
import subprocess
import sys
from pathlib import Path

from features.storage.files import (
    SECONDS_UNTIL_OLD,
    partial_path,
    remove_leftovers,
    replacing_folder,
)


def left_by_a_dead_process(path: Path) -> Path:
    """Make a partial file in a process that has ended."""
    code = (
        "import sys; from pathlib import Path; from features.storage.files import partial_path\n"
        "partial = partial_path(Path(sys.argv[1])); partial.write_text('half'); print(partial)"
    )
    command = [sys.executable, "-c", code, str(path)]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def of_another_machine(partial: Path) -> Path:
    """Rename a partial file as if another machine had made it."""
    name = re.sub(r"[0-9a-f]{12}-(?=\d+-)", "0" * 12 + "-", partial.name)
    return partial.rename(partial.with_name(name))


def test_a_folder_appears_whole_also_where_there_is_none_above_it(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with replacing_folder(tmp_path / "export" / "hf") as folder:
            (folder / "card").write_text(text)
        assert (tmp_path / "export" / "hf" / "card").read_text() == text
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["hf"]


def test_no_two_names_are_the_same(tmp_path: Path) -> None:
    names = {partial_path(tmp_path / "0") for _ in range(100)}
    assert len(names) == 100


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    left = left_by_a_dead_process(tmp_path / "0")
    assert left.exists()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    mine = partial_path(tmp_path / "0")
    mine.write_text("half")
    os.utime(mine, (0, 0))
    remove_leftovers(tmp_path)
    assert mine.exists()


def test_what_another_machine_writes_is_removed_only_when_it_is_a_day_old(tmp_path: Path) -> None:
    other = of_another_machine(left_by_a_dead_process(tmp_path / "0"))
    remove_leftovers(tmp_path)
    assert other.exists()
    then = other.stat().st_mtime - SECONDS_UNTIL_OLD - 60
    os.utime(other, (then, then))
    remove_leftovers(tmp_path)
    assert not other.exists()


def test_files_of_other_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".0.partial").write_text("someone else's")
    remove_leftovers(tmp_path)
    assert (tmp_path / ".0.partial").exists()
