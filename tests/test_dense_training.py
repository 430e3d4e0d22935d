"""Training of dense heads: what is drawn, what a step does, and that a run is repeatable."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest
import tiny_downstream
from flax import nnx

from flip_jax.data.drawn_faces import PARSING_CLASSES
from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import BadRecord, RecordSource, load_manifest
from flip_jax.downstream import dense_training
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.dense_geometry import Geometry, squash_matrix
from flip_jax.downstream.dense_pictures import DenseBatches, Squares, read_picture
from flip_jax.downstream.dense_saved import net_of, read_dense, save_dense
from flip_jax.downstream.dense_training import DenseNet, DenseRecipe, train_dense
from flip_jax.downstream.face_data import FaceData
from flip_jax.models.heads import SegmentationHead
from flip_jax.named_arrays import named_leaves

pytestmark = pytest.mark.release
SIZE, CHANNELS, CLASSES = 64, 4, 19
RECIPE = DenseRecipe(epochs=2, batch_size=8)


def output(channels, rngs):
    return SegmentationHead(channels, CLASSES, rngs)


def loss(logits, batch):
    labels = batch["mask"][:, 2::4, 2::4].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squash(picture):
    return Geometry(squash_matrix(*picture.shape, SIZE), SIZE)


def example(picture, rng):
    geometry = squash(picture)
    image = geometry.place_image(picture.image)
    image = np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
    return {"image": image, "mask": geometry.place_mask(picture.mask)}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return Backbone.load(tiny_downstream.write_model(folder), batch_size=8)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "drawn"
    tiny_downstream.write_faces(folder, train_identities=10, test_identities=2)
    return FaceData(folder, 32).split("train")


def net_on(backbone, finetune=False):
    return DenseNet(backbone, output, size=SIZE, channels=CHANNELS, finetune=finetune)


def no_score(predict):
    return 0.0, 0.0


def run(net, faces, recipe=RECIPE, seed=1, score=no_score):
    batches = DenseBatches(faces, example, recipe.batch_size, seed)
    return train_dense(net, recipe, batches, loss, score, seed, log=lambda line: None)


def test_records_say_what_is_marked(faces):
    assert faces.masked.all() and set(faces.points.tolist()) == {68}
    part = faces.take([3, 1])
    assert part.masked.shape == (2,) and part.points.tolist() == [68, 68]
    assert tuple(load_manifest(faces.source.path).mask_classes) == PARSING_CLASSES
    picture, record = read_picture(faces, 5), faces.record(5)
    assert picture.image.shape == (64, 64, 3) and picture.mask.shape == (64, 64)
    assert np.array_equal(picture.landmarks, record.landmarks)
    assert np.array_equal(picture.box, record.box)


def test_a_mask_of_another_size_is_named(faces, tmp_path):
    one = faces.source[0]
    small = tiny_downstream.write_faces(tmp_path / "other", size=80)
    bad = msgspec.structs.replace(one, mask=RecordSource(small, "train")[0].mask)
    with RecordWriter(tmp_path / "bad", "test") as writer:
        writer.write("train", bad)
    faces = FaceData(tmp_path / "bad", 32).split("train")
    with pytest.raises(BadRecord, match=r"mask of \[80, 80\] pixels for a picture of \[64, 64\]"):
        read_picture(faces, 0)


def test_a_batch_is_a_function_of_seed_and_step(faces):
    batches = [DenseBatches(faces, example, 6, seed) for seed in (1, 1, 2)]
    with ThreadPoolExecutor(3) as pool, ThreadPoolExecutor(1) as one:
        there = batches[0].at(4, pool)
        for name, array in batches[1].at(4, one).items():
            assert np.array_equal(array, there[name])
        assert not np.array_equal(batches[2].at(4, pool)["image"], there["image"])
        streamed = list(batches[0].stream(5))
        assert np.array_equal(streamed[4]["image"], there["image"]) and len(streamed) == 5
    # Every picture once per round, in another order each.
    rows = np.concatenate([batches[0].rows(t) for t in range(10)]).reshape(3, 20)
    assert all(sorted(turn) == list(range(20)) for turn in rows.tolist())
    assert not np.array_equal(rows[0], rows[1])
    assert batches[0].steps_per_epoch == 3
    assert DenseBatches(faces.take(range(2)), example, 6, 0).steps_per_epoch == 1
    # A picture that comes again is augmented anew.
    assert not np.array_equal(
        example(read_picture(faces, 0), batches[0]._rng(1, 0, 0))["image"],
        example(read_picture(faces, 0), batches[0]._rng(1, 1, 0))["image"],
    )


def test_an_error_in_a_thread_reaches_the_caller(faces):
    def fails(picture, rng):
        raise ValueError("of the example")

    with pytest.raises(ValueError, match="of the example"):
        next(DenseBatches(faces, fails, 2, 0).stream(3))


@pytest.fixture(scope="module")
def trained(backbone, faces):
    seen = []

    def score(predict):
        seen.append(np.concatenate(list(predict(Squares(faces.take(range(5)), squash)))))
        return float(len(seen) == 1), float(len(seen))

    return run(net_on(backbone), faces, score=score), seen


def test_what_comes_of_a_training(trained, backbone, faces):
    found, seen = trained
    assert found.epochs.tolist() == [1, 2] and found.val.tolist() == [1, 0]
    assert found.epoch == 1 and found.best_on_test == 2
    assert seen[0].shape == (5, 16, 16, CLASSES) and seen[0].dtype == np.float32
    # The kept weights are those of the epoch that was best on validation.
    squares = Squares(faces.take(range(5)), squash)
    again = np.concatenate(list(net_on(backbone).predict(found.arrays, squares, 8)))
    np.testing.assert_allclose(again, seen[0], atol=1e-6)
    assert np.abs(seen[1] - seen[0]).max() > 1e-4
    assert sorted(found.arrays.params) == ["decoder", "neck", "output"]


def test_a_run_is_repeatable(trained, backbone, faces):
    again = run(net_on(backbone), faces, score=lambda predict: (1.0, 0.0))
    first = named_leaves(trained[0].arrays)
    for name, leaf in named_leaves(again.arrays).items():
        assert np.array_equal(leaf, first[name]), name
    assert np.array_equal(again.loss, trained[0].loss)


def test_one_device_or_eight(trained, backbone, faces, monkeypatch):
    """The same numbers: BatchNorm looks at the whole batch, dropout at the picture's place."""
    net = net_on(backbone)
    assert net.mesh_of(8).size == 8 and net.mesh_of(6).size == 6 and net.mesh_of(7).size == 7
    assert net.mesh_of(20).size == 5
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert net.mesh_of(8).size == 1
    alone = run(net, faces)
    np.testing.assert_allclose(alone.loss, trained[0].loss, rtol=1e-5)


