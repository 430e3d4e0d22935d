"""Building an index: what is in it, stopping and going on, damage; and its nearest neighbours."""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("faiss", reason="search needs the extra `search`")
pytest.importorskip("aiohttp", reason="search needs the extra `search`")

import faiss
from search_world import make_world, write_checkpoint

import flip_jax
from flip_jax.api import FlipModel
from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import Record, RecordSource
from flip_jax.search import builder
from flip_jax.search import index as index_module
from flip_jax.search.__main__ import main, parse
from flip_jax.search.builder import build_index
from flip_jax.search.filters import allowed_faces
from flip_jax.search.identity import weights_digest
from flip_jax.search.index import (
    FaceIndex,
    Manifest,
    compare,
    least_effort,
    new_graph,
    recall,
    walk,
)
from flip_jax.search.server import load_engine
from flip_jax.weights import read_tokenizer, read_weights, write_export


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors():
    """6,000 unit vectors that lie near a surface of 8 dimensions, and 100 queries near it."""
    rng = np.random.default_rng(0)
    surface = rng.normal(size=(8, 32))
    latent = rng.normal(size=(6100, 8))
    found = unit(np.tanh(latent @ surface / 3) + 0.1 * rng.normal(size=(6100, 32)))
    return found[:6000], found[6000:], latent


@pytest.fixture(scope="module")
def many(vectors, tmp_path_factory):
    """An index of them whose attribute 0 is the sign of one coordinate of the surface."""
    rows, _, latent = vectors
    faiss.omp_set_num_threads(1)  # more make the graph differ from run to run
    graph = new_graph(32)
    graph.add(rows)
    attributes = np.zeros((40, 6000), np.int8)
    attributes[0] = latent[:6000, 0] > 0
    attributes[1] = latent[:6000, 1] > 1.5
    attributes[2, :3] = 1
    manifest = Manifest(
        checkpoint="c",
        checkpoint_step=0,
        checkpoint_digest="",
        data="d",
        data_hash="",
        split="test",
        faces=6000,
        effort=64,
        left_out=0,
        embed_dim=32,
        examples=index_module.Examples(),
    )
    folder = tmp_path_factory.mktemp("many") / "index"
    index_module.write_index(folder, graph, attributes, np.arange(6000), manifest)
    return FaceIndex(folder)


def exact(rows, query, count, allowed=None):
    scores = rows.astype(np.float64) @ query.astype(np.float64)
    if allowed is not None:
        scores[~allowed] = -np.inf
        count = min(count, int(allowed.sum()))
    return np.argsort(-scores, kind="stable")[:count]


def test_the_index_holds_every_face(world):
    engine, source = world.engine, RecordSource(world.data, "test")
    index, manifest = engine.index, engine.index.manifest
    assert len(index) == len(source) == manifest.faces == 40 and manifest.left_out == 0
    assert manifest.data_hash == source.manifest_hash
    images = [source[number].image for number in range(40)]
    found = np.stack([index.vector(face) for face in range(40)])
    np.testing.assert_allclose(found, engine.model.encode_image(images), atol=2e-6)
    labels = np.stack([source[number].attributes for number in range(40)])
    np.testing.assert_array_equal(index.attributes, labels.T)
    assert sorted(path.name for path in world.index.iterdir()) == [
        "attributes.npy",
        "manifest.json",
        "records.npy",
        "vectors.faiss",
    ]
    assert not list(world.index.parent.glob(".index*"))


def test_examples_are_of_the_index(world):
    index, source = world.engine.index, world.engine.source
    examples = index.manifest.examples
    texts = {source[number].captions[0] for number in range(39)}
    assert examples.captions and set(examples.captions) <= texts
    assert examples.faces and all(source[int(index.records[f])].strokes for f in examples.sketches)


@pytest.mark.parametrize("count", [1, 10, 50])
def test_few_faces_are_all_compared(many, vectors, count):
    rows, queries, _ = vectors
    for query in queries[:5]:
        for allowed in (None, many.attributes[0] == 1, many.attributes[2] == 1):
            faces, cosines = many.search(query, count, allowed)
            np.testing.assert_array_equal(faces, exact(rows, query, count, allowed))
            np.testing.assert_allclose(cosines, rows[faces] @ query, atol=1e-6)
    nobody = np.zeros(6000, bool)
    assert [len(part) for part in many.search(queries[0], count, nobody)] == [0, 0]


