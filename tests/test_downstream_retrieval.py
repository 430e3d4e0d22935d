"""The retrieval task: frozen towers against the evaluator of training, head steps against the
train loss, numbers against loops, and the command as a whole."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_downstream
from hypothesis import given, settings
from hypothesis import strategies as st

from flip_jax import partition
from flip_jax.config import EvalConfig, MeshConfig
from flip_jax.data.gallery import Gallery
from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import RecordSource
from flip_jax.downstream import retrieval_features, retrieval_heads, retrieval_numbers
from flip_jax.downstream.__main__ import main
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.features import FeatureCache
from flip_jax.downstream.retrieval import Retrieval, RetrievalEvaluator
from flip_jax.downstream.retrieval_features import FrozenGallery, FusedTower, TrainPairs, heads_of
from flip_jax.downstream.retrieval_saved import load_heads, save_heads
from flip_jax.downstream.retrieval_task import Settings, training_config
from flip_jax.losses.flip import flip_loss
from flip_jax.losses.itm import sample_hard_negatives
from flip_jax.models import flip
from flip_jax.optim import learning_rate, make_optimizer

NO_CACHE = FeatureCache(None)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return tiny_downstream.write_faces(tmp_path_factory.mktemp("faces") / "drawn")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_downstream.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def backbone(model):
    return Backbone.load(model, batch_size=8)


@pytest.fixture(scope="module")
def data(drawn, backbone):
    return FaceData(drawn, backbone.image_size)


def other_heads(backbone):
    heads = heads_of(backbone)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape).astype(np.float32), heads)


def replicated(found, weights):
    """The numbers of a retrieval whose queries are there as often as their picture's weight."""
    columns = []
    for ranks in found.ranks.values():
        recalls = []
        for direction, owner in (("t2i", found.image_of), ("i2t", np.arange(found.images))):
            seen = [
                r for r, o in zip(ranks[direction], owner, strict=True) for _ in range(weights[o])
            ]
            if not seen:
                return [np.nan] * (9 * len(found.ranks))
            some = [100 * np.mean([r < k for r in seen]) for k in (1, 5, 10)]
            columns += [*some, np.median(seen) + 1]
            recalls += some
        columns.append(np.mean(recalls))
    return columns


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_numbers_of_weighted_pictures(data):
    images = data.draw(st.integers(1, 7))
    image_of = np.repeat(np.arange(images), data.draw(st.integers(1, 3)))
    rank = st.integers(0, 14)
    ranks = {
        order: {
            name: np.array(data.draw(st.lists(rank, min_size=size, max_size=size)))
            for name, size in (("t2i", len(image_of)), ("i2t", images))
        }
        for order in ("cosine", "reranked")
    }
    found = Retrieval(ranks, np.zeros((len(image_of), 1), int), image_of, images, 1, k=1)
    rows = st.lists(st.integers(0, 3), min_size=images, max_size=images)
    weights = np.array([data.draw(rows) for _ in range(3)], np.float32)
    numbers = retrieval_numbers.retrieval_statistic(found)(weights)
    expected = [replicated(found, row.astype(int)) for row in weights]
    np.testing.assert_allclose(numbers, expected, rtol=0, atol=1e-9)
    assert len(retrieval_numbers.metric_names("zero-shot", found)) == numbers.shape[1]


def test_numbers_of_chance_are_those_of_random_orders():
    image_of = np.array([0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 6, 7])
    found = Retrieval({}, np.zeros((12, 1), int), image_of, images=8, captions=3, k=0)
    rng = np.random.default_rng(0)
    relevant = image_of[:, None] == np.arange(8)
    first = {"t2i": [], "i2t": []}
    for _ in range(3000):
        for name, mask in (("t2i", relevant), ("i2t", relevant.T)):
            order = rng.permuted(np.tile(np.arange(mask.shape[1]), (len(mask), 1)), axis=1)
            first[name].append(np.take_along_axis(mask, order, axis=1).argmax(axis=1))
    chance = retrieval_numbers.chance_numbers(found)
    for name, ranks in first.items():
        ranks = np.concatenate(ranks)
        assert chance[f"{name} R@5"] == pytest.approx(100 * np.mean(ranks < 5), abs=1.0)
        assert chance[f"{name} median rank"] == pytest.approx(np.median(ranks) + 1, abs=0.5)
    assert chance["t2i median rank"] == 4.5  # (8 + 1) / 2
    assert list(chance) == list(retrieval_numbers.NUMBERS)


