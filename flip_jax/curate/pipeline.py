"""The build as one Beam pipeline, the same in this process and on a cluster.

What moves between its steps are names of finished files in the work folder, some hundred bytes for
each chunk and shard. Records stay inside one step, or in files where the work folder is on a disk;
where it is not (gs://), they travel to their shards by the runner's shuffle.

    files -> chunks -> parts -> copies, near duplicates -> groups
                           \\-------------------------------\\-> splits -> order
                                                           -> shards -> data set
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.pvalue import AsList, AsSingleton, TaggedOutput
from apache_beam.runners.portability.fn_api_runner.fn_runner import (
    ExtendedProvisionInfo,
    FnApiRunner,
)
from apache_beam.runners.portability.portable_runner import JobServiceHandle

from flip_jax.curate.captions import GrammarStage
from flip_jax.curate.config import CurateConfig
from flip_jax.curate.groups import Groups, Settled, join, settle
from flip_jax.curate.inputs import Chunk, input_files, input_names, split_input
from flip_jax.curate.links import FOLDER, Links, search, searches
from flip_jax.curate.optout import OptOut, OptOutStage
from flip_jax.curate.order import carry, count_groups, order, shard_counts
from flip_jax.curate.output import ShardFile, assemble, check_target, write_shard
from flip_jax.curate.parts import Part, PartMaker
from flip_jax.curate.pictures import HashStage, ReadStage
from flip_jax.curate.stages import Stage, fingerprint
from flip_jax.curate.storage import Work, is_local

COUNTS = "counts.json"
_COUNTS = "counts"  # an output of a step


def build(cfg: CurateConfig) -> dict[str, int]:
    """Makes a data set; goes on where an earlier build with the same work folder was stopped.

    Args:
      cfg: checked by `validate`.

    Returns:
      How many samples each stage saw, dropped and why; also in `counts.json` of the work folder.

    Raises:
      ValueError: settings or input that cannot be used, or no record was left.
      OSError: files cannot be read or written.
    """
    check_target(cfg.output.path)
    work = Work(cfg.output.work or cfg.output.path.rstrip("/") + ".work")
    files = input_files(cfg.input)
    inputs = [*zip(range(len(files)), files, input_names(files, cfg.input), strict=True)]
    stages = make_stages(cfg, work)
    with _locked(work):
        work.clear_scratch()
        work.remove_folder("status")
        options = beam_options(cfg)
        with _plain_errors(), beam.Pipeline(_runner(cfg, options), options) as pipeline:
            _connect(pipeline, cfg, work, inputs, stages)
        work.remove_folder(FOLDER)
        return json.loads(work.read(COUNTS))


def make_stages(cfg: CurateConfig, work: Work) -> list[Stage]:
    """The stages between the input and the parts, in order.

    Raises:
      ValueError, OSError: a list of `opt_out` that cannot be used.
    """
    # Here: each brings its own libraries.
    from flip_jax.curate.attributes import AttributeStage
    from flip_jax.curate.faces import FaceStage

    opt_out = OptOut(cfg.opt_out)
    opt_out.load()  # a bad list must stop the build before anything is fetched
    stages = [
        OptOutStage(cfg.opt_out, opt_out),
        ReadStage(cfg.input, opt_out),
        FaceStage(cfg.faces),
        AttributeStage(cfg.attributes),
        GrammarStage(cfg.captions),
    ]
    if cfg.rewrite.url is not None:
        from flip_jax.curate.rewrite import RewriteStage

        stages.append(RewriteStage(cfg.rewrite, cfg.rewrite.cache or work.path("rewrites")))
    return [*stages, HashStage(cfg.opt_out, opt_out)]


def beam_options(cfg: CurateConfig) -> PipelineOptions:
    options = [f"--runner={cfg.beam.runner}", "--default_sdk_harness_log_level=WARNING"]
    if cfg.beam.runner == "DirectRunner":
        mode = "multi_processing" if cfg.beam.workers > 1 else "in_memory"
        options += [f"--direct_num_workers={cfg.beam.workers}", f"--direct_running_mode={mode}"]
    return PipelineOptions([*options, *shlex.split(cfg.beam.options)])


def _runner(cfg: CurateConfig, options: PipelineOptions) -> FnApiRunner | None:
    """For DirectRunner the one that runs in this process: Beam itself would rather download and
    start another program. None = what the options say."""
    if cfg.beam.runner != "DirectRunner":
        return None
    told = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    info = beam_provision_api_pb2.ProvisionInfo(pipeline_options=told)
    return FnApiRunner(provision_info=ExtendedProvisionInfo(info))


def _connect(
    pipeline: beam.Pipeline,
    cfg: CurateConfig,
    work: Work,
    inputs: list[tuple[int, str, str]],
    stages: list[Stage],
) -> None:
    """Builds the pipeline; `inputs` are number, path and name (see `input_names`) of each."""
    made = (
        pipeline
        | "Files" >> beam.Create(inputs)
        | "SpreadFiles" >> beam.Reshuffle()
        | "SplitInput" >> beam.ParDo(SplitInput(work, cfg))
        | "SpreadChunks" >> beam.Reshuffle()
        | "MakeParts"
        >> beam.ParDo(MakeParts(PartMaker(work, cfg, stages))).with_outputs(_COUNTS, main="parts")
    )
    parts = made["parts"]
    groups = (
        pipeline
        | "Searches" >> beam.Create(searches(cfg.dedupe))
        | "SpreadSearches" >> beam.Reshuffle()
        | "Search" >> beam.ParDo(Search(work, cfg), AsList(parts))
        | "AllLinks" >> beam.combiners.ToList()
        | "Join" >> beam.ParDo(Join(work), AsList(parts))
    )
    settled = (
        parts
        | "SpreadParts" >> beam.Reshuffle()
        | "Settle" >> beam.ParDo(Settle(work, cfg), AsSingleton(groups))
    )
    # That there are sizes also says that all parts are settled.
    sizes = settled | "Sizes" >> beam.Map(lambda each: each.sizes)
    sizes = AsSingleton(sizes | "SumSizes" >> beam.CombineGlobally(_sum))
    if is_local(work.root):
        start = pipeline | "Start" >> beam.Create([None])
        shards = start | "Order" >> beam.ParDo(Order(work, cfg), AsList(parts), sizes)
        shards |= "SpreadShards" >> beam.Reshuffle()
    else:
        shards = parts | "Route" >> beam.ParDo(Route(work, cfg), sizes)
        shards |= "GroupByShard" >> beam.GroupByKey()
    shards |= "WriteShards" >> beam.ParDo(WriteShards(work), AsSingleton(groups))
    counts = (made[_COUNTS], settled | "Counts" >> beam.Map(lambda each: each.counts))
    counts = counts | beam.Flatten() | "SumCounts" >> beam.CombineGlobally(_sum)
    (
        shards
        | "AllShards" >> beam.combiners.ToList()
        | "Assemble" >> beam.ParDo(Assemble(work, cfg), AsList(parts), AsSingleton(counts))
    )


def _sum(found: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in found:
        total.update(each)
    return dict(total)


class SplitInput(beam.DoFn):
    def __init__(self, work: Work, cfg: CurateConfig):
        self.work, self.cfg = work, cfg

    def process(self, found: tuple[int, str, str]) -> Iterable[Chunk]:
        number, file, name = found
        return split_input(self.work, file, number, name, self.cfg.input)


class MakeParts(beam.DoFn):
    def __init__(self, maker: PartMaker):
        self.maker = maker

    def process(self, chunk: Chunk) -> Iterator[Part | TaggedOutput]:
        part, counts = self.maker.make(chunk)
        _to_metrics(counts)
        yield part
        yield TaggedOutput(_COUNTS, counts)

    def teardown(self) -> None:
        self.maker.teardown()


class Search(beam.DoFn):
    """Equal pictures, or near duplicates in some bands."""

    def __init__(self, work: Work, cfg: CurateConfig):
        self.work, self.cfg = work, cfg.dedupe

    def process(self, which: int, parts: list[Part]) -> Iterator[Links]:
        yield search(self.work, parts, self.cfg, which)


class Join(beam.DoFn):
    def __init__(self, work: Work):
        self.work = work

    def process(self, links: list[Links], parts: list[Part]) -> Iterator[str]:
        yield join(self.work, parts, links)


class _WithGroups(beam.DoFn):
    """Keeps the file of groups open."""

    def __init__(self, work: Work):
        self.work = work
        self._name, self._groups = "", None

    def groups(self, name: str) -> Groups:
        if name != self._name:
            self.teardown()
            self._name, self._groups = name, Groups(self.work, name)
        return self._groups

    def teardown(self) -> None:
        if self._groups is not None:
            self._groups.close()
        self._name, self._groups = "", None


class Settle(_WithGroups):
    def __init__(self, work: Work, cfg: CurateConfig):
        super().__init__(work)
        self.cfg = cfg

    def process(self, part: Part, groups: str) -> Iterator[Settled]:
        settled = settle(self.work, part, self.groups(groups), self.cfg)
        _to_metrics(settled.counts)
        yield settled


class Order(beam.DoFn):
    def __init__(self, work: Work, cfg: CurateConfig):
        self.work, self.shard_bytes = work, cfg.output.shard_bytes

    def process(self, _: None, parts: list[Part], sizes: dict[str, int]) -> Iterator[str]:
        return order(self.work, parts, shard_counts(sizes, self.shard_bytes))


class Route(beam.DoFn):
    def __init__(self, work: Work, cfg: CurateConfig):
        self.work, self.shard_bytes = work, cfg.output.shard_bytes

    def process(self, part: Part, sizes: dict[str, int]) -> Iterator[tuple[str, Any]]:
        return carry(self.work, part, shard_counts(sizes, self.shard_bytes))


class WriteShards(_WithGroups):
    def process(self, shard: str | tuple[str, Iterable[Any]], groups: str) -> Iterator[ShardFile]:
        named = (shard, None) if isinstance(shard, str) else shard
        yield write_shard(self.work, self.groups(groups), *named)


class Assemble(beam.DoFn):
    def __init__(self, work: Work, cfg: CurateConfig):
        self.work, self.cfg = work, cfg

    def process(self, shards: list[ShardFile], parts: list[Part], counts: dict[str, int]) -> None:
        self.work.write(COUNTS, json.dumps(counts, sort_keys=True, indent=1).encode())
        parts = sorted(parts, key=lambda part: part.place)
        source = describe(self.cfg, [part.rows_key for part in parts])
        groups = count_groups(self.work, parts)
        assemble(self.work, shards, groups, source, counts, self.cfg.output.path)


def describe(cfg: CurateConfig, rows_keys: list[str]) -> str:
    """What a data set is made from and how, for its manifest: the settings that shape it, where
    they are not the defaults of the release."""
    told = {}
    for group in ("faces", "attributes", "captions", "rewrite", "dedupe", "split"):
        settings, defaults = getattr(cfg, group), getattr(CurateConfig(), group)
        for item in dataclasses.fields(settings):
            if (value := getattr(settings, item.name)) != getattr(defaults, item.name):
                told[f"{group}.{item.name}"] = value
    made = " ".join(f"{name}={value}" for name, value in told.items())
    return f"curated from {cfg.input.paths}, rows {fingerprint(rows_keys)[:16]}; {made}"


def _to_metrics(counts: dict[str, int]) -> None:
    for name, count in counts.items():
        Metrics.counter("curate", name).inc(count)


_WORKER_GONE = "Channel closed prematurely"  # Beam's words
_STEP = " [while running '"  # what Beam adds to the message of an error
# The last line of a traceback that came from another process.
_LAST_LINE = re.compile(
    r"^(ValueError|OSError|FileNotFoundError|PermissionError): ((?:(?!^\w+: ).)*)"
    r" \[while running '",
    re.MULTILINE | re.DOTALL,
)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Makes the errors that a user can mend what they were: Beam adds to their message, and
    reports those of other processes as RuntimeError with all tracebacks in it."""
    try:
        yield
    except (ValueError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(str(error).partition(_STEP)[0]) from error
    except RuntimeError as error:
        if _WORKER_GONE in str(error):
            raise OSError(
                "a worker process ended before its work was done, killed perhaps for want of "
                "memory; build again, with fewer config.beam.workers if so: what is done stays done"
            ) from error
        found = _LAST_LINE.findall(str(error))
        if not found:
            raise
        name, message = found[-1]
        raise (ValueError if name == "ValueError" else OSError)(message) from error


@contextmanager
def _locked(work: Work) -> Iterator[None]:
    """Keeps a second build away from a local work folder.

    Raises:
      ValueError: there is one.
    """
    if not is_local(work.root):
        yield
        return
    Path(work.root).mkdir(parents=True, exist_ok=True)
    with open(Path(work.root, "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"config.output.work={work.root!r} is in use by another build; wait for it or "
                "choose another folder"
            ) from error
        yield
