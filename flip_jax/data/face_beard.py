"""Beard of a drawn face: mustache, goatee, sideburns and the shadow of a shaved beard."""

from __future__ import annotations

import numpy as np

from flip_jax.data.face_canvas import SHADING, mirror, moved, smooth, within
from flip_jax.data.face_parts import Scene, mix


def paint_beard(scene: Scene) -> None:
    """Mustache, goatee, sideburns or the shadow of a shaved beard."""
    person = scene.person
    rng = np.random.default_rng(person.style)
    if scene.picture.stubble:
        _paint_stubble(scene, rng)
    colour = mix(person.hair, (30, 22, 20), 0.25)
    for present, shape in (
        (person.sideburns, _sideburn),
        (person.goatee, _goatee),
        (person.mustache, _mustache),
    ):
        if present:
            for patch in shape(scene):
                _paint_patch(scene, rng, patch, colour)


def _sideburn(scene: Scene) -> list[np.ndarray]:
    """Strips from the temples along the jaw; with a goatee they reach down to it."""
    jaw = scene.shape.half_jaw()
    below = jaw[(jaw[:, 1] > -0.1) & (jaw[:, 1] < (1.15 if scene.person.goatee else 0.62))]
    width = np.interp(below[:, 1], [-0.1, 0.3, 0.6, 1.1], [0.14, 0.2, 0.24, 0.36])
    inner = np.stack([below[:, 0] - width, below[:, 1] - 0.3 * width], axis=1)
    strip = np.concatenate([moved(below, x=0.01), inner[::-1]])
    return [strip, strip * (-1, 1)]


def _goatee(scene: Scene) -> list[np.ndarray]:
    shape, person = scene.shape, scene.person
    top = shape.outer_lip(np.zeros(1), True)[0, 1] + 0.05
    half = 0.36 if not person.sideburns else 0.5
    low = person.chin + 0.09
    points = [
        (0.1, top),
        (0.24, top - 0.03),
        (half, top + 0.02),
        (half * 0.95, 0.6 * low + 0.4 * top),
        (0.3, low - 0.03),
        (0.0, low),
    ]
    right = smooth(np.array(points))
    return [np.concatenate([right, mirror(right)[1:]])]


def _mustache(scene: Scene) -> list[np.ndarray]:
    shape, person = scene.shape, scene.person
    u = np.linspace(-1, 1, 15)
    lower = shape.outer_lip(u, False) * (1.12, 1)
    lower[:, 1] += 0.02 + (0.1 if person.goatee else 0.04) * np.abs(u) ** 3
    room = shape.outer_lip(np.zeros(1), False)[0, 1] - shape.nose_base
    height = np.clip(0.8 * room, 0.09, 0.17) * (1 - 0.75 * u**2)
    upper = moved(lower, y=-0.02) - np.stack([0 * u, height], axis=1)
    return [np.concatenate([lower, upper[::-1]])]


def _paint_patch(scene: Scene, rng: np.random.Generator, patch: np.ndarray, colour) -> None:
    """A patch of beard: soft-edged fill with hairs in two shades."""
    placed = scene.head(patch, 0.05)
    scene.canvas.blend(placed, colour, 0.92, 0.02 * scene.unit)
    scene.canvas.stroke(SHADING, placed)
    spots = _scatter(rng, patch, 160)
    sweep = np.stack([0.02 * np.sign(spots[:, 0]), np.full(len(spots), 0.045)], axis=1)
    shades = colour * 0.6, mix(colour, (255, 240, 220), 0.14)
    hairs = np.stack([spots - sweep, spots + sweep], axis=1)
    scene.hairs(hairs, shades, 0.017, 0.05, stage=SHADING)


def _scatter(rng: np.random.Generator, area: np.ndarray, count: int) -> np.ndarray:
    """Random points in a polygon: those of `count` in its bounding box that hit it."""
    spots = rng.uniform(area.min(axis=0), area.max(axis=0), (count, 2))
    return spots[within(area, spots)]


def _paint_stubble(scene: Scene, rng: np.random.Generator) -> None:
    jaw = scene.shape.half_jaw()
    outer = jaw[jaw[:, 1] > 0.2]
    y = scene.shape.nose_base + 0.1
    inner = smooth(np.array([(0.0, y - 0.03), (0.4, y), (0.72, 0.62), (outer[0, 0] - 0.06, 0.22)]))
    half = np.concatenate([inner, outer])
    zone = np.concatenate([half, mirror(half)])
    colour = mix(mix(scene.person.hair, (40, 40, 48), 0.6), scene.person.skin, 0.25)
    scene.canvas.blend(scene.head(zone), colour, 0.55, 0.045 * scene.unit, inside=scene.outline)
    spots = _scatter(rng, zone, 150)
    dots = np.stack([spots, moved(spots, 0.004, 0.03)], axis=1)
    scene.hairs(dots, (colour * 0.55, colour * 0.75), 0.018, stage=SHADING)
