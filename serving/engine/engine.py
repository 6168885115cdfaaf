"""A bundle made ready to answer: verified, parsed, replayed, with one Pipeline per method built from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features.bundle import TABLES, Bundle, open_bundle
from features.catalog import Catalog
from features.errors import BundleError
from features.keys import event_type_key
from features.transforms import ItemInputShapes, item_text, text_tokens
from serving.bundle.bitmap import clear_keys, clear_rows, first_allowed
from serving.bundle.golden import replay
from serving.bundle.model import Device, Model, uses_cuda
from serving.bundle.reading import bounded
from serving.bundle.tables import read_tables
from serving.bundle.text_index import LexicalIndex
from serving.bundle.vector_index import Index, can_scan_on
from serving.engine.pipelines import CHOICES, Dependencies, PipelineBuilder, candidate_count
from serving.engine.preparation import SHARED_TABLES
from serving.engine.warm_up import warm_models, warm_pipelines
from serving.pipeline.runner import Pipeline


@dataclass(frozen=True, slots=True)
class Engine:
    """One bundle, ready to answer; a request takes the reference once, so no answer mixes two.

    Attributes:
        bundle: The verified bundle.
        model: Its models.
        catalog: Its items, with what was put since.
        lexical: Their words, searchable.
        shapes: How items and words are fed to the encoders.
        pipelines: The stages of each method: "recommend", "search", "rank", "similar".
        event_types: Event type key -> name, of the types the bundle knows.
    """

    bundle: Bundle
    model: Model
    catalog: Catalog
    lexical: LexicalIndex
    shapes: ItemInputShapes
    pipelines: Mapping[str, Pipeline]
    event_types: Mapping[int, str]

    @property
    def bundle_id(self) -> str:
        """The name of the bundle."""
        return self.bundle.bundle_id

    @property
    def surfaces(self) -> list[str]:
        """The names of the surfaces that the ranker was trained on."""
        return list(self.bundle.model.surface_rates)

    @property
    def actions(self) -> list[str]:
        """The names of the ranker's actions."""
        return self.bundle.model.action_names


class EngineRef:
    """A reference to the engine in use."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine


def open_engine(
    path: Path, dependencies: Dependencies, bundle_id: str = "", sealed: Mapping[str, int] | None = None
) -> Engine:
    """Opens a bundle, replays its golden requests and builds its pipelines.

    Args:
        path: Directory of the bundle.
        dependencies: The parts of the process that it is opened in.
        bundle_id: The bundle that has to be there; empty where any will do.
        sealed: Handles of shared memory: `SHARED_TABLES` is that of its tables, see `serving.engine.preparation`.

    Raises:
        BundleError: The bundle is damaged, contradicts itself, or answers its golden requests wrongly.
        ConfigError: The device asked for is not there.
    """
    config, bundle = dependencies.config, open_bundle(path, bundle_id, TABLES)
    fingerprint = bundle.manifest.feature_fingerprint
    if fingerprint != bundle.model.declared.fingerprint():
        raise BundleError(f"{path}: made for other features ({fingerprint[:12]}); export the run with this version")
    spec = bundle.model
    with bounded_memory(bundle, config.device):
        tables = read_tables(bundle, (sealed or {}).get(SHARED_TABLES))
        catalog = tables.catalog
        model = Model(bundle, config.device)
        # `cuda` insists on both; `auto` uses for each what the machine has.
        on_device = model.device == "cuda" and (config.device == "cuda" or can_scan_on("cuda"))
        index = Index(tables.index, catalog, "cuda" if on_device else "cpu", checked=True)
        model.probe(spec.shapes, len(spec.event_types))
        # Before the catalogue takes live changes, as these would change the best items.
        replay(bundle, model, catalog, index, tables.neighbors.weights)
        pipelines = PipelineBuilder(bundle, model, tables, index, dependencies).pipelines()
        _warm_up(catalog, tables.lexical)
        warm_models(model, spec.shapes, candidate_count(bundle, config))
        warm_pipelines(pipelines, catalog, [*spec.event_types, *CHOICES])
        event_types = {event_type_key(name): name for name in spec.event_types}
        return Engine(bundle, model, catalog, tables.lexical, spec.shapes, pipelines, event_types)


@contextmanager
def bounded_memory(bundle: Bundle, device: Device) -> Iterator[None]:
    """Bounds the memory that reading a bundle and asking its models for the first time may take.

    A GPU reserves addresses far beyond what it uses, so there is no bound where one may be used.

    Raises:
        BundleError: It takes more.
    """
    if uses_cuda(device):
        yield
        return
    with bounded(bundle):
        yield


def _warm_up(catalog: Catalog, lexical: LexicalIndex) -> None:
    """Compiles the kernels that the golden requests do not reach, so that no caller waits for them."""
    rows = np.arange(min(1, catalog.size), dtype=np.int32)
    bitmap = catalog.eligible_bitmap(0).copy()
    first_allowed(rows, bitmap, 1)
    clear_keys(bitmap, catalog.columns.category, np.ones(1, np.uint64))
    clear_rows(bitmap, rows)
    tokens = text_tokens("some words")
    # Live items have postings of their own, which can be written to where those of the bundle cannot.
    live = LexicalIndex(np.array([0, tokens.size]), tokens)
    live.put([0], [tokens])
    live.search(tokens, 1)
    live.score(tokens, np.zeros(1, np.int32))
    for row in rows.tolist():
        tokens = text_tokens(item_text(catalog.item(row)))
        lexical.search(tokens, 1, catalog.eligible_bitmap(0))
        lexical.score(tokens, rows)
