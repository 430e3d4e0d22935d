"""Captions word by word: the loss, whole steps with it, and the search for the best caption."""

import itertools
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from test_accumulation import in_steps, loss_and_gradient
from test_partition import assert_same_steps, run
from tiny_run import CFG, batches

from flip_jax import api, caption, caption_scores, checkpoint, config, main, partition
from flip_jax.config import LossWeights
from flip_jax.data.attributes import ATTRIBUTE_INDEX
from flip_jax.losses.caption import next_word_losses
from flip_jax.models import captioner, flip
from flip_jax.models.beam import write_captions
from flip_jax.optim import make_optimizer
from flip_jax.train import init_state, make_train_step

ROOT = Path(__file__).parent.parent
TEXT = replace(CFG.model.text, dropout=0.0, init_std=0.2)
MODEL = replace(CFG.model, text=TEXT, caption_head=True)
CAPTION = replace(CFG, model=MODEL, loss=replace(CFG.loss, weights=LossWeights(caption=2.0)))
FIELDS = ["--config.loss.weights.caption=1", "--config.model.caption_head=true"]


# The loss -----------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2, 4, 5))
    ids = np.array([[4, 1, 2, 3], [4, 3, 0, 0]], np.int32)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    sums, words = next_word_losses(jnp.float32(logits), ids, mask, 0.1)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    places = [[(0, 1), (1, 2), (2, 3)], [(0, 3)]]
    for row, told in enumerate(places):
        target = [0.9 * np.eye(5)[word] + 0.1 / 5 for _, word in told]
        expected = -sum(t @ np.log(shares[row, p]) for t, (p, _) in zip(target, told, strict=True))
        np.testing.assert_allclose(sums[row], expected, rtol=1e-6)
    np.testing.assert_array_equal(words, [3, 1])


@jax.jit
def logits_of(params, ids, mask, tokens):
    model = nnx.merge(flip.build(MODEL), params)
    return model.caption_logits(ids, mask, tokens)


@pytest.fixture(scope="module")
def params():
    """Far from a fresh head, so that every part shows."""
    fresh = jax.jit(flip.init_params, static_argnums=(0, 1))(MODEL, 0.07, jax.random.key(0))
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


@pytest.fixture(scope="module")
def tokens(params):
    (batch,) = batches(1)
    return nnx.merge(flip.build(MODEL), params).encode_image(batch["image"][:4])[0]


def test_a_word_sees_the_picture_and_the_words_before_it(params, tokens):
    (batch,) = batches(1)
    ids, mask = batch["token_ids"][:4], np.ones((4, 8), bool)
    before = logits_of(params, ids, mask, tokens)
    # Not in place: what was dispatched may still read it.
    ids = ids.copy()
    assert before.shape == (4, 8, 50) and before.dtype == jnp.float32
    ids[:, 0] = 7  # [DEC] stands there whatever is given
    ids[:, 5] = (ids[:, 5] + 1) % 48
    after = logits_of(params, ids, mask, tokens)
    np.testing.assert_allclose(after[:, :5], before[:, :5], atol=1e-5)
    assert (np.abs(after - before)[:, 5:].max(-1) > 1e-3).all()
    other = logits_of(params, ids, mask, tokens[::-1])
    assert (np.abs(other - after).max(-1) > 1e-3).all()


@pytest.mark.release
def test_same_steps_on_a_mesh():
    meshed, alone = run(8, 2, CAPTION), run(1, 1, CAPTION)
    assert {"loss_itc", "loss_itm", "loss_caption"} < set(alone[0][0])
    assert_same_steps(meshed, alone)


@pytest.fixture(scope="module")
def whole():
    return loss_and_gradient(in_steps(CAPTION, 1), 0)