@pytest.mark.parametrize("first", ["enc", "cls"])
def test_frozen_gallery_is_the_evaluator_of_training(backbone, data, drawn, first):
    tower = FusedTower(backbone, first)
    gallery = FrozenGallery(tower, data.split("test"), 2, NO_CACHE)
    heads = other_heads(backbone)
    found = gallery.rank(heads, 7)

    cfg = dataclasses.replace(
        backbone.cfg, eval=EvalConfig(batch_size=8, rerank=7, captions=2, first_token=first)
    )
    records = Gallery(
        RecordSource(drawn, "test"), backbone.tokenizer, backbone.image_size, captions=2
    )
    evaluator = RetrievalEvaluator(cfg, records, partition.make_mesh(MeshConfig()))
    expected = evaluator(jax.device_get(backbone.params) | heads)
    assert (found.k, found.images, found.captions) == (7, 24, 2)
    np.testing.assert_array_equal(found.image_of, expected.image_of)
    np.testing.assert_array_equal(found.top_images, expected.top_images)
    for order, ranks in expected.ranks.items():
        for direction in ranks:
            np.testing.assert_array_equal(found.ranks[order][direction], ranks[direction])


def test_kept_pairs_change_nothing(backbone, data, monkeypatch):
    tower = FusedTower(backbone, "enc")
    faces, start, changed = data.split("test"), heads_of(backbone), other_heads(backbone)
    gallery = FrozenGallery(tower, faces, 1, NO_CACHE)
    gallery.rank(start, 5)
    computed = []
    called = FusedTower.__call__

    def counting(self, gallery, texts, pairs):
        computed.append(len(pairs[0]))
        return called(self, gallery, texts, pairs)

    monkeypatch.setattr(FusedTower, "__call__", counting)
    again = gallery.rank(changed, 5)
    assert len(computed) == 1 and 0 < computed[0] < 240  # not those that were there
    gallery.rank(changed, 5)
    assert len(computed) == 1
    fresh = FrozenGallery(tower, faces, 1, NO_CACHE).rank(changed, 5)
    # Room for the pairs that are asked for and no others; then for none.
    monkeypatch.setattr(retrieval_features, "_STORE_BYTES", gallery._fused.nbytes - 4)
    small = FrozenGallery(tower, faces, 1, NO_CACHE)
    small.rank(start, 5)
    before = len(small._pairs)
    found = [again, small.rank(changed, 5)]
    assert len(small._pairs) < before + computed[0]
    monkeypatch.setattr(retrieval_features, "_STORE_BYTES", 0)
    found.append(FrozenGallery(tower, faces, 1, NO_CACHE).rank(changed, 5))
    for one in found:
        for direction, ranks in fresh.ranks["reranked"].items():
            np.testing.assert_array_equal(one.ranks["reranked"][direction], ranks)


