"""What a drawn person wears: clothes, necktie, necklace, hat, glasses and earrings."""

from __future__ import annotations

import numpy as np

from flip_jax.data.face_canvas import BODY, WEAR, ellipse, mirror, moved, ribbon, smooth
from flip_jax.data.face_parts import INK, Scene, mix

METAL = np.array((226, 184, 74))


def paint_body(scene: Scene) -> None:
    """Neck, clothes, necktie and necklace, behind the head."""
    canvas, person, picture, body = scene.canvas, scene.person, scene.picture, scene.body
    width = 0.56 if person.male else 0.44
    width += 0.08 * person.chubby
    right = [(width, 0.6), (width, 1.2), (width + 0.1, 1.5), (0.98, 1.72), (1.1, 2.5)]
    right = smooth(np.array(right))
    placed = body(np.concatenate([right, mirror(right)]))
    canvas.fill(placed, mix(person.skin, scene.shadow, 0.2), "neck")
    canvas.outline(placed, scene.ink, INK * scene.unit)
    for side in (-1, 1):
        throat = right[(right[:, 1] > 1.0) & (right[:, 1] < 1.5)]
        canvas.stroke(BODY, body(throat * (side, 1)))
    chin_shadow = ellipse((0, person.chin - 0.14), (0.75, 0.42))
    canvas.blend(body(chin_shadow), scene.shadow * 0.82, 0.8, 0.06 * scene.unit, inside=placed)
    _paint_garment(scene, width)
    if picture.necktie:
        _paint_necktie(scene)
    if picture.necklace is not None:
        _paint_necklace(scene, width)


def _paint_garment(scene: Scene, neck: float) -> None:
    canvas, picture, body = scene.canvas, scene.picture, scene.body
    colour = np.asarray(picture.garment_colour)
    edge = INK * scene.unit
    shoulder = 1.85 if scene.person.male else 1.6
    right = smooth(
        np.array([(neck + 0.17, 1.46), (1.0, 1.58), (shoulder, 1.86), (shoulder + 0.3, 2.9)])
    )
    opening = {
        "crew": [(-0.4, 1.66), (0.0, 1.72), (0.4, 1.66)],
        "vneck": [(0.0, 2.2)],
        "shirt": [(0.0, 1.86)],
    }[picture.garment]
    opening = np.array([(-neck - 0.17, 1.46), *opening, (neck + 0.17, 1.46)])
    if picture.garment == "crew":
        opening = smooth(opening)
    cloth = body(np.concatenate([right, mirror(right), opening[1:-1]]))
    canvas.fill(cloth, colour, "cloth")
    canvas.outline(cloth, colour * 0.5, edge)
    for side in (-1, 1):
        canvas.stroke(BODY, body(right * (side, 1)))
        fold = smooth(np.array([(1.2, 1.95), (1.12, 2.15), (1.1, 2.4)])) * (side, 1)
        canvas.line(body(fold), colour * 0.75, 0.05 * scene.unit)
    canvas.stroke(BODY, body(opening))
    if picture.garment == "shirt":
        _paint_collar(scene, neck, mix(colour, (255, 255, 255), 0.75), colour * 0.5)
    else:
        hem = moved(opening, y=0.08)
        canvas.outline(body(hem), colour * 0.7, edge, closed=False)


def _paint_collar(scene: Scene, neck: float, paper: np.ndarray, edge: np.ndarray) -> None:
    """A shirt's collar; with a necktie the shirt shows between the jacket's lapels."""
    canvas, body = scene.canvas, scene.body
    if scene.picture.necktie:
        front = body(np.array([(-0.5, 1.6), (0.5, 1.6), (0.0, 2.8)]))
        canvas.fill(front, paper, "cloth")
        canvas.outline(front, edge, INK * scene.unit)
    for side in (-1, 1):
        collar = [(neck + 0.08, 1.26), (neck + 0.18, 1.5), (0.46, 1.9), (0.0, 1.78)]
        collar = body(np.array(collar) * (side, 1))
        canvas.fill(collar, paper, "cloth")
        canvas.outline(collar, edge, INK * scene.unit)
        canvas.stroke(BODY, collar)


