"""The page in a real browser, without a screen: what a person does, and what may go wrong."""

import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("faiss", reason="search needs the extra `search`")
pytest.importorskip("aiohttp", reason="search needs the extra `search`")
pytest.importorskip("selenium", reason="driving a browser needs the extra `dev`")

from search_world import RERANK, TEXT, Served
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None or DRIVER is None,
        reason="no Chromium here; on Debian: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for switch in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "lang=en"):
        options.add_argument(f"--{switch}")
    options.add_argument("--window-size=1280,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


class Page:
    """What a person sees and does."""

    def __init__(self, browser, address: str):
        self.browser, self.address = browser, address
        browser.get(address)
        browser.execute_script("localStorage.setItem('language', 'en')")
        browser.refresh()
        self.wait(lambda: self.faces())

    def all(self, selector: str):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str):
        (found,) = self.all(selector)
        return found

    def wait(self, condition, seconds: float = 60):
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.05)
        return found

    def click(self, selector: str) -> None:
        """Scrolls there first, as a person would."""
        found = self.one(selector)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        found.click()

    def type(self, text: str) -> None:
        box = self.one("#text")
        box.clear()
        box.send_keys(text)

    def faces(self) -> list[int]:
        """Numbers of the faces shown."""
        found = self.browser.execute_script(
            "return [...document.querySelectorAll('#grid img')].map(image => image.src)"
        )
        return [int(re.search(r"/pictures/(\d+)", address)[1]) for address in found]

    def search(self, act) -> list[int]:
        """Does something that starts a search; the faces it finds."""
        self.browser.execute_script("document.getElementById('timing').textContent = ''")
        act()
        self.wait(lambda: self.one("#timing").text or self.alert())
        return self.faces()

    def alert(self) -> str:
        return self.one("#alert").text

    def drop(self, path, name: str) -> None:
        """Through the file dialog's element, as a browser without a screen has no dialog."""
        self.one("#file").send_keys(str(path / name))


@pytest.fixture
def page(browser, served):
    opened = Page(browser, served.address)
    yield opened
    # Neither the content security policy nor a script complained; refusals are said in the page.
    logged = [entry["message"] for entry in browser.get_log("browser")]
    assert [line for line in logged if "Failed to load resource" not in line] == []


def test_it_opens_with_faces_and_types_find_faces(page, world):
    assert page.faces() == list(range(24)) and page.one("#found").text == "From the collection"
    page.type(TEXT)
    found = page.search(lambda: page.one("#text").send_keys(Keys.ENTER))
    wanted, _ = world.engine.index.search(world.engine.model.encode_text([TEXT])[0], 24)
    assert found == wanted.tolist() and page.one("#found").text == "24 faces"
    page.wait(
        lambda: page.browser.execute_script(
            "return [...document.querySelectorAll('#grid img')].slice(0, 4)"
            ".every(image => image.complete && image.naturalWidth === 64)"
        )
    )
    assert len(page.search(lambda: page.click("#more"))) == 40
    assert not page.one("#more").is_displayed()


def test_itm_and_its_scores(page, world):
    page.type(TEXT)
    page.search(lambda: page.click("#go"))
    assert page.all(".score.cosine") and not page.all(".score.match")
    found = page.search(lambda: page.click("#rerank"))
    shown = [float(score.text.split()[1]) for score in page.all(".score.match")]
    assert len(shown) == RERANK and shown == sorted(shown, reverse=True)
    record = world.engine.record(found[0])
    chance = world.engine.model.match(record.image, [TEXT])[0]
    assert shown[0] == pytest.approx(100 * chance, abs=0.6)


def test_filters_and_their_chips(page, world):
    labels = world.engine.index.attributes
    found = page.search(lambda: page.click("[data-attribute=Male][data-state=no]"))
    assert set(found) == set(np.flatnonzero(labels[20] == 0)[:24].tolist())
    assert "of 40 meet the filters" in page.one("#timing").text
    found = page.search(lambda: page.click("[data-attribute=Male][data-state=unknown]"))
    assert set(found) == set(np.flatnonzero(labels[20] == -1).tolist())
    assert [chip.text for chip in page.all("#chosen .chip")] == ["Male: unknown ×"]
    assert len(page.search(lambda: page.one("#chosen .chip").click())) == 24
    # All labels of Smiling are known: nothing to ask for.
    assert not page.all("[data-attribute=Smiling][data-state=unknown]")


