"""The models of a bundle as ONNX Runtime sessions: on CUDA if it is asked for and available, else on the CPU.

A session is given one thread and never spins: a service scales by processes, and a spinning thread starves the others.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as _onnxruntime
import onnxruntime.capi.onnxruntime_pybind11_state as _state

from features.bundle import Bundle
from features.errors import BundleError
from features.model_inputs import ranker_width
from features.transforms import ItemInputShapes
from serving.bundle.graph_file import check_graph
from serving.bundle.reading import Announce, silent
from serving.errors import ConfigError, ServingError

Device = Literal["auto", "cpu", "cuda"]

# Typed Any because the package has no stubs.
onnxruntime: Any = _onnxruntime

_F32 = npt.NDArray[np.float32]
_I64 = npt.NDArray[np.int64]
_Shapes = dict[str, list[int | None]]
_ERRORS_ONLY = 3
CUDA = {
    # TensorFloat-32 keeps 10 bits of a number: a golden answer would no longer be met.
    "use_tf32": "0",
    # The workers of a machine share the memory of its GPU, so none takes more than it needs.
    "arena_extend_strategy": "kSameAsRequested",
}
"""Options of the CUDA provider."""
_LONGEST_REASON = 300
# Every error that a session can raise; they share no base of their own.
_FAULTS = tuple(kind for kind in vars(_state).values() if isinstance(kind, type) and issubclass(kind, Exception))


class ModelError(ServingError):
    """A model that failed, or answered with NaN or infinity; the caller goes on without its answer."""


class Model:
    """The four models of a bundle; any number of threads may call at once."""

    def __init__(self, bundle: Bundle, device: Device = "cpu", announce: Announce = silent) -> None:
        """Loads the models from the bundle's verified bytes.

        Args:
            bundle: An opened bundle.
            device: `cuda` insists on it, `auto` takes it if it is available.
            announce: Called with the name of each file before it is read.

        Raises:
            BundleError: A file is no model, or its inputs and outputs are not those that the manifest promises.
            ConfigError: `cuda` is asked for and not available.
        """
        self._path, self._announce = bundle.path, announce
        self.dim, self.max_length = bundle.model.dim, bundle.model.max_length
        self.actions = len(bundle.model.actions)
        self.features = ranker_width(self.actions, len(bundle.model.declared))
        self._providers = _providers(device)
        self.device = "cuda" if len(self._providers) > 1 else "cpu"
        self._insists = device == "cuda"
        dim, features = self.dim, self.features
        sequence: _Shapes = {"vectors": [None, None, dim], "types": [None, None], "lengths": [None]}
        words: _Shapes = {"tokens": [None, None]}
        content: _Shapes = {**words, "categories": [None, None], "creators": [None], "prices": [None]}
        pairs: _Shapes = {"user": [1, dim], "items": [None, dim], "features": [None, features]}
        self._user = self._load(bundle, "user_encoder.onnx", sequence, [None, dim])
        self._item = self._load(bundle, "item_encoder.onnx", content, [None, dim])
        self._query = self._load(bundle, "query_encoder.onnx", words, [None, dim])
        self._ranker = self._load(bundle, "ranker.onnx", pairs, [None, self.actions])

    def probe(self, shapes: ItemInputShapes, event_types: int, announce: Announce = silent) -> None:
        """Asks each model for its smallest and its largest inputs, so that no request is the first to.

        Args:
            shapes: How items and words are fed to the encoders.
            event_types: Number of the event types that the user encoder knows.
            announce: Called with the name of each file before its model is asked.

        Raises:
            BundleError: A model fails, answers NaN or infinity or in another shape, or its tables are smaller than the
                manifest promises.
        """
        probes: dict[str, Callable[[], None]] = {
            "user_encoder.onnx": lambda: self._probe_users(event_types),
            "item_encoder.onnx": lambda: self._probe_items(shapes),
            "query_encoder.onnx": lambda: self._probe_queries(shapes),
            "ranker.onnx": self._probe_ranker,
        }
        for name, probe in probes.items():
            announce(name)
            try:
                probe()
            except ModelError as error:
                raise BundleError(f"{self._path / name}: {error}; export the run again") from error

    def _probe_users(self, event_types: int) -> None:
        for length in sorted({1, self.max_length}):
            vectors = np.zeros((2, length, self.dim), np.float32)
            types = np.full((2, length), event_types, np.int64)
            _require(self.encode_users(vectors, types, np.array([length, 1], np.int64)), 2, self.dim)

    def _probe_items(self, shapes: ItemInputShapes) -> None:
        for count in (1, 2):
            tokens = np.zeros((count, shapes.max_tokens), np.int64)
            categories = np.zeros((count, shapes.max_categories), np.int64)
            tokens[-1], categories[-1] = shapes.token_buckets, shapes.category_buckets
            creators, prices = np.full(count, shapes.creator_buckets, np.int64), np.full(count, -1, np.float32)
            content: dict[str, npt.NDArray[Any]] = {"tokens": tokens, "categories": categories}
            content |= {"creators": creators, "prices": prices}
            _require(self.encode_items(content), count, self.dim)

    def _probe_queries(self, shapes: ItemInputShapes) -> None:
        for word in (0, shapes.token_buckets):
            _require(self.encode_query(np.full(shapes.max_tokens, word, np.int64))[None], 1, self.dim)

    def _probe_ranker(self) -> None:
        user = np.zeros(self.dim, np.float32)
        for count in (1, 2):
            items, features = (np.zeros((count, width), np.float32) for width in (self.dim, self.features))
            _require(self.rank(user, items, features), count, self.actions)

    def encode_user(self, vectors: _F32, types: _I64) -> _F32:
        """Returns the vector of one user.

        Args:
            vectors: Vectors of the items of the user's events, oldest first; float32 [L, D], 1 <= L <= max_length.
            types: Types of the events; int64 [L].

        Returns:
            float32 [D]; the inner product with an item's vector is the relevance.

        Raises:
            ModelError: The model fails, or its answer is not finite.
            ValueError: There is no event, or more than `max_length`.
        """
        user: _F32 = self.encode_users(vectors[None], types[None], np.array([len(types)], np.int64))[0]
        return user

    def encode_users(self, vectors: _F32, types: _I64, lengths: _I64) -> _F32:
        """Returns the vectors of many users, whose events are padded on the right.

        Args:
            vectors: float32 [B, L, D], 0 at padding.
            types: int64 [B, L], 0 at padding.
            lengths: Number of events of each, at least 1; int64 [B].

        Returns:
            float32 [B, D].

        Raises:
            ModelError: The answer is not finite.
            ValueError: A user has no event, or the sequences are longer than `max_length`.
        """
        if not lengths.size or lengths.min() < 1 or types.shape[1] > self.max_length:
            raise ValueError(f"a user's events must be 1 to {self.max_length}; without any there is no vector")
        return self._run(self._user, {"vectors": vectors, "types": types, "lengths": lengths})

    def encode_items(self, inputs: Mapping[str, npt.NDArray[Any]]) -> _F32:
        """Returns the vectors of items by their content.

        Args:
            inputs: `features.transforms.item_inputs` of n items.

        Returns:
            float32 [n, D].

        Raises:
            ModelError: The answer is not finite.
        """
        return self._run(self._item, dict(inputs))

    def encode_query(self, tokens: _I64) -> _F32:
        """Returns the vector of a query's words.

        Args:
            tokens: `tokens` of `features.transforms.query_inputs`; int64 [T] or [1, T].

        Returns:
            float32 [D].

        Raises:
            ModelError: The answer is not finite.
        """
        query: _F32 = self._run(self._query, {"tokens": tokens.reshape(1, -1)})[0]
        return query

    def rank(self, user: _F32, items: _F32, features: _F32) -> _F32:
        """Returns how likely each action is for each candidate.

        Args:
            user: The user's vector; float32 [D].
            items: Vectors of the candidates; float32 [n, D].
            features: `features.assemble.ranker_features` of the candidates; float32 [n, F].

        Returns:
            Logits float32 [n, A], in the order of the manifest's actions; a row never depends on the other candidates.

        Raises:
            ModelError: The answer is not finite.
        """
        if not len(items):  # asked of nothing at all, ONNX Runtime divides by zero, and the process ends
            return np.empty((0, self.actions), np.float32)
        return self._run(self._ranker, {"user": user.reshape(1, -1), "items": items, "features": features})

    def warm(self, items: Mapping[str, npt.NDArray[Any]], candidates: int) -> None:
        """Runs every model once at each size that calls ask for, so that no caller waits for kernels and memory.

        Args:
            items: The largest batch of items that is embedded at once, as `encode_items` takes it.
            candidates: Candidates of a request.

        Raises:
            ModelError: An answer is not finite.
        """
        user = np.zeros(self.dim, np.float32)
        for length in {1, self.max_length}:
            user = self.encode_user(np.zeros((length, self.dim), np.float32), np.zeros(length, np.int64))
        for count in {1, len(items["tokens"])}:
            self.encode_items({name: values[:count] for name, values in items.items()})
        self.encode_query(items["tokens"][:1])
        for count in {1, candidates}:
            features = np.zeros((count, self.features), np.float32)
            self.rank(user, np.zeros((count, self.dim), np.float32), features)

    def _load(self, bundle: Bundle, name: str, inputs: _Shapes, output: list[int | None]) -> Any:
        options = onnxruntime.SessionOptions()
        # Bit-for-bit answers on any number of cores, and a core for each worker.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = _ERRORS_ONLY
        path = bundle.path / name
        self._announce(name)
        content = bundle.read(name)
        # First: the parser of ONNX Runtime trusts a file, and a hostile one could end the process.
        check_graph(content, str(path))
        try:
            session = onnxruntime.InferenceSession(content, options, providers=self._providers)
        except _FAULTS as error:
            reason = " ".join(str(error).split())[:_LONGEST_REASON]
            raise BundleError(f"{path}: ONNX Runtime cannot load it ({reason}); export the run again") from error
        if self.device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
            if self._insists:
                raise ConfigError(
                    "--device cuda: ONNX Runtime has its CUDA provider, but it does not start: install the driver, and "
                    "CUDA and cuDNN in the versions that this ONNX Runtime names (pip install "
                    "'onnxruntime-gpu[cuda,cudnn]'), or choose --device cpu"
                )
            # The session has fallen back to the CPU, and so do the others.
            self.device, self._providers = "cpu", self._providers[-1:]
        _require_shapes(session, path, inputs, output)
        return session

    def _run(self, session: Any, inputs: dict[str, npt.NDArray[Any]]) -> _F32:
        try:
            answer: _F32 = session.run(None, inputs)[0]
        except _FAULTS as error:
            raise ModelError(f"a model failed: {' '.join(str(error).split())[:_LONGEST_REASON]}") from error
        if not np.isfinite(answer).all():
            raise ModelError("a model answered with NaN or infinity; check the vectors and features that it was given")
        return answer


def _require_shapes(session: Any, path: Path, inputs: _Shapes, output: list[int | None]) -> None:
    """Refuses a model whose inputs and outputs are not those that the manifest promises."""
    shapes = {node.name: node.shape for node in session.get_inputs()}
    answer = session.get_outputs()[0].shape
    fit = shapes.keys() == inputs.keys() and all(_fits(shapes[name], inputs[name]) for name in inputs)
    if not (fit and _fits(answer, output)):
        raise BundleError(
            f"{path}: takes {shapes} and answers {answer}, the manifest promises {inputs} and {output} "
            "(None = any); export the run again"
        )


def _require(answer: _F32, count: int, width: int) -> None:
    if answer.shape != (count, width):
        raise ModelError(f"a model answers {list(answer.shape)} instead of [{count}, {width}]")


def uses_cuda(device: Device) -> bool:
    """Returns True if the models would run on a GPU.

    Raises:
        ConfigError: `cuda` is asked for and not available.
    """
    return len(_providers(device)) > 1


def _providers(device: Device) -> list[Any]:
    available = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device == "cuda" and not available:
        raise ConfigError(
            "--device cuda: this ONNX Runtime has no CUDA provider; uninstall onnxruntime and pip install "
            "'penchant[gpu]', which brings onnxruntime-gpu, or choose --device cpu"
        )
    if not available or device == "cpu":
        return ["CPUExecutionProvider"]
    # CUDA and cuDNN may come as packages, where no loader looks; it tells on stdout what it does not find.
    with contextlib.redirect_stdout(sys.stderr):
        onnxruntime.preload_dlls()
    return [("CUDAExecutionProvider", CUDA), "CPUExecutionProvider"]


def _fits(shape: list[Any], expected: list[int | None]) -> bool:
    """Returns True if a shape has the promised sizes; an axis of any size must have no fixed one."""
    return len(shape) == len(expected) and all(
        isinstance(size, str) if promised is None else size == promised
        for size, promised in zip(shape, expected, strict=True)
    )
