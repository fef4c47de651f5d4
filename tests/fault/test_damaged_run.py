"""Whole commands over a finished run of which one file is damaged: right, or one line.

What is right is what the command says and makes without the damage.
"""

import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import jaxtyping
import pytest

from pipeline.cli import cli
from pipeline.interrupt import StopRequest
from pipeline.run.align import align_run
from pipeline.run.config import load_config
from pipeline.run.evaluate import evaluate_run
from pipeline.run.extract import extract
from tests import tiny
from tests.commands import sail

SEED = int(os.environ.get("DAMAGE_SEED", "20261201"))
TRIALS = 320
SECONDS_FOR_A_COMMAND = 60
WORDS = "a red circle"
Damage = Callable[[Path, random.Random], None]


def flip(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def cut(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])


def zero(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = dice.randrange(len(content))
    stop = min(len(content), start + dice.choice([16, 4096, 1 << 20]))
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)


def lengthen(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes() + dice.randbytes(dice.choice([1, 4, 4096])))


def take_another(path: Path, dice: random.Random) -> None:
    """Put another file of the run in the place of one, of its folder if there is one."""
    run = next(folder for folder in path.parents if folder.name == "run")
    others = [each for each in sorted(path.parent.iterdir()) if each.is_file() and each != path]
    others = others or [
        each for each in sorted(run.rglob(path.name)) if each.is_file() and each != path
    ]
    path.write_bytes(dice.choice(others).read_bytes() if others else b"")


def delete(path: Path, _dice: random.Random) -> None:
    path.unlink()