def test_a_photo_finds_itself_and_what_is_like_it(page, world, tmp_path):
    (tmp_path / "face.jpg").write_bytes(world.engine.record(7).image)
    assert page.search(lambda: page.drop(tmp_path, "face.jpg"))[0] == 7
    assert page.one("#attached").is_displayed()
    page.all("#grid button")[1].click()
    second = page.faces()[1]
    assert page.wait(lambda: page.one("#detail").is_displayed())
    assert world.engine.record(second).captions[0] in page.one("#detail-captions").text
    assert page.search(lambda: page.click("#similar"))[0] == second
    page.search(lambda: page.click("#detach"))
    assert not page.one("#attached").is_displayed() and page.faces() == list(range(24))


def test_drawing_searches_at_every_stroke(page):
    page.click("#sketch")
    canvas = page.one("#canvas")
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)

    def stroke(y: int) -> None:
        moves = ActionChains(page.browser, 20).move_to_element_with_offset(canvas, -60, y)
        moves.click_and_hold().move_by_offset(60, 5).move_by_offset(60, -5).release().perform()

    first = page.search(lambda: stroke(-40))
    page.click("#colours .pen:nth-child(3)")
    page.click("#widths .pen:nth-child(3)")
    assert page.search(lambda: stroke(20)) != first
    assert len(page.all("#best button")) == 6
    assert page.search(lambda: page.click("#undo")) == first
    assert page.search(lambda: page.click("#clear")) == list(range(24))


def test_examples(page, world):
    found = page.search(lambda: page.all("#example-texts .chip")[0].click())
    text = page.one("#text").get_attribute("value")
    assert text == world.engine.index.manifest.examples.captions[0]
    wanted, _ = world.engine.index.search(world.engine.model.encode_text([text])[0], 24)
    assert found == wanted.tolist()
    face = world.engine.index.manifest.examples.faces[0]
    assert page.search(lambda: page.all("#example-faces .thumb")[0].click())[0] == face
    page.all("#example-faces .pencil")[0].click()
    strokes = len(world.engine.record(world.engine.index.manifest.examples.sketches[0]).strokes)
    assert strokes > 10
    page.wait(lambda: len(page.all("#best button")) == 6)
    dark = "return document.getElementById('canvas').getContext('2d').getImageData(0, 0, 448, 448)"
    dark += ".data.filter((value, place) => place % 4 === 0 && value < 99).length"
    assert page.browser.execute_script(dark) > 2000


def test_chinese(page):
    page.click("[data-language=zh]")
    assert page.one("h1").text == "人脸检索" and page.one("#go").text == "搜索"
    assert page.browser.execute_script("return document.documentElement.lang") == "zh-CN"
    page.search(lambda: page.click("[data-attribute=Young][data-state=yes]"))
    assert page.one("#chosen .chip").text == "年轻：是 ×"
    page.browser.refresh()  # the choice is kept
    page.wait(lambda: page.one("h1").text == "人脸检索")
    # Every word is there: none of the English ones is left.
    left = page.one("body").text
    assert not re.search(r"Filters|Search|Photo|Sketch|Male|Show more", left)


def test_bad_pictures_are_explained(page, tmp_path):
    Image.new("L", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 1_000_000
    (tmp_path / "large.jpg").write_bytes(b"\xff\xd8\xff" + bytes(9 * 2**20))
    (tmp_path / "letter.jpg").write_bytes(b"Dear Sir or Madam" * 50)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), "u1")).save(
        tmp_path / "whole.jpg"
    )
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    for name, said in (
        ("bomb.png", "too many pixels: at most 32 megapixels"),
        ("large.jpg", "too large: at most 8 MB"),
        ("letter.jpg", "not a JPEG, PNG or WebP"),
        ("half.jpg", "damaged or not whole"),
    ):
        page.drop(tmp_path, name)
        page.wait(lambda said=said: said in page.alert())
        assert not page.one("#attached").is_displayed() and page.faces()
    page.search(lambda: page.drop(tmp_path, "whole.jpg"))
    assert page.alert() == "" and page.one("#attached").is_displayed()


