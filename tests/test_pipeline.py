"""The training stream: order, resume, hosts, workers and dirt; and the evaluation gallery."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from flip_jax.config import DataConfig
from flip_jax.data import pipeline
from flip_jax.data.gallery import Gallery
from flip_jax.data.pipeline import BadData, TrainPipeline
from flip_jax.data.record_sketch import sketch_at
from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import (
    BadRecord,
    Record,
    RecordSource,
    group_number,
    join_strokes,
)
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.data.transforms import decode_image, encode_jpeg, load_image, resize_image

ROOT = Path(__file__).resolve().parent.parent
SIZE = 16  # pixels, of the model
RECORDS = 30
CONFIG = DataConfig(batch_size=8, threads=2, prefetch=3)


def record(number: int, captions: int = 3) -> Record:
    rng = np.random.default_rng(number)
    image = np.kron(rng.integers(0, 256, (4, 3, 3), dtype=np.uint8), np.ones((6, 7, 1), np.uint8))
    return Record(
        id=f"id{number}",
        group_id=f"person:{number // 3}",
        image=encode_jpeg(image),
        captions=[f"she is smiling and {'very ' * c}young" for c in range(captions)],
        attributes=np.zeros(40, np.int8),
    )


def write(folder: Path, records: list[Record], split: str = "train") -> RecordSource:
    with RecordWriter(folder, "test data", shard_bytes=8000) as writer:
        for item in records:
            writer.write(split, item)
    return RecordSource(folder, split)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> RecordSource:
    return write(tmp_path_factory.mktemp("data") / "clean", [record(n) for n in range(RECORDS)])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load("grammar", max_length=12)


@pytest.fixture
def make(source, tokenizer):
    """Builds a pipeline over the clean records; keyword arguments change the config or the host."""

    def build(seed=7, host_index=0, host_count=1, **changes) -> TrainPipeline:
        cfg = dataclasses.replace(CONFIG, **changes)
        return TrainPipeline(source, tokenizer, cfg, SIZE, seed, host_index, host_count)

    return build


def take(train: TrainPipeline, steps: int, start: int = 0) -> list[dict]:
    with train.batches(start) as stream:
        return [{k: np.array(v) for k, v in next(stream).items()} for _ in range(steps)]


def assert_same(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_batch_shapes_and_content(make, source, tokenizer):
    train = make(flip=False, randaugment_ops=0)
    batch = train.batch_at(0)
    kinds = {name: (value.dtype.str, value.shape) for name, value in batch.items()}
    assert kinds == {
        "image": ("|u1", (8, SIZE, SIZE, 3)),
        "token_ids": ("<i4", (8, 12)),
        "token_mask": ("|b1", (8, 12)),
        "group": ("<i4", (8,)),
        "index": ("<i8", (8,)),
        "bad": ("<i4", (8,)),
    }
    for row, number in enumerate(batch["index"]):
        item = source[number]
        expected = load_image(item.image, SIZE)
        np.testing.assert_array_equal(batch["image"][row], expected)
        assert batch["group"][row] == group_number(item.group_id)
        ids, _ = tokenizer(item.captions)
        assert any((batch["token_ids"][row] == known).all() for known in ids)
    assert not batch["bad"].any()
    assert train.steps_per_epoch == RECORDS // 8


def test_every_window_of_n_holds_each_record_once(make):
    batches = take(make(), 15)  # 120 rows, 4 epochs; a batch of 8 crosses every border of 30
    order = np.concatenate([batch["index"] for batch in batches])
    for start in range(0, 120, RECORDS):
        assert sorted(order[start : start + RECORDS]) == list(range(RECORDS))
    assert not np.array_equal(order[:RECORDS], order[RECORDS : 2 * RECORDS])


def test_batches_equal_batch_at(make):
    train = make()
    assert_same(take(train, 6), [train.batch_at(step) for step in range(6)])


def test_resume_equals_the_unbroken_stream(make):
    unbroken = take(make(), 12)
    for start in (1, 5, 11):
        assert_same(take(make(), 12 - start, start), unbroken[start:])


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_thread_count_changes_nothing(make, threads):
    assert_same(take(make(threads=threads), 6), take(make(), 6))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_are_one_host(make, hosts):
    parts = [take(make(host_index=h, host_count=hosts), 6) for h in range(hosts)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, take(make(), 6))


def test_seed_changes_order_and_draws(make):
    a, b = take(make(), 1)[0], take(make(seed=8), 1)[0]
    assert not np.array_equal(a["index"], b["index"])


def test_draws_differ_between_visits_and_hosts(source, make):
    """One record drawn many times gets many captions, flips and augmentations."""
    batches = take(make(), 60)
    images, texts = Counter(), Counter()
    for batch in batches:
        for row in np.flatnonzero(batch["index"] == 3):
            images[batch["image"][row].tobytes()] += 1
            texts[batch["token_ids"][row].tobytes()] += 1
    assert texts.total() == 16 and len(texts) == 3
    assert len(images) >= 6

    plain = [load_image(source[n].image, SIZE) for n in range(RECORDS)]

    def mirrored(host: int) -> np.ndarray:
        part = take(make(host_index=host, host_count=2, randaugment_ops=0), 20)
        rows = [pair for b in part for pair in zip(b["image"], b["index"], strict=True)]
        return np.array([not np.array_equal(image, plain[n]) for image, n in rows])

    first, second = mirrored(0), mirrored(1)
    assert len(first) == 80 and 20 < first.sum() < 60 and 20 < second.sum() < 60
    assert 20 < (first != second).sum() < 60


def test_prefetch_is_bounded(source, tokenizer):
    """An element of the stream is a whole batch; Grain's own default is to hold 500."""
    reads = []

    class Watched(RecordSource):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    watched = Watched(source.path, "train")
    with TrainPipeline(watched, tokenizer, CONFIG, SIZE, seed=7).batches() as stream:
        next(stream)
        deadline = time.monotonic() + 60
        while len(reads) < 8 * (1 + CONFIG.prefetch) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        assert len(reads) == 8 * (1 + CONFIG.prefetch)


