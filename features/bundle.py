"""Training's hand-over to serving: a directory, content-addressed, published by rename and never changed afterwards.

A flipped byte in an index or a model usually loads and answers wrongly without a word, so every file is hashed before
a parser sees it, and the parser gets the very bytes that were hashed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from features.errors import BundleError

FORMAT = 1
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


@dataclasses.dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle.

    Attributes:
        path: Its directory.
        bundle_id: Its name, made of its content.
        manifest: Its manifest.
    """

    path: Path
    bundle_id: str
    manifest: dict[str, Any]

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
        content = (self.path / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.manifest["files"][name]["sha256"]:
            raise BundleError(f"{self.path / name}: changed while the bundle was being loaded; publish it again")
        return content


def publish(staging: Path, out: Path, manifest: dict[str, Any]) -> str:
    """Turns a directory of finished files into a bundle.

    Args:
        staging: Holds every file of `FILES`, on the same file system as `out`; gone afterwards.
        out: Where the bundle shall be; must not exist, unless it is this very bundle.
        manifest: What the manifest says beside `format`, `bundle_id` and `files`, which are filled in here.

    Returns:
        The bundle id.

    Raises:
        BundleError: A file is missing, or `out` holds something else.
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
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    for name in (*FILES, MANIFEST):
        sync(staging / name)
    sync(staging)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging.rename(out)
    sync(out.parent)
    return str(manifest["bundle_id"])


def open_bundle(path: Path, bundle_id: str = "") -> Bundle:
    """Verifies every file of a bundle, before anybody parses one.

    Args:
        path: The directory, or a link to it; the link is followed once, and may move afterwards.
        bundle_id: The bundle that has to be there; empty where any will do.

    Raises:
        BundleError: The directory is no bundle, is half copied, was changed, or holds links, files of another bundle or
            files of none; or it is another bundle than the one asked for.
    """
    path = path.resolve()
    manifest = _manifest(path)
    if bundle_id and manifest["bundle_id"] != bundle_id:
        raise BundleError(
            f"{path}: holds the bundle {manifest['bundle_id']}, and the running service serves {bundle_id}; restart "
            "the service to serve the other one, or put this one back"
        )
    files = manifest["files"]
    if sorted(files) != sorted(FILES):
        raise BundleError(f"{path / MANIFEST}: lists {sorted(files)}, a bundle of format {FORMAT} has {list(FILES)}")
    extra = {entry.name for entry in path.iterdir()} - {*FILES, MANIFEST}
    if extra:
        raise BundleError(f"{path}: {', '.join(sorted(extra))} belong to no bundle; remove them or publish again")
    for name in FILES:
        _verify(path / name, files[name])
    if manifest["bundle_id"] != _bundle_id(files, manifest):
        raise BundleError(f"{path / MANIFEST}: the bundle id does not fit its content; publish the bundle again")
    return Bundle(path, manifest["bundle_id"], manifest)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except OSError as error:
        raise BundleError(
            f"{path}: no bundle here ({MANIFEST}: {error.strerror}); make one with `penchant export`"
        ) from error
    except ValueError as error:
        raise BundleError(f"{path / MANIFEST}: not JSON ({error}); publish the bundle again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise BundleError(f"{path / MANIFEST}: format {found!r}, this version reads {FORMAT}; export the run again")
    for key in ("bundle_id", "files", "model", "configuration", "feature_set"):
        if key not in manifest:
            raise BundleError(f"{path / MANIFEST}: has no {key!r}; publish the bundle again")
    return manifest


def _verify(path: Path, facts: dict[str, Any]) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise BundleError(f"{path}: missing; copy the whole bundle again") from None
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise BundleError(f"{path}: is a link, or has one; a bundle holds plain files only, copy it with their content")
    if status.st_size != facts["size"]:
        raise BundleError(f"{path}: has {status.st_size} bytes instead of {facts['size']}; copy the whole bundle again")
    if _sha256(path) != facts["sha256"]:
        raise BundleError(f"{path}: its sha256 is not the manifest's; it was changed or belongs to another bundle")


def _facts(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _bundle_id(files: dict[str, Any], manifest: dict[str, Any]) -> str:
    content = {
        "files": {name: files[name]["sha256"] for name in sorted(files)},
        **{
            key: manifest.get(key)
            for key in ("model", "configuration", "feature_set", "data_fingerprint", "catalog_version")
        },
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flushes a file, or the names in a directory, to the disk: what is there survives a loss of power from now on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
