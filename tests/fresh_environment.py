"""Another Python process that has a few packages, with what they need, and nothing else."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

NOT_INSTALLED = re.compile(r";.*\bextra\b")


def fresh_environment(folder: Path, *packages: str) -> Path:
    """Make a folder of links to the installed packages and their requirements, and no others."""
    folder.mkdir()
    for name in _with_requirements(packages):
        for top in {file.parts[0] for file in metadata.files(name) or [] if file.parts[0] != ".."}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    return folder


def run_in(environment: Path, code: str, *, cwd: Path) -> str:
    """Run code in a process that sees only the standard library, an environment, and its folder."""
    start = f"import sys; sys.path[:0] = [{str(environment)!r}, {str(cwd)!r}]\n"
    finished = subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def _with_requirements(packages: tuple[str, ...]) -> set[str]:
    found, waiting = set[str](), list(packages)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another system
            continue
        if name not in found:
            found.add(name)
            waiting += [
                re.split(r"[^\w.-]", each)[0]
                for each in requirements
                if not NOT_INSTALLED.search(each)
            ]
    return found
