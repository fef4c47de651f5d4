"""Checks a feature store of format version 2, with the standard library and numpy alone.

    python fsck.py STORE.zarr

It is written from docs/store.md and shares no code with the program that writes stores, so that one
can find the faults of the other. It names each file that is not the one that was written, and ends
with 1 if there is any. Strings are not decoded (that needs zstd): their files are compared with the
manifest. A store that is growing may have either of two files; that is said, and is a fault.
"""

import hashlib
import json
import re
import stat
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

Faults = list[str]
OK, HIGHEST_STATUS = 1, 9
HIDDEN = re.compile(r"\..+\.[0-9a-f]{12}-\d+-[0-9a-f]{8}\.partial")  # of a writer, alive or killed
LIMIT = 1 << 33  # bytes of a file that are believed
LANES = 1 << 12


def crc_table(size: int) -> np.ndarray:
    """Return what CRC-32C makes of a byte that is followed by `size` zero bytes, for four bytes."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    if size == 0:
        return table
    basis = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(size):
        basis = table[basis & 255] ^ (basis >> np.uint32(8))
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1  # (256, 8)
    columns = basis.reshape(4, 8)
    tables = [np.bitwise_xor.reduce(np.where(bits, each, 0), axis=1) for each in columns]
    return np.stack(tables)


TABLE = crc_table(0)
SHIFTS: dict[int, np.ndarray] = {}


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (RFC 3720): of many equal parts at once, which are then joined."""
    length = len(data) // LANES
    crc = np.uint32(0xFFFFFFFF)
    if length:
        if length not in SHIFTS:
            SHIFTS[length] = crc_table(length)
        lanes = np.frombuffer(data, np.uint8, LANES * length).reshape(LANES, length)
        crcs = np.zeros(LANES, np.uint32)
        for column in np.ascontiguousarray(lanes.T):
            crcs = TABLE[(crcs ^ column) & 255] ^ (crcs >> np.uint32(8))
        shift = SHIFTS[length]
        for each in crcs:
            parts = [shift[i][(int(crc) >> (8 * i)) & 255] for i in range(4)]
            crc = np.bitwise_xor.reduce(parts) ^ each
    value = int(crc)
    for byte in data[LANES * length :]:
        value = int(TABLE[(value ^ byte) & 255]) ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def digest(document: dict[str, Any]) -> str:
    kept = {name: it for name, it in document.items() if name != "consolidated_metadata"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


class Store:
    """The files of a store, and what was found wrong with them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: Faults = []
        self.expected: set[str] = set()
        self.read_files = 0

    def fault(self, name: str, what: str) -> None:
        self.faults.append(f"{self.path / name}: {what}")

    def content(self, name: str) -> bytes | None:
        """Return the bytes of a file; None, and a fault, if there is no such file."""
        self.expected.add(name)
        file = self.path / name
        try:
            about = file.stat()
            if not stat.S_ISREG(about.st_mode):
                raise OSError("it is not a regular file")
            if about.st_size > LIMIT:
                raise OSError(f"it has {about.st_size} bytes")
            self.read_files += 1
            return file.read_bytes()
        except OSError as error:
            self.fault(name, f"it cannot be read ({error.strerror or error})")
            return None

    def document(self, name: str) -> dict[str, Any] | None:
        """Return a JSON object; None, and a fault, if there is none."""
        content = self.content(name)
        if content is None:
            return None
        try:
            document = json.loads(content)
            if not isinstance(document, dict) or document.get("zarr_format") != 3:
                raise ValueError("not metadata of Zarr 3")
        except (ValueError, RecursionError) as error:
            self.fault(name, f"it is not what it should be ({error})")
            return None
        return document

    def manifest(self, part: str) -> list[dict[str, Any]]:
        """Return what the manifest of the store ("") or of a column says: two while it grows."""
        name = f"{part}/manifest/zarr.json" if part else "manifest/zarr.json"
        document = self.document(name)
        if document is None:
            return []
        try:
            attributes = document["attributes"]
            if attributes.pop("sha256") != digest(document):
                raise ValueError("its sha256 does not match")
            versions = [attributes, *filter(None, [attributes.pop("next", None)])]
            metadata = [each["metadata"] for each in versions]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            self.fault(name, f"it is damaged ({error})")
            return []
        if len(versions) > 1:
            self.fault(part or ".", "rows are being appended, or a command that did was killed")
        for place in sorted(set().union(*metadata)):
            about = self.document(place)
            if about is not None and digest(about) not in [each.get(place) for each in metadata]:
                self.fault(place, f"it is another one than {self.path / name} speaks of")
        return versions

    def rows(self, versions: list[dict[str, Any]]) -> list[list[int]]:
        """Check the files of all row arrays; return what the crc32 of each file of keys may be."""
        keys: list[list[int]] = []
        for array in sorted(set().union(*(each["arrays"] for each in versions))):
            files = [each["arrays"].get(array, {"bytes": [], "crc32": []}) for each in versions]
            for chunk in range(max(len(each["bytes"]) for each in files)):
                said = [
                    (each["bytes"][chunk], each["crc32"][chunk])
                    for each in files
                    if chunk < len(each["bytes"])
                ]
                if array == "key":
                    keys.append([crc for _, crc in said])
                name = f"{array}/c/{chunk}"
                if (0, 0) in said and not (self.path / name).exists():
                    continue  # of a store that was of version 1
                content = self.content(name)
                if content is None:
                    continue
                if len(content) not in [size for size, _ in said]:
                    self.fault(name, f"it has {len(content)} bytes, not {said[0][0]}")
                elif (len(content), zlib.crc32(content)) not in said:
                    self.fault(name, "its crc32 is not the one in the manifest")
        return keys

    def chunk(self, name: str, size: int) -> tuple[bytes, int] | None:
        """Return the values of a chunk and its crc32c; None, and a fault, if it is damaged."""
        content = self.content(name)
        if content is None:
            return None
        if len(content) != size + 4:
            self.fault(name, f"it has {len(content)} bytes, not {size + 4}")
            return None
        crc = int.from_bytes(content[size:], "little")
        if crc32c(content[:size]) != crc:
            self.fault(name, "its crc32c does not match its bytes")
            return None
        return content[:size], crc

    def column(self, name: str, rows: int, size: int, keys: list[list[int]]) -> None:
        """Check a column: each chunk is whole, is the one of its place, and is what rows can be."""
        versions = self.manifest(name)
        metadata = f"{name}/features/zarr.json"
        about = self.document(metadata) if versions else None
        said = [it["metadata"].get(metadata) for it in versions]
        if about is None or digest(about) not in said:
            if versions and None in said:
                self.fault(f"{name}/manifest/zarr.json", f"it does not speak of {metadata}")
            self.expected |= {self.name_of(file) for file in (self.path / name).rglob("*")}
            return
        encoder = "/".join(name.split("/")[:2]) + "/zarr.json"
        encoders = [each["metadata"].get(encoder) for each in versions]
        for chunk in range(-(-rows // size)):
            places = [
                crc32c(f"{name}\n{chunk}\n{key}\n{sha}".encode())
                for key in keys[chunk]
                for sha in encoders
            ]
            self.chunk_of(name, chunk, min(size, rows - chunk * size), about, places)

    def chunk_of(
        self, name: str, chunk: int, rows: int, about: dict[str, Any], places: list[int]
    ) -> None:
        """Check the files of a chunk against each other and against its record."""
        size, dim = about["chunk_grid"]["configuration"]["chunk_shape"]
        is_scaled = about["data_type"] == "int8"
        files = {
            "identity": (f"{name}/identity/c/{chunk}/0", 20),
            "status": (f"{name}/status/c/{chunk}", size),
            "features": (f"{name}/features/c/{chunk}/0", size * dim * (1 if is_scaled else 2)),
        }
        if is_scaled:
            files["scale"] = (f"{name}/scale/c/{chunk}", 4 * size)
        if not (self.path / files["status"][0]).exists():
            self.fault(name, f"chunk {chunk} is not done")
            self.expected |= {file for file, _ in files.values()}
            return
        found = {part: self.chunk(*file) for part, file in files.items()}
        record = found.pop("identity")
        if record is None:
            return
        words = np.frombuffer(record[0], "<u4").tolist()  # features, scale, status, place, images
        if words[3] not in places:
            self.fault(files["identity"][0], "it is of another chunk, other keys or encoder")
            return
        said = dict(zip(("features", "scale", "status"), words, strict=False))
        for part, values in found.items():
            if values is not None and values[1] != said[part]:
                self.fault(files[part][0], "it is another chunk than was written here")
        if found["status"] is not None and found["features"] is not None:
            status = np.frombuffer(found["status"][0], np.uint8)
            dtype = np.int8 if is_scaled else np.dtype("<f2")
            features = np.frombuffer(found["features"][0], dtype).reshape(size, dim)
            self.values(files["features"][0], features, status, rows)

    def values(self, name: str, features: np.ndarray, status: np.ndarray, count: int) -> None:
        """Check that rows that are ok are finite and not zero, and that all others are zero."""
        is_ok, is_zero = status == OK, ~features.any(axis=1)
        rows = np.arange(len(status)) < count
        wrong = rows & ((status == 0) | (status > HIGHEST_STATUS))
        wrong |= rows & is_ok & (is_zero | ~np.isfinite(features.astype(np.float32)).all(axis=1))
        wrong |= ~(rows & is_ok) & ~is_zero
        if wrong.any():
            self.fault(name, f"row {int(wrong.argmax())} of it is not what its status says")

    def name_of(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()

    def check(self) -> None:
        """Check every file."""
        root = self.document("zarr.json")
        versions = self.manifest("")
        said = [each["metadata"].get("zarr.json") for each in versions]
        if root is None or digest(root) not in said:
            return
        about = root.get("attributes", {})
        if (about.get("format"), about.get("format_version")) != ("sail-features", 2):
            self.fault("zarr.json", "it is no feature store of version 2")
            return
        rows, size = about["rows"], about["rows_per_chunk"]
        keys = self.rows(versions)
        if len(keys) < -(-rows // size):
            self.fault("manifest/zarr.json", f"it has {len(keys)} files of keys for {rows} rows")
            return
        columns = [
            *self.folders("image"),
            *(f for e in self.folders("text") for f in self.folders(e)),
        ]
        for column in columns:
            self.column(column, rows, size, keys)
        for file in sorted(self.path.rglob("*")):
            name = self.name_of(file)
            is_hidden = any(HIDDEN.fullmatch(part) for part in name.split("/"))
            if not file.is_dir() and name not in self.expected and not is_hidden:
                self.fault(name, "it is no file of the store")

    def folders(self, name: str) -> list[str]:
        there = sorted((self.path / name).glob("*/"))
        return [self.name_of(folder) for folder in there if not folder.name.startswith(".")]


def main(path: str) -> int:
    store = Store(Path(path))
    store.check()
    for fault in dict.fromkeys(store.faults):
        print(fault)
    if not store.faults:
        print(f"{path} is whole: {store.read_files} files.")
    return 1 if store.faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