def _paint_necktie(scene: Scene) -> None:
    canvas, body = scene.canvas, scene.body
    colour = mix(scene.picture.accessory_colour, (70, 10, 24), 0.35)
    blade = [(0.12, 1.88), (0.27, 2.6), (-0.27, 2.6), (-0.12, 1.88)]
    knot = [(0.19, 1.64), (0.12, 1.92), (-0.12, 1.92), (-0.19, 1.64)]
    for points in (blade, knot):
        placed = body(np.array(points))
        canvas.fill(placed, colour, "cloth")
        canvas.outline(placed, colour * 0.45, INK * scene.unit)
        canvas.stroke(WEAR, placed[[0, 1, 2, 3, 0]])
    for y in (2.02, 2.18):
        stripe = body(np.array([(-0.14, y + 0.1), (0.0, y + 0.04), (0.15, y - 0.04)]))
        canvas.line(stripe, mix(colour, (255, 255, 255), 0.65), 0.06 * scene.unit, 0.0)


def _paint_necklace(scene: Scene, neck: float) -> None:
    canvas, body, unit = scene.canvas, scene.body, scene.unit
    arc = ellipse((0, 1.38), (neck + 0.06, 0.36), 0.0, np.pi, 25)
    placed = body(arc)
    canvas.label(ribbon(placed, 0.07 * unit, 0.0), "neck_l")
    canvas.stroke(WEAR, placed)
    if scene.picture.necklace == "beads":
        pearl = mix(scene.picture.accessory_colour, (255, 250, 240), 0.6)
        for x, y in arc[1:-1]:
            bead = body(ellipse((x, y), (0.058, 0.058), count=10))
            canvas.fill(bead, pearl, "neck_l")
            canvas.outline(bead, pearl * 0.55, 0.012 * unit)
        return
    canvas.line(moved(placed, y=0.02 * unit), METAL * 0.45, 0.06 * unit, 0.0)
    canvas.line(placed, METAL, 0.05 * unit, 0.0)
    if scene.picture.necklace == "pendant":
        drop = body(np.array([(0, 1.72), (0.1, 1.81), (0, 1.93), (-0.1, 1.81)]))
        canvas.fill(drop, scene.picture.accessory_colour, "neck_l")
        canvas.outline(drop, METAL * 0.7, INK * unit)
        canvas.stroke(WEAR, drop[[0, 1, 2, 3, 0]])


def paint_hat(scene: Scene) -> None:
    kind = scene.picture.hat
    if kind is None:
        return
    canvas, head = scene.canvas, scene.head
    colour = np.asarray(scene.picture.accessory_colour)
    side = scene.person.cheek + 0.14 + 0.6 * scene.person.hair_volume
    rise = 1.1 + scene.person.hair_volume
    crown = ellipse((0, -0.58), (side, rise), np.pi, 2 * np.pi, 25)
    if kind == "brim":
        crown[:, 1] = np.maximum(crown[:, 1], -1.62)
    band_top = np.stack([np.linspace(side, -side, 15), np.zeros(15)], axis=1)
    band_top[:, 1] = -0.66 - 0.1 * (1 - (band_top[:, 0] / side) ** 2)
    dome = head(np.concatenate([crown, band_top]), 0.05)
    canvas.fill(dome, colour, "hat")
    canvas.blend(
        head(ellipse((0.4 * scene.picture.light[0], -1.2), (0.4, 0.25)), 0.1),
        (255, 255, 255),
        0.25,
        0.1 * scene.unit,
        inside=dome,
    )
    canvas.outline(dome, colour * 0.45, INK * scene.unit)
    canvas.stroke(WEAR, dome)
    if kind == "beanie":
        band = np.concatenate([moved(band_top, y=-0.14), moved(band_top, y=0.14)[::-1]])
        _paint_flat(scene, band, colour * 0.78)
        for x in np.linspace(-0.85, 0.85, 9):
            rib = np.array(
                [(x, -0.93 + 0.1 * x * x), (x, -0.8 + 0.1 * x * x), (x, -0.66 + 0.1 * x * x)]
            )
            scene.draw(rib, colour * 0.5, 0.03, 0.05)
        top = head(ellipse((0, -0.62 - rise), (0.16, 0.16), count=14), 0.05)
        canvas.fill(top, mix(colour, (255, 255, 255), 0.4), "hat")
        canvas.outline(top, colour * 0.45, INK * scene.unit)
    elif kind == "brim":
        band = np.concatenate([moved(band_top, y=-0.2), band_top[::-1]])
        _paint_flat(scene, band, colour * 0.4)
        _paint_flat(scene, ellipse((0, -0.68), (side + 0.5, 0.17)), colour * 0.9)
    else:
        visor = ellipse((0.25 * np.sin(scene.picture.yaw), -0.64), (1.0, 0.24), count=28)
        visor[:, 1] += 0.08 * visor[:, 0] ** 2
        _paint_flat(scene, visor, colour * 0.62)


