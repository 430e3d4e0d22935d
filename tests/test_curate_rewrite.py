"""Rewriting by a language model, against a server that answers well."""

import dataclasses
import time
from collections import Counter

import pytest

pytest.importorskip("aiohttp", reason="rewriting needs the extra `curate`")

from chat_server import ChatServer, good, said
from rewrite_run import CFG, MAN, WOMAN, rewritten, run, texts

from flip_jax.curate.rewrite import RewriteStage


def test_captions_keep_their_order_and_number(tmp_path):
    wanted = texts(40)
    batch = [wanted[:5], [], wanted[5:6], wanted[6:]]
    # Later requests are answered first.
    slow = {text: 0.2 * (n % 4 == 0) for n, text in enumerate(wanted)}

    def behave(number, payload):
        time.sleep(slow[payload["messages"][-1]["content"]])
        return good(payload)

    with ChatServer(behave) as server:
        found, tally = run(server, tmp_path, *batch)
    assert found == [tuple(map(rewritten, each)) for each in batch]
    assert tally == {"captions": 40, "rewritten": 40}


def test_what_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret\n")
    with ChatServer() as server:
        run(server, tmp_path, [MAN], key_variable="SOME_KEY", model="m", seed=7, max_tokens=99)
    (payload,) = server.requests
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    system, user = payload.pop("messages")
    assert user == {"role": "user", "content": MAN}
    assert system["role"] == "system" and "Keep every detail" in system["content"]
    sampling = {"temperature": 0.7, "top_p": 0.8, "max_tokens": 99, "seed": 7}
    assert payload == {"model": "m", **sampling}


def test_a_prompt_of_ones_own(tmp_path):
    (tmp_path / "prompt.txt").write_text("Sag es anders.\n")
    with ChatServer() as server:
        run(server, tmp_path, [MAN], prompt=str(tmp_path / "prompt.txt"))
    assert server.requests[0]["messages"][0]["content"] == "Sag es anders."
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_requests_at_a_time_are_bounded(tmp_path, concurrency):
    with ChatServer(seconds=0.05) as server:
        run(server, tmp_path, texts(24), concurrency=concurrency)
    assert server.most == concurrency and len(server.requests) == 24


def test_equal_captions_are_asked_for_once(tmp_path):
    with ChatServer() as server:
        found, tally = run(server, tmp_path, [MAN, WOMAN], [MAN, MAN])
    assert sorted(server.texts()) == sorted([MAN, WOMAN])
    assert found == [(rewritten(MAN), rewritten(WOMAN)), (rewritten(MAN),) * 2]
    assert tally == {"captions": 4, "rewritten": 4}


def test_the_cache_saves_the_second_request(tmp_path):
    with ChatServer() as server:
        first = run(server, tmp_path, texts(6))
        assert len(server.requests) == 6
        assert run(server, tmp_path, texts(6)) == first
        assert len(server.requests) == 6
        run(server, tmp_path, texts(8))
        assert len(server.requests) == 8
        (tmp_path / "prompt.txt").write_text("another prompt")
        for change in (
            {"model": "another"},
            {"prompt": str(tmp_path / "prompt.txt")},
            {"temperature": 0.1},
            {"top_p": 0.1},
            {"max_tokens": 100},
            {"seed": 1},
        ):
            before = len(server.requests)
            run(server, tmp_path, texts(2), **change)
            assert len(server.requests) == before + 2, change


def test_a_rejected_reply_is_not_asked_for_again(tmp_path):
    with ChatServer(lambda number, payload: said("A dog.")) as server:
        first = run(server, tmp_path, [MAN])
        assert first == ([(MAN,)], {"captions": 1, "kept": 1, "rejected: lost Eyeglasses": 1})
        assert run(server, tmp_path, [MAN]) == first
        assert len(server.requests) == 1


# The check


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("This woman has a beard and glasses.", "contradicted Male"),
        ("This man has no beard and wears glasses.", "contradicted No_Beard"),
        ("This man has a beard.", "lost Eyeglasses"),
        ("This young man has a beard and glasses.", "invented Young"),
        ("This man has a beard, glasses and a suit.", "words not understood"),
        ("这个男人有胡子，戴着眼镜。", "lost Eyeglasses"),
        (f"{MAN} " * 9, "too long"),
        ('""', "empty"),
    ],
)
def test_rewrites_that_say_something_else_are_not_used(tmp_path, answer, reason):
    with ChatServer(lambda number, payload: said(answer)) as server:
        found, tally = run(server, tmp_path, [MAN])
        assert found == [(MAN,)]
        assert tally == {"captions": 1, "kept": 1, f"rejected: {reason}": 1}
        if reason not in ("too long", "empty"):
            found, _ = run(server, tmp_path, [MAN], check=False)
            assert found == [(answer,)]