def test_worker_processes_change_nothing_and_leave_nothing(make):
    expected = take(make(), 5, start=2)
    assert_same(take(make(workers=2, threads=1), 5, start=2), expected)
    assert multiprocessing.active_children() == []


def test_batches_of_workers_are_copied_ahead(make, monkeypatch):
    """A step would wait for the copy, 5 % of its time on a fast device."""
    copied = []

    def own(batch):
        copied.append(threading.current_thread())
        return batch | {"copied": np.array(len(copied))}

    monkeypatch.setattr(pipeline, "_own", own)
    with make(workers=1, threads=1).batches() as stream:
        assert next(stream)["copied"] == 1
        deadline = time.monotonic() + 60
        while len(copied) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(copied) >= 2  # nobody has asked for it yet
    assert threading.main_thread() not in copied


def test_workers_outlive_signals_to_the_process_group(make):
    """The parent finishes and saves its step first."""
    expected = take(make(), 12)
    with make(workers=2, threads=1).batches() as stream:
        batches = [next(stream), next(stream)]  # one of each worker: both are up
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGINT)
        batches += [next(stream) for _ in range(10)]  # more than are prefetched
    assert_same(batches, expected)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


STREAM = """
import multiprocessing, sys
from flip_jax.config import DataConfig
from flip_jax.data.pipeline import TrainPipeline
from flip_jax.data.records import RecordSource
from flip_jax.data.tokenizer import Tokenizer
if __name__ == "__main__":
    source = RecordSource(sys.argv[1], "train")
    cfg = DataConfig(batch_size=8, threads=1, workers=int(sys.argv[2]))
    train = TrainPipeline(source, Tokenizer.load("grammar", 12), cfg, 16, seed=7)
    with train.batches() as stream:
        batches = [next(stream) for _ in range(3)]
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        if sys.argv[3:] == ["wait"]:
            sys.stdin.read()
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "stream.py"
    path.write_text(STREAM)
    return path


def test_runs_in_a_bare_interpreter_without_complaint(source, script):
    """No parsed flags, warnings are errors, and nothing is printed on the way out."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(source.path), "2"],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_workers_end_when_the_parent_is_killed(source, script):
    if sys.platform != "linux":
        pytest.skip("needs /proc to list processes")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(source.path), "2", "wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all("spawn_main" in command_line(pid) for pid in workers)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while any(command_line(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(command_line(pid) for pid in workers)
    parent.stdin.close()
    parent.stdout.close()


def test_pipeline_starts_no_backend_of_jax(source):
    """Grain imports jax; a backend that starts would take the accelerator from the trainer."""
    code = STREAM + "    import jax\n    print('then', flush=True)\n    jax.devices()\n"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(source.path), "0"],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    assert done.stdout.split() == ["then"], done.stderr
    assert done.returncode and "nowhere" in done.stderr  # a backend could not have started


