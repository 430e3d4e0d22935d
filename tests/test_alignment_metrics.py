"""Landmark errors: by hand, against a loop, and what is not known."""

import numpy as np
import pytest

from flip_jax.data.drawn_faces import draw_face
from flip_jax.data.landmark_schemes import SCHEMES, scheme_of
from flip_jax.downstream.alignment_metrics import (
    NORMALIZERS,
    area_shares,
    error_curve,
    face_errors,
    failures,
    lengths,
    normalizers_of,
)
from flip_jax.downstream.intervals import mean_of


@pytest.mark.parametrize("points", [5, 19, 68, 98])
def test_mirroring_twice_is_nothing(points):
    scheme = scheme_of(points)
    assert np.array_equal(scheme.mirror[scheme.mirror], np.arange(points))
    if scheme.corners:
        assert scheme.mirror[scheme.corners[0]] == scheme.corners[1]
    left, right = scheme.pupils
    assert set(scheme.mirror[list(left)]) == set(right)


def test_a_mirrored_drawn_face_has_the_mirrored_points():
    """A symmetric face: what is left is right, point by point."""
    faces = [draw_face(0, identity, 0, 96) for identity in range(60)]
    frontal = np.stack([face.landmarks for face in faces])
    flipped = frontal[:, scheme_of(68).mirror] * [-1, 1]
    mean, other = frontal.mean(0), flipped.mean(0)
    mean, other = mean - mean.mean(0), other - other.mean(0)
    # Over many faces looking both ways the mean face is symmetric, to a pixel of 96.
    assert np.abs(mean - other).max() < 2.0
    wrong = frontal * [-1, 1]
    assert np.abs(mean - (wrong.mean(0) - wrong.mean((0, 1)))).max() > 20


# A sketch of where points of each scheme are, by which a table with a slip is found: mirrored
# points must lie in mirrored places.
def _layout(points):
    rows = {
        5: [(-3, 3), (3, 3), (0, 0), (-2, -3), (2, -3)],
        19: [
            *((x, 5) for x in (-5, -3, -1, 1, 3, 5)),
            *((x, 3) for x in (-4, -3, -2, 2, 3, 4)),
            *((x, 0) for x in (-1, 0, 1)),
            *((x, -3) for x in (-2, 0, 2)),
            (0, -6),
        ],
    }
    if points in rows:
        return np.array(rows[points], float)
    ring = np.linspace(np.pi, 2 * np.pi, 33 if points == 98 else 17)
    jaw = 8 * np.stack([np.cos(ring), np.sin(ring)], 1)
    parts = [jaw]
    if points == 98:  # brows run around: above from the left, below from the right
        upper, lower = np.linspace(-6, -2, 5), np.linspace(-2.5, -5.5, 4)
        parts += [_row(upper, 5), _row(lower, 4.5), _row(upper + 8, 5), _row(lower + 8, 4.5)]
        parts += [_column((3, 2, 1, 0)), _row(np.linspace(-1, 1, 5), -0.5)]
        parts += [
            _oval(-4, 3, 1.5, 8),
            _oval(4, 3, 1.5, 8),
            _oval(0, -3, 2, 12),
            _oval(0, -3, 1, 8),
        ]
        parts += [np.array([(-4.0, 3), (4, 3)])]
    else:
        parts += [_row(np.linspace(-6, -2, 5), 5), _row(np.linspace(2, 6, 5), 5)]
        parts += [_column((3, 2, 1, 0)), _row(np.linspace(-1, 1, 5), -0.5)]
        parts += [
            _oval(-4, 3, 1.5, 6),
            _oval(4, 3, 1.5, 6),
            _oval(0, -3, 2, 12),
            _oval(0, -3, 1, 8),
        ]
    return np.concatenate(parts)


def _row(x, y):
    return np.stack([x, np.full(len(x), float(y))], 1)


def _column(y):
    return np.stack([np.zeros(len(y)), np.array(y, float)], 1)


def _oval(x, y, radius, count):
    """From the left over the top, as the eyes and the mouth of both schemes are numbered."""
    angle = np.pi - 2 * np.pi * np.arange(count) / count
    return np.stack([x + radius * np.cos(angle), y + 0.5 * radius * np.sin(angle)], 1)


@pytest.mark.parametrize("points", [5, 19, 68, 98])
def test_mirrored_places(points):
    layout = _layout(points)
    assert layout.shape == (points, 2)
    mirrored = layout[SCHEMES[points].mirror] * [-1, 1]
    np.testing.assert_allclose(mirrored, layout, atol=1e-9)