@pytest.fixture
def walking(monkeypatch):
    """The graph is walked at sizes where comparing with all would do; gives the efforts."""
    efforts = []

    def noted(graph, queries, count, effort, selector=None):
        efforts.append(effort)
        return walk(graph, queries, count, effort, selector)

    monkeypatch.setattr(index_module, "COST_PER_CANDIDATE", 0)
    monkeypatch.setattr(index_module, "EXACT_FILTERED", 0)
    monkeypatch.setattr(index_module, "walk", noted)
    return efforts


@pytest.mark.parametrize("row", [None, 0, 1])
def test_a_walk_finds_nearly_all(many, vectors, walking, row):
    rows, queries, _ = vectors
    allowed = None if row is None else many.attributes[row] == 1
    found = [many.search(query, 10, allowed)[0] for query in queries]
    nearest = [exact(rows, query, 10, allowed) for query in queries]
    assert recall(np.stack(found), np.stack(nearest)) >= 0.95
    share = 1.0 if allowed is None else allowed.mean()
    assert walking == [int(64 / share)] * len(queries)
    assert allowed is None or all(allowed[faces].all() for faces in found)


def test_a_walk_that_ends_early_is_not_an_answer(many, vectors, walking):
    queries = vectors[1]
    allowed = many.attributes[2] == 1
    for query in queries[:20]:
        assert set(many.search(query, 3, allowed)[0]) == {0, 1, 2}
    assert len(walking) == 20


