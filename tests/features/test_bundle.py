"""A bundle is what was published, to the byte, or it is refused with the file and the reason."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from features import bundle
from features.errors import BundleError
from features.manifest import ActionSpec, ModelSpec


def staged(path, salt: str = ""):
    path.mkdir()
    for name in bundle.FILES:
        (path / name).write_bytes(f"{name}{salt}".encode() * 100)
    return path


MODEL = {
    "dim": 4, "max_length": 5, "max_tokens": 3, "max_categories": 2, "token_buckets": 7, "category_buckets": 7,
    "creator_buckets": 7, "event_types": ["like"], "seen_types": ["like"], "action_weights": [1.0], "blend": 0.5,
    "actions": [{"name": "like", "event_type": "like", "min_value": None}], "repeats": False, "base_rates": [-1.0],
}  # fmt: skip
MANIFEST = {
    "model": MODEL, "configuration": {}, "feature_set": {"fingerprint": "f"}, "data_fingerprint": "d",
    "catalog_version": 0,
}  # fmt: skip


@pytest.fixture
def published(tmp_path):
    bundle.publish(staged(tmp_path / "staging"), tmp_path / "bundle", MANIFEST)
    return tmp_path / "bundle"


def test_what_is_published_opens(published, tmp_path):
    opened = bundle.open_bundle(published)
    assert opened.model == ModelSpec.of(MODEL)
    assert (opened.model.dim, opened.model.shapes.token_buckets, opened.model.base_rates) == (4, 7, (-1.0,))
    assert opened.model.actions == (ActionSpec("like", "like"),)
    assert opened.read("index.faiss") == b"index.faiss" * 100
    assert len(opened.bundle_id) == 16
    assert not (tmp_path / "staging").exists()


def test_the_same_content_has_the_same_id_and_may_be_published_again(published, tmp_path):
    again = bundle.publish(staged(tmp_path / "again"), published, MANIFEST)
    assert again == bundle.open_bundle(published).bundle_id


def test_another_bundle_is_never_overwritten(published, tmp_path):
    with pytest.raises(BundleError, match="another bundle"):
        bundle.publish(staged(tmp_path / "other", "!"), published, MANIFEST)


def test_a_file_that_is_missing_before_publication(tmp_path):
    staging = staged(tmp_path / "staging")
    (staging / "ranker.onnx").unlink()
    with pytest.raises(BundleError, match=r"ranker\.onnx missing"):
        bundle.publish(staging, tmp_path / "bundle", MANIFEST)


def flip(path):
    content = bytearray((path / "index.faiss").read_bytes())
    content[50] ^= 1
    (path / "index.faiss").write_bytes(content)


def cut(path):
    (path / "vectors.npy").write_bytes((path / "vectors.npy").read_bytes()[:-1])


def half_copied(path):
    (path / "ranker.onnx").unlink()


def stranger(path):
    (path / "index.faiss.tmp").write_bytes(b"")


def hard_link(path):
    os.link(path / "tokens.npy", path.parent / "elsewhere")


def soft_link(path):
    shutil.move(path / "tokens.npy", path.parent / "elsewhere")
    (path / "tokens.npy").symlink_to(path.parent / "elsewhere")


def edited(path):
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["model"]["dim"] = 5
    (path / "manifest.json").write_text(json.dumps(manifest))


def no_manifest(path):
    (path / "manifest.json").unlink()


def half_manifest(path):
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-40])


def future(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, r"index\.faiss: its sha256"),
        (cut, r"vectors\.npy: has \d+ bytes instead of"),
        (half_copied, r"ranker\.onnx: missing"),
        (stranger, r'"index\.faiss\.tmp" belong'),
        (hard_link, r"tokens\.npy: has another name as well"),
        (soft_link, r"tokens\.npy: a link"),
        (edited, "bundle id does not fit"),
        (no_manifest, "no bundle here"),
        (half_manifest, "not JSON"),
        (future, "format 99"),
    ],
)
def test_damage_is_refused_with_file_and_reason(published, damage, message):
    damage(published)
    with pytest.raises(BundleError, match=message):
        bundle.open_bundle(published)


def test_files_of_two_bundles_do_not_mix(published, tmp_path):
    bundle.publish(staged(tmp_path / "other-staging", "!"), tmp_path / "other", MANIFEST)
    shutil.copy(tmp_path / "other" / "vectors.npy", published / "vectors.npy")
    with pytest.raises(BundleError, match=r"vectors\.npy"):
        bundle.open_bundle(published)


def test_a_file_that_changes_between_verification_and_parsing(published):
    opened = bundle.open_bundle(published)
    flip(published)
    with pytest.raises(BundleError, match="changed while"):
        opened.read("index.faiss")


def test_a_link_that_moves_moves_no_opened_bundle(published, tmp_path):
    other = bundle.publish(staged(tmp_path / "other-staging", "!"), tmp_path / "other", MANIFEST)
    link = tmp_path / "current"
    link.symlink_to("bundle")
    opened = bundle.open_bundle(link)
    (tmp_path / "next").symlink_to("other")
    (tmp_path / "next").rename(link)
    assert opened.path == published.resolve()
    assert opened.read("index.faiss") == b"index.faiss" * 100
    assert bundle.open_bundle(link).bundle_id == other != opened.bundle_id


def test_another_bundle_than_the_one_asked_for_is_refused_with_both_names(published):
    there = bundle.open_bundle(published).bundle_id
    assert bundle.open_bundle(published, there).bundle_id == there
    with pytest.raises(BundleError, match=rf"holds the bundle {there}, and the running service serves other; restart"):
        bundle.open_bundle(published, "other")
