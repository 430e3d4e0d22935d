"""Searching over HTTP: right answers."""

import base64
import re

import numpy as np
import pytest

pytest.importorskip("faiss", reason="search needs the extra `search`")
pytest.importorskip("aiohttp", reason="search needs the extra `search`")

from conftest import ROOT
from search_world import RERANK, TEXT, Served, cosines, encoded, photo

from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.records import BadRecord
from flip_jax.search.engine import Engine, Query
from flip_jax.search.pictures import RefusedPicture


def test_text_finds_what_comparing_with_all_finds(served, world):
    status, found = served.search(text=TEXT, count=10)
    scores = cosines(world.engine, world.engine.model.encode_text([TEXT])[0])
    assert status == 200 and (found["matching"], found["total"]) == (40, 40)
    assert [f["face"] for f in found["faces"]] == np.argsort(-scores, kind="stable")[:10].tolist()
    np.testing.assert_allclose(
        [f["cosine"] for f in found["faces"]], np.sort(-scores)[:10] * -1, atol=6e-5
    )
    assert all(face["match"] is None for face in found["faces"])
    record = world.engine.record(found["faces"][0]["face"])
    first = found["faces"][0]
    assert (first["id"], first["captions"]) == (record.id, record.captions)
    present = [
        name for name, label in zip(ATTRIBUTES, record.attributes, strict=True) if label == 1
    ]
    assert first["attributes"] == present


def test_a_photo_finds_itself(served, world):
    data = base64.b64encode(world.engine.record(7).image).decode()
    for query in ({"picture": data}, {"face": 7}, {"picture": encoded(photo(world, 7), "WEBP")}):
        status, found = served.search(**query)
        assert status == 200 and found["faces"][0]["face"] == 7
        assert found["faces"][0]["cosine"] > 0.99


def test_a_photo_asked_in_python_finds_itself(world):
    query = Query(picture=world.engine.record(7).image, count=1)
    (face,) = world.engine.search(query).faces
    assert face.face == 7 and face.cosine > 0.99
    with pytest.raises(RefusedPicture, match="not a JPEG"):
        world.engine.search(Query(picture=b"no picture"))


def test_words_and_a_picture_together(served, world):
    model = world.engine.model
    both = model.encode_text([TEXT])[0] + model.encode_image(photo(world, 7))[0]
    scores = cosines(world.engine, both / np.linalg.norm(both))
    _, found = served.search(text=TEXT, picture=encoded(photo(world, 7)), count=40)
    given = {face["face"]: face["cosine"] for face in found["faces"]}
    np.testing.assert_allclose([given[face] for face in range(40)], scores, atol=6e-5)


@pytest.mark.parametrize(
    "filters", [{"Male": "yes"}, {"Male": "unknown"}, {"Male": "no", "Young": "yes"}]
)
def test_filters(served, world, filters):
    values = {"yes": 1, "no": 0, "unknown": -1}
    wanted = {
        face
        for face in range(40)
        if all(
            world.engine.record(face).attributes[ATTRIBUTES.index(name)] == values[state]
            for name, state in filters.items()
        )
    }
    assert 0 < len(wanted) < 40
    for query in ({"text": TEXT}, {}):
        _, found = served.search(**query, filters=filters, count=40)
        assert {face["face"] for face in found["faces"]} == wanted
        assert found["matching"] == len(wanted)


def test_filters_that_nobody_meets(served):
    status, found = served.search(
        text=TEXT, filters={"Male": "yes", "No_Beard": "unknown"}, rerank=True
    )
    assert status == 200 and found["faces"] == [] and found["matching"] == 0


def test_nothing_asked_lists_the_first(served):
    _, found = served.search(count=5)
    assert [face["face"] for face in found["faces"]] == [0, 1, 2, 3, 4]
    assert all(face["cosine"] is None for face in found["faces"])


def test_itm_puts_the_best_in_order(served, world):
    _, plain = served.search(text=TEXT, count=40)
    _, found = served.search(text=TEXT, count=40, rerank=True)
    best = [face["face"] for face in plain["faces"][:RERANK]]
    images = [world.engine.record(face).image for face in best]
    chances = dict(zip(best, world.engine.model.match(images, [TEXT] * RERANK), strict=True))
    faces = found["faces"]
    assert [f["face"] for f in faces[:RERANK]] == sorted(chances, key=chances.get, reverse=True)
    for face in faces[:RERANK]:
        assert face["match"] == pytest.approx(chances[face["face"]], abs=6e-5)
    # Behind them, as by cosine.
    assert faces[RERANK:] == plain["faces"][RERANK:]
    _, few = served.search(text=TEXT, count=2, rerank=True)
    assert few["faces"] == faces[:2]


def test_itm_of_a_picture_looks_at_captions(served, world):
    picture = photo(world, 3)
    _, found = served.search(picture=encoded(picture), rerank=True, count=RERANK)
    captions = [face["captions"][0] for face in found["faces"]]
    chances = world.engine.model.match(picture, captions)
    np.testing.assert_allclose([f["match"] for f in found["faces"]], chances, atol=6e-5)
    assert np.all(np.diff(chances) <= 1e-6)
    # The last face has no caption: it comes behind those that have one.
    _, found = served.search(face=39, rerank=True, count=RERANK)
    assert (found["faces"][-1]["face"], found["faces"][-1]["match"]) == (39, None)
    assert all(face["match"] is not None for face in found["faces"][:-1])


def test_the_page_is_told_what_the_model_does_not_see(served, world):
    _, found = served.search(text="a zyxwvut woman 微笑")
    assert found["notes"] == [{"code": "unknown_words", "words": ["zyxwvut", "微笑"]}]
    _, found = served.search(text="a woman with a hat " * 20)
    tokens = world.engine.model.tokenizer.max_length - 2
    assert found["notes"] == [{"code": "cut", "tokens": tokens}]
    assert served.search(text=TEXT)[1]["notes"] == []


def test_a_record_that_was_damaged_since_is_left_out(world, caplog):
    class Damaged:
        def __getitem__(self, number):
            if number == 2:
                raise BadRecord("/place/test-00000.array_record record 2: damaged")
            return world.engine.source[number]

    engine = Engine(world.engine.index, Damaged(), world.engine.model, RERANK)
    with Served(engine) as server:
        _, found = server.search(count=5)
        assert [face["face"] for face in found["faces"]] == [0, 1, 3, 4]
        _, found = server.search(face=2, count=40)
        assert len(found["faces"]) == 39
        status, _, body = server.ask("GET", "/pictures/2")
    assert status == 500 and b"place" not in body and "record 2: damaged" in caplog.text


def test_the_python_of_the_docs_runs(world, capsys):
    page = (ROOT / "docs" / "search.md").read_text()
    (script,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for name, path in (("runs/demo/index", world.index), ("runs/demo", world.checkpoint)):
        script = script.replace(f'Path("{name}")', f'Path("{path}")')
    exec(compile(script, "search.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    chances = [float(line.split()[2]) for line in lines]
    assert len(lines) == 5 and chances == sorted(chances, reverse=True)