def test_another_try_has_another_seed(tmp_path):
    def behave(number, payload):
        return good(payload) if payload["seed"] == 12 else said("A man.")

    with ChatServer(behave) as server:
        found, tally = run(server, tmp_path, [MAN, WOMAN], seed=10, attempts=5)
        assert found == [(rewritten(MAN), rewritten(WOMAN))]
        assert Counter(payload["seed"] for payload in server.requests) == {10: 2, 11: 2, 12: 2}
        rejected = {"rejected: lost Eyeglasses": 2, "rejected: contradicted Male": 2}
        assert tally == {"captions": 2, "rewritten": 2, **rejected}


def test_captions_that_cannot_be_checked_are_left_alone(tmp_path):
    web = "My uncle Bob at the lake!!"
    with ChatServer() as server:
        found, tally = run(server, tmp_path, [web, MAN])
        assert found == [(web, rewritten(MAN))] and server.texts() == [MAN]
        assert tally == {"captions": 2, "kept": 1, "rewritten": 1, "not understood": 1}
        found, _ = run(server, tmp_path, [web], check=False)
        assert found == [(rewritten(web),)]


@pytest.mark.parametrize(
    "answer",
    [
        f'"{MAN}"',
        f"\u201c{MAN}\u201d",
        "\n  " + MAN.replace(". ", ".\n\n") + "\n",
        f"<think>He has a beard,\nso he is no baby.</think>\n\n{MAN}",
    ],
)
def test_what_stands_around_an_answer_is_taken_off(tmp_path, answer):
    with ChatServer(lambda number, payload: said(answer)) as server:
        found, tally = run(server, tmp_path, [MAN])
    assert found == [(MAN,)] and tally["rewritten"] == 1


# Several texts in a request


def test_several_texts_in_a_request(tmp_path):
    wanted = texts(7)
    with ChatServer() as server:
        found, tally = run(server, tmp_path, wanted, texts_per_request=3)
    assert found == [tuple(map(rewritten, wanted))]
    # Requests run side by side and may arrive in any order.
    assert sorted(payload["max_tokens"] for payload in server.requests) == [128, 384, 384]
    assert sorted(text.count("\n") for text in server.texts()) == [0, 2, 2]
    assert tally == {"captions": 7, "rewritten": 7}


@pytest.mark.parametrize(
    "answer",
    [
        "1. One.\n2. Two.",
        "1. One.\n2. Two.\n3. Three.\n4. Four.",
        "1. One.\n3. Three.\n2. Two.",
        "One.\nTwo.\nThree.",
        "Here you are:\n1. One.\n2. Two.\n3. Three.",
        "1. One.\n2.\n3. Three.",
    ],
)
def test_a_wrong_number_of_answers(tmp_path, answer):
    """Nothing is matched by guess: each text is asked for by itself."""
    wanted = texts(3)

    def behave(number, payload):
        return said(answer) if "\n" in payload["messages"][-1]["content"] else good(payload)

    with ChatServer(behave) as server:
        found, tally = run(server, tmp_path, wanted, texts_per_request=3)
    assert found == [tuple(map(rewritten, wanted))]
    assert len(server.requests) == 4 and tally == {"captions": 3, "rewritten": 3}


def test_settings_that_cannot_be_used(tmp_path):
    def stage(cache="replies", **changes):
        return RewriteStage(dataclasses.replace(CFG, **changes), cache)

    with pytest.raises(ValueError, match=r"config.rewrite.url='host:8000' must start with http"):
        stage(url="host:8000")
    with pytest.raises(ValueError, match=r"config.rewrite.cache='gs://b/c' must be a folder"):
        stage("gs://b/c", url="http://h")
    with pytest.raises(ValueError, match=r"config.rewrite.prompt='none.txt' cannot be read"):
        stage(url="http://h", prompt="none.txt")
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        stage(url="http://h", prompt=str(tmp_path / "empty"))


def test_fingerprint_holds_what_captions_depend_on(tmp_path):
    (tmp_path / "prompt.txt").write_text("another")
    base = dataclasses.replace(CFG, url="http://h")

    def printed(**changes):
        return RewriteStage(dataclasses.replace(base, **changes), "x").fingerprint()

    same = {"url": "http://other", "concurrency": 1, "retries": 0, "timeout_seconds": 1.0}
    for name, value in {**same, "cache": "y", "key_variable": "K"}.items():
        assert printed(**{name: value}) == printed(), name
    other = {"model": "m", "temperature": 0.0, "top_p": 0.1, "max_tokens": 9, "seed": 9}
    other |= {"attempts": 9, "check": False, "texts_per_request": 2}
    for name, value in {**other, "prompt": str(tmp_path / "prompt.txt")}.items():
        assert printed(**{name: value}) != printed(), name
