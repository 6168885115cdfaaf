"""Training's hand-over to serving: a directory, content-addressed, published by rename and never changed afterwards.

A flipped byte in an index or a model usually loads and answers wrongly without a word, so every file is hashed before
a parser sees it, and the parser gets the very bytes that were hashed: a private copy, or sealed memory that the workers
of a service share. No file of a bundle is ever mapped.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from features import manifest as manifests
from features.errors import BundleError
from features.limits import memory
from features.manifest import FORMAT

MANIFEST = "manifest.json"
FILES = (
    "golden.json",
    "index.faiss",
    "item_encoder.onnx",
    "items.arrow",
    "neighbor_scores.npy",
    "neighbors.npy",
    "popular.arrow",
    "query_encoder.onnx",
    "ranker.onnx",
    "token_offsets.npy",
    "tokens.npy",
    "user_encoder.onnx",
    "vectors.npy",
    "vocabulary.arrow",
)
"""Every bundle holds exactly these and the manifest."""

_CHUNK = 1 << 20
_FOLDER_MODE, _FILE_MODE = 0o755, 0o644
"""A bundle holds no user's data, and may be served by another user than the one that trained it."""
_MOST_HOLES = 64 << 20
_MOST_EXTENTS = 10_000
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


@dataclasses.dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle.

    Attributes:
        path: Its directory.
        bundle_id: Its name, made of its content.
        manifest: Its manifest.
        sealed: Handles of memory that holds a file, by the file's name; see `seal`.
    """

    path: Path
    bundle_id: str
    manifest: dict[str, Any]
    sealed: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> dict[str, Any]:
        """The part of the manifest that says how the models are fed and combined."""
        model: dict[str, Any] = self.manifest["model"]
        return model

    def read(self, name: str) -> bytes:
        """The bytes of a file, hashed again on the way, so that the parser gets what was verified.

        Raises:
            BundleError: The file changed after the bundle was opened.
        """
        facts = self.manifest["files"][name]
        try:
            content = b"".join(_pieces(self.path / name, facts["size"]))
        except BundleError as error:
            raise BundleError(f"{error} (changed while the bundle was being loaded)") from error
        self._check(name, content)
        return content

    def view(self, name: str) -> memoryview:
        """The bytes of a file as `read` gives them, in memory shared with other processes where it is sealed.

        Raises:
            BundleError: The file changed after the bundle was opened, or the memory is not sealed or holds other bytes.
        """
        handle = self.sealed.get(name)
        if handle is None:
            return memoryview(self.read(name))
        size = self.manifest["files"][name]["size"]
        if fcntl.fcntl(handle, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(handle).st_size != size:
            raise BundleError(f"{self.path / name}: its shared memory is not sealed; start the service again")
        content = memoryview(mmap.mmap(handle, size, prot=mmap.PROT_READ)) if size else memoryview(b"")
        self._check(name, content)
        return content

    def seal(self, name: str) -> int:
        """Puts a file into memory that nobody can change any more; the caller closes the handle that it returns.

        A child that inherits the handle opens the bundle with it and shares the memory.

        Raises:
            BundleError: The file changed after the bundle was opened.
        """
        content = self.read(name)
        handle = os.memfd_create(f"penchant-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with os.fdopen(handle, "wb", closefd=False) as sink:
                sink.write(content)
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _check(self, name: str, content: bytes | memoryview) -> None:
        if hashlib.sha256(content).hexdigest() != self.manifest["files"][name]["sha256"]:
            raise BundleError(f"{self.path / name}: changed while the bundle was being loaded; publish it again")


def publish(staging: Path, out: Path, manifest: dict[str, Any]) -> str:
    """Turns a directory of finished files into a bundle.

    Args:
        staging: Holds every file of `FILES`, on the same file system as `out`; gone afterwards.
        out: Where the bundle shall be; must not exist, unless it is this very bundle.
        manifest: What the manifest says beside `format`, `bundle_id` and `files`, which are filled in here.

    Returns:
        The bundle id.

    Raises:
        BundleError: A file is missing, a field of the manifest is out of range, or `out` holds something else.
    """
    missing = [name for name in FILES if not (staging / name).is_file()]
    if missing:
        raise BundleError(f"{staging}: {', '.join(missing)} missing; a bundle needs every one of its files")
    files = {name: _facts(staging / name) for name in FILES}
    manifest = {"format": FORMAT, "bundle_id": _bundle_id(files, manifest), **manifest, "files": files}
    if out.exists():
        if open_bundle(out).bundle_id != manifest["bundle_id"]:
            raise BundleError(f"{out}: holds another bundle; a bundle is never changed, choose another directory")
        shutil.rmtree(staging)
        return str(manifest["bundle_id"])
    content = json.dumps(manifest, indent=1, sort_keys=True).encode()
    manifests.parse(content, str(out / MANIFEST))
    (staging / MANIFEST).write_bytes(content)
    for name in (*FILES, MANIFEST):
        (staging / name).chmod(_FILE_MODE)
        sync(staging / name)
    staging.chmod(_FOLDER_MODE)
    sync(staging)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging.rename(out)
    sync(out.parent)
    return str(manifest["bundle_id"])


def open_bundle(path: Path, bundle_id: str = "", sealed: Mapping[str, int] | None = None) -> Bundle:
    """Verifies every file of a bundle, before anything parses one.

    Args:
        path: The directory, or a link to it; the link is followed once, and may move afterwards.
        bundle_id: The bundle that has to be there; empty where any will do.
        sealed: Handles that `Bundle.seal` returned, by name; these files are taken from memory.

    Raises:
        BundleError: The directory is no bundle, is half copied, was changed, or holds links, devices, files of another
            bundle or files of none; its manifest is malformed; or it is another bundle than the one asked for.
    """
    try:
        path = path.resolve()
        entries = {entry.name for entry in path.iterdir()}
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        reason = error.strerror if isinstance(error, OSError) else "a link that leads to itself"
        raise BundleError(f"{path}: no bundle here ({reason}); make one with `penchant export`") from error
    manifest = _manifest(path)
    if bundle_id and manifest["bundle_id"] != bundle_id:
        raise BundleError(
            f"{path}: holds the bundle {manifest['bundle_id']}, and the running service serves {bundle_id}; restart "
            "the service to serve the other one, or put this one back"
        )
    files = manifest["files"]
    if sorted(files) != sorted(FILES):
        raise BundleError(f"{path / MANIFEST}: lists {sorted(files)}, a bundle of format {FORMAT} has {list(FILES)}")
    extra = entries - {*FILES, MANIFEST}
    if extra:
        names = ", ".join(map(json.dumps, sorted(extra)))
        raise BundleError(f"{path}: {names} belong to no bundle; remove them or publish again")
    if sum(files[name]["size"] for name in FILES) > memory():
        raise BundleError(f"{path / MANIFEST}: its files are larger than the memory that this process may use")
    for name in FILES:
        if _sha256(path / name, files[name]["size"]) != files[name]["sha256"]:
            raise BundleError(f"{path / name}: its sha256 is not the manifest's; it was changed or is another bundle's")
    if manifest["bundle_id"] != _bundle_id(files, manifest):
        raise BundleError(f"{path / MANIFEST}: the bundle id does not fit its content; publish the bundle again")
    return Bundle(path, manifest["bundle_id"], manifest, dict(sealed or {}))


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not os.path.lexists(file):
        raise BundleError(f"{path}: no bundle here ({MANIFEST} is missing); make one with `penchant export`")
    return manifests.parse(b"".join(_pieces(file)), str(file))


def _pieces(path: Path, size: int | None = None) -> Iterator[bytes]:
    """Yields the content of a plain file of `size` bytes; a manifest's, which no manifest tells, where that is None."""
    # A pipe or a device in its place neither keeps us waiting nor is followed to.
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BundleError(f"{path}: missing; copy the whole bundle again") from None
    except OSError as error:
        kind = "a link" if path.is_symlink() else error.strerror
        raise BundleError(f"{path}: {kind}; a bundle holds plain files only, copy it with their content") from None
    try:
        size = _checked_size(path, os.fstat(handle), size)
    except BundleError:
        os.close(handle)
        raise
    with os.fdopen(handle, "rb", buffering=0) as file:
        if _holes(handle, size) > _MOST_HOLES:
            raise BundleError(f"{path}: holds nothing over more than {_MOST_HOLES} bytes; copy the whole bundle again")
        left = size
        try:
            while piece := file.read(min(_CHUNK, left + 1)):
                left -= len(piece)
                if left < 0:
                    break
                yield piece
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror}); copy the whole bundle again") from error
    if left:
        raise BundleError(f"{path}: grew or shrank while it was read; copy the whole bundle again")