def test_a_row_for_each_host(make):
    whole = make(batch_size=2).batch_at(5)
    parts = [make(batch_size=2, host_index=h, host_count=2).batch_at(5) for h in range(2)]
    assert np.array_equal(whole["index"], np.concatenate([part["index"] for part in parts]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host_count": 3}, "batch_size=8 does not divide over 3 hosts"),
        ({"batch_size": 31}, "more than the 30 records"),
        ({"host_index": 2, "host_count": 2}, "host_index=2"),
    ],
)
def test_impossible_settings(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_closed_stream_ends(make):
    stream = make().batches()
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream)


# --- sketches in the place of pictures


def sketched(number: int) -> Record:
    """Every third record has strokes, every third a scan, the others no sketch."""
    fields = {name: getattr(record(number), name) for name in Record.__struct_fields__}
    scan = np.full((20, 21), 255, np.uint8)
    scan[3 + number % 10, 2:19] = scan[2:18, 5 + number % 10] = 0
    lines = [np.array([(2.0, 3.0), (18.0, 3.0 + number % 10)]), np.array([(5.0, 4.0), (5.0, 22.0)])]
    if number % 3 == 0:
        fields["polylines"] = join_strokes(lines)
    elif number % 3 == 1:
        fields["drawings"] = [cv2.imencode(".png", scan)[1].tobytes()]
    return Record(**fields)


@pytest.fixture(scope="module")
def sketches(tmp_path_factory) -> RecordSource:
    folder = tmp_path_factory.mktemp("data") / "sketched"
    return write(folder, [sketched(n) for n in range(RECORDS)])


def sketch_pipeline(source, tokenizer, share, *place, seed=7) -> TrainPipeline:
    plain = {"flip": False, "randaugment_ops": 0, "sketch_share": share}
    cfg = dataclasses.replace(CONFIG, **plain)
    return TrainPipeline(source, tokenizer, cfg, SIZE, seed, *place)


def test_a_share_of_the_pictures_is_shown_as_sketches(sketches, tokenizer):
    batches = take(sketch_pipeline(sketches, tokenizer, 0.4), 120)
    shown = [0, 0, 0]  # by what the record has
    stages = []
    for number, image in (x for b in batches for x in zip(b["index"], b["image"], strict=True)):
        item = sketches[int(number)]
        if np.array_equal(image, load_image(item.image, SIZE)):
            continue
        shown[number % 3] += 1
        # Grey, and a part of the ink of the whole sketch.
        assert (image == image[..., :1]).all()
        whole = sketch_at(item, [1.0], SIZE)[0]
        assert not (image < 128)[whole == 255].any()
        stages.append((255 - image.astype(float)).sum() / (255 - whole.astype(float)).sum())
    assert shown[2] == 0 and all(0.3 * 320 < n < 0.5 * 320 for n in shown[:2])
    # At all stages alike: the shares of the ink are spread evenly.
    quarters = np.histogram(stages, bins=4, range=(0, 1.01))[0] / len(stages)
    assert quarters.min() > 0.15 and quarters.max() < 0.4, quarters


def test_sketches_are_drawn_anew_at_each_visit_and_alike_on_all_hosts(sketches, tokenizer):
    one = take(sketch_pipeline(sketches, tokenizer, 0.5), 15)
    assert_same(one[5:], take(sketch_pipeline(sketches, tokenizer, 0.5), 10, start=5))
    hosts = [take(sketch_pipeline(sketches, tokenizer, 0.5, host, 2), 15) for host in (0, 1)]
    for whole, first, second in zip(one, *hosts, strict=True):
        np.testing.assert_array_equal(whole["image"], [*first["image"], *second["image"]])
    pairs = [x for b in one for x in zip(b["index"], b["image"], strict=True)]
    visits = {image.tobytes() for number, image in pairs if number == 3}
    assert len(visits) >= 2  # of four visits, half of them a sketch


def test_without_a_share_pictures_are_shown(sketches, tokenizer):
    for batch in take(sketch_pipeline(sketches, tokenizer, 0.0), 4):
        plain = [load_image(record(n).image, SIZE) for n in batch["index"]]
        np.testing.assert_array_equal(batch["image"], plain)


def test_a_sketch_that_cannot_be_drawn_counts_as_bad(tmp_path, tokenizer):
    items = [sketched(n) for n in range(RECORDS)]
    fields = {name: getattr(items[4], name) for name in Record.__struct_fields__}
    items[4] = Record(**fields | {"drawings": [b"no picture"]})
    damaged = write(tmp_path / "damaged", items)
    cfg = dataclasses.replace(CONFIG, sketch_share=1.0, max_bad_fraction=0.5)
    with TrainPipeline(damaged, tokenizer, cfg, SIZE, 7).batches() as stream:
        for _ in range(4):
            next(stream)
        (name,) = stream.bad_records()
    assert re.search(r"train-0000.*record.*sketch of id4: a drawing is no picture", name)


