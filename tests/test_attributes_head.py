"""The attribute head against recorded tensors and PyTorch; scores and training against loops."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file
from test_golden import case_config

from flip_jax.convert import torch_flip
from flip_jax.downstream import probe_training
from flip_jax.downstream.attribute_head import (
    combine,
    head_logits,
    init_head,
    label_loss,
    normalize_states,
)
from flip_jax.downstream.attribute_scores import METRICS, attribute_statistic, by_attribute
from flip_jax.downstream.attributes import majority
from flip_jax.downstream.backbone import pool_states, probe_blocks
from flip_jax.downstream.intervals import measure
from flip_jax.downstream.probe_training import Recipe, train_head
from flip_jax.models import flip

NOISE = 5e-6


@pytest.fixture
def recorded(golden):
    """(probe tensors, the recorded head in our layout, states of our image tower)"""
    io = load_file(golden / "A_probe.safetensors")
    meta = json.loads((golden / "A_meta.json").read_text())
    cfg = case_config(meta)
    params = torch_flip.params_from_official(load_file(golden / "A_params.safetensors"), cfg.model)
    vit = nnx.merge(flip.build(cfg.model), params).vit
    image = jnp.asarray(io["in/pixel_values"].transpose(0, 2, 3, 1))
    blocks = tuple(
        json.loads((golden / "A_probe.json").read_text())["intermediate_transformer_output"]
    )
    assert probe_blocks(cfg.model.vision.depth) == blocks
    return io, official_head(io, "param"), pool_states(vit, image, blocks)


def official_head(io, prefix):
    return {
        "weights": jnp.asarray(io[f"{prefix}/layer_weights"][0, :, 0]),
        "norm": {
            "scale": jnp.asarray(io[f"{prefix}/ln.weight"]),
            "bias": jnp.asarray(io[f"{prefix}/ln.bias"]),
        },
        "linear": {
            "kernel": jnp.asarray(io[f"{prefix}/visual_proj.weight"].T),
            "bias": jnp.asarray(io[f"{prefix}/visual_proj.bias"]),
        },
    }


def close(ours, wanted, tolerance=NOISE):
    np.testing.assert_allclose(np.asarray(ours), wanted, rtol=0, atol=tolerance)


def test_recorded_states_values_loss_and_gradients(recorded):
    io, head, states = recorded
    for number, name in enumerate(("layer_0", "layer_1", "layer_11")):
        tokens = io[f"out/{name}"]
        close(states[:, 3 * number], tokens[:, 0], 1e-5)
        close(states[:, 3 * number + 1], tokens[:, 1:].mean(1), 1e-5)
        close(states[:, 3 * number + 2], tokens[:, 1:].max(1), 1e-5)
    states, target = normalize_states(states), jnp.asarray(io["in/target"], jnp.int8)
    scale, bias = head["norm"]["scale"], head["norm"]["bias"]
    close(states * scale + bias, io["out/layer_embeds"], 1e-5)
    close(combine("flip", head, states), io["out/combined_embeds"], 1e-5)
    close(head_logits("flip", head, states), io["out/pred_logits"], 1e-5)

    def loss(head):
        return label_loss(head_logits("flip", head, states), target)

    close(loss(head), io["out/loss"])
    grads = jax.grad(loss)(head)
    jax.tree.map(close, grads, official_head(io, "grad"))


def test_three_recorded_steps(recorded):
    io, head, states = recorded
    states, target = normalize_states(states), jnp.asarray(io["in/target"], jnp.int8)
    adamw = optax.adamw(1e-3, weight_decay=0.05)
    moments = adamw.init(head)

    @jax.jit
    def step(head, moments):
        def loss(head):
            return label_loss(head_logits("flip", head, states), target)

        value, grads = jax.value_and_grad(loss)(head)
        updates, moments = adamw.update(grads, moments, head)
        return value, optax.apply_updates(head, updates), moments

    for wanted in io["train/losses"]:
        value, head, moments = step(head, moments)
        close(value, wanted)
    jax.tree.map(lambda ours, theirs: close(ours, theirs, 1e-5), head, official_head(io, "after3"))


@pytest.mark.parametrize("kind", ["flip", "facer"])
def test_heads_in_pytorch(kind):
    """Both heads written as their sources write them: value and gradients."""
    torch = pytest.importorskip("torch", reason="the comparison needs the extra [torch]")
    rng = np.random.default_rng(0)
    rows, vectors, width, labels = 6, 9, 16, 5
    states = rng.normal(2.0, 3.0, size=(rows, vectors, width)).astype(np.float32)
    target = rng.integers(0, 2, (rows, labels)).astype(np.int8)
    head = init_head(kind, vectors, width, labels, jax.random.key(0))
    head = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), head)
    leaves = {
        "weights": head["weights"],
        "scale": head["norm"]["scale"],
        "bias": head["norm"]["bias"],
        "kernel": head["linear"]["kernel"],
        "shift": head["linear"]["bias"],
    }
    tensors = {n: torch.tensor(np.asarray(v), requires_grad=True) for n, v in leaves.items()}
    vector = []
    for v in range(vectors):
        own = (lambda t, v=v: t) if kind == "flip" else (lambda t, v=v: t[v])
        scale, bias = own(tensors["scale"]), own(tensors["bias"])
        x = torch.tensor(states[:, v])
        vector.append(torch.nn.functional.layer_norm(x, (width,), scale, bias, 1e-5))
    weights = tensors["weights"] if kind == "flip" else tensors["weights"].softmax(0)
    mixed = (torch.stack(vector, 1) * weights[None, :, None]).sum(1)
    logits = mixed @ tensors["kernel"] + tensors["shift"]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.tensor(target, dtype=torch.float32)
    )
    loss.backward()

    def ours(head):
        normed = normalize_states(jnp.asarray(states))
        return label_loss(head_logits(kind, head, normed), jnp.asarray(target))

    close(head_logits(kind, head, normalize_states(jnp.asarray(states))), logits.detach(), 1e-5)
    close(ours(head), loss.detach())
    grads = jax.grad(ours)(head)
    found = {**grads["norm"], "weights": grads["weights"], "kernel": grads["linear"]["kernel"]}
    found["shift"] = grads["linear"]["bias"]
    for name, tensor in tensors.items():
        close(found[name], tensor.grad, 1e-5)


def test_start_values_are_those_of_the_sources():
    head = init_head("flip", 12, 768, 40, jax.random.key(0))
    assert np.abs(head["weights"]).max() <= np.sqrt(6 / 13)
    kernel, bound = np.asarray(head["linear"]["kernel"]), np.sqrt(6 / 808)
    assert 0.95 * bound < np.abs(kernel).max() <= bound
    head = init_head("facer", 12, 768, 40, jax.random.key(0))
    assert np.all(head["weights"] == 1) and head["norm"]["scale"].shape == (12, 768)
    kernel, bound = np.asarray(head["linear"]["kernel"]), 768**-0.5
    assert 0.95 * bound < np.abs(kernel).max() <= bound


def test_unknown_labels_change_nothing():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    labels = np.array([[1, 0, -1], [0, -1, -1], [1, 1, 0], [-1, -1, -1]], np.int8)
    known = labels >= 0
    each = np.logaddexp(0, -np.where(labels == 1, logits, -logits))
    close(label_loss(logits, jnp.asarray(labels)), each[known].mean(), 1e-6)
    grad = jax.grad(label_loss)(logits, jnp.asarray(labels))
    assert np.all(np.asarray(grad)[~known] == 0) and np.all(np.asarray(grad)[known] != 0)
    assert label_loss(logits, jnp.full((4, 3), -1, jnp.int8)) == 0


def loop_scores(present, scores, labels):
    """Metrics of one attribute, the slow way."""
    rows = [(s, p, y) for s, p, y in zip(scores, present, labels, strict=True) if y >= 0]
    accuracy = np.mean([p == (y == 1) for _, p, y in rows])
    recalls = [np.mean([p == (y == 1) for _, p, y in rows if y == side]) for side in (0, 1)]
    precision, gained = 0.0, sum(y for _, _, y in rows)
    for threshold in sorted({s for s, _, _ in rows}, reverse=True):
        inside = [y for s, _, y in rows if s >= threshold]
        new = sum(y for s, _, y in rows if s == threshold)
        precision += new / gained * np.mean(inside)
    return 100 * accuracy, 100 * np.mean(recalls), 100 * precision


def random_case(seed, rows=60, labels=4):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-3, 4, (rows, labels)) / 2  # many ties
    truth = rng.integers(-1, 2, (rows, labels)).astype(np.int8)
    return scores > 0, scores, truth


@pytest.mark.parametrize("seed", range(4))
def test_scores_by_a_loop(seed):
    present, scores, truth = random_case(seed)
    found = attribute_statistic(present, scores, truth)(np.ones((1, len(truth)), np.float32))[0]
    wanted = np.array([loop_scores(present[:, k], scores[:, k], truth[:, k]) for k in range(4)]).T
    np.testing.assert_allclose(found[3:].reshape(3, 4), wanted, rtol=1e-6)
    np.testing.assert_allclose(found[:3], wanted.mean(axis=1), rtol=1e-6)


def test_weights_are_repetitions():
    present, scores, truth = random_case(9)
    times = np.random.default_rng(1).integers(0, 4, len(truth))
    rows = np.repeat(np.arange(len(truth)), times)
    weighted = attribute_statistic(present, scores, truth)(times[None].astype(np.float32))
    repeated = attribute_statistic(present[rows], scores[rows], truth[rows])
    np.testing.assert_allclose(weighted, repeated(np.ones((1, len(rows)), np.float32)), rtol=1e-6)


def test_what_has_no_positive_is_left_out_of_the_mean():
    present, scores, truth = random_case(3)
    truth[:, 1] = 0
    numbers = measure(attribute_statistic(present, scores, truth), np.arange(60), resamples=20)
    accuracy, balanced, precision = by_attribute(numbers)
    assert np.isnan(precision[1].value) and np.isnan(balanced[1].value)
    assert accuracy[1].value == pytest.approx(100 * np.mean(~present[:, 1]))
    others = [precision[k].value for k in (0, 2, 3)]
    assert numbers[METRICS.index("AP")].value == pytest.approx(np.mean(others))


def test_the_majority_class():
    train = np.array([[1, 0, -1], [1, 1, -1], [0, -1, 0], [1, 0, 1]], np.int8)
    test = np.array([[1, 1, 1], [0, 1, 0], [1, -1, 0]], np.int8)
    found = attribute_statistic(*majority(train, test), test)(np.ones((1, 3), np.float32))[0]
    # Said: yes, no, no (a tie is no). AP of equal scores is the share of positives.
    each = found[3:].reshape(3, 3)
    np.testing.assert_allclose(each[0], [200 / 3, 0, 200 / 3])
    np.testing.assert_allclose(each[1], [50, np.nan, 50])
    np.testing.assert_allclose(each[2], [200 / 3, 100, 100 / 3])


def states_and_labels(seed, rows, vectors=3, width=8, labels=5):
    rng = np.random.default_rng(seed)
    direction = np.random.default_rng(99).normal(size=(vectors * width, labels))
    states = rng.normal(size=(rows, vectors, width)).astype(np.float32)
    logits = states.reshape(rows, -1) @ direction + rng.normal(size=(rows, labels))
    return np.asarray(normalize_states(jnp.asarray(states))), (logits > 0).astype(np.int8)


def test_training_is_the_plain_loop():
    """One rate: orders, cosine over epochs, decoupled decay and dropped rest, step by step."""
    train, val, test = (states_and_labels(n, rows) for n, rows in enumerate((37, 20, 20)))
    recipe = Recipe("flip", epochs=3, batch_size=8, weight_decay=0.05)
    found = train_head(recipe, (0.02,), train, val, test, seed=5)
    key = jax.random.key(5)
    head = init_head("flip", 3, 8, 5, jax.random.fold_in(key, 3))
    mean = jax.tree.map(np.zeros_like, head)
    square, count, accuracies, heads = mean, 0, [], []
    for epoch in range(3):
        rate = 0.02 * 0.5 * (1 + np.cos(np.pi * epoch / 3))
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), 37))
        for rows in order[:32].reshape(4, 8):
            grads = jax.grad(
                lambda h, rows=rows: label_loss(
                    head_logits("flip", h, train[0][rows]), jnp.asarray(train[1][rows])
                )
            )(head)
            count += 1
            mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
            square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, square, grads)
            head = jax.tree.map(
                lambda p, m, s, c=count, r=rate: (
                    p - r * (m / (1 - 0.9**c) / (np.sqrt(s / (1 - 0.999**c)) + 1e-8) + 0.05 * p)
                ),
                head,
                mean,
                square,
            )
        right = (np.asarray(head_logits("flip", head, val[0])) > 0) == (val[1] == 1)
        accuracies.append(100 * right.mean())
        heads.append(head)
    np.testing.assert_allclose(found.val_accuracy, accuracies, rtol=1e-5)
    assert found.epoch == int(np.argmax(accuracies)) + 1
    jax.tree.map(lambda a, b: close(a, b, 1e-5), found.head, heads[found.epoch - 1])


def test_validation_chooses_rate_and_epoch_and_never_the_test_split():
    train, val, test = (states_and_labels(n, rows) for n, rows in enumerate((120, 60, 60)))
    recipe = Recipe("flip", epochs=12, batch_size=16, weight_decay=0.05)
    rates = (1e-5, 0.03, 3.0)
    found = train_head(recipe, rates, train, val, test, seed=0)
    alone = [train_head(recipe, (rate,), train, val, test, seed=0) for rate in rates]
    best = int(np.argmax([one.val_accuracy.max() for one in alone]))
    assert found.rate == rates[best] == 0.03
    assert found.epoch == alone[best].val_accuracy.argmax() + 1
    assert found.val_accuracy.max() > 65
    flipped = train_head(recipe, rates, train, val, (test[0], 1 - test[1]), seed=0)
    jax.tree.map(np.testing.assert_array_equal, found.head, flipped.head)
    np.testing.assert_allclose(flipped.test_accuracy, 100 - found.test_accuracy, rtol=1e-4)
    assert found.best_on_test == max(one.test_accuracy.max() for one in alone)


def test_a_rate_that_diverges_is_never_chosen():
    """Nearly all labels are "no": a head of NaN would be right nearly always."""
    train, val, test = (states_and_labels(n, rows) for n, rows in enumerate((64, 60, 60)))
    rare = [
        (states, labels * (np.arange(len(labels)) % 20 == 0)[:, None].astype(np.int8))
        for states, labels in (train, val, test)
    ]
    recipe = Recipe("flip", epochs=3, batch_size=16, weight_decay=0.05)
    found = train_head(recipe, (3e38, 0.01), *rare, seed=0)
    assert found.rate == 0.01
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.head))
    with pytest.raises(FloatingPointError, match="no head of finite values"):
        train_head(recipe, (3e38,), *rare, seed=0)


def test_the_epoch_is_chosen_by_the_accuracy_of_the_report():
    """Labels that are not known unevenly: the mean over attributes, not over labels."""
    train, val, test = (states_and_labels(n, rows) for n, rows in enumerate((64, 60, 60)))
    for split in (val, test):
        split[1][10:, 0] = -1
        split[1][:, 4] = -1
    recipe = Recipe("flip", epochs=3, batch_size=16, weight_decay=0.05)
    found = train_head(recipe, (0.02,), train, val, test, seed=0)
    scores = np.asarray(head_logits("flip", found.head, test[0]))
    each = attribute_statistic(scores > 0, scores, test[1])(np.ones((1, 60), np.float32))[0]
    assert found.test_accuracy[found.epoch - 1] == pytest.approx(each[0], rel=1e-6)


def test_no_right_answer_is_no_divergence():
    train, val, test = (states_and_labels(n, rows) for n, rows in enumerate((64, 60, 60)))
    recipe = Recipe("flip", epochs=1, batch_size=16, weight_decay=0.0)
    said = np.asarray(
        head_logits("flip", train_head(recipe, (0.02,), train, val, test, seed=0).head, val[0])
    )
    wrong = (said <= 0).astype(np.int8)
    found = train_head(recipe, (0.02,), train, (val[0], wrong), test, seed=0)
    assert found.val_accuracy.tolist() == [0.0] and found.epoch == 1


def test_evaluation_in_blocks(monkeypatch):
    data = states_and_labels(4, 50)
    head = init_head("flip", 3, 8, 5, jax.random.key(1))
    whole = 100 * np.mean((np.asarray(head_logits("flip", head, data[0])) > 0) == (data[1] == 1))
    monkeypatch.setattr(probe_training, "_EVAL_ROWS", 16)
    found = probe_training._accuracy("flip", head, *map(jnp.asarray, data))
    assert float(found) == pytest.approx(whole, rel=1e-6)
