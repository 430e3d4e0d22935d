"""What the server sends besides answers: the page, its words, pictures and strokes."""

import io
import json
import re
from importlib import resources

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("faiss", reason="search needs the extra `search`")
pytest.importorskip("aiohttp", reason="search needs the extra `search`")

from search_world import photo

from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.search import pictures

PAGE = resources.files("flip_jax.search") / "page"


def test_the_page_and_its_files(served):
    status, headers, page = served.ask("GET", "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    names = set(re.findall(rb'(?:src|href)="(/assets/[^"]+)"', page))
    assert len(names) == 3
    for name in names:
        assert served.ask("GET", name.decode())[0] == 200
    script = served.ask("GET", "/assets/app.js")[2].decode()
    for name in re.findall(r'from "\./(\w+\.js)"', script):
        status, headers, _ = served.ask("GET", f"/assets/{name}")
        assert status == 200 and headers["Content-Type"] == "text/javascript; charset=utf-8"


def test_the_page_asks_nobody_else():
    """Not one address of another host in what the server sends."""
    sent = "".join(file.read_text() for file in PAGE.iterdir())
    assert set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"'<)]*", sent)) == {
        "http://www.w3.org/2000/svg"
    }


def test_all_words_are_there_in_both_languages():
    words = (PAGE / "words.js").read_text()
    english, chinese = re.search(
        r"en: \{(.*)\n  zh: \{(.*)\n\};\n\n// Group", words, re.DOTALL
    ).groups()
    keys = [re.findall(r"^ {4,6}(\w+):", part, re.MULTILINE) for part in (english, chinese)]
    assert keys[0] == keys[1] and len(keys[0]) > 50
    assert sorted(re.findall(r'^    \["(\w+)", "', words, re.MULTILINE)) == sorted(ATTRIBUTES)
    used = set(re.findall(r'data-word="(\w+)"', (PAGE / "index.html").read_text()))
    used |= set(
        re.findall(
            r"words\.(\w+)",
            "".join((PAGE / f"{name}.js").read_text() for name in ("app", "filters", "results")),
        )
    )
    assert used - set(keys[0]) == {"js"}  # of "./words.js"


def test_info_tells_the_limits_and_the_counts(served, world):
    status, _, body = served.ask("GET", "/api/info")
    info = json.loads(body)
    assert status == 200 and info["faces"] == 40 and info["limits"]["picture_bytes"] == 8 * 2**20
    assert info["attributes"]["Male"]["unknown"] == 8
    assert all(sum(counts.values()) == 40 for counts in info["attributes"].values())
    for path in (world.data, world.checkpoint, world.index):
        assert str(path) not in body.decode()


def test_pictures_are_small_jpegs_without_metadata(served, world):
    status, headers, body = served.ask("GET", "/pictures/3?v=1")
    assert status == 200 and headers["Content-Type"] == "image/jpeg"
    assert "max-age" in headers["Cache-Control"]
    shown, kept = Image.open(io.BytesIO(body)), photo(world, 3)
    assert shown.size == (64, 64) and not shown.getexif()
    assert np.abs(np.array(shown).astype(int) - kept).mean() < 6
    large = Image.new("RGB", (900, 300), "red")
    large.getexif()[0x010F] = "a camera"
    memory = io.BytesIO()
    large.save(memory, "JPEG", exif=large.getexif())
    small = Image.open(io.BytesIO(pictures.thumbnail(memory.getvalue())))
    assert small.size == (320, 107) and not small.getexif()


def test_what_browsers_keep_is_asked_for_with_the_version():
    """Or they show another index's after it was served at the same address."""
    text = "".join(file.read_text() for file in PAGE.glob("*.js"))
    kept = re.findall(r"`/(?:pictures|api/strokes)/\$\{\w+\}([^`]*)`", text)
    assert len(kept) == 2 and all(re.match(r"\?v=\$\{.*version\}", rest) for rest in kept)


def test_strokes(served, world):
    status, _, body = served.ask("GET", "/api/strokes/5")
    found, strokes = json.loads(body), world.engine.record(5).strokes
    assert status == 200 and found["size"] == 64 and len(found["strokes"]) == len(strokes) > 10
    np.testing.assert_allclose(found["strokes"][3], strokes[3], atol=0.051)