@pytest.mark.slow
def test_parts_of_a_batch_are_the_step_of_all(whole):
    parts = loss_and_gradient(in_steps(CAPTION, 4), 0)
    for name, value in whole[0].items():
        np.testing.assert_allclose(parts[0][name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    names = jax.tree_util.tree_leaves_with_path(parts[1])
    for (path, ours), value in zip(names, jax.tree.leaves(whole[1]), strict=True):
        name = partition.leaf_path(path)
        scale = 1e-2 if name.endswith("key/bias") else np.abs(value).max()
        np.testing.assert_allclose(ours, value, rtol=0, atol=3e-6 * scale, err_msg=name)


@pytest.mark.slow
def test_the_loss_is_the_weighted_sum_of_its_parts(whole):
    plain = replace(CFG, model=replace(MODEL, caption_head=False))
    (metrics, gradient), (alone, without) = whole, loss_and_gradient(plain, 0)
    parts = metrics["loss_itc"] + metrics["loss_itm"] + 2 * metrics["loss_caption"]
    np.testing.assert_allclose(metrics["loss"], parts, rtol=1e-6)
    assert "loss_caption" not in alone and "caption_head" not in without
    assert metrics["loss_itc"] == pytest.approx(alone["loss_itc"], rel=1e-6)
    for leaf in jax.tree.leaves(gradient["caption_head"]):
        assert np.abs(leaf).max() > 0


# Writing ------------------------------------------------------------------------------------------

SEP, PAD = 3, 0


def oracle(params, tokens, allowed, places, beams, penalty):
    """Beam search over whole texts, without a memory, one picture after the other."""
    found = []

    def value(one):
        return one[1] / (len(one[0]) - 1) ** penalty

    for image in tokens:
        kept, ended = [([48], 0.0)], []
        for place in range(places - 1):
            candidates = []
            for words, score in kept:
                if words[-1] == SEP and len(words) > 1:
                    candidates.append((words, score))
                    continue
                ids = np.array([words + [PAD] * (places - len(words))], np.int32)
                logits = logits_of(params, ids, ids == ids, image[None])
                shares = np.asarray(jax.nn.log_softmax(logits[0, place]), np.float64)
                candidates += [([*words, w], score + shares[w]) for w in np.flatnonzero(allowed)]
            kept = sorted(candidates, key=lambda c: -c[1])[:beams]
            ended += [one for one in kept if one[0][-1] == SEP]
        best = max(kept + ended, key=value)
        found.append(([int(w) for w in best[0]] + [PAD] * (places - len(best[0])), best[1]))
    return found


def written(params, tokens, allowed, places, beams, penalty=0.0):
    def write(params, tokens):
        model = nnx.merge(flip.build(MODEL), params)
        ends = {"sep_id": SEP, "pad_id": PAD, "places": places}
        return write_captions(model, tokens, allowed, **ends, beams=beams, length_penalty=penalty)

    return jax.device_get(jax.jit(write)(params, tokens))


@pytest.mark.parametrize(("beams", "penalty"), [(1, 0.0), (3, 1.0)])
def test_same_words_as_a_search_without_memory(params, tokens, beams, penalty):
    allowed = np.arange(50) % 4 == 3  # twelve words, [SEP] among them
    ids, scores = written(params, tokens, allowed, 6, beams, penalty)
    for row, (words, score) in enumerate(oracle(params, tokens, allowed, 6, beams, penalty)):
        assert ids[row].tolist() == words
        assert scores[row] == pytest.approx(score, abs=1e-4)
    assert len({tuple(row) for row in ids.tolist()}) > 1


class Memory(NamedTuple):
    """What the search hands on, of a toy that needs none."""

    words: jax.Array


@pytest.mark.parametrize(("beams", "penalty"), [(2, 0.0), (2, 1.0), (3, 0.0)])
def test_a_caption_that_ended_is_not_forgotten(monkeypatch, beams, penalty):
    """It ends at once with 0.30; two beams that go on have 0.32 next, and 0.04 in the end."""
    pad, sep, dec = 0, 1, 5
    table = np.full((6, 6), 1e-9, np.float32)  # next word by last word
    table[dec, [2, sep, 3]] = 0.65, 0.30, 0.05
    table[[2, 3]] = np.float32([1e-9, 0.01, 0.5, 0.49, 1e-9, 1e-9])
    monkeypatch.setattr(captioner, "begin", lambda *_, texts: Memory(jnp.zeros((1, texts))))
    monkeypatch.setattr(captioner, "step", lambda bert, last, place, memory: (last, memory))
    model = SimpleNamespace(
        dec_id=dec,
        bert=SimpleNamespace(word_embed=jnp.zeros(1)),
        caption_head=lambda last, _: jnp.log(table)[last],
    )
    allowed = np.isin(np.arange(6), (sep, 2, 3))
    ends = {"sep_id": sep, "pad_id": pad, "places": 6}
    options = {"beams": beams, "length_penalty": penalty}
    ids, scores = write_captions(model, jnp.zeros((1, 1, 1)), allowed, **ends, **options)
    if penalty:  # by the mean of its words the longer one is better: log 0.04 / 5
        assert ids[0].tolist() == [dec, 2, 2, 2, 2, 2]
        assert scores[0] == pytest.approx(np.log(0.65 * 0.5**4), abs=1e-4)
    else:
        assert ids[0].tolist() == [dec, sep, pad, pad, pad, pad]
        assert scores[0] == pytest.approx(np.log(0.30), abs=1e-4)


def test_enough_beams_find_the_likeliest_of_all_captions(params, tokens):
    words = [SEP, 10, 20]
    allowed = np.isin(np.arange(50), words)
    ids, scores = written(params, tokens[:1], allowed, 5, 40)
    texts = set()
    for drawn in itertools.product(words, repeat=4):
        end = drawn.index(SEP) + 1 if SEP in drawn else 4
        texts.add(drawn[:end])
    rows = np.array([[48, *t] + [PAD] * (4 - len(t)) for t in sorted(texts)], np.int32)
    logits = logits_of(params, rows, rows == rows, jnp.repeat(tokens[:1], len(rows), 0))
    shares = np.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), rows[:, 1:, None], -1)[..., 0]
    totals = np.where(rows[:, 1:] != PAD, shares, 0).sum(1)
    assert ids[0].tolist() == rows[np.argmax(totals)].tolist()
    assert scores[0] == pytest.approx(totals.max(), abs=1e-4)


