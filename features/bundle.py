"""Training's hand-over to serving: a directory, content-addressed, published by rename and never changed afterwards.

A flipped byte in an index or a model usually loads and answers wrongly without a word, so every file is hashed before
a parser sees it, and the parser gets the very bytes that were hashed: a private copy, or sealed memory that the workers
of a service share (`features.shared_arrays`). No file of a bundle is ever mapped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pyarrow as pa

from features import manifest as manifests
from features.arrow_file import read_table
from features.errors import BundleError
from features.files import check_size, pieces, sha256, sync
from features.limits import memory
from features.manifest import FORMAT, MOST_BYTES, Manifest, ModelSpec, content_id
from features.npy_file import Shape, read_array, read_header

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

TABLES = (
    "index.faiss",
    "items.arrow",
    "neighbor_scores.npy",
    "neighbors.npy",
    "token_offsets.npy",
    "tokens.npy",
    "vectors.npy",
    "vocabulary.arrow",
)
"""Files whose size grows with the items: serving reads them once a host, into memory that its processes share."""

_FOLDER_MODE, _FILE_MODE = 0o755, 0o644
"""A bundle holds no user's data, and may be served by another user than the one that trained it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle.

    Attributes:
        path: Its directory.
        manifest: Its manifest.
    """

    path: Path
    manifest: Manifest

    @property
    def bundle_id(self) -> str:
        """Its name, made of its content."""
        return self.manifest.bundle_id

    @property
    def model(self) -> ModelSpec:
        """Sizes, names and weights by which its models are fed and combined."""
        return self.manifest.model

    def table(
        self,
        name: str,
        types: Mapping[str, pa.DataType],
        required: frozenset[str],
        content: bytes | memoryview | None = None,
    ) -> pa.Table:
        """Reads an Arrow file, every value of it checked.

        Args:
            name: The file.
            types: The columns that it may have, and their types.
            required: Those that it must have, without a NULL.
            content: The bytes of the file, if `pieces` gave them already.

        Raises:
            BundleError: The file changed after the bundle was opened, or is no sound table of these columns.
        """
        try:
            return read_table(self.read(name) if content is None else content, types, required)
        except ValueError as error:
            raise self.malformed(name, f"Arrow cannot read it ({error})") from error

    def array(self, name: str, dtype: npt.DTypeLike, shape: Shape) -> npt.NDArray[Any]:
        """Reads a numpy file.

        Args:
            name: The file.
            dtype: Type that its numbers have.
            shape: Shape that it has; None: any size.

        Raises:
            BundleError: The file changed after the bundle was opened, or is no array of this type and shape.
        """
        try:
            return read_array(self.read(name), dtype, shape)
        except ValueError as error:
            raise self.malformed(name, str(error)) from error

    def malformed(self, name: str, reason: str) -> BundleError:
        """Returns the error about a file whose content no export of this version writes."""
        return BundleError(f"{self.path / name}: {reason}; export the run again")

    def stream_array(
        self, name: str, dtype: npt.DTypeLike, shape: Shape
    ) -> tuple[tuple[int, ...], Iterator[bytes | memoryview]]:
        """Returns the shape of a numpy file and its numbers piece by piece, so that a large one is in memory once.

        The last piece comes only if the file is whole and its hash is right; see `array` for arguments and errors.
        """
        pieces = self.pieces(name)
        first = next(pieces, b"")
        try:
            sizes, start = read_header(first, self.manifest.files[name].size, dtype, shape)
        except ValueError as error:
            # A changed file is not a malformed one: the hash of all of it tells which of the two it is.
            for _ in pieces:
                pass
            raise self.malformed(name, str(error)) from error

        def numbers() -> Iterator[bytes | memoryview]:
            yield memoryview(first)[start:]
            yield from pieces

        return sizes, numbers()

    def read(self, name: str) -> bytes:
        """Returns the bytes of a file, hashed again on the way, so that the parser gets what was verified.

        Raises:
            BundleError: The file changed after the bundle was opened.
        """
        return b"".join(self.pieces(name))

    def pieces(self, name: str) -> Iterator[bytes]:
        """Yields the bytes of a file as `read` returns them; a reader must not use them before the last one has come.

        Raises:
            BundleError: The file is not the one that the manifest lists; raised after the last piece.
        """
        digest, facts = hashlib.sha256(), self.manifest.files[name]
        try:
            for piece in pieces(self.path / name, facts.size):
                digest.update(piece)
                yield piece
        except BundleError as error:
            raise BundleError(f"{error} (changed while the bundle was being loaded)") from error
        if digest.hexdigest() != facts.sha256:
            raise BundleError(f"{self.path / name}: changed while the bundle was being loaded; publish it again")


def publish(staging: Path, out: Path, manifest: dict[str, Any]) -> str:
    """Publishes a directory of finished files as a bundle.

    Args:
        staging: Holds every file of `FILES`, on the same file system as `out`; gone afterwards.
        out: Directory of the bundle; must not exist, unless it holds this very bundle.
        manifest: The manifest but for `format`, `bundle_id` and `files`, which are filled in here.

    Returns:
        The bundle id.

    Raises:
        BundleError: A file is missing, a field of the manifest is out of range, or `out` holds something else.
    """
    missing = [name for name in FILES if not (staging / name).is_file()]
    if missing:
        raise BundleError(f"{staging}: {', '.join(missing)} missing; a bundle needs every one of its files")
    files = {name: _facts(staging / name) for name in FILES}
    bundle_id = content_id({**manifest, "files": files})
    manifest = {"format": FORMAT, "bundle_id": bundle_id, **manifest, "files": files}
    # The same run exported twice is the same bundle, so a script may be repeated.
    if out.exists():
        if open_bundle(out).bundle_id != bundle_id:
            raise BundleError(f"{out}: holds another bundle; a bundle is never changed, choose another directory")
        shutil.rmtree(staging)
        return bundle_id
    content = json.dumps(manifest, indent=1, sort_keys=True).encode()
    # Read as serving will read it, so that what would be refused there is not published.
    manifests.parse(content, str(out / MANIFEST))
    (staging / MANIFEST).write_bytes(content)
    # Each file, then their names, then the rename: a loss of power leaves the whole bundle or none.
    for name in (*FILES, MANIFEST):
        (staging / name).chmod(_FILE_MODE)
        sync(staging / name)
    staging.chmod(_FOLDER_MODE)
    sync(staging)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging.rename(out)
    sync(out.parent)
    return bundle_id


def open_bundle(path: Path, bundle_id: str = "", later: Collection[str] = ()) -> Bundle:
    """Verifies every file of a bundle, before anything parses one.

    Args:
        path: The directory, or a link to it; the link is followed once, and may move afterwards.
        bundle_id: The bundle that has to be there; empty: any.
        later: Files whose hash is left to `Bundle.read` and its like, because the caller reads each of them, or has
            what was read of them in sealed memory. Their presence and their size are verified all the same.

    Raises:
        BundleError: The directory is no bundle, is half copied, was changed, or holds links, devices, files of another
            bundle or files of none; its manifest is malformed; or it is another bundle than the one asked for.
    """
    try:
        # Followed once: a link that is moved meanwhile must not mix the files of two bundles.
        path = path.resolve()
        entries = {entry.name for entry in path.iterdir()}
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        reason = error.strerror if isinstance(error, OSError) else "a link that leads to itself"
        raise BundleError(f"{path}: no bundle here ({reason}); make one with `penchant export`") from error
    manifest = _read_manifest(path)
    if bundle_id and manifest.bundle_id != bundle_id:
        raise BundleError(
            f"{path}: holds the bundle {manifest.bundle_id}, and the running service serves {bundle_id}; restart "
            "the service to serve the other one, or put this one back"
        )
    _verify(path, manifest, entries, later)
    return Bundle(path, manifest)


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not os.path.lexists(file):
        raise BundleError(f"{path}: no bundle here ({MANIFEST} is missing); make one with `penchant export`")
    return manifests.parse(b"".join(pieces(file, most=MOST_BYTES)), str(file))


def _verify(path: Path, manifest: Manifest, entries: set[str], later: Collection[str]) -> None:
    """Refuses a directory whose files are not those that its manifest lists, to the byte but for those of `later`."""
    files = manifest.files
    if sorted(files) != sorted(FILES):
        raise BundleError(f"{path / MANIFEST}: lists {sorted(files)}, a bundle of format {FORMAT} has {list(FILES)}")
    # A file that no manifest names is verified by none, and is a sign of a copy that mixed two bundles.
    extra = entries - {*FILES, MANIFEST}
    if extra:
        names = ", ".join(map(json.dumps, sorted(extra)))
        raise BundleError(f"{path}: {names} belong to no bundle; remove them or publish again")
    if manifest.size > memory():
        raise BundleError(f"{path / MANIFEST}: its files are larger than the memory that this process may use")
    for name in FILES:
        if name in later:
            check_size(path / name, files[name].size)
        elif sha256(path / name, files[name].size) != files[name].sha256:
            raise BundleError(f"{path / name}: its sha256 is not the manifest's; it was changed or is another bundle's")
    # Last: a file that was changed is the more helpful thing to name.
    if manifest.bundle_id != manifest.content_id:
        raise BundleError(f"{path / MANIFEST}: the bundle id does not fit its content; publish the bundle again")


def _facts(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"size": size, "sha256": sha256(path, size)}
