"""Shape of a drawn face: its curves in face units and its 68 landmarks.

Face units: origin between the eyes, x to the picture's right, y down, 1 = half a face width.
`side` is -1 for the picture's left, +1 for its right. Each feature has a lift, its height over
the dome of `face_canvas.Frame`, that painting and landmarks share.
"""

from __future__ import annotations

import numpy as np

from flip_jax.data.face_canvas import Frame, mirror, resample, smooth
from flip_jax.data.face_traits import Person, Picture

BROW_LIFT = 0.05
MOUTH_LIFT = 0.08
NOSE_LIFT = 0.12  # of the bridge and the nostrils
SKULL_TOP = -1.36


class FaceShape:
    """Curves of one person's face with one picture's expression."""

    def __init__(self, person: Person, picture: Picture):
        self.person = person
        self.picture = picture
        self.nose_base = person.nose_length + 0.05
        # On long faces the mouth sits lower, but never farther from the nose than lips allow.
        self.mouth_y = self.nose_base + 0.42 * (person.chin - self.nose_base)
        self.tip_lift = 0.44 if person.pointy_nose else 0.28

    def half_jaw(self) -> np.ndarray:
        """Right half of the outline, from eye level down to the chin's middle: [n, 2]."""
        p = self.person
        level = 0.76
        controls = [
            (p.cheek * 0.985, -0.25),
            (p.cheek, 0.08),
            (0.55 * p.cheek + 0.45 * p.jaw + 0.03, 0.46),
            (p.jaw, level),
            (0.52 * p.jaw + 0.48 * p.chin_width + 0.04, 0.42 * level + 0.58 * p.chin),
            (p.chin_width, p.chin - 0.035),
            (0.0, p.chin),
        ]
        return smooth(np.array(controls))

    def outline(self) -> np.ndarray:
        """The head without hair, clockwise from the skull's top: closed polygon [n, 2]."""
        crown = smooth(
            np.array(
                [
                    (0.0, SKULL_TOP),
                    (0.44, -1.27),
                    (0.78, -0.98),
                    (0.95, -0.58),
                    (self.person.cheek * 0.985, -0.25),
                ]
            )
        )
        right = np.concatenate([crown[:-1], self.half_jaw()])
        return np.concatenate([right, mirror(right)[1:-1]])

    def jaw(self) -> np.ndarray:
        """From the picture's left ear around the chin to its right ear: [17, 2]."""
        right = self.half_jaw()
        return resample(np.concatenate([mirror(right[::-1]), right[::-1][1:]]), 17)

    def eye(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Upper and lower lid, both from the picture's left to its right: 2 x [13, 2]."""
        p = self.person
        u = np.linspace(-1, 1, 13)  # nose side .. temple
        height = p.eye_height * self.picture.squint * (0.92 if self.picture.smiling else 1.0)
        x = side * (p.eye_spacing + p.eye_width * u)
        corners = -p.eye_slant * u
        upper = corners - height * (1 - np.abs(u) ** 2.2) * (1 - 0.08 * u)
        lower = corners + 0.72 * height * (1 - np.abs(u) ** 2.4) * (1 + 0.12 * u)
        order = slice(None, None, side)
        return np.stack([x, upper], 1)[order], np.stack([x, lower], 1)[order]

    def brow(self, side: int) -> np.ndarray:
        """Middle line of a brow, from the picture's left to its right: [9, 2]."""
        p = self.person
        u = np.linspace(0, 1, 9)  # nose side .. temple
        x = side * (p.eye_spacing - 0.23 + 0.5 * u)
        if p.arched_brows:
            rise = 0.02 + 0.15 * np.sin(np.pi * u**0.9) - 0.03 * u
        else:
            rise = 0.02 * np.sin(np.pi * u)
        line = np.stack([x, -0.30 - p.brow_lift - rise + 0.04 * (u - 0.5) ** 2], axis=1)
        return line[::side]

    def nose_tip(self) -> np.ndarray:
        return np.array([0.0, self.nose_base - (0.0 if self.person.pointy_nose else 0.1)])

    def nostrils(self) -> np.ndarray:
        """Lower edge of the nose, from the picture's left to its right: [9, 2]."""
        u = np.linspace(-1, 1, 9)
        drop = (0.10 if self.person.pointy_nose else 0.03) * (1 - np.abs(u))
        y = self.nose_base + drop - 0.05 * u**4
        return np.stack([self.person.nose_width * u, y], axis=1)

    def _mouth_x(self, u: np.ndarray) -> np.ndarray:
        return u * self.person.mouth_width * (1.22 if self.picture.smiling else 1.0)

    def inner_lip(self, u: np.ndarray, lower: bool) -> np.ndarray:
        """Where a lip meets the gap or the other lip, at u in -1 (left corner) .. 1: [n, 2]."""
        gap = self.picture.opening * (0.68 if lower else -0.32) * (1 - u**2)
        y = self.mouth_y - self.picture.smile * (u**2 - 0.35) + gap
        return np.stack([self._mouth_x(u), y], axis=1)

    def outer_lip(self, u: np.ndarray, lower: bool) -> np.ndarray:
        """Where a lip meets the skin, at u in -1 (left corner) .. 1: [n, 2]."""
        inside = np.maximum(1 - u**2, 0)
        if lower:
            reach = self.person.lower_lip * inside**0.65
        else:
            bow = 1 - 0.28 * np.exp(-((u / 0.16) ** 2))
            reach = -self.person.upper_lip * inside**0.6 * bow
        return self.inner_lip(u, lower) + np.stack([np.zeros_like(u), reach], axis=1)

    def landmarks(self, head: Frame) -> np.ndarray:
        """The iBUG-68 points: float64 [68, 2] in picture units."""
        bridge_y = np.linspace(-0.04, self.nose_tip()[1], 4)
        bridge = [
            head(np.array([[0.0, y]]), lift)
            for y, lift in zip(bridge_y, np.linspace(NOSE_LIFT, self.tip_lift, 4), strict=True)
        ]
        eyes = []
        for side in (-1, 1):
            upper, lower = self.eye(side)
            eyes += [upper[[0, 4, 8, 12]], lower[[8, 4]]]
        top = np.array([-1.0, -0.62, -0.25, 0.0, 0.25, 0.62, 1.0])
        inner = np.array([-0.85, -0.4, 0.0, 0.4, 0.85])
        mouth = [
            self.outer_lip(top, lower=False),
            self.outer_lip(np.array([0.62, 0.3, 0.0, -0.3, -0.62]), lower=True),
            self.inner_lip(inner, lower=False),
            self.inner_lip(inner[3:0:-1], lower=True),
        ]
        return np.concatenate(
            [
                head(self.jaw()),
                head(np.concatenate([self.brow(-1)[::2], self.brow(1)[::2]]), BROW_LIFT),
                *bridge,
                head(self.nostrils()[[1, 2, 4, 6, 7]], NOSE_LIFT),
                head(np.concatenate(eyes)),
                head(np.concatenate(mouth), MOUTH_LIFT),
            ]
        )
