"""What the lines of an opt-out list mean, and which are refused."""

import re

import pytest

pytest.importorskip("apache_beam", reason="curation needs the extra `curate`")

from flip_jax.curate.config import OptOutConfig
from flip_jax.curate.optout import OptOut


def test_what_a_list_of_urls_means(tmp_path):
    (tmp_path / "urls").write_text("http://A.test/x?y=Z#top\nhttps://b.test:443/ # b\n")
    (tmp_path / "domains").write_text("c.test\n")
    opt_out = OptOut(OptOutConfig(urls=f"{tmp_path}/urls", domains=f"{tmp_path}/domains"))
    opt_out.load()
    out = [
        "https://a.test:443/x?y=Z",
        "HTTP://a.test/x?y=Z#end",
        "http://b.test/",
        "http://d.c.test.",
    ]
    assert [opt_out.url_reason(url) for url in out] == ["url"] * 3 + ["domain c.test"]
    within = ["http://a.test/x?y=z", "http://a.test:8080/x?y=Z", "http://[::1/c.test", "c.test"]
    assert [opt_out.url_reason(url) for url in within] == [None] * 4


@pytest.mark.parametrize(
    ("name", "lines", "out", "within"),
    [
        (
            "domains",
            b"\xef\xbb\xbfexample.com\r\n",
            "https://a.example.com/a",
            "https://xample.com/",
        ),
        ("urls", b"\xef\xbb\xbfhttps://a.test/b", "http://a.test/b", "http://a.test/c"),
        ("domains", "münchen.de", "https://b.xn--mnchen-3ya.de/a", "https://munchen.de/a"),
        ("domains", "XN--MNCHEN-3YA.de", "https://München.de/a", "https://munchen.de/a"),
        ("domains", "straße.de", "https://xn--strae-oqa.de/a", "https://strasse.de/a"),
        ("domains", ".my_host.test.", "http://MY_HOST.test./", "http://host.test/"),
        ("urls", "https://münchen.de/ä b", "http://xn--mnchen-3ya.de/%C3%A4%20b", "http://b.de/"),
        ("urls", "http://b.test", "https://b.test./#top", "https://b.test/a"),
    ],
)
def test_entries_match_however_they_are_written(tmp_path, name, lines, out, within):
    (tmp_path / "list").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    opt_out = OptOut(OptOutConfig(**{name: f"{tmp_path}/list"}))
    opt_out.load()
    assert opt_out.url_reason(out) and opt_out.url_reason(within) is None


@pytest.mark.parametrize(
    ("name", "line", "wanted"),
    [
        *(
            ("domains", line, "a bare host name such as example.com")
            for line in (
                *("https://example.com/", "b.test/private", "b.test:80", "a@b.test", "a.*.test"),
                *("b.test c.test", "b.test,c.test", "a..test", "*.", "ü" * 70 + ".test"),
            )
        ),
        *(
            ("urls", line, "a whole url such as https://example.com/a.jpg")
            for line in ("host.test/a.jpg", "ftp://a.test/b", "https:///a", "http://[::1/a")
        ),
        ("hashes", "ab" * 31, "a SHA-256 of 64 hexadecimal digits"),
    ],
)
def test_a_line_that_would_leave_nothing_out_is_refused(tmp_path, name, line, wanted):
    (tmp_path / "list").write_text(f"# all of these\n\n{line}  # me\n", "utf-8")
    place = (
        f"config.opt_out.{name}: {tmp_path}/list, line 3, holds {line!r}; a line must be {wanted}"
    )
    with pytest.raises(ValueError, match=re.escape(place)):
        OptOut(OptOutConfig(**{name: f"{tmp_path}/list"})).load()


def test_a_list_that_is_not_there(tmp_path):
    message = f"config.opt_out.urls: {tmp_path}/gone cannot be read"
    with pytest.raises(OSError, match=re.escape(message)):
        OptOut(OptOutConfig(urls=f"{tmp_path}/gone")).load()


def test_lists_are_utf_8(tmp_path):
    (tmp_path / "list").write_text("münchen.de", "latin-1")
    message = f"config.opt_out.domains: {tmp_path}/list is not UTF-8; save it as UTF-8"
    with pytest.raises(ValueError, match=re.escape(message)):
        OptOut(OptOutConfig(domains=f"{tmp_path}/list")).load()