def _checked_size(path: Path, status: os.stat_result, size: int | None) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: is no plain file; a bundle holds plain files only, copy it with their content")
    if status.st_nlink != 1:
        raise BundleError(f"{path}: has another name as well, a hard link; a bundle holds plain files only, copy it")
    if size is None:
        if status.st_size > manifests.MOST_BYTES:
            raise BundleError(f"{path}: has {status.st_size} bytes, a manifest has at most {manifests.MOST_BYTES}")
        return status.st_size
    if status.st_size != size:
        raise BundleError(f"{path}: has {status.st_size} bytes instead of {size}; copy the whole bundle again")
    return size


def _holes(handle: int, size: int) -> int:
    """Bytes of a file that are on no disk: terabytes of them cost nothing to make and hours to hash."""
    if size <= _MOST_HOLES:
        return 0
    data = place = 0
    for _ in range(_MOST_EXTENTS):
        try:
            start = os.lseek(handle, place, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # the file system does not tell
                data = size
            break
        place = os.lseek(handle, start, os.SEEK_HOLE)
        data += place - start
    else:
        data = size
    os.lseek(handle, 0, os.SEEK_SET)
    return size - data


def _facts(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"size": size, "sha256": _sha256(path, size)}


def _bundle_id(files: dict[str, Any], manifest: dict[str, Any]) -> str:
    content = {
        "files": {name: files[name]["sha256"] for name in sorted(files)},
        **{
            key: manifest.get(key)
            for key in ("model", "configuration", "feature_set", "data_fingerprint", "catalog_version")
        },
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(path, size):
        digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flushes a file, or the names in a directory, to the disk: what is there survives a loss of power from now on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