@pytest.mark.slow
def test_a_step_is_that_of_training(backbone, data):
    """The heads' part of the train loss's gradient, through towers that run in full."""
    faces = data.split("train").take(np.arange(0, 48, 2))  # one picture of each person
    pairs = TrainPairs(backbone, faces, 2, NO_CACHE)
    # Rates that differ from step to step, decay, soft targets and a clipped temperature.
    asked = Settings(lr=0.01, epochs=3, warmup_steps=2, batch_size=16, alpha=0.4, momentum=0.9)
    cfg = training_config(asked.resolved(), 160, 8)
    heads = other_heads(backbone) | {"temperature": np.float32(0.7)}
    state = retrieval_heads.init_state(cfg, heads, 10)
    step = retrieval_heads.make_step(cfg, backbone, 10)
    rows = np.arange(16)
    batches = [pairs.batch(rows, rows % 2), pairs.batch(rows + 8, 1 - rows % 2)]

    params = jax.tree.map(jnp.asarray, jax.device_get(backbone.params))
    twin, queue = flip.twin_params(params | heads), jax.tree.map(jnp.copy, state["queue"])
    rate = learning_rate(cfg.optim, 10, 30)
    tx = make_optimizer(cfg.optim, rate)
    opt_state = tx.init(heads)
    own = dataclasses.replace(cfg, loss=dataclasses.replace(cfg.loss, candidates="global"))

    @jax.jit  # once for all steps
    def gradient(heads, twin, queue, batch, negatives, alpha):
        given = {n: batch[n] for n in ("image", "token_ids", "token_mask", "group")}
        options = {"cfg": own, "graphdef": backbone.graphdef, "negatives": negatives}
        return jax.grad(
            lambda heads: flip_loss(params | heads, twin, queue, given, alpha, None, **options),
            has_aux=True,
        )(heads)

    for number, batch in enumerate(batches):
        batch = jax.tree.map(jnp.asarray, batch)
        state, losses = step(backbone.params, state, batch)

        heads = heads | {"temperature": np.clip(heads["temperature"], 0.001, 0.5)}
        twin = flip.update_twin(twin, params | heads, 0.9) | {n: params[n] for n in ("vit", "bert")}
        embeds = retrieval_heads._embeds(heads, batch)
        key = jax.random.fold_in(jax.random.key(cfg.seed), number)
        negatives, valid = sample_hard_negatives(
            embeds["image"], embeds["text"], batch["group"], heads["temperature"], key
        )
        assert valid["image"].all() and valid["text"].all()

        grads, aux = gradient(heads, twin, queue, batch, negatives, jnp.float32(0.4 * number / 20))
        updates, opt_state = tx.update(grads, opt_state, heads)
        heads = optax.apply_updates(heads, updates)
        queue = flip.enqueue(
            queue, aux["twin_embeds"]["image"], aux["twin_embeds"]["text"], batch["group"]
        )
        expected = [aux["metrics"]["loss_itc"], aux["metrics"]["loss_itm"]]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        np.testing.assert_allclose(state["queue"]["text"], queue["text"], rtol=0, atol=2e-6)
    for path, leaf in jax.tree.leaves_with_path(heads):
        found = dict(jax.tree.leaves_with_path(state["heads"]))[path]
        np.testing.assert_allclose(found, leaf, rtol=0, atol=2e-5, err_msg=str(path))


