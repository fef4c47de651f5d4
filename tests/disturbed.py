"""Commands that change files, in a small folder that is as it was before each time they run."""

import contextlib
import fnmatch
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from pathlib import Path

import torch
from click.testing import CliRunner

from align.heads import build_model
from pipeline.cli import cli
from pipeline.export.released import save_released
from tests import tiny
from tests.commands import sail
from tests.feature_stores import make_store
from tests.system_calls import Call, Ended, run_command

Tree = dict[str, bytes]
TIMES = ("align/metrics.jsonl", "align/tensorboard/*", "eval/report.html", "run/encoders.json")
"""What holds a time of day or a speed, and so differs between two undisturbed runs."""


def stores(folder: Path) -> None:
    make_store(folder / "s.zarr", rows=20)
    make_store(folder / "t.zarr", rows=20, seed=1)


def converted(form: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        stores(folder)
        sail("convert", folder / "s.zarr", "--to", form, "--out", folder / "in")

    return make


def world(folder: Path) -> None:
    text = tiny.world(folder, rows=16).read_text()
    settings = {"epochs = 3": "steps = 2\ncheckpoint_every = 1", "bootstrap = 50": "bootstrap = 5"}
    for before, after in settings.items():
        text = text.replace(before, after)
    (folder / "tiny.toml").write_text(text)


def extracted(folder: Path) -> None:
    world(folder)
    sail("extract", folder / "tiny.toml")


def with_more(folder: Path) -> None:
    extracted(folder)
    tiny.write_tar(folder / "shards" / "train-2.tar", tiny.samples(8, first=500))


def trained(folder: Path) -> None:
    extracted(folder)
    sail("align", folder / "tiny.toml")
    for number in range(3):
        (folder / "photos").mkdir(exist_ok=True)
        (folder / "photos" / f"{number}.png").write_bytes(tiny.encoded(tiny.picture(number), "PNG"))
    (folder / "texts").write_text("a red circle\na blue square\n")


def trained_star(folder: Path) -> None:
    world(folder)
    kind = "--set=align.head={ kind = 'star', dim = 6, expansion = 2 }"
    sail("extract", folder / "tiny.toml", kind)
    sail("align", folder / "tiny.toml", kind)


def released(folder: Path) -> None:
    extracted(folder)
    torch.manual_seed(0)
    settings = {"kind": "star", "dim": 6, "expansion": 2}
    model = build_model(settings, image_dim=16, text_dim=12)
    save_released(model, "star", folder / "head.pt", epoch=0)


@dataclass(frozen=True)
class Command:
    """A command, in a folder that is made for it."""

    make: Callable[[Path], None]
    words: str
    """Relative to the folder."""


COMMANDS = {
    "extract": Command(world, "extract tiny.toml"),
    "append": Command(with_more, "extract tiny.toml --append"),
    "align": Command(extracted, "align tiny.toml"),
    "eval": Command(trained, "eval tiny.toml"),
    "search": Command(trained, "search run circle --split test"),
    "merge": Command(stores, "merge s.zarr t.zarr --prefix --out out"),
    "subset": Command(stores, "subset s.zarr --random 12 --out out"),
    "rechunk": Command(stores, "rechunk s.zarr --rows-per-chunk 5 --out out"),
    "reorder": Command(stores, "reorder s.zarr --like s.zarr --out out"),
    "to int8": Command(stores, "convert s.zarr --dtype int8 --out out"),
    "to hdf5": Command(stores, "convert s.zarr --to hdf5 --out out"),
    "to parquet": Command(stores, "convert s.zarr --to parquet --out out"),
    "to clip-retrieval": Command(stores, "convert s.zarr --to clip-retrieval --out out"),
    "from hdf5": Command(converted("hdf5"), "import-store in --from hdf5 --out out"),
    "from parquet": Command(converted("parquet"), "import-store in --from parquet --out out"),
    "export hf": Command(trained, "export run --to hf --out out"),
    "export llava": Command(trained, "export run --to llava --with-encoders --out out"),
    "export onnx": Command(trained, "export run --to onnx --out out"),
    "export open_clip": Command(trained, "export run --to open_clip --out out"),
    "import-head": Command(released, "import-head head.pt tiny.toml"),
    "export-head": Command(trained_star, "export-head run out.pt"),
    "embed to npy": Command(trained, "embed run --images photos --out out.npy"),
    "embed to parquet": Command(trained, "embed run --texts texts --out out.parquet"),
    "embed to zarr": Command(trained, "embed run --images photos --out out.zarr"),
}


def visible(folder: Path, below: Path | None = None) -> Tree:
    """Return what is under names that are not hidden; of links, where they lead."""
    found: Tree = {}
    for path in sorted((below or folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if path.is_symlink():
            found[name] = os.fsencode(path.readlink())
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


@dataclass
class Work:
    """A command in a folder that is as it was before each time it runs."""

    command: Command
    folder: Path
    context: BaseContext
    calls: list[Call] = field(default_factory=list)
    """Of an undisturbed run."""
    known: dict[str, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    """What was under a name before an undisturbed run, and while it went on."""
    expected: Tree = field(default_factory=dict)
    """What is there after it."""

    def __post_init__(self) -> None:
        self._template = self.folder.with_name("template")
        self.folder.mkdir(parents=True)
        self.command.make(self.folder)
        self.folder.rename(self._template)
        self.restart()
        for name, content in visible(self.folder).items():
            self.known[name].add(content)
        ended = self.run(self._watch)
        assert ended.code == 0, ended.stderr
        self.expected = visible(self.folder)
        for name, content in self.expected.items():
            self.known[name].add(content)

    def restart(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._template, self.folder, symlinks=True)

    def run_here(self) -> Ended:
        """Run the command in this process."""
        with contextlib.chdir(self.folder):
            result = CliRunner().invoke(cli, self.command.words.split())
        error = result.exception
        told = "" if error is None or isinstance(error, SystemExit) else f"Traceback: {error!r}"
        return Ended(result.exit_code, result.stdout, result.stderr + told)

    def run(self, answer: Callable[[Call], int | None]) -> Ended:
        """Run it in a process of its own, which asks before its calls."""
        return run_command(self.context, self.command.words.split(), self.folder, answer)

    def _watch(self, call: Call) -> None:
        self.calls.append(call)
        if call.name == "rename":
            old, new = map(Path, call.paths)
            name = new.relative_to(self.folder).as_posix()
            if old.is_file() or old.is_symlink():
                content = os.fsencode(old.readlink()) if old.is_symlink() else old.read_bytes()
                self.known[name].add(content)
            for file in (path for path in old.rglob("*") if path.is_file()):
                inner = file.relative_to(old).as_posix()
                self.known[f"{name}/{inner}"].add(file.read_bytes())

    def wrong(self) -> list[str]:
        """Name what is under its final name, and never is in an undisturbed run."""
        return [
            name
            for name, content in visible(self.folder).items()
            if not has_times(name) and content not in self.known[name]
        ]

    def different(self) -> list[str]:
        """Name what is not as an undisturbed run leaves it."""
        found = visible(self.folder)
        return [
            name
            for name in sorted({*found, *self.expected})
            if not has_times(name) and found.get(name) != self.expected.get(name)
        ]


def has_times(name: str) -> bool:
    return any(fnmatch.fnmatch(name, f"*{pattern}") for pattern in TIMES)
