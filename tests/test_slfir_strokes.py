"""Growing sketches: from strokes, and revealed in a raster."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from flip_jax.data.drawn_faces import draw_face, draw_sketch
from flip_jax.data.sketch_strokes import (
    by_hand,
    grow_raster,
    grow_strokes,
    level_paper,
    reveal_shares,
    trace_lines,
)


def raster(*lines: list[tuple[int, int]], paper: int = 255, side: int = 96) -> np.ndarray:
    """Lines of three pixels' width."""
    drawing = np.full((side, side), paper, np.uint8)
    for line in lines:
        cv2.polylines(drawing, [np.array(line, np.int32)], False, 20, 3)
    return drawing


def ink(pictures: np.ndarray) -> np.ndarray:
    """Darkness of each picture."""
    return (255 - pictures.astype(float)).sum(axis=(1, 2))


LONG = [(8, 20), (88, 20)]
SHORT = [(20, 60), (40, 60)]


def test_imports_no_jax():
    code = "import sys, flip_jax.data.sketch_strokes; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_strokes_appear_in_their_order_by_length():
    """Three strokes of 10, 30 and 40 pixels in 8 steps of 10."""
    strokes = [
        np.array([(5.0, 5.0), (15.0, 5.0)]),
        np.array([(5.0, 25.0), (5.0, 55.0)]),
        np.array([(50.0, 10.0), (50.0, 50.0)]),
    ]
    grown = grow_strokes(strokes, (64, 64), 8, 64)
    dark = grown < 128
    assert dark[0, 5, 6:15].all() and not dark[0, 26:].any()
    for step, y in enumerate((35, 45, 55), start=1):
        assert dark[step, 26 : y - 1, 5].all() and not dark[step, y + 2 :, 5].any()
        assert not dark[step, :, 50].any()
    assert dark[5, 11:29, 50].all() and not dark[5, 33:, 50].any()
    assert (np.diff(grown.astype(int), axis=0) <= 0).all()  # ink stays


def test_the_last_step_is_the_whole_drawing():
    face = draw_face(0, 3, 0, 128)
    grown = grow_strokes(face.strokes, (128, 128), 50, 128)
    assert grown.shape == (50, 128, 128) and grown.dtype == np.uint8
    whole = draw_sketch(face.strokes, 128)
    # The pen stops inside strokes, which moves points by up to 1/16 pixel.
    assert np.abs(grown[-1].astype(int) - whole).mean() < 0.5
    steps = np.diff(ink(grown))
    assert (steps > 0).all() and steps.max() < 6 * steps.mean()


def test_strokes_are_squashed_as_their_picture_is():
    stroke = [np.array([(0.0, 10.0), (199.0, 10.0)])]  # across a picture of 100 x 200
    grown = grow_strokes(stroke, (100, 200), 2, 50)
    dark = np.argwhere(grown[-1] < 128)
    assert dark[:, 0].min() >= 4 and dark[:, 0].max() <= 6
    assert dark[:, 1].min() <= 1 and dark[:, 1].max() >= 48
    assert not (grown[0] < 128)[:, 27:].any()


def test_a_hand_is_as_far_off_as_it_says():
    """Turn, scale and shift of two lines over many hands, against their standard deviations."""
    shape, middle = (100, 200), np.array([100.0, 50.0])
    lines = (middle + np.array([[-30, 0], [30, 0]]), middle + np.array([[0, -20], [0, 20]]))
    for line, same in zip(lines, by_hand(lines, shape, 0.0, seed=0), strict=True):
        np.testing.assert_allclose(same, line, atol=1e-5)
    moved = np.array([by_hand(lines, shape, 1.0, seed) for seed in range(2000)])
    first, second = moved[:, 0], moved[:, 1]
    across = first[:, 1] - first[:, 0]
    np.testing.assert_allclose(np.std(np.arctan2(*across.T[::-1])), np.radians(4), rtol=0.1)
    np.testing.assert_allclose(np.std(np.log(np.hypot(*across.T))), 0.06, rtol=0.1)
    centres = np.stack([first.mean(1), second.mean(1)]) - middle
    sheet = np.hypot(0.04, 0.01) * np.array([200, 100])
    np.testing.assert_allclose(centres.std(axis=1), np.stack([sheet, sheet]), rtol=0.1)
    apart = (centres[0] - centres[1]).std(axis=0)
    np.testing.assert_allclose(apart, 0.01 * np.sqrt(2) * np.array([200, 100]), rtol=0.1)
    half = np.array([by_hand(lines, shape, 0.5, seed) for seed in range(2000)])
    np.testing.assert_allclose(half[:, 0].mean(1).std(0), sheet / 2, rtol=0.1)