def test_recipes():
    caption, dialog = (Settings(recipe=n).resolved() for n in ("celeba_caption", "celeba_dialog"))
    assert (caption.lr, caption.epochs, caption.warmup_steps, caption.rerank) == (
        3e-5,
        50,
        2000,
        256,
    )
    assert (dialog.lr, dialog.epochs, dialog.warmup_steps, dialog.rerank) == (3e-3, 20, 500, 32)
    assert Settings(lr=0.1, rerank=0).resolved().lr == 0.1
    assert Settings(lr=0.1, rerank=0).resolved().rerank == 0
    cfg = training_config(dialog, 1000, 8)
    assert (cfg.data.batch_size, cfg.loss.queue_size, cfg.optim.warmup_steps) == (64, 960, 15)
    assert (cfg.loss.alpha, cfg.optim.weight_decay, cfg.optim.schedule) == (0.4, 0.05, "cosine")
    with pytest.raises(DataLacks, match="at least 2 pictures, and one per device"):
        training_config(dialog, 7, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "settings.lr=0.0: must be above 0"),
        ({"alpha": 1.5}, r"settings.alpha=1.5: must be in \[0, 1\]"),
        ({"batch_size": 1}, "settings.batch_size=1: must be at least 2"),
        ({"rerank": -1}, "settings.rerank=-1: must be at least 0"),
        ({"pictures": 0}, "settings.pictures=0: must be at least 2"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Settings(**fields).resolved()


@pytest.fixture(scope="module")
def done(model, drawn, tmp_path_factory):
    """The command, once, with all that it can do."""
    out = tmp_path_factory.mktemp("out")
    arguments = ["retrieval", "--checkpoint", str(model), "--data", str(drawn), "--out", str(out)]
    arguments += ["--epochs=3", "--rerank=4", "--by=Male,Young", "--resamples=50", "--captions=2"]
    assert main([*arguments, "--batch-size", "8", "--lr=0.01"]) == 0
    return out, json.loads((out / "report.json").read_text())


def test_the_command(done):
    out, report = done
    assert list(report["results"]) == ["trained", "random", "chance"]
    trained, chance = report["results"]["trained"], report["results"]["chance"]
    assert len(trained) == 36 and list(trained) == list(chance)
    for name, number in trained.items():
        assert number["low"] <= number["high"], name
    mean = np.mean(
        [trained[f"heads cosine {d} R@{k}"]["value"] for d in ("t2i", "i2t") for k in (1, 5, 10)]
    )
    assert trained["heads cosine mean recall"]["value"] == pytest.approx(mean)
    assert chance["zero-shot reranked t2i R@1"] == pytest.approx(100 / 24)
    assert chance["heads cosine t2i median rank"] == 12.5
    details = report["details"]
    assert details["gallery"] == {"images": 24, "texts": 48, "captions_per_image": 2, "k": 4}
    for label in ("trained", "random"):
        own = details[label]
        assert own["epoch"] == 1 + int(np.argmax(own["val_mean_recall"]))
        assert own["best_on_test"] == max(own["test_mean_recall"])
        at = own["test_mean_recall"][own["epoch"] - 1]
        assert report["results"][label]["heads reranked mean recall"]["value"] == pytest.approx(at)
    page = (out / "report.md").read_text()
    assert "| zero-shot cosine t2i R@1 |" in page and "is no result" in page
    assert "gallery of 24 pictures and 48 captions (at most 2 per picture)" in page
    assert (out / "report.png").stat().st_size > 50_000


def test_the_model_as_it_is(model, drawn, tmp_path):
    arguments = ["retrieval", "--checkpoint", str(model), "--data", str(drawn)]
    arguments += ["--train-heads=False", "--rerank=0", "--random-backbone=False", "--pictures=10"]
    assert main([*arguments, "--out", str(tmp_path), "--resamples=20", "--batch-size=8"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["results"]) == ["trained", "chance"]
    names = [f"zero-shot cosine {name}" for name in retrieval_numbers.NUMBERS]
    assert list(report["results"]["trained"]) == names
    assert report["results"]["chance"]["zero-shot cosine i2t R@1"] == pytest.approx(10.0)
    assert not (tmp_path / "heads.npz").exists()


def test_breakdowns(done, data):
    report = done[1]
    male = data.split("test").attributes[:, 20] == 1
    for label in ("trained", "random"):
        parts = report["by"][label]["Male"]["parts"]
        assert parts["yes"]["rows"] == male.sum() and parts["no"]["rows"] == (~male).sum()
        for name, whole in report["results"][label].items():
            if "R@" in name:
                # Two captions of every picture: both directions have as many queries per picture.
                both = [parts[value][name]["value"] for value in ("yes", "no")]
                mean = np.average(both, weights=[male.sum(), (~male).sum()])
                assert mean == pytest.approx(whole["value"]), name
                gap = report["by"][label]["Male"]["gap"][name]
                assert gap["value"] == pytest.approx(abs(both[0] - both[1]))
                assert gap["low"] <= gap["high"]


def test_saved_heads_are_those_of_the_report(done, backbone, data):
    out, report = done
    tuned = load_heads(out / "heads.npz", backbone)
    faces = data.split("test")
    texts = [text for own in faces.captions for text in own[:2]]
    cosines = tuned.embed_texts(texts) @ tuned.embed_images(faces.images).T
    right = cosines[np.arange(len(texts)), np.arange(len(texts)) // 2]
    hits = 100 * np.mean((cosines >= right[:, None]).sum(axis=1) <= 5)
    reported = report["results"]["trained"]["heads cosine t2i R@5"]["value"]
    assert hits == pytest.approx(reported)
    assert tuned.origin["digest"] != backbone.origin["digest"]


def test_heads_that_cannot_be_used(done, backbone, tmp_path):
    with pytest.raises(FileNotFoundError, match="train them again"):
        load_heads(tmp_path / "none.npz", backbone)
    with pytest.raises(ValueError, match="was trained on weights"):
        load_heads(done[0] / "heads.npz", backbone.random_twin())
    whole = (done[0] / "heads.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="holds no retrieval heads"):
        load_heads(tmp_path / "cut.npz", backbone)
    heads = heads_of(backbone)
    del heads["itm_head"]
    save_heads(tmp_path / "part.npz", backbone, heads, {})
    with pytest.raises(ValueError, match="is not whole: missing itm_head"):
        load_heads(tmp_path / "part.npz", backbone)


@pytest.mark.slow
def test_training_learns(backbone, data):
    """Heads fit what they are trained on, as far as random towers tell the pictures apart."""
    faces, backbone = data.split("train").take(np.arange(0, 48, 2)), backbone.random_twin(3)
    before = jax.tree.map(np.copy, heads_of(backbone))
    gallery = FrozenGallery(FusedTower(backbone, "enc"), faces, 1, NO_CACHE)
    asked = Settings(lr=0.003, epochs=40, batch_size=8, alpha=0.0, momentum=0.9, queue_size=24)
    cfg = training_config(asked.resolved(), len(faces), 8)
    pairs = TrainPairs(backbone, faces, 1, NO_CACHE)
    rank = lambda heads: gallery.rank(heads, 0)  # noqa: E731
    trained = retrieval_heads.train_heads(cfg, backbone, pairs, rank, rank, log=lambda _: None)
    start = retrieval_heads.mean_recall(rank(before))
    assert trained.val_recall.max() > 1.5 * start
    assert (trained.losses[-1] < trained.losses[0] - [0.5, 0.02]).all()
    assert trained.epoch == 1 + int(trained.val_recall.argmax())
    # The steps give their buffers away; those of the backbone are not among them.
    jax.tree.map(np.testing.assert_array_equal, heads_of(backbone), before)


def test_too_few_pictures_to_train_on(backbone, data):
    faces = data.split("train")
    one = faces.take(faces.groups == faces.groups[0])
    asked = Settings(epochs=1, batch_size=8, queue_size=8)
    cfg = training_config(asked.resolved(), 8, 8)
    for few in (faces.take(range(3)), one.take([0, 1] * 4)):
        pairs = TrainPairs(backbone, few, 1, NO_CACHE)
        with pytest.raises(ValueError, match="a batch of 8 and two groups are needed"):
            retrieval_heads.train_heads(cfg, backbone, pairs, None, None)


def test_data_that_does_not_allow_it(backbone, data, tmp_path, model, capsys):
    source = data.split("test").source
    with RecordWriter(tmp_path / "bare", "by hand") as writer:
        for number in range(4):
            record = source[number]
            writer.write("test", record.__class__(**{**_fields(record), "captions": []}))
    arguments = ["retrieval", "--checkpoint", str(model), "--data", str(tmp_path / "bare")]
    assert main([*arguments, "--out", str(tmp_path / "o")]) == 1
    assert "none of 4 records has a caption" in capsys.readouterr().err
    assert not (tmp_path / "o" / "report.json").exists()


def _fields(record):
    return {name: getattr(record, name) for name in record.__struct_fields__}
