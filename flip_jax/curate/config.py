"""Every setting of a curation build: frozen dataclasses with all defaults, and their checks.

The defaults of the filters are the paper's (arXiv 2407.08515). A file under `configs/curate/`
changes a few fields, the command line changes more with `--config.faces.min_side=96`.
"""

from __future__ import annotations

import operator
import shlex
from dataclasses import dataclass, field
from typing import Any, Literal

from flip_jax.config import check_types


@dataclass(frozen=True)
class InputConfig:
    """Where rows come from.

    `kind` says what `paths` are. `table`: .parquet, .csv or .jsonl; a row holds a picture
    (`image_column`), names a file below `images` (`file_column`) or a url (`url_column`). `tar`:
    shards in the layout of img2dataset and WebDataset: members of one name are one sample,
    pictures beside .txt and .json. `folder`: pictures, .txt and .json files side by side.
    """

    kind: Literal["table", "tar", "folder"] = "table"
    # Files, folders or patterns such as data/*.parquet, with spaces between; quoted as in a shell.
    paths: str = ""
    images: str | None = None  # folder of a table's pictures
    # Columns of a table, keys of the .json files of the other kinds. None = there is no such thing.
    id_column: str | None = None  # unique; None = made from the file name or from url and box
    image_column: str | None = None  # picture files as bytes, or structs with a field `bytes`
    file_column: str | None = None  # with `images`
    url_column: str | None = None
    text_column: str | None = None  # None = .txt files, where the kind has them
    box_column: str | None = None
    group_column: str | None = None  # the person
    licence_column: str | None = None
    source_column: str | None = None
    group_prefix: str = ""  # put before the group, to keep data sets apart
    # Four numbers, in pixels: x0, y0, x1, y1 or x, y, width, height.
    box_format: Literal["corners", "size"] = "corners"
    source: str = ""  # of rows without `source_column`
    licence: str = ""  # of rows without `licence_column`
    max_pixels: int = 50_000_000  # a picture that claims more is not decoded
    # Rows that a worker does at a time. Finished chunks survive a kill.
    chunk_rows: int = 1000


@dataclass(frozen=True)
class FacesConfig:
    """Faces of a picture. Source of the two filters: arXiv 2407.08515."""

    # `whole`: the picture is a crop already. `given`: boxes of the input. `opencv`: the cascade
    # that ships with OpenCV 4; it finds faces that look at the camera, from brow to mouth, and has
    # no confidence. `onnx`: the model file of `model`.
    detector: Literal["whole", "given", "opencv", "onnx"] = "opencv"
    model: str | None = None  # .onnx file
    detect_side: int = 640  # pixels; the picture is scaled to this for the detector
    min_confidence: float = 0.98  # kept above; for detectors that have one
    min_side: int = 128  # pixels of the crop's shorter side; kept above
    max_faces: int | None = None  # per picture, the most confident first
    margin: float = 0.0  # share of the box added on each side
    align: bool = True  # turn the eyes level where there are landmarks
    quality: int = 95  # JPEG quality of crops


@dataclass(frozen=True)
class AttributesConfig:
    """The 40 attributes. Source of the two filters: arXiv 2407.08515."""

    # `given`: columns of the input named like the attributes. `probe`: a folder that `python -m
    # flip_jax.downstream attributes` left. `onnx`: a model file, pictures to 40 numbers in the
    # order of CelebA.
    labeller: Literal["given", "probe", "onnx"] = "given"
    model: str | None = None  # folder of the probe, or .onnx file
    model_output: Literal["probabilities", "logits"] = "probabilities"  # of the .onnx file
    # Of RGB in 0..1, as the .onnx file was trained.
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    min_probability: float = 0.85  # a label is kept above; for labellers that have one
    # A sample with more attributes that are present is kept; -1 = any. Absent ones do not count:
    # nearly every face lacks more than five for certain, and the paper's filter left 15 of 23
    # million. Of 5,671 faces of CelebA 88 % have more than five.
    min_labels: int = 5
    batch_size: int = 16  # pictures that the model gets at a time; the last ones are filled up


@dataclass(frozen=True)
class CaptionsConfig:
    count: int = 5  # made by grammar, per face
    seed: int = 0
    keep_texts: bool = False  # captions of the input come first


