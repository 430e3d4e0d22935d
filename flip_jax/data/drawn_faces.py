"""Drawn faces: pictures of nobody, with 40 labels, landmarks, class mask and sketch.

The default data of the package. A face is a pure function of (seed, identity, picture, size); the
identity fixes the person (`face_traits.Person`), the picture its pose, light, expression and
accessories (`face_traits.Picture`). Everything is drawn in units of the face, so that another
size shows the same face.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from flip_jax.data import face_parts, face_wear
from flip_jax.data.face_beard import paint_beard
from flip_jax.data.face_canvas import PARSING_CLASSES, Canvas, Frame
from flip_jax.data.face_hair import Hair
from flip_jax.data.face_parts import Scene
from flip_jax.data.face_shape import SKULL_TOP, FaceShape
from flip_jax.data.face_traits import (
    Person,
    Picture,
    attribute_vector,
    sample_person,
    sample_picture,
)

__all__ = ["PARSING_CLASSES", "SIZES", "DrawnFace", "draw_face", "draw_sketch", "draw_traits"]

SIZES = (64, 512)  # smallest and largest side of a picture, pixels


@dataclass(frozen=True)
class DrawnFace:
    """One picture and all that is known about it. Whole coordinates are pixel centres.

    Attributes:
        image: uint8 [size, size, 3] RGB.
        attributes: int8 [40], 0 or 1, in the order of `attributes.ATTRIBUTES`; none is unknown.
        identity: the person's number.
        landmarks: float32 [68, 2] x, y in pixels, iBUG order: jaw 0-16, brows 17-26, nose 27-35,
            eyes 36-47, mouth 48-67.
        box: float32 [4] x0, y0, x1, y1 of the face from forehead to chin, pixels.
        mask: uint8 [size, size], index into PARSING_CLASSES.
        strokes: polylines float32 [n, 2] x, y in pixels in the order an artist draws them:
            outlines, features, shading, hair, accessories.
    """

    image: np.ndarray
    attributes: np.ndarray
    identity: int
    landmarks: np.ndarray
    box: np.ndarray
    mask: np.ndarray
    strokes: tuple[np.ndarray, ...]


def draw_face(seed: int, identity: int, picture: int, size: int = 128) -> DrawnFace:
    """Draws one picture of one person.

    Args:
        seed: of the whole collection, >= 0.
        identity: which person, >= 0.
        picture: which picture of that person, >= 0.
        size: side in pixels, 64..512.

    Returns:
        The face; the same bytes for the same arguments.

    Raises:
        ValueError: a number is negative or `size` is outside 64..512.
    """
    for name, value in (("seed", seed), ("identity", identity), ("picture", picture)):
        if value < 0:
            raise ValueError(f"{name} is {value}, must be 0 or more")
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size is {size} pixels, must be {SIZES[0]}..{SIZES[1]}")
    person, look = draw_traits(seed, identity, picture)
    background_rng, noise_rng = _rng(seed, 2, identity, picture), _rng(seed, 3, identity, picture)
    scene = _scene(person, look, size)
    _paint_background(scene.canvas, background_rng)
    _paint(scene)
    landmarks = scene.shape.landmarks(scene.head) * size - 0.5
    crown = scene.head(np.array([(0.0, 0.75 * SKULL_TOP)])) * size - 0.5
    corners = np.concatenate([landmarks, crown])
    return DrawnFace(
        image=_develop(scene.canvas.image, look, size, noise_rng),
        attributes=attribute_vector(person, look),
        identity=identity,
        landmarks=landmarks.astype(np.float32),
        box=np.concatenate([corners.min(axis=0), corners.max(axis=0)]).astype(np.float32),
        mask=scene.canvas.mask,
        strokes=scene.canvas.sketch(),
    )


def draw_traits(seed: int, identity: int, picture: int) -> tuple[Person, Picture]:
    """Who is on the picture that `draw_face` draws of the same numbers, and how they look there."""
    person = sample_person(_rng(seed, 0, identity))
    return person, sample_picture(_rng(seed, 1, identity, picture), person)


def _rng(seed: int, stream: int, *numbers: int) -> np.random.Generator:
    # The first entry keeps the streams apart.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, *numbers)))


def _scene(person: Person, picture: Picture, size: int) -> Scene:
    head = Frame(
        picture.centre,
        pivot=(0.0, 1.1),  # the neck
        scale=picture.scale,
        yaw=picture.yaw,
        pitch=picture.pitch,
        roll=picture.roll,
        dome=0.62,
    )
    body = Frame(picture.centre, pivot=(0.0, 1.6), scale=picture.scale, roll=0.25 * picture.roll)
    shape = FaceShape(person, picture)
    return Scene(
        canvas=Canvas(size),
        person=person,
        picture=picture,
        shape=shape,
        head=head,
        body=body,
        outline=head(shape.outline()),
    )


def _paint(scene: Scene) -> None:
    """All layers, back to front."""
    hair = Hair(scene)
    hair.paint_back()
    face_wear.paint_body(scene)
    face_parts.paint_ears(scene)
    face_parts.paint_skin(scene)
    paint_beard(scene)
    face_parts.paint_nose(scene)
    face_parts.paint_eyes(scene)
    face_parts.paint_brows(scene)
    face_parts.paint_mouth(scene)
    hair.paint_front()
    face_wear.paint_hat(scene)
    face_wear.paint_glasses(scene)
    face_wear.paint_earrings(scene)


def _paint_background(canvas: Canvas, rng: np.random.Generator) -> None:
    """A gradient with out-of-focus shapes, drawn small and enlarged."""
    side = 32
    grey = rng.uniform(50, 215)
    base = grey + rng.normal(0, 22, 3)
    corners = np.clip(
        base + rng.normal(0, 26, (2, 2, 1)) + rng.normal(0, 9, (2, 2, 3)), 10, 245
    ).astype(np.float32)
    small = cv2.resize(corners, (side, side), interpolation=cv2.INTER_LINEAR)
    for _ in range(rng.integers(0, 9)):
        colour = np.clip(base + rng.normal(0, 34) + rng.normal(0, 22, 3), 5, 250).tolist()
        centre = rng.integers(0, side, 2).tolist()
        if rng.random() < 0.5:
            cv2.circle(small, centre, int(rng.integers(2, 8)), colour, -1)
        else:
            end = (np.array(centre) + rng.integers(3, 16, 2)).tolist()
            cv2.rectangle(small, centre, end, colour, -1)
    small = cv2.GaussianBlur(small, (0, 0), rng.uniform(0.8, 2.5))
    whole = cv2.resize(small, canvas.image.shape[:2], interpolation=cv2.INTER_CUBIC)
    canvas.image[:] = np.clip(whole, 0, 255)


def _develop(
    image: np.ndarray, picture: Picture, size: int, rng: np.random.Generator
) -> np.ndarray:
    """From canvas to picture: size, light over all of it, contrast, blur, grain."""
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light_x, light_y = picture.light
    light = 0.10 * (light_x * ramp[None, :, None] + light_y * ramp[:, None, None])
    gain = np.array(picture.tint, np.float32) * picture.brightness
    image = (image * (gain + light) - 128) * picture.contrast + 128
    if picture.blur:
        image = cv2.GaussianBlur(image, (0, 0), picture.blur * size)
    image += rng.standard_normal(image.shape, np.float32) * picture.noise
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def draw_sketch(strokes: Sequence[np.ndarray], size: int, count: int | None = None) -> np.ndarray:
    """Draws the first strokes of a sketch, dark on white paper.

    Args:
        strokes: polylines [n, 2] x, y in pixels of a picture of side `size`.
        size: side in pixels.
        count: how many strokes; None = all.

    Returns:
        uint8 [size, size], 255 = paper.

    Raises:
        ValueError: `count` is negative or more than there are strokes.
    """
    if count is not None and not 0 <= count <= len(strokes):
        raise ValueError(f"count is {count}, must be 0..{len(strokes)} (the number of strokes)")
    paper = np.full((size, size), 255, np.uint8)
    for stroke in strokes[:count]:
        line = np.round(np.asarray(stroke) * 16).astype(np.int32)
        cv2.polylines(paper, [line], False, 32, max(1, round(size / 160)), cv2.LINE_AA, 4)
    return paper