def test_a_body_that_slips_past_the_page_is_refused_by_the_server(page):
    """As a script of the page's own, without the check of the file's size."""
    script = """
        const done = arguments[0];
        fetch("/api/search", {method: "POST", headers: {"Content-Type": "application/json"},
            body: JSON.stringify({picture: "A".repeat(12 * 2 ** 20)})})
            .then(async answer => done([answer.status, (await answer.json()).error.code]))
            .catch(error => done([0, String(error)]))"""
    status, code = page.browser.execute_async_script(script)
    assert (status, code) in ((413, "picture_bytes"), (0, "TypeError: Failed to fetch"))
    page.type(TEXT)
    assert page.search(lambda: page.click("#go"))


def test_a_description_that_is_too_long(page):
    script = "document.getElementById('text').value = 'man '.repeat(200)"
    page.browser.execute_script(script)
    page.click("#go")
    page.wait(lambda: page.alert() == "This description is too long: at most 500 characters.")


def test_what_is_found_is_shown_as_text(page):
    """Nothing that a query or a caption holds becomes part of the page."""
    page.type("<img src=x onerror=alert(1)> <b>zqxj</b>")
    page.search(lambda: page.click("#go"))
    assert "zqxj" in page.one("#notes").text and not page.all("#notes b")


@pytest.mark.parametrize("path", ["../../etc/passwd", "assets/..%2fapp.py", "pictures/999999"])
def test_addresses_lead_nowhere_else(page, served, path):
    script = "fetch(arguments[0]).then(answer => arguments[1](answer.status))"
    status = page.browser.execute_async_script(f"const done = arguments[1]; {script}", "/" + path)
    assert status == 404


def test_the_server_goes_away_and_comes_back(browser, world):
    with Served(world.engine) as server:
        page = Page(browser, server.address)
    page.type(TEXT)
    page.click("#go")
    page.wait(lambda: page.alert() == "The server does not answer. Is it still running?")
    browser.get_log("browser")


def test_a_page_works_while_fifty_others_search(page, served):
    """50 users, three searches each, while a person uses the page."""
    with ThreadPoolExecutor(50) as pool:
        others = [pool.submit(served.search, text=f"{TEXT} {n}", rerank=True) for n in range(150)]
        page.type(TEXT)
        assert len(page.search(lambda: page.click("#go"))) == 24 and page.alert() == ""
        assert {work.result()[0] for work in others} == {200}


def test_a_phone(browser, served):
    """At the width of a phone nothing sticks out, and what is tapped is large enough."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page = Page(browser, served.address)
        for language in ("en", "zh"):
            page.click(f"[data-language={language}]")
            page.click("#filters summary")
            wide = "return document.documentElement.scrollWidth"
            assert browser.execute_script(wide) <= 390
            small = """return [...document.querySelectorAll('button, summary')].filter(item => {
                const box = item.getBoundingClientRect();
                return box.width && Math.min(box.width, box.height) < 24}).map(x => x.outerHTML)"""
            assert browser.execute_script(small) == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_has_a_name(page):
    """For those who cannot see it: no button, field or picture without words."""
    page.type(TEXT)
    page.search(lambda: page.click("#go"))
    page.click("#sketch")
    nameless = """return [...document.querySelectorAll('button, input, textarea, canvas')].filter(
        item => item.offsetParent && !item.ariaHidden && !item.ariaLabel && !item.textContent.trim()
            && !item.labels?.[0]?.textContent.trim()).map(item => item.outerHTML)"""
    assert page.browser.execute_script(nameless) == []
    without = "return [...document.images].filter(image => !image.hasAttribute('alt')).length"
    assert page.browser.execute_script(without) == 0
