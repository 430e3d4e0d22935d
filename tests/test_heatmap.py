"""Landmarks as heatmaps, against loops in float64 and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flip_jax.losses.heatmap import (
    landmark_loss,
    soft_argmax,
    target_heatmaps,
    target_sigma,
)

SIZE = 96  # pixels of a picture
CELLS = 20  # of a map


@jax.jit
def value_and_gradient(logits, points, known):
    """((loss, parts), gradient by the logits)."""

    def loss(logits):
        return landmark_loss(logits, points, known, SIZE)

    return jax.value_and_grad(loss, has_aux=True)(logits)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    logits = rng.normal(-2, 2, (3, 20, 20, 5)).astype(np.float32)
    points = rng.uniform(8, SIZE - 8, (3, 5, 2)).astype(np.float32)
    return logits, points


def test_sigma_is_a_quarter_of_the_radius_and_at_least_a_cell():
    assert target_sigma(128) == 1.25  # radius 5 on 128 cells
    assert target_sigma(256) == 2.5
    assert target_sigma(24) == 1.0


def test_targets_by_a_loop(case):
    points = case[1]
    found = np.asarray(target_heatmaps(points, SIZE, 128))
    assert found.shape == (3, 128, 128, 5)
    for b, y, x, p in [(0, 3, 4, 0), (1, 60, 61, 2), (2, 127, 0, 4)]:
        cx, cy = (points[b, p].astype(np.float64) + 0.5) * 128 / SIZE - 0.5
        wanted = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) * 16 / 2 / 5**2)
        assert found[b, y, x, p] == pytest.approx(wanted, rel=1e-4, abs=1e-12)
    b, p = 1, 3
    near = np.round((points[b, p] + 0.5) * 128 / SIZE - 0.5).astype(int)
    assert found[b, near[1], near[0], p] == found[b, ..., p].max()


def test_soft_argmax_by_a_loop(case):
    logits = case[0]
    found = np.asarray(soft_argmax(logits, SIZE))
    weights = 1 / (1 + np.exp(-logits.astype(np.float64)))
    for b in range(3):
        for p in range(5):
            total = x_sum = y_sum = 0.0
            for y in range(20):
                for x in range(20):
                    total += weights[b, y, x, p]
                    x_sum += weights[b, y, x, p] * x
                    y_sum += weights[b, y, x, p] * y
            wanted = (np.array([x_sum, y_sum]) / total + 0.5) * SIZE / 20 - 0.5
            np.testing.assert_allclose(found[b, p], wanted, rtol=1e-5)


@pytest.mark.parametrize("cells", [24, 128])
def test_the_point_of_a_gaussian_is_its_centre(cells):
    """Between pixels and cells, at the size a loss is computed and at any other."""
    points = np.random.default_rng(1).uniform(0.3 * SIZE, 0.7 * SIZE, (4, 7, 2))
    target = np.asarray(target_heatmaps(points.astype(np.float32), SIZE, cells), np.float64)
    logits = np.log(np.maximum(target, 1e-30)) - np.log1p(-np.minimum(target, 1 - 1e-12))
    found = soft_argmax(logits.astype(np.float32), SIZE)
    np.testing.assert_allclose(found, points, atol=1e-3)


def test_soft_argmax_where_every_sigmoid_is_zero():
    """In float32 each is exp(-200): the place is still known, and so is the gradient."""
    logits = jnp.full((1, 8, 8, 1), -200.0).at[0, 2, 5].set(-150.0)
    grad = jax.jit(jax.value_and_grad(lambda x: soft_argmax(x, 8)[0, 0, 0]))
    point, gradient = grad(logits)
    assert point == pytest.approx(5)
    assert jnp.isfinite(gradient).all()


def test_loss_and_gradient_against_torch(case):
    torch = pytest.importorskip("torch")
    logits, points = case
    known = np.ones((3, 5), bool)
    (loss, parts), found = value_and_gradient(logits, points, known)

    heat = torch.tensor(logits, dtype=torch.float64).permute(0, 3, 1, 2).requires_grad_()
    act, axis = heat.sigmoid(), torch.arange(CELLS, dtype=torch.float64)
    total = act.sum((2, 3))
    x, y = (act.sum(2) * axis).sum(-1) / total, (act.sum(3) * axis).sum(-1) / total
    wanted = (torch.tensor(points, dtype=torch.float64) + 0.5) / SIZE
    distance = ((torch.stack([x, y], -1) + 0.5) / CELLS - wanted).norm(dim=-1).mean()
    centre = wanted * CELLS - 0.5
    dx, dy = axis - centre[..., :1], axis - centre[..., 1:]
    target = torch.exp(-(dx[:, :, None] ** 2 + dy[..., None] ** 2) / 2 / target_sigma(CELLS) ** 2)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(heat, target)
    (distance + entropy).backward()
    assert parts["points"] == pytest.approx(distance.item(), rel=1e-5)
    assert parts["heatmap"] == pytest.approx(entropy.item(), rel=1e-5)
    assert loss == pytest.approx((distance + entropy).item(), rel=1e-5)
    np.testing.assert_allclose(found, heat.grad.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-8)


def test_unknown_points_count_nowhere(case):
    """The loss of the known points alone, whatever the unknown ones hold."""
    logits, points = case
    known = np.ones((3, 5), bool)
    known[:, [1, 4]] = False
    holes = np.where(known[..., None], points, np.nan)
    (loss, _), gradient = value_and_gradient(logits, holes, known)
    kept = [0, 2, 3]
    some = logits[..., kept], points[:, kept], known[:, kept]
    (wanted, _), wanted_gradient = value_and_gradient(*some)
    assert loss == pytest.approx(float(wanted), rel=1e-6)
    np.testing.assert_allclose(gradient[..., kept], wanted_gradient, rtol=1e-5, atol=1e-9)
    assert not np.any(gradient[..., [1, 4]])
    (loss, _), gradient = value_and_gradient(logits, holes, np.zeros((3, 5), bool))
    assert loss == 0 and not np.any(gradient)


def test_gradient_at_the_very_point_is_finite():
    logits = np.zeros((3, 20, 20, 5), np.float32)
    points = np.asarray(soft_argmax(logits, SIZE))
    (_, parts), gradient = value_and_gradient(logits, points, np.ones((3, 5), bool))
    assert parts["points"] == 0
    assert np.isfinite(gradient).all()