def replace(path: Path, _dice: random.Random, *, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def make_fifo(path: Path, _dice: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def make_folder(path: Path, _dice: random.Random) -> None:
    path.unlink()
    path.mkdir()


def lead_to(path: Path, _dice: random.Random, *, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


DAMAGES: dict[str, Damage] = {
    "flip": flip,
    "cut": cut,
    "zero": zero,
    "lengthen": lengthen,
    "another": take_another,
    "delete": delete,
    "fifo": make_fifo,
    "folder": make_folder,
    "empty": partial(replace, content=b""),
    "list": partial(replace, content=b"[]"),
    "object": partial(replace, content=b"{}"),
    "null": partial(replace, content=b"null"),
    "nested": partial(replace, content=b"[" * 100_000),
    "digits": partial(replace, content=b"9" * 10_000),
    "image": partial(replace, content=tiny.encoded(tiny.picture(1))),
    "text": partial(replace, content=b"\xff\xfe a line\n"),
    "array": partial(replace, content=b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16),
    "device": partial(lead_to, target="/dev/zero"),
    "itself": partial(lead_to, target="loop"),
}


@dataclass(frozen=True)
class Command:
    """A command, and the files (as seen from the run) with what it writes if all is well."""

    words: tuple[str, ...]
    made: tuple[str, ...] = ()


RUN, OTHER, RECIPE = "{folder}/run", "{folder}/other", "{folder}/tiny.toml"
COMMANDS = {
    "extract": Command(("extract", RECIPE)),
    "align": Command(("align", RECIPE), ("align/best/model.safetensors",)),
    "eval": Command(("eval", RECIPE, "--json"), ("eval/results.json",)),
    "search": Command(("search", RUN, WORDS, "--json")),
    "captions": Command(("search", RUN, WORDS, "--among", "captions", "--json")),
    "compare": Command(("compare", OTHER, RUN, "--json")),
    "embed": Command(
        ("embed", RUN, "--texts", "{folder}/lines.txt", "--out", "{folder}/o.npy"), ("../o.npy",)
    ),
    "embed exported": Command(
        ("embed", f"{RUN}/export/hf", "--texts", "{folder}/lines.txt", "--out", "{folder}/o.npy"),
        ("../o.npy",),
    ),
    "embed pictures": Command(
        ("embed", f"{RUN}/export/hf", "--images", "{folder}/pictures", "--out", "{folder}/o.npy"),
        ("../o.npy",),
    ),
    "export": Command(
        ("export", RUN, "--to", "hf", "--out", "{folder}/exported"),
        ("../exported/model.safetensors", "../exported/config.json", "../exported/README.md"),
    ),
    "export-head": Command(("export-head", RUN, "{folder}/head.pt"), ("../head.pt",)),
    "inspect": Command(("inspect", f"{RUN}/features/test.zarr", "--row", "3")),
}
STORE = f"{RUN}/features/train.zarr"
ON_STORES = {
    "align anew": Command(
        ("align", RECIPE, "--set=run.dir='{folder}/new'", "--set=run.features='{folder}/run'"),
        ("../new/align/best/model.safetensors",),
    ),
    "inspect": Command(("inspect", STORE, "--row", "3")),
    "int8": Command(("convert", STORE, "--dtype", "int8", "--out", "{folder}/o"), ("../o",)),
    "hdf5": Command(("convert", STORE, "--to", "hdf5", "--out", "{folder}/o"), ("../o",)),
    "parquet": Command(("convert", STORE, "--to", "parquet", "--out", "{folder}/o"), ("../o",)),
    "rechunk": Command(
        ("rechunk", STORE, "--rows-per-chunk", "5", "--out", "{folder}/o"), ("../o",)
    ),
    "subset": Command(
        ("subset", STORE, "--query", "image/vit=ok", "--out", "{folder}/o"), ("../o",)
    ),
    "merge": Command(
        ("merge", STORE, f"{RUN}/features/test.zarr", "--out", "{folder}/o"), ("../o",)
    ),
    "reorder": Command(("reorder", STORE, "--like", STORE, "--out", "{folder}/o"), ("../o",)),
    "pick": Command(("pick", RECIPE, "--json", "--on", "test")),
    **{name: COMMANDS[name] for name in ("extract", "eval", "search", "captions", "export")},
}
"""Commands that read stores."""
READ_BY = {
    "config.toml": ("search", "export", "embed", "align", "eval"),
    "encoders.json": ("extract",),
    "index": ("extract", "eval", "inspect"),
    "align": ("align", "eval", "search", "export", "export-head", "embed"),
    "eval": ("eval", "compare", "export"),
    "search": ("search", "captions"),
    "model": ("align", "eval"),
    "export": ("embed exported", "embed pictures", "export"),
}


def finished(folder: Path) -> Path:
    """Extract, align, evaluate, search and export a tiny world twice; returns its folder."""
    recipe = tiny.world(folder, rows=24, extra=["zero_shot = ['test']", "knn = ['test']"])
    recipe.write_text(
        recipe.read_text().replace('kind = "glu"', 'kind = "mlp"').replace(", depth = 2", "")
    )  # of the kind that export-head writes
    (folder / "lines.txt").write_text(f"{WORDS}\na blue star\n")
    (folder / "pictures").mkdir()
    for seed in range(3):
        (folder / "pictures" / f"{seed}.jpg").write_bytes(tiny.encoded(tiny.picture(seed)))
    config = load_config(str(recipe))
    extract(config, StopRequest())
    align_run(config, StopRequest())
    evaluate_run(config, StopRequest())
    shutil.copytree(folder / "run", folder / "other", symlinks=True)
    for name in ("search", "captions"):
        sail(*words_of(COMMANDS[name], folder))
    exported = folder / "run" / "export" / "hf"
    sail("export", folder / "run", "--to", "hf", "--with-encoders", "--out", exported)
    return folder


def words_of(command: Command, folder: Path) -> list[str]:
    return [word.format(folder=folder) for word in command.words]


def ended(command: Command, folder: Path) -> tuple[int, str, str]:
    """Call a command in a process of its own; return its exit code, stdout and stderr."""
    out, err = folder / "stdout", folder / "stderr"
    child = os.fork()
    if not child:
        code = 99
        try:
            for path, descriptor in ((out, 1), (err, 2)):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS_FOR_A_COMMAND)
            jaxtyping.config.update("jaxtyping_disable", True)  # as for users
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            cli.main(words_of(command, folder), prog_name="sail")
        except SystemExit as exit:
            code = int(exit.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code, out.read_text(errors="replace"), err.read_text(errors="replace")


def told(command: Command, folder: Path, stdout: str) -> str:
    """Return what a command said and made, as far as it is the same each time."""
    made = [folder / "run" / name for name in command.made]
    inside = [path for each in made for path in [each, *sorted(each.rglob("*"))] if path.is_file()]
    hashes = [sha256(path.read_bytes()).hexdigest() for path in inside]
    said = re.sub(r'"seconds": [\d.e-]+', "", stdout.replace(str(folder), ""))
    return " ".join([said, *hashes])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["run", "stores"])
def test_one_damaged_file_of_a_run_gives_the_right_result_or_one_line(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not live in a child
    whole, trial = tmp_path / "whole", finished(tmp_path / "trial")
    shutil.copytree(trial, whole, symlinks=True)
    commands = COMMANDS if what == "run" else ON_STORES
    right = {}
    for name, command in commands.items():
        restore(trial, whole)
        code, out, err = ended(command, trial)
        assert code == 0, (name, err)
        right[name] = told(command, trial, out)
    files = sorted(
        path.relative_to(whole / "run").as_posix()
        for path in (whole / "run").rglob("*")
        if path.is_file()
        and "tensorboard" not in str(path)  # which is never read
        and (".zarr/" in str(path)) == (what == "stores")
    )
    dice, faults = random.Random(SEED), list[str]()
    for number in range(TRIALS):
        file, damage = files[number % len(files)], dice.choice(list(DAMAGES))
        name = dice.choice(list(commands))
        if what == "run":
            name = dice.choice(READ_BY.get(file.partition("/")[0], tuple(commands)))
        restore(trial, whole)
        DAMAGES[damage](trial / "run" / file, dice)
        code, out, err = ended(commands[name], trial)
        trouble = f"{name} with {file}: {damage}"
        errors = [line for line in err.splitlines() if line.startswith("Error: ")]
        if code not in (0, 1, 2) or "Traceback" in err or (code and len(errors) != 1):
            faults.append(f"{trouble}: exit {code}: {err[-1500:]}")
        elif (
            not code
            and file != "config.toml"  # which is the user's to change: stages keep their own
            and told(commands[name], trial, out) != right[name]
        ):
            faults.append(f"{trouble}: silently wrong: {err[-600:]}")
    assert not faults, "\n\n".join(faults)


def restore(trial: Path, whole: Path) -> None:
    """Put everything back to where it was made: paths and times stand in the run."""
    shutil.rmtree(trial)
    shutil.copytree(whole, trial, symlinks=True)
