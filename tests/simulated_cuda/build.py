"""Compiles `guard.cpp` against the torch that is installed, once, and loads it before torch."""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("guard.cpp")
BUILT = ROOT / ".pytest_cache" / "simulated_cuda"


def why_not() -> str | None:
    """Why no GPU can be simulated here; None if one can."""
    if "+cpu" not in (version := metadata.version("torch")):
        return f"torch {version} is no CPU build: it has a CUDA of its own"
    return None if shutil.which("g++") else "no g++ is here to compile tests/simulated_cuda"


def library() -> Path:
    """The compiled guard; the first process compiles it, and others wait for that."""
    made_of = SOURCE.read_bytes() + metadata.version("torch").encode()
    BUILT.mkdir(parents=True, exist_ok=True)
    built = BUILT / f"guard-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    with (BUILT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            torch = _torch()
            partial = built.with_suffix(".partial")
            command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{torch / 'include'}"]
            command += [str(SOURCE), "-o", str(partial)]
            command += [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
            subprocess.run(command, check=True)
            partial.rename(built)
    return built


def load() -> None:
    """Load the guard, as a library of torch would be; before torch is imported."""
    for path in [_torch() / "lib" / name for name in ("libc10.so", "libtorch_cpu.so")]:
        ctypes.CDLL(os.fspath(path), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(os.fspath(library()), mode=ctypes.RTLD_GLOBAL)


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    return Path(str(spec.origin)).parent