def test_a_step_by_hand(backbone, faces):
    """Rates of the parts, decay, average: from the gradient, with optax's AdamW on one part."""
    recipe = dataclasses.replace(
        RECIPE, epochs=1, rates=(0.0, 1e-2, 1e-3, 3e-3), weight_decay=0.1, decay_at=0.5
    )
    net = net_on(backbone)
    some = faces.take(range(8))
    found = run(net, some, recipe)
    start = net.init(1)
    with ThreadPoolExecutor(1) as pool:
        batch = DenseBatches(some, example, 8, 1).at(0, pool)
    graph, tower = net._graph, jax.tree.map(jnp.asarray, net._tower)
    key = jax.random.fold_in(jax.random.key(1), 0)

    @jax.jit
    @jax.grad
    def grad(params):
        arrays = dense_training.DenseArrays(params, jax.tree.map(jnp.asarray, start.stats))
        return loss(graph(tower, arrays, batch["image"], True, key)[0], batch)

    grads = grad(start.params)
    for part, rate in zip(("neck", "decoder", "output"), recipe.rates[1:], strict=True):
        adam = optax.adamw(rate, weight_decay=0.1)
        old = start.params[part]
        updates, _ = adam.update(grads[part], adam.init(old), old)
        wanted = optax.apply_updates(old, updates)
        # The average after one step: (1 + 0) / (10 + 0) of the start.
        wanted = jax.tree.map(lambda o, n: 0.1 * o + 0.9 * n, old, wanted)
        for name, leaf in named_leaves(wanted).items():
            mine = named_leaves(found.arrays.params[part])[name]
            # The first update of Adam is the sign of the gradient: tiny gradients are noise.
            sure = np.abs(named_leaves(grads[part])[name]) > 1e-5
            np.testing.assert_allclose(mine[sure], np.asarray(leaf)[sure], atol=2e-6, err_msg=name)