def test_the_effort_reaches_the_recall(many, vectors, walking):
    graph, queries = many._graph, vectors[1]
    effort = least_effort(graph, queries)
    nearest = compare(graph, queries, 10)[1]
    assert recall(walk(graph, queries, 10, effort)[1], nearest) >= index_module.RECALL
    if effort > 64:
        assert recall(walk(graph, queries, 10, effort // 2)[1], nearest) < index_module.RECALL
    hard = new_graph(128)
    hard.add(unit(np.random.default_rng(0).normal(size=(3000, 128))))
    other = unit(np.random.default_rng(1).normal(size=(50, 128)))
    effort, nearest = least_effort(hard, other), compare(hard, other, 10)[1]
    assert recall(walk(hard, other, 10, 64)[1], nearest) < index_module.RECALL
    assert 64 < effort <= 3000
    assert recall(walk(hard, other, 10, effort)[1], nearest) >= index_module.RECALL


def test_recall_by_hand():
    assert recall(np.array([[1, 2], [5, -1]]), np.array([[2, 3], [5, 6]])) == 0.5


def test_filters():
    attributes = np.array([[1, 0, -1, 1]] * 40, np.int8)
    attributes[31] = [1, 1, 1, 0]
    assert allowed_faces(attributes, {}) is None
    for state, wanted in (("yes", [1, 0, 0, 1]), ("no", [0, 1, 0, 0]), ("unknown", [0, 0, 1, 0])):
        assert allowed_faces(attributes, {"Male": state}).tolist() == [bool(x) for x in wanted]
    both = allowed_faces(attributes, {"Male": "yes", "Smiling": "yes"})
    assert both.tolist() == [True, False, False, False]
    for wrong in ({"Tall": "yes"}, {"Male": "maybe"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            allowed_faces(attributes, wrong)


def test_a_build_that_failed_goes_on(world, tmp_path, monkeypatch):
    """After 16 faces it stops; the next embeds only the others, and all vectors are as ever."""
    monkeypatch.setattr("flip_jax.search.builder._BATCH", 8)
    encode, seen = FlipModel.encode_image, []

    def failing(self, images):
        if len(seen) == 2:
            raise OSError("the disk is full")
        seen.append(len(images))
        return encode(self, images)

    def counting(self, images):
        seen.append(len(images))
        return encode(self, images)

    out, given = tmp_path / "index", (world.checkpoint, world.data, "test")
    monkeypatch.setattr(FlipModel, "encode_image", failing)
    with pytest.raises(OSError, match="disk is full"):
        build_index(*given, out)
    assert not out.exists()
    rows = tmp_path / ".index.partial" / "rows"
    with rows.open("ab") as file:
        file.write(b"torn row")
    seen.clear()
    monkeypatch.setattr(FlipModel, "encode_image", counting)
    assert build_index(*given, out).faces == 40
    assert seen == [8, 8, 8] and not (tmp_path / ".index.partial").exists()
    found, whole = FaceIndex(out), world.engine.index
    for face in range(40):
        np.testing.assert_allclose(found.vector(face), whole.vector(face), atol=2e-6)
    np.testing.assert_array_equal(found.records, whole.records)


def test_a_build_of_another_model_starts_afresh(world, tmp_path, monkeypatch):
    encode, stop = FlipModel.encode_image, [True]

    def stopping(self, images):
        if stop and stop.pop():
            encode(self, images)
            raise KeyboardInterrupt
        return encode(self, images)

    other = write_checkpoint(tmp_path / "other", seed=1)
    build = tmp_path / ".index.partial"
    build.mkdir()
    (build / "made_from.json").write_text('{"checkpoint_digest": "another"}')
    (build / "rows").write_bytes(bytes(8 + 40 + 4 * 16))
    monkeypatch.setattr(FlipModel, "encode_image", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_index(other, world.data, "test", tmp_path / "index")
    assert (build / "rows").stat().st_size == 0
    made = build_index(other, world.data, "test", tmp_path / "index")
    assert (
        made.faces == 40 and made.checkpoint_digest != world.engine.index.manifest.checkpoint_digest
    )


def test_one_build_at_a_time(world, tmp_path):
    """The lock is the system's: it goes with the process that holds it, however that ends."""
    (tmp_path / ".index.partial").mkdir()
    out = tmp_path / "index"
    with open(tmp_path / ".index.partial" / "rows", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process is building"):
            build_index(world.checkpoint, world.data, "test", out)
    assert not out.exists()
    assert build_index(world.checkpoint, world.data, "test", out).faces == 40


def test_a_build_does_not_take_the_file_of_one_that_has_just_ended(world, tmp_path, monkeypatch):
    """Opened, and removed before it could be locked: what went there would be lost."""
    lock = fcntl.flock

    def late(file, how):
        os.remove(file.name)
        lock(file, how)

    monkeypatch.setattr(builder.fcntl, "flock", late)
    with pytest.raises(OSError, match="has just ended; start again"):
        build_index(world.checkpoint, world.data, "test", tmp_path / "index")
    monkeypatch.undo()
    assert build_index(world.checkpoint, world.data, "test", tmp_path / "index").faces == 40
    assert [file.name for file in tmp_path.iterdir()] == ["index"]


def test_what_is_in_the_way_is_not_replaced(world, tmp_path, monkeypatch):
    given = (world.checkpoint, world.data, "test")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path("."), tmp_path / "here"):
        with pytest.raises(ValueError, match="cannot be replaced: name a folder"):
            build_index(*given, out)
    assert not list(tmp_path.glob(".*partial"))
    with pytest.raises(ValueError, match=r"exists; .*--overwrite"):
        build_index(*given, world.index)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(ValueError, match="is no index, so it is not replaced"):
        build_index(*given, tmp_path / "photos", overwrite=True)
    copy = shutil.copytree(world.index, tmp_path / "copy")
    (copy / "vectors.faiss").write_bytes(b"old")
    build_index(*given, copy, overwrite=True)
    assert len(FaceIndex(copy)) == 40


def test_what_came_in_the_way_meanwhile_is_not_replaced(world, tmp_path, monkeypatch):
    out = tmp_path / "index"
    write = builder.write_index

    def write_index(*arguments):
        out.mkdir()
        (out / "photo.jpg").touch()
        write(*arguments)

    monkeypatch.setattr(builder, "write_index", write_index)
    with pytest.raises(ValueError, match=r"index exists; .*--overwrite"):
        build_index(world.checkpoint, world.data, "test", out)
    assert [file.name for file in out.iterdir()] == ["photo.jpg"]


def test_unreadable_records_are_left_out_or_stop_it(world, tmp_path):
    source = world.engine.source
    with RecordWriter(tmp_path / "data", "two bad pictures") as writer:
        for number in range(12):
            record: Record = source[number]
            whole = number not in (0, 11)
            image = record.image if whole else record.image[: len(record.image) // 2]
            kept = {n: getattr(record, n) for n in ("id", "group_id", "captions", "attributes")}
            writer.write("test", Record(**kept, image=image))
    given = (world.checkpoint, tmp_path / "data", "test", tmp_path / "index")
    with pytest.raises(ValueError, match=r"2 of 12 records .* cannot be read"):
        build_index(*given)
    assert not (tmp_path / "index").exists()
    manifest = build_index(*given, max_bad_fraction=0.2)
    assert (manifest.faces, manifest.left_out) == (10, 2)
    assert FaceIndex(tmp_path / "index").records.tolist() == list(range(1, 11))


def test_damage_and_other_versions_are_refused(world, tmp_path):
    copy = shutil.copytree(world.index, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    for name in manifest["files"]:
        whole = (copy / name).read_bytes()
        middle = len(whole) // 2
        for bad in (whole[:middle], whole[:middle] + b"\xa5" + whole[middle + 1 :]):
            (copy / name).write_bytes(bad)
            with pytest.raises(OSError, match=rf"{name} is damaged.*build it again"):
                FaceIndex(copy)
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
            FaceIndex(copy)
        (copy / name).write_bytes(whole)
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        FaceIndex(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not the manifest"):
        FaceIndex(copy)
    with pytest.raises(FileNotFoundError, match="no finished index"):
        FaceIndex(tmp_path)


def test_another_checkpoint_is_refused_and_its_export_is_not(world, tmp_path):
    other = write_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"was made by another model than .*other: digest \w{16}"):
        load_engine(world.index, other)
    weights = read_weights(world.checkpoint)
    write_export(tmp_path / "export", weights, read_tokenizer(world.checkpoint, weights))
    engine = load_engine(world.index, tmp_path / "export")
    text = ["a woman with a hat"]
    wanted = flip_jax.load(world.checkpoint).encode_text(text)
    np.testing.assert_array_equal(engine.model.encode_text(text), wanted)


def test_the_export_of_an_older_checkpoint_is_the_same_model(world, tmp_path):
    weights = read_weights(world.checkpoint)
    tokenizer = read_tokenizer(world.checkpoint, weights)
    del weights.meta["config"]["model"]["vision"]["attention"]  # a release before had no such field
    write_export(tmp_path / "export", weights, tokenizer)
    assert weights_digest(read_weights(tmp_path / "export")) == weights_digest(weights)


def test_other_or_moved_data(world, tmp_path):
    copy = shutil.copytree(world.index, tmp_path / "index")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["data"] = str(tmp_path / "gone")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FileNotFoundError, match="give its folder as --data"):
        load_engine(copy, world.checkpoint)
    assert load_engine(copy, world.checkpoint, world.data).record(0).id
    with RecordWriter(tmp_path / "others", "other faces") as writer:
        writer.write("test", world.engine.source[0])
    with pytest.raises(ValueError, match="made from another data set"):
        load_engine(copy, world.checkpoint, tmp_path / "others")
    with pytest.raises(ValueError, match="--rerank is 65"):
        load_engine(copy, world.checkpoint, world.data, rerank=65)


def test_the_commands(world, tmp_path, capsys):
    given = ["index", "--checkpoint", str(world.checkpoint), "--data", str(world.data)]
    assert main([*given, "--out", str(tmp_path / "index")]) == 0
    assert "40 faces, 0 left out" in capsys.readouterr().out
    for arguments, message in (
        ([*given, "--out", str(tmp_path / "index")], "--overwrite"),
        ([*given, "--out", str(tmp_path / "other"), "--split", "train"], "no split 'train'"),
        ([*given, "--out", str(tmp_path / "other"), "--threads", "0"], "threads is 0"),
        (["serve", "--index", str(tmp_path), "--checkpoint", "c"], "no finished index"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


def test_it_serves_until_it_is_told_to_stop(world, capsys):
    """The real command: says its address, answers, ends with status 0 on SIGTERM."""
    command = [sys.executable, "-m", "flip_jax.search", "serve", "--port", "0", "--rerank", "2"]
    command += ["--index", str(world.index), "--checkpoint", str(world.checkpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        lines = [process.stdout.readline(), process.stdout.readline()]
        address = re.search(r"http://127\.0\.0\.1:(\d+)/", lines[1])
        assert main([*command[3:4], "--port", address[1], *command[6:]]) == 1
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(30) == 0 and time.monotonic() - started < 20
    assert "40 faces" in lines[0]
    assert "Address already in use" in capsys.readouterr().err
    assert main(["serve", "--port", "70000", *command[6:]]) == 1
    assert "--port is 70000" in capsys.readouterr().err


def test_the_commands_of_the_page_parse():
    page = (ROOT / "docs" / "search.md").read_text()
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    lines = blocks.replace("\\\n", " ").splitlines()
    found = [line for line in lines if line.startswith("python -m flip_jax.search")]
    assert {parse(shlex.split(line)[3:]).command for line in found} == {"index", "serve"}
