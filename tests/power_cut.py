"""What may be on a disk after a power cut, by the calls that a process made before it.

Nothing is sure but what was synchronised: the content of a file by an fsync of the file, a name by
an fsync of its folder. A rename is one change, and of what was not synchronised any part may be
lost or kept, in any order.
"""

import os
import random
import struct
from dataclasses import dataclass, field
from pathlib import Path

from tests.system_calls import Call

PAGE = 4096


@dataclass
class Node:
    """A file, a folder or a link, as programs see it and as it is on the disk for sure."""

    kind: str
    content: bytearray = field(default_factory=bytearray)
    """Of a file; of a link, where it leads."""
    settled: bytes = b""
    names: dict[str, "Node"] = field(default_factory=dict)
    settled_names: dict[str, "Node"] = field(default_factory=dict)
    was_cut: bool = False
    """Whether settled bytes were cut off, so that the settled ones may be gone."""
    time: int | None = None
    """When a file that was there before was changed, in ns."""


@dataclass
class Change:
    """A change of names that is not on the disk for sure: what each of them stands for."""

    names: list[tuple[Node, str, Node | None]]


class Disk:
    """Follows the calls of a process, and says what a power cut may leave."""

    def __init__(self, folder: Path) -> None:
        """Begin with what is in a folder, all of which is on the disk."""
        self.folder = folder
        self.root = _read(folder)
        self._changes: list[Change] = []

    def follow(self, call: Call) -> None:
        """Make a change that a call is about to make."""
        getattr(self, f"_{call.name}", lambda _call: None)(call)

    def cut(self, target: Path, chance: random.Random) -> None:
        """Write what a power cut at this moment may leave into a new folder.

        Args:
            target: The folder.
            chance: Decides what of the changes that are not settled is kept.
        """
        kept = chance.choice((0.0, 0.5, 0.5, 1.0))
        names = {id(node): dict(node.settled_names) for node in self._nodes()}
        for change in self._changes:
            if chance.random() < kept:
                for folder, name, node in change.names:
                    there = names.setdefault(id(folder), dict(folder.settled_names))
                    if node is None:
                        there.pop(name, None)
                    else:
                        there[name] = node
        _write(self.root, names, target, chance)

    def _nodes(self) -> list[Node]:
        found, left = {}, [self.root]
        while left:
            node = left.pop()
            if id(node) not in found:
                found[id(node)] = node
                left += [*node.names.values(), *node.settled_names.values()]
        return list(found.values())

    def _at(self, path: str) -> Node | None:
        node: Node | None = self.root
        for part in Path(path).relative_to(self.folder).parts:
            node = None if node is None else node.names.get(part)
        return node

    def _parent(self, path: str) -> tuple[Node, str]:
        place = Path(path)
        if (parent := self._at(str(place.parent))) is None:  # a thread was faster than its call
            parent = Node("folder")
            self._change((*self._parent(str(place.parent)), parent))
        return parent, place.name

    def _change(self, *names: tuple[Node, str, Node | None]) -> None:
        for folder, name, node in names:
            if node is None:
                folder.names.pop(name, None)
            else:
                folder.names[name] = node
        self._changes.append(Change(list(names)))

    def _open(self, call: Call) -> None:
        at = call.number == 257
        flags = call.arguments[1 + at]
        node = self._at(call.paths[0])
        if node is None and flags & os.O_CREAT:
            self._change((*self._parent(call.paths[0]), Node("file")))
        elif node is not None and flags & os.O_TRUNC:
            node.content.clear()
            node.was_cut, node.time = True, None

    def _write(self, call: Call) -> None:
        self._put_next(call, call.memory(call.arguments[1], call.arguments[2]))

    def _writev(self, call: Call) -> None:
        pieces = struct.iter_unpack("<QQ", call.memory(call.arguments[1], 16 * call.arguments[2]))
        self._put_next(call, b"".join(call.memory(start, size) for start, size in pieces))

    def _put_next(self, call: Call, data: bytes) -> None:
        about = Path(f"/proc/{call.process}/fdinfo/{call.arguments[0]}").read_text().split()
        if int(about[3], 8) & os.O_APPEND:
            node = self._at(call.paths[0])
            self._put(call.paths[0], len(node.content) if node else 0, data)
        else:
            self._put(call.paths[0], int(about[1]), data)

    def _pwrite(self, call: Call) -> None:
        data = call.memory(call.arguments[1], call.arguments[2])
        self._put(call.paths[0], call.arguments[3], data)

    def _fallocate(self, call: Call) -> None:
        node = self._at(call.paths[0])
        if node is not None:
            node.content.extend(bytes(max(0, sum(call.arguments[2:4]) - len(node.content))))

    def _put(self, path: str, start: int, data: bytes) -> None:
        node = self._at(path)
        if node is None:
            return  # it has no name any more
        node.time = None
        node.content.extend(bytes(max(0, start - len(node.content))))
        node.content[start : start + len(data)] = data

    def _ftruncate(self, call: Call) -> None:
        node, size = self._at(call.paths[0]), call.arguments[1]
        assert node is not None
        node.was_cut = node.was_cut or size < len(node.settled)
        node.content[:] = node.content[:size].ljust(size, b"\0")

    def _mkdir(self, call: Call) -> None:
        if self._at(call.paths[0]) is None and self._at(str(Path(call.paths[0]).parent)):
            self._change((*self._parent(call.paths[0]), Node("folder")))

    def _symlink(self, call: Call) -> None:
        if self._at(call.paths[0]) is None:
            target = call.text(call.arguments[0])
            link = Node("link", bytearray(target), target)
            self._change((*self._parent(call.paths[0]), link))

    def _link(self, call: Call) -> None:
        node = self._at(call.paths[0])
        if node is not None and self._at(call.paths[1]) is None:
            self._change((*self._parent(call.paths[1]), node))

    def _unlink(self, call: Call) -> None:
        if self._at(call.paths[0]) is not None:
            self._change((*self._parent(call.paths[0]), None))

    def _rmdir(self, call: Call) -> None:
        node = self._at(call.paths[0])
        if node is not None and not node.names:  # the system refuses one with something in it
            self._unlink(call)

    def _rename(self, call: Call) -> None:
        node, other = map(self._at, call.paths)
        if node is None or (other is not None and other.kind == "folder" and other.names):
            return
        self._change((*self._parent(call.paths[0]), None), (*self._parent(call.paths[1]), node))

    def _fsync(self, call: Call) -> None:
        node = self._at(call.paths[0])
        if node is None:
            return
        if node.kind != "folder":
            node.settled, node.was_cut = bytes(node.content), False
            return
        left = []
        for change in self._changes:
            if any(folder is node for folder, _, _ in change.names):
                for folder, name, there in change.names:
                    if there is None:
                        folder.settled_names.pop(name, None)
                    else:
                        folder.settled_names[name] = there
            else:
                left.append(change)
        self._changes = left


