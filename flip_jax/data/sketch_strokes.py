"""Sketches as they grow: by their own strokes, or a raster by lines traced in it; no jax.

"How much is drawn" is a share of the total length of the lines, not of their number, so that every
step adds about the same amount of drawing.

A drawn face has its strokes and the order in which an artist would put them down
(`drawn_faces.DrawnFace`). A scanned sketch has neither. There the order is made up, the same way
for every sketch: its lines are thinned to one pixel, traced so that a line goes straight on where
lines cross, and revealed longest first; every other pixel appears with the nearest line. Long
outlines come before features and features before hatching, but no artist drew it in just this
order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from scipy import ndimage

# Clockwise from the upper neighbour: (dy, dx), and the bit each has in a neighbourhood's code.
_NEIGHBOURS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
# Those around them, 16 pixels.
_BEYOND = tuple((y, x) for y in range(-2, 3) for x in range(-2, 3) if 2 in (abs(y), abs(x)))
# A line that turns by more than this where lines meet has ended, radians.
_SHARPEST_TURN = math.radians(60)
_LOOK_BACK = 5  # pixels that give a line its direction
# The share of the way from paper to black at which a mark is taken for a line.
_LINE_DARKNESS = 0.12
# Standard deviation of the blur before that, as a share of the longer side.
_SMOOTHING = 1 / 224
_WHITE = 0.94  # of the paper's level, above which is only its texture
# How far off a hand is that copies lines, standard deviations: the turn of the sheet in radians,
# its scale (of the logarithm), its shift and, on top, that of each line, in sides of the picture.
_HAND_TURN, _HAND_SCALE, _HAND_SHIFT, _HAND_LINE = math.radians(4), 0.06, 0.04, 0.01


def level_paper(sketch: np.ndarray) -> np.ndarray:
    """Makes the paper white and keeps the lines.

    Args:
      sketch: uint8 [H, W], dark lines on light paper.

    Returns:
      uint8 [H, W], 255 = paper.
    """
    threshold, _ = cv2.threshold(sketch, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    bright = sketch[sketch > threshold]
    paper = float(np.median(bright)) if bright.size else 255.0
    return np.clip(sketch * (255.0 / (_WHITE * paper)), 0, 255).astype(np.uint8)


def trace_lines(levelled: np.ndarray) -> tuple[np.ndarray, ...]:
    """The lines of a raster sketch, longest first.

    Args:
      levelled: uint8 [H, W], see `level_paper`.

    Returns:
      Polylines float32 [n, 2] (x, y) in pixels, n >= 1, no point twice; empty for a blank sheet.
    """
    # Grain and the gaps of hatching would break a line into many.
    smooth = cv2.GaussianBlur(levelled, (0, 0), _SMOOTHING * max(levelled.shape))
    thinned = _thin(smooth < 255 * (1 - _LINE_DARKNESS))
    lines = [np.array(line, np.float32)[:, ::-1] for line in _walk(thinned)]
    return tuple(sorted(lines, key=_length, reverse=True))


def reveal_shares(shape: tuple[int, int], lines: Sequence[np.ndarray]) -> np.ndarray:
    """When each pixel of a sketch appears, its lines being drawn one after the other.

    Args:
      shape: (H, W).
      lines: polylines [n, 2] (x, y) in pixels inside the picture, in the order of drawing.

    Returns:
      float32 [H, W] in 0..1: the share of the total length at which the nearest line arrives. 0
      everywhere without a line.
    """
    if not lines:
        return np.zeros(shape, np.float32)
    points = np.concatenate(lines)
    column, row = points.round().astype(int).T
    # To the next line the pen jumps: only what it draws counts, and a dot counts as a pixel.
    steps = np.concatenate([[1.0, *np.hypot(*np.diff(line, axis=0).T)] for line in lines])
    share = np.cumsum(steps) / steps.sum()
    at = np.ones(shape, np.float32)
    np.minimum.at(at, (row, column), share.astype(np.float32))
    blank = np.ones(shape, bool)
    blank[row, column] = False
    nearest = ndimage.distance_transform_edt(blank, return_distances=False, return_indices=True)
    return at[tuple(nearest)]


def grow_raster(sketch: np.ndarray, steps: int) -> np.ndarray:
    """Reveals a raster sketch line by line, see the top of this file.

    Args:
      sketch: uint8 [H, W], dark lines on light paper.
      steps: T, 1 or more.

    Returns:
      uint8 [T, H, W], 255 = paper; picture t - 1 has t / T of the length of the lines, the last one
      is the whole sketch on levelled paper.

    Raises:
      ValueError: `steps` is below 1, or there is no line in the sketch.
    """
    return raster_at(sketch, _even_shares(steps))


def raster_at(sketch: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """As `grow_raster`, with `shares` of the length of the lines, above 0 up to 1: uint8
    [len(shares), H, W]."""
    levelled = level_paper(sketch)
    lines = trace_lines(levelled)
    if not lines:
        raise ValueError("the sketch is blank: no dark line on light paper")
    arrival = reveal_shares(levelled.shape, lines)
    # They end at 1 but for rounding; a share of 1 shows everything.
    limits = np.where(np.equal(shares, 1), np.inf, shares).astype(np.float32)
    return np.where(arrival <= limits[:, None, None], levelled, np.uint8(255))


def grow_strokes(
    strokes: Sequence[np.ndarray], shape: tuple[int, int], steps: int, side: int
) -> np.ndarray:
    """Draws a sketch of strokes step by step, the pen stopping inside a stroke if need be.

    Args:
      strokes: polylines [n, 2] (x, y) in pixels of a picture, in drawing order.
      shape: (H, W) of that picture; it is squashed to a square.
      steps: T, 1 or more.
      side: S, pixels of the pictures to make.

    Returns:
      uint8 [T, S, S], 255 = paper; picture t - 1 has t / T of the length of the strokes.

    Raises:
      ValueError: `steps` is below 1, or there is no stroke.
    """
    return strokes_at(strokes, shape, _even_shares(steps), side)


def by_hand(
    strokes: Sequence[np.ndarray], shape: tuple[int, int], amount: float, seed: int
) -> tuple[np.ndarray, ...]:
    """Lines as a hand would copy them: none is where it should be to the pixel.

    Args:
      strokes: polylines [n, 2] (x, y) in pixels of a picture.
      shape: (H, W) of that picture.
      amount: 1 = the hand of the constants above, 0 = an exact one.
      seed: of what the hand does wrong.

    Returns:
      Polylines float32 [n, 2], some of them beyond the edge.
    """
    rng, sides = np.random.default_rng(seed), np.array([shape[1], shape[0]])
    turn, stretch = amount * rng.normal(0, (_HAND_TURN, _HAND_SCALE))
    cosine, sine = np.exp(stretch) * np.array([math.cos(turn), math.sin(turn)])
    matrix = np.array([[cosine, sine], [-sine, cosine]])
    shift = amount * rng.normal(0, _HAND_SHIFT, 2) * sides
    moved = []
    for line in strokes:
        own = amount * rng.normal(0, _HAND_LINE, 2) * sides
        moved.append(((line - sides / 2) @ matrix + sides / 2 + shift + own).astype(np.float32))
    return tuple(moved)


def strokes_at(
    strokes: Sequence[np.ndarray], shape: tuple[int, int], shares: Sequence[float], side: int
) -> np.ndarray:
    """As `grow_strokes`, with `shares` of the length, ascending, above 0 up to 1: uint8
    [len(shares), S, S]."""
    if not strokes:
        raise ValueError("the sketch has no strokes")
    scale = side / np.array([shape[1], shape[0]])
    scaled = [(np.asarray(line, np.float64) + 0.5) * scale - 0.5 for line in strokes]
    lengths = [np.append(0.0, np.cumsum(np.hypot(*np.diff(line, axis=0).T))) for line in scaled]
    ends = np.cumsum([length[-1] for length in lengths])
    paper, pictures = np.full((side, side), 255, np.uint8), []
    number = drawn = 0  # the stroke under the pen, and how far it goes, in pixels
    for target in ends[-1] * np.asarray(shares):
        while number < len(scaled):
            start = ends[number] - lengths[number][-1]
            stop = min(target - start, lengths[number][-1])
            _draw_part(paper, scaled[number], lengths[number], drawn, stop)
            drawn = stop
            if target < ends[number]:
                break
            number, drawn = number + 1, 0.0
        pictures.append(paper.copy())
    return np.stack(pictures)


def _draw_part(
    paper: np.ndarray, line: np.ndarray, length: np.ndarray, start: float, stop: float
) -> None:
    """Draws a polyline [n, 2] from `start` to `stop`, measured by `length` [n] along it."""
    inside = line[(length > start) & (length < stop)]
    first, last = (
        [np.interp(at, length, line[:, axis]) for axis in (0, 1)] for at in (start, stop)
    )
    fixed = np.round(np.concatenate([[first], inside, [last]]) * 16).astype(np.int32)
    width = max(1, round(len(paper) / 160))
    cv2.polylines(paper, [fixed], False, 32, width, cv2.LINE_AA, 4)


def _even_shares(steps: int) -> np.ndarray:
    if steps < 1:
        raise ValueError(f"steps is {steps}, must be 1 or more")
    return np.arange(1, steps + 1) / steps


def _length(line: np.ndarray) -> float:
    return float(np.hypot(*np.diff(line, axis=0).T).sum())


def _codes(marks: np.ndarray) -> np.ndarray:
    """The eight neighbours of every pixel as the bits of a number: uint8 [H, W]."""
    kernel = np.zeros((3, 3), np.float32)
    for bit, (dy, dx) in enumerate(_NEIGHBOURS):
        kernel[dy + 1, dx + 1] = 1 << bit
    return cv2.filter2D(marks.astype(np.uint8), -1, kernel, borderType=cv2.BORDER_CONSTANT)


def _thinning_table(first: bool) -> np.ndarray:
    """Which neighbourhoods lose their middle in a half-step of Zhang and Suen: bool [256]."""
    code = np.arange(256)
    p2, _, p4, _, p6, _, p8, _ = ring = [(code >> bit) & 1 for bit in range(8)]
    neighbours = sum(ring)
    edges = sum((ring[i] == 0) & (ring[(i + 1) % 8] == 1) for i in range(8))
    if first:
        open_side = (p2 * p4 * p6 == 0) & (p4 * p6 * p8 == 0)
    else:
        open_side = (p2 * p4 * p8 == 0) & (p2 * p6 * p8 == 0)
    return (neighbours >= 2) & (neighbours <= 6) & (edges == 1) & open_side


_THINNING = (_thinning_table(True), _thinning_table(False))


def _thin(marks: np.ndarray) -> np.ndarray:
    """The middle lines of marks, one pixel wide: bool [H, W].

    Source: Zhang and Suen, A fast parallel algorithm for thinning digital patterns, CACM 1984.
    """
    marks = marks.copy()
    while True:
        before = np.count_nonzero(marks)
        for table in _THINNING:
            marks &= ~table[_codes(marks)]
        if np.count_nonzero(marks) == before:
            return marks


def _walk(thinned: np.ndarray) -> list[list[tuple[int, int]]]:
    """Lines (y, x) that take the pixels of a thinned sketch, each at most once.

    A line starts at an end where there is one, and goes on to the neighbour that turns it least. A
    single pixel that a line went past is left out; it is no line, and appears with its neighbour.
    """
    codes = _codes(thinned)
    loose = np.bitwise_count(codes) == 1
    pixels = {tuple(pixel) for pixel in np.argwhere(thinned).tolist()}
    starts = [tuple(p) for p in np.argwhere(thinned & loose).tolist()] + sorted(pixels)
    lines = []
    for pixel in starts:
        if pixel not in pixels:
            continue
        line = [pixel]
        pixels.discard(pixel)
        while (pixel := _next(line, pixels)) is not None:
            line.append(pixel)
            pixels.discard(pixel)
        if len(line) > 1 or not codes[line[0]]:
            lines.append(line)
    return lines


def _next(line: list[tuple[int, int]], free: set[tuple[int, int]]) -> tuple[int, int] | None:
    """The free pixel that a line goes on to; None where it ends."""
    y, x = line[-1]
    around = [(y + dy, x + dx) for dy, dx in _NEIGHBOURS if (y + dy, x + dx) in free]
    if len(line) == 1:  # it may go anywhere, straight rather than across
        return min(around, key=lambda p: abs(p[0] - y) + abs(p[1] - x), default=None)
    if len(around) == 1:
        return around[0]  # the line itself, however it bends
    back_y, back_x = line[-min(len(line), _LOOK_BACK)]
    heading = math.atan2(y - back_y, x - back_x)

    def turn(pixel: tuple[int, int]) -> float:
        angle = math.atan2(pixel[0] - y, pixel[1] - x) - heading
        return abs(math.remainder(angle, 2 * math.pi))

    # Over a line that was drawn before, the next pixel is two away.
    around = around or [(y + dy, x + dx) for dy, dx in _BEYOND if (y + dy, x + dx) in free]
    best = min(around, key=turn, default=None)
    return best if best is not None and turn(best) <= _SHARPEST_TURN else None
