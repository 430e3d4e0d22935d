"""Hair of a drawn face, painted onto a `Scene`."""

from __future__ import annotations

import numpy as np

from flip_jax.data.face_canvas import HAIR, ellipse, mirror, moved, normals, resample, smooth
from flip_jax.data.face_parts import INK, Scene, mix

CENTRE_Y = -0.12  # of the ellipse that the hair's upper edge follows


def _waved(points: np.ndarray, amplitude: float, length: float, phase: float) -> np.ndarray:
    """The polyline with a sine of this wave length across it, in face units."""
    total = np.hypot(*np.diff(points, axis=0).T).sum()
    points = resample(points, max(8, int(8 * total / length)))
    s = np.linspace(0, total, len(points))
    return points + normals(points) * (amplitude * np.sin(2 * np.pi * s / length + phase))[:, None]


class Hair:
    """One person's hair: its outlines in face units and the painting of its layers."""

    def __init__(self, scene: Scene):
        self.scene = scene
        self.person = scene.person
        # Strands and waves belong to the person, not to the picture.
        self.rng = np.random.default_rng(scene.person.style)
        self.wavy = scene.person.hair_kind == "wavy"
        self.base = np.asarray(scene.person.hair)
        self.dark = self.base * 0.62
        self.light = mix(self.base, (255, 246, 226), 0.22)

    def _style(self, points: np.ndarray, amplitude: float) -> np.ndarray:
        """The line as this hair draws it: straight or in waves."""
        if not self.wavy:
            return points
        return _waved(points, amplitude, self.rng.uniform(0.34, 0.42), self.rng.uniform(0, 6))

    def _side(self) -> float:
        """Half width of the hair at the ears' level."""
        return self.person.cheek + 0.07 + 0.6 * self.person.hair_volume

    def _top(self) -> np.ndarray:
        """Upper edge, from the picture's left temple over the crown to the right: [n, 2]."""
        height = 1.30 + self.person.hair_volume
        return ellipse((0, CENTRE_Y), (self._side(), height), np.pi, 2 * np.pi, 25)

    def _shape(self, points: np.ndarray, colour: np.ndarray, lift: float) -> None:
        self.scene.canvas.fill(self.scene.head(points, lift), colour, "hair")

    def _edge(self, line: np.ndarray, lift: float, closed: bool = False) -> None:
        """Outline of a mass of hair, also in the sketch."""
        placed = self.scene.head(np.concatenate([line, line[:1]]) if closed else line, lift)
        width = 0.7 * INK * self.scene.unit
        self.scene.canvas.outline(placed, self.dark * 0.8, width, closed=False)
        self.scene.canvas.stroke(HAIR, placed)

    def _strand(self, points: np.ndarray, lift: float, index: int) -> None:
        """One visible strand; every fourth goes into the sketch."""
        colour = self.dark if index % 2 else self.light
        width = self.rng.uniform(0.02, 0.05)
        line = self._style(points, 0.04)
        self.scene.draw(line, colour, width, lift, stage=None if index % 4 else HAIR)

    def paint_back(self) -> None:
        """Long hair behind neck and shoulders."""
        length, side = self.person.hair_length, self._side()
        if self.person.hair_kind == "bald" or length < 0:
            return
        edge = [(side, CENTRE_Y), (side + 0.08, 0.5), (side + 0.06, 0.75 * length), (side, length)]
        right = self._style(smooth(np.array(edge)), 0.07)
        hem = [(0.5, length + 0.06), (0.0, length + 0.02)]
        right = np.concatenate([right, hem])
        points = np.concatenate([self._top(), right, mirror(right)])
        self._shape(points, self.base * 0.72, -0.3)

    def paint_front(self) -> None:
        """Everything over the face: cap, curtains and bangs."""
        if self.person.hair_kind == "bald":
            return
        self._paint_cap()
        if self.person.hair_length > 0:
            for side in (-1, 1):
                self._paint_curtain(side)
        if self.scene.picture.bangs:
            self._paint_bangs()

    def _hairline(self) -> np.ndarray:
        """Lower edge of the cap, from the picture's right temple to the left: [n, 2]."""
        person = self.person
        ear = 0.16 if person.hair_length < 0 else 0.0
        part = person.parting
        temple = [(0.98, ear), (0.9, -0.3)]
        if person.receding:
            half = [*temple, (0.84, -0.78), (0.58, -1.2), (0.3, -1.1)]
            middle = [(0.0, -0.98)]
        elif person.hair_kind == "cropped":
            half = [*temple, (0.84, -0.66), (0.6, -0.88), (0.3, -0.93)]
            middle = [(0.0, -0.94)]
        else:  # highest at the parting, sweeping down to both temples
            half = [*temple, (0.78, -0.62)]
            middle = [(0.42 + 0.4 * part, -0.92), (part, -1.08), (0.4 * part - 0.42, -0.92)]
        left = [(-x, y) for x, y in reversed(half)]
        return smooth(np.array([*half, *middle, *left]))

    def _paint_cap(self) -> None:
        person = self.person
        short = person.hair_length < 0
        hairline = self._hairline()
        if person.hair_kind != "cropped" and not person.receding:
            hairline = self._style(hairline, 0.035)
        top = self._style(self._top(), 0.05 if short else 0.03)
        self._cast_shadow(hairline)
        cap = np.concatenate([top, hairline])
        self._shape(cap, self.base, 0.0)
        if short:
            self._edge(cap, 0.0, closed=True)
        else:  # the curtains continue the cap: no line across
            self._edge(top, 0.0)
            self._edge(hairline, 0.0)
        if person.hair_kind == "cropped":
            self._paint_ticks(hairline)
        else:
            self._paint_strands()
            self._paint_sheen()

    def _cast_shadow(self, edge: np.ndarray) -> None:
        """Soft shadow that hair throws on the face below its `edge`."""
        scene = self.scene
        band = scene.head(np.concatenate([edge, moved(edge, y=0.1)[::-1]]))
        scene.canvas.blend(band, scene.shadow * 0.9, 0.6, 0.03 * scene.unit, scene.outline)

    def _paint_strands(self) -> None:
        """Strands that fan out from the parting over the crown, between hairline and upper edge."""
        person, rng = self.person, self.rng
        low = 0.93 if person.receding else 0.78
        t = np.linspace(0, 1, 12)
        start = 1.5 * np.pi + 0.9 * person.parting
        for index, end in enumerate(np.linspace(1.05, 1.95, 15) * np.pi):
            angle = start + (end - start) * t
            reach = low + (rng.uniform(low + 0.04, 0.98) - low) * t
            radii = np.array([self._side(), 1.30 + person.hair_volume])
            arc = np.stack([np.cos(angle), np.sin(angle)], axis=1) * reach[:, None] * radii
            self._strand(moved(arc, y=CENTRE_Y), 0.0, index)

    def _paint_sheen(self) -> None:
        """The band of light that hair shows on the crown."""
        scene = self.scene
        x = 0.4 * scene.picture.light[0]
        arc = ellipse((0, CENTRE_Y), (0.8 * self._side(), 1.16), 1.32 * np.pi, 1.68 * np.pi, 11)
        band = np.concatenate([arc, moved(arc, y=0.1)[::-1]])
        placed = scene.head(moved(band, x))
        scene.canvas.blend(placed, mix(self.light, (255, 255, 255), 0.25), 0.45, 0.035 * scene.unit)

    def _paint_ticks(self, hairline: np.ndarray) -> None:
        """Short hair: a soft edge and rows of ticks instead of strands."""
        scene = self.scene
        front = hairline[8:-8]
        band = scene.head(np.concatenate([front, moved(front, y=0.07)[::-1]]))
        scene.canvas.blend(band, self.base, 0.5, 0.025 * scene.unit, scene.outline)
        angle = self.rng.uniform(1.06, 1.94, 90) * np.pi
        reach = self.rng.uniform(0.84, 0.97, 90)[:, None]
        root = np.stack([self._side() * np.cos(angle), 1.3 * np.sin(angle)], axis=1) * reach
        ticks = moved(np.stack([root, root * 1.07], axis=1), y=CENTRE_Y)
        scene.hairs(ticks, (self.dark, mix(self.base, self.light, 0.6)), 0.02, stage=HAIR)

    def _paint_curtain(self, side: int) -> None:
        """Hair that falls in front of one ear."""
        length, outer = self.person.hair_length, self._side()
        inner_edge = [(0.8, -0.62), (0.9, -0.2), (0.93, 0.3), (0.84, 0.8 * min(length, 1.4))]
        inner = smooth(np.array([*inner_edge, (0.8, length)]))
        rim = [(outer, CENTRE_Y - 0.2), (outer + 0.08, 0.4), (outer + 0.06, 0.8 * length)]
        rim = self._style(smooth(np.array([*rim, (outer - 0.06, length + 0.04)])), 0.06)
        inner = self._style(inner, 0.04)
        edge = np.concatenate([inner, rim[::-1]]) * (side, 1)
        self._shape(edge, self.base, -0.05)
        self._edge(edge, -0.05)
        for index in range(5):
            share = (index + 0.7) / 6
            line = (1 - share) * resample(inner, 9) + share * resample(rim, 9)
            self._strand(line * (side, 1), -0.05, index)

    def _paint_bangs(self) -> None:
        """A fringe down to the brows, in locks."""
        locks = 9
        x = np.linspace(-0.86, 0.86, 2 * locks + 1)
        tips = -0.42 - 0.05 * (1 - (x / 0.86) ** 2) + self.rng.uniform(-0.05, 0.04, x.size)
        tips[1::2] -= 0.04 if self.wavy else 0.1
        lower = np.stack([x, tips], axis=1)[::-1]
        lower = smooth(lower, steps=4) if self.wavy else lower
        crown = ellipse((0, CENTRE_Y - 0.3), (0.93, 0.92), np.pi, 2 * np.pi, 15)
        self._cast_shadow(lower)
        self._shape(np.concatenate([crown, lower]), self.base, 0.03)
        self._edge(lower, 0.03)
        for index, tip in enumerate(lower[1:-1:2]):
            root = np.array([0.75 * tip[0], -1.12])
            bend = 0.5 * (root + tip) + (0.08 * tip[0], 0)
            self._strand(smooth(np.array([root, bend, moved(tip, y=-0.04)])), 0.03, index)
        self._paint_sheen()