def _read(folder: Path) -> Node:
    node = Node("folder")
    for path in folder.iterdir():
        if path.is_symlink():
            content = os.fsencode(path.readlink())
            there = Node("link", bytearray(content), content)
        elif path.is_dir():
            there = _read(path)
        else:
            content = path.read_bytes()
            there = Node("file", bytearray(content), content, time=path.stat().st_mtime_ns)
        node.names[path.name] = there
    node.settled_names = dict(node.names)
    return node


def _write(
    node: Node, names: dict[int, dict[str, Node]], target: Path, chance: random.Random
) -> None:
    target.mkdir()
    for name, there in names.get(id(node), {}).items():
        path = target / name
        if there.kind == "folder":
            _write(there, names, path, chance)
        elif there.kind == "link":
            path.symlink_to(os.fsdecode(bytes(there.content)))
        else:
            path.write_bytes(_left_of(there, chance))
            if there.time is not None:
                os.utime(path, ns=(there.time, there.time))


def _left_of(file: Node, chance: random.Random) -> bytes:
    """Return what may be in a file, of which not all is settled."""
    now, settled = bytes(file.content), file.settled
    if now == settled:
        return now
    if settled and not file.was_cut:  # each page is as it was, or as it is
        old = settled.ljust(len(now), b"\0")[: chance.choice((len(settled), len(now)))]
        starts = range(0, len(old), PAGE)
        pages = [chance.choice((old, now))[start : start + PAGE] for start in starts]
        return b"".join(pages)[: len(old)]
    cut = chance.randrange(len(now) + 1)
    parts = (settled, now, b"", now[:cut], now[:cut].ljust(len(now), b"\0"), bytes(len(now)))
    return chance.choice(parts)