def test_rates_fall_to_a_tenth(backbone, faces):
    """With decay from the start, one epoch moves the weights a tenth as far."""
    some = faces.take(range(8))
    moved = []
    for decay_at in (1.0, 0.0):
        recipe = dataclasses.replace(RECIPE, epochs=1, decay_at=decay_at)
        found, start = run(net_on(backbone), some, recipe), net_on(backbone).init(1)
        change = found.arrays.params["output"]["kernel"] - start.params["output"]["kernel"]
        moved.append(np.abs(change).mean())
    assert moved[1] == pytest.approx(moved[0] / 10, rel=1e-3)


def test_fine_tuning_moves_the_tower_and_frozen_does_not(backbone, faces):
    net = net_on(backbone, finetune=True)
    found = run(net, faces.take(range(8)), dataclasses.replace(RECIPE, epochs=1))
    tower = found.arrays.params["backbone"]
    assert tower["position_embed"].shape == (17, 32)
    moved = named_leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), tower, net._tower))
    # Only the last norm and the last class token are not looked at.
    still = {name for name, change in moved.items() if change == 0}
    assert still <= {"post_norm/scale", "post_norm/bias"}
    assert 1e-5 < moved["patch_embed/kernel"] < 1.1e-4, "the rate of the tower is 1e-4"


def test_the_loss_of_a_fixed_set_falls(backbone, faces):
    recipe = dataclasses.replace(RECIPE, epochs=45, rates=(1e-2,) * 4, evaluate_every=20)
    found = run(net_on(backbone), faces.take(range(8)), recipe)
    assert found.epochs.tolist() == [20, 40, 45]
    assert found.loss[-1] < 1.7 < 2.3 < found.loss[0]  # log 19 = 2.94 at the start


def test_divergence_is_an_error(backbone, faces):
    recipe = dataclasses.replace(RECIPE, epochs=2, rates=(1e30,) * 4)
    with pytest.raises(FloatingPointError, match="try lower ones"):
        run(net_on(backbone), faces.take(range(8)), recipe)


def test_a_saved_head_says_the_same(trained, backbone, faces, tmp_path):
    net, arrays = net_on(backbone), trained[0].arrays
    path = tmp_path / "deep" / "head.npz"
    save_dense(path, "parsing", net, arrays, {"classes": ["a", "b"]})
    assert [p.name for p in path.parent.iterdir()] == ["head.npz"]
    read, about = read_dense(path, "parsing", backbone)
    assert about["classes"] == ["a", "b"] and about["backbone"] == backbone.origin
    squares = Squares(faces.take(range(3)), squash)
    again = list(net_of(about, backbone, output).predict(read, squares))
    assert np.array_equal(again[0], next(net.predict(arrays, squares)))
    with pytest.raises(ValueError, match="heads of 'parsing', not of 'alignment'"):
        read_dense(path, "alignment", backbone)
    with pytest.raises(ValueError, match="was trained on weights"):
        read_dense(path, "parsing", backbone.random_twin())
    with pytest.raises(FileNotFoundError, match="train them again"):
        read_dense(tmp_path / "none.npz", "parsing", backbone)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="holds no parsing heads"):
        read_dense(path, "parsing", backbone)


@pytest.mark.parametrize(("field", "value"), [("size", 40), ("size", 16), ("channels", 0)])
def test_sizes_that_do_not_fit(backbone, field, value):
    options = {"size": 64, "channels": 4} | {field: value}
    with pytest.raises(ValueError, match=f"settings.{field}={value}"):
        DenseNet(backbone, output, finetune=False, **options)


def test_the_average_starts_quickly_and_ends_slowly():
    """After n steps of a constant: what is left of the start."""
    array = dense_training.DenseArrays({"a": jnp.zeros(())}, {})
    one = dense_training.DenseArrays({"a": jnp.ones(())}, {})
    left = 1.0
    for t in range(50):
        array = dense_training._average(0.999, jnp.int32(t), array, one)
        left *= (1 + t) / (10 + t)
        assert float(array.params["a"]) == pytest.approx(1 - left, abs=1e-6)
    far = dense_training._average(0.999, jnp.int32(10**6), array, one).params["a"]
    assert 1 - float(far) == pytest.approx(0.999 * left, abs=1e-6)


def test_all_arrays_are_saved():
    """Nothing of a head is of a third kind."""
    head = dense_training.DenseHead(4, 4, output, nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.split(head, nnx.Param, nnx.BatchStat, ...)[3])
