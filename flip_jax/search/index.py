"""An index of face embeddings on disk, and nearest neighbours under a filter; no jax.

An index is a folder:

    vectors.faiss    unit vectors float32 [N, E] in a graph of near neighbours (HNSW)
    attributes.npy   int8 [40, N]: 1 present, 0 absent, -1 unknown
    records.npy      int64 [N]: number of each face's record in the split it was made from
    manifest.json    what it was made from, sizes and SHA-256 of the files above

It holds no picture: these stay in the data set, which is known by the hash of its manifest.
"""

from __future__ import annotations

from pathlib import Path

import faiss
import msgspec
import numpy as np

import flip_jax
from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.records import file_sha256

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FILES = VECTORS, ATTRIBUTE_FILE, RECORDS = "vectors.faiss", "attributes.npy", "records.npy"
NEIGHBOURS = 32  # of a vector in the graph
BUILD_EFFORT = 200  # candidates looked at when a vector is added
EFFORTS = (64, 128, 256, 512, 1024, 2048, 4096)  # candidates looked at in a search
RECALL = 0.98  # that the effort of an index must reach on captions of its own faces
# A walk takes as long per candidate as comparing with so many vectors that lie in a row; measured
# with 100,000 vectors of 256 dimensions.
COST_PER_CANDIDATE = 100
# A filter that contradicts the query leaves faces far from where a walk leads, and the walk misses
# some of them without a sign. So many faces are compared in about 20 ms, which misses none.
EXACT_FILTERED = 200_000
_AGAIN = "build it again with `python -m flip_jax.search index`"


class File(msgspec.Struct, kw_only=True):
    bytes: int
    sha256: str


class Examples(msgspec.Struct, kw_only=True):
    """Queries to start from, out of the index itself."""

    captions: list[str] = msgspec.field(default_factory=list)
    faces: list[int] = msgspec.field(default_factory=list)
    sketches: list[int] = msgspec.field(default_factory=list)  # faces with strokes


class Manifest(msgspec.Struct, kw_only=True):
    """What `manifest.json` holds."""

    format_version: int = FORMAT_VERSION
    created_by: str = f"flip_jax {flip_jax.__version__}"
    library: str = f"faiss {faiss.__version__}"
    checkpoint: str  # where it was
    checkpoint_step: int
    checkpoint_digest: str  # of weights, config and vocabulary; see `identity.weights_digest`
    data: str  # where it was
    data_hash: str  # SHA-256 of the data set's manifest
    split: str
    faces: int
    effort: int  # candidates looked at in a search; `faces` = compare with all
    left_out: int  # records that could not be read
    embed_dim: int
    examples: Examples
    files: dict[str, File] = msgspec.field(default_factory=dict)


class _Version(msgspec.Struct):
    format_version: int


class FaceIndex:
    """An index in memory, about 1.4 KB per face at 256 dimensions. N faces, E joint embedding.

    Safe to share between threads.

    Attributes:
      manifest: see `Manifest`.
      attributes: int8 [40, N]; records: int64 [N].

    Raises:
      FileNotFoundError: no such folder, or no index in it.
      ValueError: an index of another version.
      OSError: a file is missing or damaged.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.manifest = load_manifest(self.path)
        for name in FILES:
            _check_file(self.path / name, self.manifest.files.get(name))
        self.attributes = np.load(self.path / ATTRIBUTE_FILE, allow_pickle=False)
        self.records = np.load(self.path / RECORDS, allow_pickle=False)
        # The graph is a view of what was read, which must outlive it.
        self._owner = faiss.read_index(str(self.path / VECTORS))
        self._graph = faiss.downcast_index(self._owner)
        faces, dim = self.manifest.faces, self.manifest.embed_dim
        found = (self._graph.ntotal, self._graph.d, self.attributes.shape, self.records.shape)
        if found != (faces, dim, (len(ATTRIBUTES), faces), (faces,)):
            raise OSError(f"index {self.path}: its files do not belong together; {_AGAIN}")

    def __len__(self) -> int:
        return self.manifest.faces

    def vector(self, face: int) -> np.ndarray:
        """Unit vector float32 [E] of a face, 0 <= face < N."""
        return self._graph.reconstruct(face)

    def search(
        self, query: np.ndarray, count: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The faces of greatest cosine.

        Few faces are all compared; among many the graph is walked, which finds nearly all of the
        nearest.

        Args:
          query: float32 [E], unit norm.
          count: how many, at least 1.
          allowed: bool [N], which faces may be found; None = all.

        Returns:
          (faces int64 [n], cosines float32 [n]), best first; n is `count`, or the number of faces
          allowed if that is less.
        """
        available = len(self) if allowed is None else int(np.count_nonzero(allowed))
        count = min(count, available)
        if count == 0:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        if allowed is None or available == len(self):
            selector, is_exact = None, self.manifest.effort >= len(self)
        else:
            selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
            is_exact = available <= EXACT_FILTERED
        # A walk meets as many allowed faces as their share of all.
        effort = int(max(self.manifest.effort, 2 * count) * len(self) / available)
        if not is_exact and effort * COST_PER_CANDIDATE < available:
            cosines, faces = walk(self._graph, query[None], count, effort, selector)
            if faces[0, -1] >= 0:  # else the walk ended early
                return faces[0], cosines[0]
        cosines, faces = compare(self._graph, query[None], count, selector)
        return faces[0], cosines[0]