def test_long_lines_come_first():
    grown = grow_raster(raster(SHORT, LONG), 10)
    dark = grown < 128
    # 80 of 100 pixels of line are the long one.
    assert dark[7, 20, 12:85].all() and not dark[7, 56:].any()
    assert not dark[3, 20, 60:].any() or not dark[3, 20, :36].any()  # from one end to the other
    assert dark[9, 60, 22:39].all()


def test_the_last_step_of_a_raster_is_all_of_it():
    face = draw_face(0, 1, 0, 160)
    drawing = draw_sketch(face.strokes, 160)
    grown = grow_raster(drawing, 70)
    np.testing.assert_array_equal(grown[-1], level_paper(drawing))
    assert (np.diff(grown.astype(int), axis=0) <= 0).all()
    shares = ink(grown) / ink(grown)[-1]
    # Hatching near a line comes with it, but the ink grows about as the lines do.
    assert np.abs(shares - np.arange(1, 71) / 70).max() < 0.12


def test_a_line_goes_straight_on_where_lines_cross():
    lines = trace_lines(raster([(10, 48), (85, 48)], [(48, 20), (48, 70)]))
    assert len(lines[0]) > 65 and np.ptp(lines[0][:, 0]) > 65 and np.ptp(lines[0][:, 1]) < 5
    assert all(np.ptp(line[:, 0]) < 5 for line in lines[1:] if len(line) > 10)
    points = [tuple(point) for line in lines for point in line.tolist()]
    assert len(points) == len(set(points))


def test_a_ring_is_one_line():
    drawing = np.full((96, 96), 255, np.uint8)
    cv2.circle(drawing, (48, 48), 30, 0, 3)
    longest, *rest = trace_lines(drawing)
    assert len(longest) > 150 and sum(map(len, rest)) < 10


def test_paper_is_levelled():
    drawing = raster(LONG, paper=190)
    drawing[:, 40:] -= 8  # texture
    levelled = level_paper(drawing)
    assert (levelled[30:] == 255).all() and (levelled[20, 12:80] < 60).all()


def test_shares_follow_the_pen():
    lines = [np.array([(0, 0), (9, 0)], np.float32), np.array([(0, 8), (4, 8)], np.float32)]
    shares = reveal_shares((10, 10), lines)
    # 1 + 9 and 1 + 4 pixels of line.
    assert shares[0, 0] == pytest.approx(1 / 15) and shares[0, 9] == pytest.approx(10 / 15)
    assert shares[8, 0] == pytest.approx(11 / 15) and shares[8, 4] == pytest.approx(1)
    assert shares[1, 0] == shares[0, 0]  # by the nearest line
    assert (reveal_shares((3, 3), []) == 0).all()


def test_bad_sketches():
    with pytest.raises(ValueError, match="blank"):
        grow_raster(np.full((40, 40), 230, np.uint8), 5)
    with pytest.raises(ValueError, match="no strokes"):
        grow_strokes([], (40, 40), 5, 40)
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"steps is {steps}, must be 1 or more"):
            grow_raster(raster(LONG), steps)
        with pytest.raises(ValueError, match=f"steps is {steps}"):
            grow_strokes([np.zeros((2, 2))], (40, 40), steps, 40)