def test_a_step_with_memory_is_the_tower(params, tokens):
    (batch,) = batches(1)
    ids = batch["token_ids"][:4].copy()
    ids[:, 0] = MODEL.text.dec_id
    model = nnx.merge(flip.build(MODEL), params)
    expected = model.bert(ids, ids == ids, tokens, causal=True)
    memory = captioner.begin(model.bert, tokens, 8, texts=4)
    take = jax.jit(lambda ids, place, memory: captioner.step(model.bert, ids, place, memory))
    for place in range(8):
        states, memory = take(ids[:, place], place, memory)
        np.testing.assert_allclose(states, expected[:, place], atol=1e-5)


@pytest.mark.slow
def test_learns_to_write_the_captions_of_a_fixed_set():
    cfg = replace(CAPTION, loss=replace(CAPTION.loss, caption_smoothing=0.0))
    tx = make_optimizer(replace(cfg.optim, weight_decay=0.0), lambda _: 3e-3)
    step = jax.jit(make_train_step(cfg, tx, lambda _: jnp.float32(3e-3), lambda _: 0.0))
    state = init_state(cfg, tx)
    (batch,) = batches(1)
    rows = np.arange(16)
    batch["token_ids"] = np.random.default_rng(4).integers(10, 40, (16, 8)).astype(np.int32)
    batch["token_mask"] = np.arange(8) < (4 + rows % 4)[:, None]
    batch["token_ids"][rows, 3 + rows % 4] = SEP
    values = []
    for _ in range(150):
        state, metrics = step(state, batch)
        values.append(float(metrics["loss_caption"]))
    assert values[0] > 3.5 and values[-1] < 0.05
    model = nnx.merge(flip.build(MODEL), state["params"])
    allowed = np.isin(np.arange(50), [SEP, *range(10, 40)])
    ids, _ = written(state["params"], model.encode_image(batch["image"])[0], allowed, 8, 1)
    wanted = np.where(batch["token_mask"], batch["token_ids"], PAD)
    np.testing.assert_array_equal(ids[:, 1:], wanted[:, 1:])


# Runs and commands --------------------------------------------------------------------------------


def train(workdir, epochs):
    start = ["--config", str(ROOT / "configs" / "debug.py"), *FIELDS, "--config.eval.rerank=0"]
    fields = [f"--config.epochs={epochs}", "--config.optim.schedule=constant"]
    assert main.main([*start, "--workdir", str(workdir), *fields]) == 0


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caption") / "run"
    train(folder, 0.5)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert any("loss_caption" in json.loads(line) for line in lines)
    return folder


