"""Parts of a drawn face: ears, skin, nose, eyes, brows and mouth, painted onto a `Scene`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flip_jax.data.face_canvas import (
    FEATURES,
    HEAD,
    SHADING,
    Canvas,
    Frame,
    ellipse,
    moved,
    smooth,
)
from flip_jax.data.face_shape import BROW_LIFT, MOUTH_LIFT, NOSE_LIFT, FaceShape
from flip_jax.data.face_traits import Person, Picture

INK = 0.028  # width of a drawn line, face units


@dataclass(frozen=True)
class Scene:
    """What every painting function needs: where to draw, what, and in which geometry."""

    canvas: Canvas
    person: Person
    picture: Picture
    shape: FaceShape
    head: Frame
    body: Frame
    outline: np.ndarray  # of the head without hair, [n, 2] picture units

    @property
    def unit(self) -> float:
        """Picture widths per face unit."""
        return self.head.scale

    @property
    def ink(self) -> np.ndarray:
        """Colour of lines on skin: a deep shade of it."""
        return mix(self.person.skin, (48, 16, 14), 0.72)

    @property
    def shadow(self) -> np.ndarray:
        """Skin out of the light."""
        return np.asarray(self.person.skin) * (0.74, 0.66, 0.64)

    @property
    def highlight(self) -> np.ndarray:
        """Skin in full light."""
        return mix(self.person.skin, (255, 250, 238), 0.5)

    def draw(self, points, colour, width=INK, lift=0.0, taper=1.0, stage=None) -> None:
        """Brush stroke on the head, `width` in face units; a `stage` puts it in the sketch."""
        placed = self.head(points, lift)
        self.canvas.line(placed, colour, width * self.unit, taper)
        if stage is not None:
            self.canvas.stroke(stage, placed)

    def hairs(self, lines, colours, width, lift=0.0, stage=None) -> None:
        """Short hairs [k, n, 2] on the head in two alternating colours; a few enter the sketch."""
        if not len(lines):
            return
        placed = self.head(lines.reshape(-1, 2), lift).reshape(lines.shape)
        for start, colour in enumerate(colours):
            self.canvas.hairs(placed[start::2], colour, width * self.unit)
        if stage is not None:
            for line in placed[:: max(1, len(placed) // 4)]:
                self.canvas.stroke(stage, line)

    def glow(self, centre, radii, colour, alpha) -> None:
        """Soft spot on the face that does not spill over its outline."""
        spot = self.head(ellipse(centre, radii, count=16))
        soft = 0.45 * min(radii) * self.unit
        self.canvas.blend(spot, colour, alpha, soft, inside=self.outline)


def mix(a, b, share: float) -> np.ndarray:
    """Colour between `a` (share 0) and `b` (share 1)."""
    return np.asarray(a, float) * (1 - share) + np.asarray(b, float) * share


def paint_ears(scene: Scene) -> None:
    for side, name in ((-1, "r_ear"), (1, "l_ear")):
        x = side * (scene.person.cheek + 0.04)
        rim = np.array([(0.0, -0.28), (0.13, -0.24), (0.16, -0.02), (0.09, 0.2), (0.0, 0.3)])
        rim = smooth(np.concatenate([rim, [(-0.1, 0.1), (-0.1, -0.2)]]), closed=True)
        ear = scene.head(rim * (side, 1) + (x, 0.04), lift=-0.25)
        scene.canvas.fill(ear, mix(scene.person.skin, scene.shadow, 0.25), name)
        scene.canvas.outline(ear, scene.ink, INK * scene.unit)
        scene.canvas.stroke(HEAD, ear[:28])
        fold = np.array([(0.03, -0.17), (0.1, -0.08), (0.05, 0.06), (0.02, 0.14)])
        scene.draw(smooth(fold) * (side, 1) + (x, 0.04), scene.shadow * 0.9, lift=-0.25)


def paint_skin(scene: Scene) -> None:
    """Face and double chin with form shadows, cheeks, blush and age lines."""
    canvas, person, head = scene.canvas, scene.person, scene.head
    if person.double_chin:
        fold = head(ellipse((0, person.chin - 0.12), (person.jaw * 0.74, 0.40)), -0.1)
        canvas.fill(fold, mix(person.skin, scene.shadow, 0.35), "skin")
        canvas.outline(fold, scene.ink, INK * scene.unit)
        canvas.stroke(HEAD, fold[1:14])
    canvas.fill(scene.outline, person.skin, "skin")
    _paint_form(scene)
    canvas.outline(scene.outline, scene.ink, INK * scene.unit)
    count = len(scene.outline)
    for part in (slice(4, count // 2 + 1), slice(count // 2, count - 3)):
        canvas.stroke(HEAD, scene.outline[part])
    for side in (-1, 1):
        _paint_cheek(scene, side)
    if person.wrinkles:
        _paint_age_lines(scene)


def _paint_form(scene: Scene) -> None:
    """Shadow on the side away from the light, light on the forehead towards it."""
    light_x, light_y = scene.picture.light
    canvas, unit = scene.canvas, scene.unit
    # Paint all of the face in shadow, then its outline moved towards the light in skin, softly.
    canvas.blend(scene.outline, scene.shadow, 0.62)
    lit = moved(scene.outline, 0.24 * light_x * unit, (0.16 * light_y - 0.06) * unit)
    canvas.blend(lit, scene.person.skin, 1.0, soft=0.13 * unit, inside=scene.outline)
    scene.glow((0.25 * light_x, -0.72), (0.45, 0.2), scene.highlight, 0.3)


def _paint_cheek(scene: Scene, side: int) -> None:
    person, picture = scene.person, scene.picture
    if picture.rosy:
        scene.glow((side * 0.6, 0.36), (0.25, 0.19), (228, 62, 72), 0.5)
    elif picture.makeup:
        scene.glow((side * 0.66, 0.3), (0.2, 0.12), (214, 84, 100), 0.28)
    if person.high_cheekbones:
        hollow = np.array([(0.97, 0.3), (0.9, 0.56), (0.52, 0.78), (0.62, 0.52)]) * (side, 1)
        hollow = scene.head(smooth(hollow, closed=True))
        scene.canvas.blend(hollow, scene.shadow, 0.8, 0.05 * scene.unit, inside=scene.outline)
        scene.glow((side * 0.68, 0.18), (0.2, 0.08), scene.highlight, 0.7)
        ridge = np.array([(0.93, 0.26), (0.78, 0.42), (0.6, 0.5)]) * (side, 1)
        scene.draw(smooth(ridge), scene.shadow * 0.85, stage=SHADING)
    if person.chubby:
        scene.glow((side * 0.62, 0.48), (0.28, 0.24), scene.highlight, 0.35)
        pad = ellipse((side * 0.56, 0.5), (0.3, 0.3), 0.3 * np.pi, 0.62 * np.pi, 9)
        scene.draw(pad, scene.shadow, 0.03, stage=SHADING)
    if picture.smiling or person.wrinkles:
        start, end = scene.person.nose_width + 0.1, 0.2 + scene.person.mouth_width
        fold = np.array(
            [
                (start, scene.shape.nose_base - 0.06),
                (end - 0.02, scene.shape.mouth_y - 0.2),
                (end, scene.shape.mouth_y - 0.02),
            ]
        )
        width = 0.022 + 0.03 * person.wrinkles
        scene.draw(smooth(fold) * (side, 1), scene.shadow * 0.92, width, stage=SHADING)


def _paint_age_lines(scene: Scene) -> None:
    strength = scene.person.wrinkles
    colour = mix(scene.person.skin, scene.shadow * 0.8, 0.5 + 0.5 * strength)
    x = np.linspace(-0.48, 0.48, 9)
    for row in range(2 + (strength > 0.75)):
        wave = 0.02 * np.cos(7 * x + row)
        line = np.stack([x * (1 - 0.12 * row), -0.62 - 0.13 * row + wave], axis=1)
        scene.draw(line, colour, 0.034, stage=SHADING)
    for side in (-1, 1):
        for rise in (-0.09, 0.0, 0.09):
            foot = np.array([(0.70, 0.02 + 0.5 * rise), (0.78, 0.02 + rise), (0.86, 2 * rise)])
            scene.draw(foot * (side, 1), colour, 0.028, stage=SHADING)


def paint_nose(scene: Scene) -> None:
    canvas, person, shape, head = scene.canvas, scene.person, scene.shape, scene.head
    lower = head(shape.nostrils(), NOSE_LIFT)
    tip = head(shape.nose_tip()[None], shape.tip_lift)[0]
    bridge = head(np.array([(-0.09, -0.08), (0.09, -0.08)]), NOSE_LIFT)
    wing_y = shape.nose_base - 0.16
    wings = head(np.array([(-person.nose_width, wing_y), (person.nose_width, wing_y)]), NOSE_LIFT)
    mid = head(np.array([(-0.1, 0.12), (0.1, 0.12)]), NOSE_LIFT + 0.05)
    nose = [bridge[0], mid[0], wings[0], *lower, wings[1], mid[1], bridge[1]]
    canvas.label(np.array(nose), "nose")
    dark = 1 if scene.picture.light[0] < 0 else 0  # index of the side out of the light
    edge = np.array([bridge[dark], mid[dark], wings[dark]])
    side_plane = np.array([*edge, lower[-dark], tip])
    canvas.blend(side_plane, scene.shadow, 0.5, 0.025 * scene.unit)
    canvas.blend(lower - (0, 0.05 * scene.unit), scene.shadow, 0.5, 0.03 * scene.unit)
    ridge = smooth(np.array([edge[0], edge[1], tip - (0, 0.08 * scene.unit)]))
    canvas.line(ridge, scene.shadow * 0.85, 0.03 * scene.unit)
    canvas.stroke(FEATURES, ridge)
    if person.pointy_nose:
        wedge = np.array([lower[1], moved(tip, y=0.06 * scene.unit), lower[-2]])
        canvas.line(np.array([wedge[0], wedge[1]]), scene.ink, INK * 1.2 * scene.unit, 0.5)
        canvas.line(np.array([wedge[1], wedge[2]]), scene.ink, INK * 1.2 * scene.unit, 0.5)
        canvas.stroke(FEATURES, wedge)
    else:
        canvas.line(smooth(lower), scene.ink, INK * scene.unit)
        canvas.stroke(FEATURES, smooth(lower))
    for side in (-1, 1):
        _paint_nostril(scene, side)
    radius = 0.09 if person.big_nose else 0.045
    spot = ellipse(tip - (0, 0.06 * scene.unit), (radius * scene.unit,) * 2, count=12)
    canvas.blend(spot, (255, 250, 242), 0.5, 0.02 * scene.unit)


def _paint_nostril(scene: Scene, side: int) -> None:
    person, shape = scene.person, scene.shape
    width = person.nose_width
    centre = (side * width * 0.48, shape.nose_base - 0.015)
    hole = ellipse(centre, (width * 0.2, 0.028), count=12)
    scene.canvas.fill(scene.head(hole, NOSE_LIFT), scene.ink)
    wing = np.array([(0.82, -0.17), (1.0, -0.06), (0.9, 0.0)]) * (side * width, 1)
    wing = smooth(moved(wing, y=shape.nose_base))
    scene.draw(wing, scene.ink, INK * (1.5 if person.big_nose else 1), NOSE_LIFT, stage=FEATURES)


def paint_eyes(scene: Scene) -> None:
    for side, name in ((-1, "r_eye"), (1, "l_eye")):
        upper, lower = scene.shape.eye(side)
        _paint_lids(scene, side, upper, lower)
        iris, pupil = _paint_eyeball(scene, side, upper, lower, name)
        _paint_lashes(scene, side, upper, lower)
        scene.canvas.stroke(FEATURES, iris)
        scene.canvas.stroke(FEATURES, pupil)


def _paint_lids(scene: Scene, side: int, upper: np.ndarray, lower: np.ndarray) -> None:
    """What lies around an eye: socket, eye shadow, crease and bags."""
    person, picture = scene.person, scene.picture
    x = side * person.eye_spacing
    scene.glow((x, -0.1), (person.eye_width + 0.05, 0.12), scene.shadow, 0.35)
    crease = moved(upper, y=-0.11 if picture.narrow_eyes else -0.08)
    if picture.makeup:
        colour = mix(picture.lipstick or (120, 60, 140), (96, 44, 128), 0.65)
        lid = np.concatenate([upper, moved(upper, y=-0.17)[::-1]])
        scene.canvas.blend(scene.head(lid), colour, 0.75, 0.025 * scene.unit)
    scene.draw(crease, scene.shadow * 0.8, 0.026, stage=SHADING)
    if person.bags:
        middle = moved(lower[1:-1], y=0.10)
        bag = np.concatenate([moved(lower, y=0.03), moved(lower, y=0.17)[::-1]])
        tired = scene.shadow * (0.92, 0.86, 1.0)
        scene.canvas.blend(scene.head(bag), tired, 0.75, 0.02 * scene.unit)
        sag = middle + np.stack([0 * middle[:, 0], 0.07 * np.sin(np.linspace(0, np.pi, 11))], 1)
        scene.draw(sag, scene.shadow * 0.7, 0.032, stage=SHADING)


def _paint_eyeball(
    scene: Scene, side: int, upper: np.ndarray, lower: np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """White, iris, pupil and glint; returns the outlines of iris and pupil for the sketch."""
    canvas, person = scene.canvas, scene.person
    ball = scene.head(np.concatenate([upper, lower[::-1][1:-1]]))
    canvas.fill(ball, (246, 243, 238), name)
    radius = 0.118
    # The gaze goes a little back towards the viewer when the head turns.
    centre = (side * person.eye_spacing - 0.12 * np.sin(scene.picture.yaw), -0.015)
    iris = scene.head(ellipse(centre, (radius, radius), count=20))
    canvas.blend(iris, mix(person.eye, (0, 0, 0), 0.45), 1.0, inside=ball)
    inner = scene.head(ellipse((centre[0], centre[1] + 0.02), (0.09, 0.085), count=16))
    canvas.blend(inner, mix(person.eye, (255, 255, 255), 0.12), 1.0, inside=ball)
    pupil = scene.head(ellipse(centre, (0.055, 0.055), count=14))
    canvas.blend(pupil, (14, 10, 12), 1.0, inside=ball)
    lid_shadow = scene.head(np.concatenate([moved(upper, y=-0.03), moved(upper, y=0.045)[::-1]]))
    canvas.blend(lid_shadow, (90, 70, 80), 0.4, 0.008 * scene.unit, inside=ball)
    glint = ellipse((centre[0] - 0.035, centre[1] - 0.04), (0.032, 0.032), count=10)
    canvas.blend(scene.head(glint), (255, 255, 255), 0.95, inside=ball)
    return iris, pupil


def _paint_lashes(scene: Scene, side: int, upper: np.ndarray, lower: np.ndarray) -> None:
    picture, person = scene.picture, scene.person
    colour = mix(scene.ink, (16, 10, 12), 0.8)
    width = 0.075 if picture.makeup else 0.045 if person.male else 0.056
    scene.draw(upper, colour, width, taper=0.65, stage=FEATURES)
    scene.draw(lower, mix(colour, person.skin, 0.35), 0.026, stage=FEATURES)
    if not person.male:
        long = 1.6 if picture.makeup else 1.0
        outer = upper[::side]
        for index, (dx, dy) in ((12, (0.09, -0.06)), (11, (0.08, -0.08)), (10, (0.06, -0.09))):
            tip = outer[index] + np.array([side * dx, dy]) * long
            scene.draw(np.array([outer[index], 0.4 * outer[index] + 0.6 * tip, tip]), colour, 0.03)


def paint_brows(scene: Scene) -> None:
    person = scene.person
    colour = mix(person.hair, (40, 28, 24), 0.5 if person.hair_colour in ("blond", "gray") else 0.3)
    rng = np.random.default_rng(person.style)
    for side, name in ((-1, "r_brow"), (1, "l_brow")):
        line = scene.shape.brow(side)
        along = line[::side]  # nose side .. temple
        width = 0.155 if person.bushy_brows else 0.075
        profile = np.array([0.75, 1, 1.05, 1, 0.95, 0.85, 0.7, 0.45, 0.15]) * width / 2
        edge = np.stack([np.zeros(9), profile], axis=1)
        brow = np.concatenate([along - edge, (along + edge)[::-1]])
        if person.bushy_brows:
            brow = brow + rng.uniform(-0.022, 0.022, brow.shape)
        placed = scene.head(brow, BROW_LIFT)
        scene.canvas.fill(placed, colour, name)
        scene.canvas.stroke(FEATURES, placed)
        if person.bushy_brows:
            root = along[:8] + np.stack([np.zeros(8), profile[:8]], axis=1)
            tip = root + np.stack([np.full(8, side * 0.07), -2.4 * profile[:8]], axis=1)
            shades = mix(colour, (0, 0, 0), 0.35), mix(colour, (255, 255, 255), 0.12)
            scene.hairs(np.stack([root, tip], axis=1), shades, 0.022, BROW_LIFT)


def paint_mouth(scene: Scene) -> None:
    canvas, person, picture, shape = scene.canvas, scene.person, scene.picture, scene.shape
    u = np.linspace(-1, 1, 21)
    outer_up, inner_up, outer_low, inner_low = (
        scene.head(curve(u, lower), MOUTH_LIFT)
        for lower in (False, True)
        for curve in (shape.outer_lip, shape.inner_lip)
    )
    if picture.lipstick is not None:
        colour = np.asarray(picture.lipstick)
    else:
        colour = mix(person.skin, (176, 70, 74), 0.34 if person.male else 0.42)
    if picture.opening:
        _paint_gap(scene, inner_up, inner_low)
    lower = np.concatenate([inner_low, outer_low[::-1]])
    upper = np.concatenate([outer_up, inner_up[::-1]])
    canvas.fill(lower, colour, "l_lip")
    canvas.fill(upper, colour * 0.84, "u_lip")
    if picture.opening:
        # The lips' rasterised edges would close the gap in the mask of a small picture.
        rows = [inner_up + share * (inner_low - inner_up) for share in (0.4, 0.6)]
        canvas.label(np.concatenate([rows[0][5:-5], rows[1][5:-5][::-1]]), "mouth")
    canvas.line(inner_up, mix(scene.ink, (60, 10, 16), 0.5), 0.034 * scene.unit, 0.6)
    canvas.line(outer_low, colour * 0.72, 0.018 * scene.unit)
    shine = ellipse((0.08, 0.5 * person.lower_lip), (0.13, 0.25 * person.lower_lip), count=14)
    shine = scene.head(shine + shape.inner_lip(np.zeros(1), True), MOUTH_LIFT)
    gloss = 0.5 if picture.lipstick is not None else 0.25
    canvas.blend(shine, (255, 244, 244), gloss, 0.02 * scene.unit)
    dip = scene.head(
        ellipse((0, 0), (0.2, 0.035), count=12) + shape.outer_lip(np.zeros(1), True) + (0, 0.07),
        MOUTH_LIFT,
    )
    canvas.blend(dip, scene.shadow, 0.5, 0.025 * scene.unit, inside=scene.outline)
    for line in (inner_up, outer_up, outer_low):
        canvas.stroke(FEATURES, line)
    if picture.opening:
        canvas.stroke(FEATURES, inner_low)
    if picture.smiling:
        for side in (-1, 1):
            corner = shape.inner_lip(np.array([float(side)]), False)
            dimple = ellipse((0, 0), (0.05, 0.08), -0.35 * np.pi, 0.35 * np.pi, 7) * (side, 1)
            scene.draw(dimple + corner, scene.ink, 0.03, MOUTH_LIFT, stage=SHADING)


def _paint_gap(scene: Scene, inner_up: np.ndarray, inner_low: np.ndarray) -> None:
    canvas, unit = scene.canvas, scene.unit
    gap = np.concatenate([inner_up, inner_low[::-1]])
    canvas.fill(gap, (74, 18, 24), "mouth")
    tongue = inner_low[5:16]
    tongue = np.concatenate([tongue, tongue[::-1] - (0, 0.05 * unit)])
    canvas.blend(tongue, (198, 86, 92), 1.0, 0.01 * unit, inside=gap)
    reach = 0.62 if scene.picture.smiling else 0.42
    teeth = np.concatenate(
        [inner_up[2:-2], (inner_up + reach * (inner_low - inner_up))[2:-2][::-1]]
    )
    canvas.blend(teeth, (250, 248, 242), 1.0, inside=gap)
