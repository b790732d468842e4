"""The data that a run names: whether its feature stores can be opened, where they lie, and whether memory can hold them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.doctor import machine
from engine.doctor.lines import Asked, Line, Probe, gib, of_bad_input, short
from pipelines.errors import BadInput

if TYPE_CHECKING:
    from engine.config import RunConfig
    from pipelines.sheet import Sheet
    from pipelines.store.reader import FeatureStore

_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "9p", "virtiofs", "afs"}
_CACHED = 0.8
"""Share of the memory that the page cache may get to hold; the rest is the run's own."""


def fits(stores: int, memory: int) -> Line:
    """Bytes of all stores, and of memory that this process and its page cache may take."""
    value = f"{gib(stores)} of stores, {gib(memory)} of memory"
    if stores <= _CACHED * memory:
        return Line("page cache", f"{value}: read from the disk once, then from memory")
    mend = "stopgo features FORMAT SOURCE NEW.lmdb --dtype uint8, which takes half of float16; or more memory"
    return Line("page cache", f"{value}: much is read from the disk again in every epoch", "note", mend)


def mount_of(path: Path, mountinfo: str) -> tuple[str, str]:
    """(mount point, type of its file system) that an absolute path lies on, from the text of /proc/self/mountinfo."""
    best = ("/", "unknown")
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        words = left.split()
        if len(words) < 5 or not right.split():
            continue
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), words[4])
        if path.is_relative_to(point) and len(point) >= len(best[0]):  # of two on one point the later lies on top
            best = point, right.split()[0]
    return best


def file_system(point: str, kind: str, stores: Sequence[Path]) -> Line:
    """Where some of the stores lie."""
    value = f"{kind} at {point}: {len(stores)} stores" if len(stores) > 1 else f"{kind} at {point}: {stores[0].name}"
    if kind in _REMOTE or kind.startswith("fuse."):
        mend = f"rsync -a {short(stores[0])} LOCAL_DISK/, and name that place in the data sheet"
        return Line("file system", f"{value}; what is not in memory comes over a network", "note", mend)
    return Line("file system", value)


def used(sheet: Sheet, names: Sequence[str]) -> dict[Path, list[str]]:
    """The stores that training and validation of these data sets read, and which sets read each."""
    found: dict[Path, list[str]] = {}
    for name in names:
        if name in sheet.sets:
            entry = sheet.sets[name]
            paths = [path for split, path in entry.stores().items() if split != "test"]
            for path in dict.fromkeys([*paths, *([entry.candidates] if entry.candidates else [])]):
                found.setdefault(path, []).append(name)
    return found


def _data(asked: Asked) -> Iterator[Line]:
    if asked.config is None:
        return
    from pipelines.sheet import inspect_sheet

    config, check = asked.config, f"stopgo check {asked.config_path}"
    path = Path(config.world.path) / "sheet.yaml" if config.data == "world" else Path(config.data)
    if config.data == "world" and not path.exists():
        yield Line("data", f"the embedded world, in {config.world.path}: built when a run first needs it, in seconds")
        return
    names = _names(config)
    sheet, problems = inspect_sheet(path, names)
    if sheet is None:
        yield from (of_bad_input("data", problem, check) for problem in problems)
        return
    stores = used(sheet, names)
    yield from _files(config, sheet, [problem for problem in problems if not _about_stores(problem)], check)
    opened = []
    for place, sets in stores.items():
        line, store = _store(place, sets, config)
        yield line
        if store is not None:
            opened.append(store)
    yield from _places(opened)
    for store in opened:
        yield from _readers(store.path)


def _names(config: RunConfig) -> list[str]:
    from engine.config import load_tasks

    return [row.name for row in load_tasks(config)[1]]


def _about_stores(problem: BadInput) -> bool:
    return any(f".{key}" in problem.where for key in ("features", "candidates"))


def _files(config: RunConfig, sheet: Sheet, problems: list[BadInput], check: str) -> Iterator[Line]:
    """What else the run's data sets need: annotations, answers, the vocabulary. Looked for, not read."""
    from engine.config import load_tasks

    for row in load_tasks(config)[1]:
        for split in sheet.sets[row.name].splits() if row.name in sheet.sets else ():
            problems.extend(sheet.reader_arguments(row.name, split, row.reader)[1])
    told = list(dict.fromkeys(f"{problem.where}: {problem.what}" for problem in problems))
    if told:
        more = f" and {len(told) - 1} more" if len(told) > 1 else ""
        yield Line("files", f"{told[0]}{more}", "problem", check)
    else:
        yield Line("files", f"all of {len(load_tasks(config)[1])} data sets are there ({check} reads them)")


def _store(path: Path, sets: Sequence[str], config: RunConfig) -> tuple[Line, FeatureStore | None]:
    """What there is to say of one store, and the store where it can be used."""
    from pipelines.store.reader import FeatureStore

    name = short(path)
    again = f"stopgo features FORMAT SOURCE {name}"
    readers = sets[0] if len(sets) == 1 else f"{len(sets)} data sets"
    if not path.exists():
        return Line("store", f"{name}: not there, and wanted by {readers}", "problem", again), None
    try:
        store = FeatureStore(path)
    except BadInput as error:
        return of_bad_input("store", error, f"mv {name} {name}.bad && {again}"), None
    size = f"{len(store):,} images, {gib(store.nbytes)}, {store.dtype} × {store.feature_dim}"
    value = f"{path.name}: {size}, for {readers}"
    if store.feature_dim != config.model.v_feature_size:
        value += f"; the model reads {config.model.v_feature_size}"
        return Line("store", value, "problem", f"model.v_feature_size={store.feature_dim}"), store
    return Line("store", value), store


def _places(stores: Sequence[FeatureStore]) -> Iterator[Line]:
    if not stores:
        return
    yield fits(sum(store.nbytes for store in stores), machine.memory_to_be_had())
    mountinfo = Path("/proc/self/mountinfo").read_text()
    places: dict[tuple[str, str], list[Path]] = {}
    for store in stores:
        places.setdefault(mount_of(store.path.resolve(), mountinfo), []).append(store.path)
    for (point, kind), paths in places.items():
        yield file_system(point, kind, paths)


def _readers(path: Path) -> Iterator[Line]:
    """Entries of processes that are gone in the reader table of LMDB's library. Training keeps no such table; other programs
    that read or write the store do, and a dead entry holds old pages for them. Where none of them has the store open, the
    library forgets the table when it is asked."""
    from pipelines.store.reader import shard_paths

    for folder in shard_paths(path):
        if os.access(folder / "lock.mdb", os.W_OK):
            import lmdb

            with lmdb.open(str(folder), readonly=True, create=False) as environment:
                gone = stale(environment.readers())
            if gone:
                mend = f"python -c \"import lmdb; print(lmdb.open('{folder}', readonly=True).reader_check())\""
                yield Line("lmdb readers", f"{folder}: {len(gone)} of processes that are gone", "note", mend)


def stale(table: str) -> list[int]:
    """The processes in a reader table that are no longer there. Its lines begin with the id of a process."""
    pids = {int(words[0]) for line in table.splitlines() if (words := line.split()) and words[0].isdigit()}
    return sorted(pid for pid in pids if not os.path.exists(f"/proc/{pid}"))


PROBES: Mapping[str, Probe] = {"data": _data}