@dataclass(frozen=True)
class RewriteConfig:
    """Rewriting by a language model behind an OpenAI-compatible HTTP API."""

    url: str | None = None  # such as http://localhost:8000/v1; None = captions stay as they are
    model: str = "Qwen/Qwen-7B-Chat"
    key_variable: str | None = None  # environment variable that holds the API key
    prompt: str | None = None  # text file; None = the one that ships with the package
    texts_per_request: int = 1  # more save prompt tokens where those cost
    temperature: float = 0.7
    top_p: float = 0.8
    max_tokens: int = 128
    seed: int = 0
    attempts: int = 2  # rewrites asked for until one passes the check
    timeout_seconds: float = 60.0
    retries: int = 5  # of a request that failed
    concurrency: int = 16  # requests at a time, per worker
    cache: str | None = None  # folder on a local disk; None = below output.work
    check: bool = True  # refuse rewrites that lose or invent an attribute


@dataclass(frozen=True)
class FetchConfig:
    concurrency: int = 32  # requests at a time, per worker
    per_host: int = 2  # requests at a time to one host, per worker
    host_delay_seconds: float = 0.1  # between the starts of two requests to one host, per worker
    connect_seconds: float = 5.0
    read_seconds: float = 10.0  # without a byte
    total_seconds: float = 60.0  # of one request; a redirect or a retry is another one
    retries: int = 2  # after 429, 5xx and broken connections
    backoff_seconds: float = 1.0  # before the first retry, doubled each time
    max_wait_seconds: float = 60.0  # a longer Retry-After is not waited for
    max_bytes: int = 20 * 2**20
    max_redirects: int = 5
    user_agent: str = "flip_jax"  # say who you are and how to reach you
    # Values of X-Robots-Tag that mean "leave this out"; `TDM-Reservation: 1` always does.
    opt_out_tags: str = "noai noimageai noindex noimageindex"
    allow_private: bool = False  # also addresses that are not public: for an intranet
    keep: bool = True  # pictures stay in the work folder: other settings need no second fetch


@dataclass(frozen=True)
class OptOutConfig:
    """Who does not want to be in: UTF-8 text files, one entry per line, # starts a comment."""

    urls: str | None = None  # whole, with http:// or https://, which stand for each other
    domains: str | None = None  # bare host names, subdomains included
    hashes: str | None = None  # SHA-256 of a picture file or of a crop's pixels, hexadecimal


@dataclass(frozen=True)
class DedupeConfig:
    exact: bool = True  # one of several equal crops stays
    near: bool = True  # near duplicates share a group
    # Bits of 256 in which two perceptual hashes may differ. Aligned faces are alike: above 32 of
    # the 256 different people begin to be taken for each other (docs/curate.md).
    max_distance: int = 20


@dataclass(frozen=True)
class SplitConfig:
    """Shares of groups, by a hash of the group."""

    train: float = 0.98
    val: float = 0.01
    test: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class OutputConfig:
    path: str = ""  # folder of the data set to make
    # Folder of finished chunks and status files; None = path + ".work".
    work: str | None = None
    shard_bytes: int = 256 * 2**20  # about


@dataclass(frozen=True)
class BeamConfig:
    runner: str = "DirectRunner"
    workers: int = 1  # processes of the DirectRunner
    # Options of Beam and of the runner, as in a shell: "--project=p --region=europe-west4".
    options: str = ""