@pytest.mark.release
def test_a_run_goes_on_to_the_same_bits(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "parts")
    for name in ("whole", "parts"):
        train(tmp_path / name, 1.0)
    whole, parts = (checkpoint.load_params(tmp_path / name) for name in ("whole", "parts"))
    assert "caption_head" in whole
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


@pytest.mark.release
def test_captions_of_records_and_pictures(workdir, tmp_path, capsys):
    data, out = workdir / "data", tmp_path / "out" / "captions.jsonl"
    common = ["--checkpoint", str(workdir), "--max-length=9", "--beams=2"]
    assert caption.main([*common, "--data", str(data), "--out", str(out), "--limit=5"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5 and all(set(row) == {"picture", "caption"} for row in rows)
    assert all(len(row["caption"].split()) <= 8 for row in rows)
    scores = json.loads(out.with_suffix(".scores.json").read_text())
    assert list(scores) == ["captions", "own", "another's"]
    assert scores["own"]["right of stated"]["value"] > 80
    picture = tmp_path / "face.png"
    model = api.load(workdir, batch_size=2)
    Image.fromarray(np.full((40, 40, 3), 99, np.uint8)).save(picture)
    capsys.readouterr()
    assert caption.main([*common, str(picture)]) == 0
    printed = json.loads(capsys.readouterr().out)
    (expected,) = model.caption(picture, beams=2, max_length=9)
    assert printed == {"picture": str(picture), "caption": expected}
    assert model.caption([]) == []
    again = model.caption([picture] * 3, beams=2, max_length=9)
    assert again == [expected] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give pictures or --data"),
        (["--data=x"], "--data needs --out"),
        (["a.png", "--limit=1"], "--split and --limit are of --data"),
        (["a.png", "--split=val"], "--split and --limit are of --data"),
        (["a.png", "--out=."], "--out=. is a folder"),
        (["a.png", "--length-penalty=nan"], "--length-penalty=nan: must be a finite number"),
        (["a.png", "--beams=0"], "beams=0"),
        (["a.png", "--max-length=99"], r"max_length=99 must be 2..32"),
        (["a.png"], "a.png"),
    ],
)
def test_input_that_cannot_be_used(workdir, arguments, words, capsys):
    assert caption.main(["--checkpoint", str(workdir), *arguments]) == 1
    assert words in capsys.readouterr().err


def test_settings_that_do_not_fit():
    for field, message in (
        (FIELDS[0], r"model\.caption_head=False: must be True with loss\.weights\.caption=1"),
        (FIELDS[1], r"model\.caption_head=True: must be False"),
        ("--config.loss.caption_smoothing=1", r"caption_smoothing=1.*\[0, 1\)"),
    ):
        cfg = config.from_arguments(config.Config(), [field])
        with pytest.raises(ValueError, match=message):
            config.validate(cfg)


def test_what_a_caption_states():
    labels = np.full(40, -1, np.int8)
    for name, value in {"Male": 0, "Eyeglasses": 1, "Smiling": 1, "Young": 0}.items():
        labels[ATTRIBUTE_INDEX[name]] = value
    caption = "This woman wears eyeglasses. She is young and has black hair."
    assert caption_scores.count(caption, labels) == (2, 1, 4, False, 11)
    assert caption_scores.count("a woman with zorps", labels)[3]


def test_the_page_and_the_preset(monkeypatch):
    """The commands of docs/caption.md are well formed; the preset is the reference and captions."""
    page = (ROOT / "docs" / "caption.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(x) for x in page.splitlines() if x.startswith("python -m flip_jax.")]
    monkeypatch.chdir(ROOT)
    assert [c[2] for c in commands] == ["flip_jax.main", *["flip_jax.caption"] * 2]
    assert main.parse(commands[0][3:])[0].model.caption_head
    for command in commands[1:]:
        caption._parser().parse_args(command[3:])
    assert all(f"`{name}" in page or name in page for name in caption_scores.METRICS)
    preset = config.validate(config.load(ROOT / "configs" / "captioner.py"))
    loss = replace(preset.loss, weights=LossWeights())
    plain = replace(preset, model=replace(preset.model, caption_head=False), loss=loss)
    assert plain == config.Config() and preset.loss.weights.caption == 1