def new_graph(dim: int) -> faiss.IndexHNSWFlat:
    """An empty graph for unit vectors float32 [n, dim]."""
    graph = faiss.IndexHNSWFlat(dim, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = BUILD_EFFORT
    return graph


def walk(
    graph: faiss.IndexHNSWFlat,
    queries: np.ndarray,
    count: int,
    effort: int,
    selector: faiss.IDSelector | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(cosines float32, vectors int64 or -1) [Q, count] of nearly the nearest to float32 [Q, E]."""
    options = faiss.SearchParametersHNSW(efSearch=effort, sel=selector)
    return graph.search(queries, count, params=options)


def compare(
    graph: faiss.IndexHNSWFlat,
    queries: np.ndarray,
    count: int,
    selector: faiss.IDSelector | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """As `walk`, and exact: compares with every vector that `selector` lets through."""
    options = None if selector is None else faiss.SearchParameters(sel=selector)
    return faiss.downcast_index(graph.storage).search(queries, count, params=options)


def recall(found: np.ndarray, nearest: np.ndarray) -> float:
    """Share of `nearest` int64 [Q, k] that is in the same row of `found` int64 [Q, k]."""
    hits = [len(np.intersect1d(*rows)) for rows in zip(found, nearest, strict=True)]
    return float(np.sum(hits)) / nearest.size


def least_effort(graph: faiss.IndexHNSWFlat, queries: np.ndarray) -> int:
    """The least effort whose recall@10 on float32 [Q, E] is `RECALL`.

    The number of vectors, if comparing with all of them takes no longer than that.
    """
    count = min(10, graph.ntotal)
    efforts = [e for e in EFFORTS if e * COST_PER_CANDIDATE < graph.ntotal]
    nearest = compare(graph, queries, count)[1] if efforts else None
    for effort in efforts:
        if recall(walk(graph, queries, count, effort)[1], nearest) >= RECALL:
            return effort
    return graph.ntotal


def write_index(
    folder: Path,
    graph: faiss.IndexHNSWFlat,
    attributes: np.ndarray,
    records: np.ndarray,
    manifest: Manifest,
) -> None:
    """Writes the files of an index; `folder` must not be there."""
    folder.mkdir()
    faiss.write_index(graph, str(folder / VECTORS))
    np.save(folder / ATTRIBUTE_FILE, attributes)
    np.save(folder / RECORDS, records)
    for name in FILES:
        file = folder / name
        manifest.files[name] = File(bytes=file.stat().st_size, sha256=file_sha256(file))
    text = msgspec.json.format(msgspec.json.encode(manifest))
    (folder / MANIFEST).write_bytes(text)


def load_manifest(path: Path) -> Manifest:
    """Reads `path/manifest.json`.

    Raises:
      FileNotFoundError: no such folder, or no index in it.
      ValueError: not the manifest of an index, or one of another version.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no finished index; {_AGAIN}")
    data = file.read_bytes()
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version == FORMAT_VERSION:
            return msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{file} is not the manifest of an index: {error}") from error
    raise ValueError(
        f"index {path} has format version {version}, this release reads {FORMAT_VERSION}; {_AGAIN}"
    )


def _check_file(path: Path, file: File | None) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the index again or {_AGAIN}")
    found = File(bytes=path.stat().st_size, sha256=file_sha256(path))
    if found != file:
        raise OSError(f"{path} is damaged; copy the index again or {_AGAIN}")