# --- dirt


def spoiled(numbers: dict[int, str]) -> list[Record]:
    """The clean records with some of them broken."""
    out = []
    for number in range(RECORDS):
        item = record(number)
        fields = {name: getattr(item, name) for name in Record.__struct_fields__}
        if numbers.get(number) == "truncated":
            fields["image"] = item.image[:-40]
        elif numbers.get(number) == "no caption":
            fields["captions"] = []
        out.append(Record(**fields))
    return out


@pytest.fixture(scope="module")
def dirty(tmp_path_factory) -> RecordSource:
    broken = {4: "truncated", 5: "no caption", 29: "truncated"}
    return write(tmp_path_factory.mktemp("data") / "dirty", spoiled(broken))


def dirty_pipeline(dirty, tokenizer, *place, seed=7, **changes) -> TrainPipeline:
    cfg = dataclasses.replace(CONFIG, **{"max_bad_fraction": 0.5, **changes})
    return TrainPipeline(dirty, tokenizer, cfg, SIZE, seed, *place)


def on_hosts(count: int, work) -> list:
    """What `work(host_index, host_count, gather)` returns on each of some hosts, here threads."""
    values, barrier = [None] * count, threading.Barrier(count, timeout=60)

    def on_host(host: int):
        def gather(value):
            values[host] = json.dumps(value)
            barrier.wait()
            found = [json.loads(text) for text in values]
            barrier.wait()
            return found

        return work(host, count, gather)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(on_host, range(count)))


def test_bad_records_are_replaced_by_the_next(dirty, tokenizer, make):
    clean, train = take(make(), 15), dirty_pipeline(dirty, tokenizer)
    with train.batches() as stream:
        for wanted in clean:
            batch = next(stream)
            replaced = {4: (6, 2), 5: (6, 1), 29: (0, 1)}
            for row, number in enumerate(wanted["index"].tolist()):
                used, bad = replaced.get(number, (number, 0))
                assert (batch["index"][row], batch["bad"][row]) == (used, bad)
                if not bad:
                    np.testing.assert_array_equal(batch["image"][row], wanted["image"][row])
        assert (stream.seen, stream.bad) == (120, 12)  # three records in four epochs
        names = "\n".join(sorted(stream.bad_records()))
    assert len(names.splitlines()) == 3
    assert "id4" in names and "record" in names and "id5): no caption" in names
    assert "train-0000" in names and "damaged JPEG" in names


def test_too_many_bad_records_stop_the_stream(dirty, tokenizer):
    for threads in (0, 2):
        train = dirty_pipeline(dirty, tokenizer, max_bad_fraction=0.05, threads=threads)
        with train.batches() as stream, pytest.raises(BadData) as error:
            for _ in range(100):
                next(stream)
        assert stream.seen == 104  # the first step with 100 examples or more
        text = str(error.value)
        assert f"{stream.bad} of 104 examples" in text
        assert "max_bad_fraction=0.05" in text and "id5): no caption" in text
        assert "python -m flip_jax.data verify" in text


def test_hosts_count_their_bad_records_together(dirty, tokenizer):
    """Whatever the share of a single host, all of them end at the same step with one message."""

    def read(*place):
        changes = {"seed": 5, "threads": 0, "max_bad_fraction": limit}
        with dirty_pipeline(dirty, tokenizer, *place, **changes).batches() as stream:
            try:
                for _ in range(30):
                    next(stream)
            except BadData as error:
                return stream.seen, stream.bad, str(error)
        return stream.seen, stream.bad, ""

    limit = 0.1  # 40 rows of a host after ten batches, 80 after twenty
    (*first, text), (*second, other) = on_hosts(2, read)
    assert (first, second) == ([80, 5], [80, 12])
    assert text == other and "the records of 17 of 160 examples" in text
    assert "id5): no caption" in text
    limit = 0.11  # the second host has more, both together do not
    assert on_hosts(2, read) == [(120, 9, ""), (120, 15, "")]


def test_a_few_bad_records_do_not_stop_the_stream(dirty, tokenizer):
    assert len(take(dirty_pipeline(dirty, tokenizer, max_bad_fraction=0.2), 30)) == 30


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_usable_is_an_error(tmp_path, tokenizer, workers):
    source = write(tmp_path / "data", spoiled(dict.fromkeys(range(RECORDS), "truncated")))
    train = dirty_pipeline(source, tokenizer, workers=workers)
    with pytest.raises(BadData, match="30 records in a row"), train.batches() as stream:
        next(stream)
    with pytest.raises(ValueError, match="none of 30 records"):
        Gallery(source, tokenizer, SIZE)