def _paint_flat(scene: Scene, points: np.ndarray, colour: np.ndarray) -> None:
    """A flat piece of the hat: filled, outlined, in the sketch."""
    placed = scene.head(points, 0.05)
    scene.canvas.fill(placed, colour, "hat")
    scene.canvas.outline(placed, colour * 0.5, INK * scene.unit)
    scene.canvas.stroke(WEAR, placed)


def paint_glasses(scene: Scene) -> None:
    """Both lenses, bridge and temples; eyes and brows stay their own classes behind them."""
    kind = scene.picture.glasses
    if kind is None:
        return
    canvas, person, unit = scene.canvas, scene.person, scene.unit
    colour = mix(scene.picture.accessory_colour, (24, 20, 24), 0.7)
    width, height, power = {
        "round": (0.31, 0.30, 1.0),
        "square": (0.34, 0.24, 0.5),
        "oval": (0.34, 0.23, 0.85),
    }[kind]
    angle = np.linspace(0, 2 * np.pi, 33)
    for side in (-1, 1):
        cos, sin = np.cos(angle), np.sin(angle)
        lens = np.stack(
            [
                width * np.sign(cos) * np.abs(cos) ** power,
                height * np.sign(sin) * np.abs(sin) ** power,
            ],
            axis=1,
        )
        lens = scene.head(moved(lens, side * person.eye_spacing, 0.03), 0.08)
        canvas.label(lens, "eye_g", keep=("l_eye", "r_eye", "l_brow", "r_brow"))
        canvas.blend(lens, (214, 232, 244), 0.16)
        glint = np.array([(-0.16, 0.12), (0.02, -0.2), (0.1, -0.2), (-0.08, 0.12)])
        glint = scene.head(moved(glint, side * person.eye_spacing, 0.03), 0.08)
        canvas.blend(glint, (255, 255, 255), 0.3, 0.008 * unit, inside=lens)
        canvas.outline(lens, colour, 0.05 * unit)
        canvas.stroke(WEAR, lens)
        inner, outer = person.eye_spacing - width, person.eye_spacing + width
        arm = np.array(
            [(outer, -0.04), (0.5 * (outer + person.cheek), -0.08), (person.cheek, -0.1)]
        )
        scene.draw(arm * (side, 1), colour, 0.06, 0.03, taper=0.0, stage=WEAR)
    bridge = np.array([(-inner, -0.02), (0, -0.07), (inner, -0.02)])
    scene.draw(smooth(bridge), colour, 0.055, 0.12, taper=0.0, stage=WEAR)


def paint_earrings(scene: Scene) -> None:
    """One at each lobe, over any hair there."""
    kind = scene.picture.earrings
    if kind is None:
        return
    canvas, head, unit = scene.canvas, scene.head, scene.unit
    gem = mix(scene.picture.accessory_colour, (255, 255, 255), 0.3)
    for side in (-1, 1):
        x = side * (scene.person.cheek + 0.05)
        if kind == "hoop":
            ring = head(ellipse((x, 0.5), (0.12, 0.16), count=22), -0.12)
            hole = head(ellipse((x, 0.5), (0.06, 0.1), count=22), -0.12)
            canvas.label(ring, "ear_r")
            canvas.outline(ring, METAL * 0.45, 0.085 * unit)
            canvas.outline(ring, METAL, 0.05 * unit)
            canvas.stroke(WEAR, hole)
        elif kind == "drop":
            ring = head(ellipse((x, 0.56), (0.085, 0.15), count=18), -0.12)
            canvas.fill(ring, gem, "ear_r")
            canvas.outline(ring, METAL * 0.6, INK * unit)
            stem = head(np.array([(x, 0.32), (x, 0.37), (x, 0.42)]), -0.12)
            canvas.line(stem, METAL, 0.04 * unit, 0.0)
        else:
            ring = head(ellipse((x, 0.34), (0.085, 0.085), count=14), -0.12)
            canvas.fill(ring, mix(gem, (255, 255, 255), 0.5), "ear_r")
            canvas.outline(ring, METAL * 0.5, INK * unit)
        canvas.stroke(WEAR, ring)