@dataclass(frozen=True)
class CurateConfig:
    input: InputConfig = field(default_factory=InputConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    opt_out: OptOutConfig = field(default_factory=OptOutConfig)
    faces: FacesConfig = field(default_factory=FacesConfig)
    attributes: AttributesConfig = field(default_factory=AttributesConfig)
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    rewrite: RewriteConfig = field(default_factory=RewriteConfig)
    dedupe: DedupeConfig = field(default_factory=DedupeConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    beam: BeamConfig = field(default_factory=BeamConfig)
    batch_rows: int = 64  # samples that a stage gets at a time; bounds the memory


def validate(cfg: CurateConfig) -> CurateConfig:
    """Checks what can be checked without files.

    Raises:
      ValueError: naming the field, its value, what is allowed and what to change.
    """
    check_types(cfg, "config")
    _check_input(cfg)
    for name in ("input.paths", "beam.options"):
        _check_quotes(cfg, name)
    for name in _AT_LEAST_1:
        _check(cfg, name, lambda value: value is None or value >= 1, "must be at least 1")
    for name in _AT_LEAST_0:
        _check(cfg, name, lambda value: value >= 0, "must be at least 0")
    for name in _SHARES:
        _check(cfg, name, lambda value: 0 <= value <= 1, "must be from 0 to 1")
    half = "must be from 0.5 to 1"
    _check(cfg, "attributes.min_probability", lambda value: 0.5 <= value <= 1, half)
    _check(cfg, "faces.quality", lambda value: 1 <= value <= 100, "must be from 1 to 100")
    distance = "must be from 0 to 255; hashes have 256 bits"
    _check(cfg, "dedupe.max_distance", lambda value: 0 <= value <= 255, distance)
    total = cfg.split.train + cfg.split.val + cfg.split.test
    if abs(total - 1) > 1e-9:
        raise ValueError(f"config.split: train + val + test is {total:g}, must be 1")
    if not cfg.output.path:
        raise ValueError("config.output.path is not set; name the folder of the data set to make")
    _check(cfg, "fetch.user_agent", str.strip, "must not be empty; say who you are")
    if cfg.faces.detector == "onnx" and cfg.faces.model is None:
        raise ValueError("config.faces.model=None: detector onnx needs the .onnx file of a model")
    if cfg.attributes.labeller != "given" and cfg.attributes.model is None:
        wanted = {"onnx": "the .onnx file", "probe": "the folder of a probe"}
        kind = cfg.attributes.labeller
        raise ValueError(f"config.attributes.model=None: labeller {kind} needs {wanted[kind]}")
    return cfg


_AT_LEAST_1 = (
    "batch_rows",
    "input.chunk_rows",
    "input.max_pixels",
    "fetch.concurrency",
    "fetch.per_host",
    "fetch.max_bytes",
    "faces.detect_side",
    "faces.max_faces",
    "attributes.batch_size",
    "rewrite.concurrency",
    "rewrite.max_tokens",
    "rewrite.attempts",
    "rewrite.texts_per_request",
    "output.shard_bytes",
    "beam.workers",
)
_AT_LEAST_0 = (
    "fetch.host_delay_seconds",
    "fetch.connect_seconds",
    "fetch.read_seconds",
    "fetch.total_seconds",
    "fetch.retries",
    "fetch.backoff_seconds",
    "fetch.max_wait_seconds",
    "fetch.max_redirects",
    "faces.min_side",
    "faces.margin",
    "captions.count",
    "captions.seed",
    "rewrite.timeout_seconds",
    "rewrite.retries",
    "rewrite.temperature",
)
_SHARES = (
    "faces.min_confidence",
    "rewrite.top_p",
    "split.train",
    "split.val",
    "split.test",
)


def _check(cfg: CurateConfig, name: str, ok: Any, allowed: str) -> None:
    value = operator.attrgetter(name)(cfg)
    if not ok(value):
        raise ValueError(f"config.{name}={value!r}: {allowed}")


def _check_quotes(cfg: CurateConfig, name: str) -> None:
    value = operator.attrgetter(name)(cfg)
    try:
        shlex.split(value)
    except ValueError as error:
        raise ValueError(
            f"config.{name}={value!r}: {error}; it is read as in a shell, so put a name with a "
            "quote, a backslash or a space in it between quotes"
        ) from error


def _check_input(cfg: CurateConfig) -> None:
    source = cfg.input
    if not source.paths:
        raise ValueError("config.input.paths is not set; name at least one file or folder")
    if source.kind != "table":
        for name in ("images", "image_column", "file_column"):
            if getattr(source, name) is not None:
                raise ValueError(
                    f"config.input.{name} is for input.kind='table' only; leave it out"
                )
        return
    if (source.images is None) != (source.file_column is None):
        raise ValueError(
            f"config.input.images={source.images!r} and file_column={source.file_column!r}: give "
            "both, the folder and the column of the names in it, or none"
        )
    if not (source.file_column or source.image_column or source.url_column):
        raise ValueError(
            "config.input: a table needs file_column (with images), image_column or url_column"
        )