def test_flipped_bytes_on_disk_are_passed_over(tmp_path, tokenizer):
    source = write(tmp_path / "data", [record(n) for n in range(RECORDS)])
    file = source.path / source.manifest.splits["train"].shards[0].file
    data = bytearray(file.read_bytes())
    data[2000:2004] = b"\0\0\0\0"
    file.write_bytes(bytes(data))
    source = pickle.loads(pickle.dumps(source))
    (bad,) = [n for n in range(RECORDS) if not readable(source, n)]
    with dirty_pipeline(source, tokenizer).batches() as stream:
        used = np.concatenate([next(stream)["index"] for _ in range(4)])
        assert stream.bad == 1 and bad not in used
        assert f"record {bad}" in stream.bad_records()[0]


def readable(source: RecordSource, number: int) -> bool:
    try:
        return source[number] is not None
    except BadRecord:
        return False


# --- gallery


def test_gallery_agrees_between_pictures_and_texts(dirty, tokenizer):
    gallery = Gallery(dirty, tokenizer, SIZE, limit=10, captions=2)
    assert gallery.records.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]
    assert (gallery.images, gallery.texts, len(gallery.bad)) == (10, 20, 2)
    np.testing.assert_array_equal(gallery.image_of, np.repeat(np.arange(10), 2))
    assert gallery.group[4] == group_number(dirty[6].group_id)
    batches = list(gallery.image_batches(4))
    assert [batch["valid"].tolist() for batch in batches] == [[True] * 4] * 2 + [
        [True, True, False, False]
    ]
    images = np.concatenate([batch["image"][batch["valid"]] for batch in batches])
    for row, number in enumerate(gallery.records):
        expected = resize_image(decode_image(dirty[number].image), SIZE)
        np.testing.assert_array_equal(images[row], expected)
        np.testing.assert_array_equal(gallery.thumbnail(row), expected)
    texts = list(gallery.text_batches(8))
    assert all(batch["token_ids"].shape == (8, 12) for batch in texts)
    valid = np.concatenate([batch["valid"] for batch in texts])
    ids = np.concatenate([batch["token_ids"] for batch in texts])[valid]
    image_of = np.concatenate([batch["image_of"] for batch in texts])[valid]
    np.testing.assert_array_equal(image_of, gallery.image_of)
    captions = [c for number in gallery.records for c in dirty[number].captions[:2]]
    assert [gallery.caption(text) for text in range(20)] == captions
    np.testing.assert_array_equal(ids, tokenizer(captions)[0])


@pytest.mark.parametrize(("hosts", "limit"), [(2, 10), (4, 9), (4, None)])
def test_hosts_share_a_gallery(dirty, tokenizer, hosts, limit):
    """Each looks at its part of the records and decodes its part of every batch."""

    class Watched(RecordSource):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    def share(host, hosts, gather):
        source = Watched(dirty.path, "train")
        own = Gallery(source, tokenizer, SIZE, limit, 2, 1, host, hosts, gather)
        assert source.reads <= -(-RECORDS // hosts)
        return own, list(own.image_batches(8)), list(own.text_batches(8))

    one = Gallery(dirty, tokenizer, SIZE, limit, captions=2)
    shares = on_hosts(hosts, share)
    for gallery, *_ in shares:
        np.testing.assert_array_equal(gallery.records, one.records)
        np.testing.assert_array_equal(gallery.image_of, one.image_of)
        np.testing.assert_array_equal(gallery.group, one.group)
        assert gallery.bad == one.bad
    for number, batches in ((1, one.image_batches(8)), (2, one.text_batches(8))):
        parts = zip(*(part[number] for part in shares), strict=True)
        joined = [
            {name: np.concatenate([part[name] for part in batch]) for name in batch[0]}
            for batch in parts
        ]
        assert_same(joined, list(batches))


def test_gallery_of_all_records_with_uneven_captions(tmp_path, tokenizer):
    source = write(tmp_path / "data", [record(n, captions=n + 1) for n in range(4)])
    gallery = Gallery(source, tokenizer, SIZE, limit=None, captions=3)
    assert gallery.images == 4
    assert gallery.image_of.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3]
    assert gallery.caption(8) == source[3].captions[2]


def test_gallery_refuses_nonsense(source, tokenizer):
    for changes in ({"limit": 0}, {"captions": 0}):
        with pytest.raises(ValueError, match="1 or more"):
            Gallery(source, tokenizer, SIZE, **changes)