def test_lengths_by_hand():
    points = np.zeros((2, 68, 2))
    points[:, 36], points[:, 45] = (10, 10), (40, 50)  # 50 apart
    points[:, 37:42], points[:, 42:45] = (10, 10), (40, 50)
    points[:, 46:48] = (40, 50)
    points[0, 36:42] += (0, 3)  # all of the left eye: the corner, and the pupil, are 47 lower
    known = np.ones((2, 68), bool)
    boxes = np.array([[0, 0, 30, 40], [5, 5, 21, 9]])
    assert lengths("ocular", points, known, boxes) == pytest.approx([np.hypot(30, 37), 50])
    assert lengths("pupil", points, known, boxes) == pytest.approx([np.hypot(30, 37), 50])
    assert lengths("diagonal", points, known, boxes) == pytest.approx([50, np.hypot(16, 4)])
    assert lengths("box", points, known, boxes) == pytest.approx([np.sqrt(1200), 8])
    known[1, 45] = False
    assert np.isnan(lengths("ocular", points, known, boxes)[1])
    assert np.isnan(lengths("pupil", points, known, boxes)[1])
    flat = np.array([[0, 0, 30, 0], [5, 5, 4, 9]])
    for kind in ("box", "diagonal"):
        assert np.isnan(lengths(kind, points, known, flat)).all()
    points[0, 45] = points[0, 36]
    assert np.isnan(lengths("ocular", points, known, boxes)[0])
    wide = np.zeros((1, 98, 2))
    wide[0, 60], wide[0, 72], wide[0, 97] = (3, 4), (0, 0), (0, 7)
    both = np.ones((1, 98), bool)
    assert lengths("ocular", wide, both, boxes[:1]) == pytest.approx([5])
    assert lengths("pupil", wide, both, boxes[:1]) == pytest.approx([7])


def test_normalisers_that_are_not_there():
    assert normalizers_of(5) == ["pupil", "diagonal", "box"]
    assert normalizers_of(98) == list(NORMALIZERS)
    assert normalizers_of(7) == ["diagonal", "box"]
    with pytest.raises(ValueError, match="'ocular' is not there for 5 points; there are pupil, d"):
        lengths("ocular", np.zeros((1, 5, 2)), np.ones((1, 5), bool), np.zeros((1, 4)))


def test_errors_by_a_loop():
    rng = np.random.default_rng(0)
    points, predicted = rng.uniform(0, 90, (2, 9, 6, 2))
    known = rng.random((9, 6)) < 0.7
    known[3] = False
    length = rng.uniform(10, 20, 9)
    length[5] = np.nan
    found = face_errors(predicted, points, known, length)
    for n in range(9):
        total = count = 0
        for p in range(6):
            if known[n, p]:
                dx, dy = predicted[n, p] - points[n, p]
                total, count = total + (dx * dx + dy * dy) ** 0.5, count + 1
        if n in (3, 5):
            assert np.isnan(found[n])
        else:
            assert found[n] == pytest.approx(total / count / length[n])


def test_failures_and_area_by_hand():
    errors = np.array([0.02, 0.07, np.nan, 0.05, 0.3])
    weights = np.ones((1, 5))
    assert mean_of(failures(errors, 0.05))(weights)[0] == pytest.approx(0.5)
    # Steps at 0.02 and 0.05 up to 0.07: (0.05 + 0.02 + 0) / 0.07 / 4.
    assert mean_of(area_shares(errors, 0.07))(weights)[0] == pytest.approx(0.25)
    x, share = error_curve(errors, 0.1)
    assert x == pytest.approx([0, 0.02, 0.05, 0.07, 0.1])
    assert share == pytest.approx([0, 0.25, 0.5, 0.75, 0.75])
    assert error_curve(np.array([0.5]), 0.1)[1].tolist() == [0, 0]


def test_area_is_the_limit_of_the_sum_in_small_steps():
    """As the published scorer sums it, with Simpson's rule in steps of 1e-4."""
    from scipy.integrate import simpson

    errors = np.random.default_rng(1).gamma(4, 0.01, 400)
    for threshold in (0.07, 0.1):
        axis = np.arange(0.0, threshold + 1e-4, 1e-4)
        share = [(errors <= x).mean() for x in axis]
        wanted = simpson(share, x=axis) / threshold
        assert area_shares(errors, threshold).mean() == pytest.approx(wanted, abs=2e-3)
        assert failures(errors, threshold).mean() == pytest.approx(1 - share[-1], abs=5e-3)


def test_bad_shapes_and_predictions():
    points, known, length = np.zeros((2, 5, 2)), np.ones((2, 5), bool), np.ones(2)
    with pytest.raises(ValueError, match="must be"):
        face_errors(points[:, :4], points, known, length)
    with pytest.raises(ValueError, match="NaN"):
        face_errors(points + np.nan, points, known, length)
