"""Detectors: what the outputs of model files mean, and the way from pictures to them and back."""

import pickle
import sys

import cv2
import numpy as np
import pytest

from flip_jax.curate import onnx_layouts
from flip_jax.curate.detectors import CascadeDetector, OnnxDetector, _best, _letterbox
from flip_jax.curate.onnx_layouts import Candidates
from flip_jax.data.drawn_faces import draw_face

onnx_files = pytest.importorskip("onnx_files", reason="needs onnx and onnxruntime")
pytest.importorskip("onnxruntime")

STRIDES = onnx_files.STRIDES
BOX = (1.0, 1.5, 2.0, 2.5)
POINTS = (0.1, 0.2, 1.1, 0.3, 0.6, 0.9, 0.2, 1.4, 1.0, 1.5)


def ready(path, side=640):
    detector = pickle.loads(pickle.dumps(OnnxDetector(path, side)))
    detector.setup()
    return detector


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("batched", [False, True])
def test_insightface_finds_a_face_where_it_is(tmp_path, stride, batched):
    path = onnx_files.red_square_detector(tmp_path / "m.onnx", stride, BOX, POINTS, batched=batched)
    detector = ready(path, 320)
    # 640 x 480 goes into 320 x 320 at half size: a cell is twice the stride.
    image = np.zeros((480, 640, 3), np.uint8)
    image[:, :] = (60, 60, 60)
    row, column, side = 2, 3, 2 * stride
    image[row * side : (row + 1) * side, column * side : (column + 1) * side] = (255, 0, 0)
    (face,) = detector.detect(image)
    corner = np.array([column, row])
    reach = np.reshape(BOX, (2, 2)) * [[-1], [1]]
    np.testing.assert_allclose(face.box, ((corner + reach) * side).ravel(), atol=1e-4)
    points = (corner + np.reshape(POINTS, (5, 2))) * side
    np.testing.assert_allclose(face.landmarks, points, atol=1e-4)
    assert face.confidence == pytest.approx(1, abs=1e-3)
    assert face.box.dtype == face.landmarks.dtype == np.float32


def test_a_blue_square_is_none(tmp_path):
    """The channels reach the model in the order that it was trained on."""
    detector = ready(onnx_files.red_square_detector(tmp_path / "m.onnx", 32, BOX, POINTS), 64)
    image = np.zeros((64, 64, 3), np.uint8)
    image[..., 2] = 255
    assert detector.detect(image) == []
    image[..., 0], image[..., 2] = 255, 0
    assert len(detector.detect(image)) > 0


def test_size_of_the_picture_does_not_matter(tmp_path):
    """Faces are found at the same place of pictures that are larger, smaller, higher, wider."""
    detector = ready(
        onnx_files.red_square_detector(tmp_path / "m.onnx", 32, (1, 1, 2, 2), POINTS), 128
    )
    for height, width in ((128, 128), (1280, 640), (96, 128), (30, 61), (128, 7)):
        image = np.zeros((height, width, 3), np.uint8)
        scale = 128 / max(height, width)
        end = round(32 / scale)
        image[:end, :end] = (255, 0, 0)
        if min(height, width) * scale < 32:  # the cell reaches beyond the picture: it is not red
            assert detector.detect(image) == []
            continue
        (face,) = detector.detect(image)
        factors = np.array([round(width * scale) / width, round(height * scale) / height])
        np.testing.assert_allclose(face.box, np.array([-32, -32, 64, 64]) / np.tile(factors, 2))


def test_a_fixed_size_of_the_model_is_kept_to(tmp_path):
    path = onnx_files.red_square_detector(
        tmp_path / "m.onnx", 32, (1, 1, 2, 2), POINTS, size=(96, 160)
    )
    image = np.zeros((480, 800, 3), np.uint8)
    image[160:320, 320:480] = (255, 0, 0)  # row 1, column 2 of cells of 160 px
    (face,) = ready(path, 640).detect(image)
    np.testing.assert_allclose(face.box, [160, 0, 640, 480], atol=1e-3)


def _random_outputs(rng, size, widths):
    outputs = {}
    for name, width in widths.items():
        for stride in STRIDES:
            rows = (size[0] // stride) * (size[1] // stride)
            found = rng.normal(0, 0.6, (1, rows, width)).astype(np.float32)
            if width == 1:
                found = np.zeros((1, rows, 1), np.float32)
                found[0, rng.choice(rows, 2, replace=False)] = rng.uniform(0.8, 1, (2, 1))
            outputs[f"{name}_{stride}"] = found
    return outputs


def test_yunet_agrees_with_opencv(tmp_path):
    rng, size = np.random.default_rng(3), (96, 160)
    for number in range(10):
        outputs = _random_outputs(rng, size, {"cls": 1, "obj": 1, "bbox": 4, "kps": 10})
        for stride in STRIDES:  # both scores are high in the same cells
            outputs[f"obj_{stride}"] = outputs[f"cls_{stride}"] * 0.9
        path = onnx_files.fixed_outputs(tmp_path / f"{number}.onnx", size, outputs)
        theirs = cv2.FaceDetectorYN.create(path, "", size[::-1], 0.5, 1.0, 100)
        _, wanted = theirs.detect(np.zeros((*size, 3), np.uint8))
        detector = ready(path)
        found = onnx_layouts.YuNet().decode(
            detector.model.run(np.zeros((1, 3, *size), np.float32)), size
        )
        order = np.argsort(-found.scores)[: len(wanted)]
        corners, ends = found.boxes[order, :2], found.boxes[order, 2:]
        points = found.landmarks[order].reshape(-1, 10)
        assert len(wanted) == np.sum(found.scores > 0.5) == 6
        np.testing.assert_allclose(found.scores[order], wanted[:, 14], atol=1e-6)
        mine = np.concatenate([corners, ends - corners, points], axis=1)
        np.testing.assert_allclose(mine, wanted[:, :14], atol=1e-3)


def test_scores_of_yunet_outside_of_0_to_1_are_clipped(tmp_path):
    outputs = {}
    for stride in STRIDES:
        rows = (32 // stride) ** 2
        for name, width in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
            outputs[f"{name}_{stride}"] = np.zeros((1, rows, width))
    outputs["cls_32"][:], outputs["obj_32"][:] = 1.5, 0.64
    outputs["cls_8"][:], outputs["obj_8"][:] = -1, -1
    detector = ready(onnx_files.fixed_outputs(tmp_path / "m.onnx", (32, 32), outputs))
    (face,) = detector.detect(np.zeros((32, 32, 3), np.uint8))
    assert face.confidence == pytest.approx(0.8)


def test_prior_boxes_against_a_loop(tmp_path):
    rng, size = np.random.default_rng(5), (64, 96)
    rows = 2 * sum((size[0] // s) * (size[1] // s) for s in STRIDES)
    loc, landms = rng.normal(0, 1, (1, rows, 4)), rng.normal(0, 1, (1, rows, 10))
    conf = np.tile([1.0, 0.0], (1, rows, 1))
    best = rng.choice(rows, 3, replace=False)
    conf[0, best, 1] = (0.99, 0.9, 0.7)
    conf[..., 0] = 1 - conf[..., 1]
    path = onnx_files.fixed_outputs(
        tmp_path / "m.onnx", size, {"output": loc, "outputt": conf, "outputtt": landms}
    )
    wanted = {}
    row = 0
    for stride, sides in zip(STRIDES, ((16, 32), (64, 128), (256, 512)), strict=True):
        for y in range(size[0] // stride):
            for x in range(size[1] // stride):
                for side in sides:
                    cx, cy = (x + 0.5) * stride, (y + 0.5) * stride
                    dx, dy, dw, dh = loc[0, row]
                    cx2, cy2 = cx + dx * 0.1 * side, cy + dy * 0.1 * side
                    w, h = side * np.exp(dw * 0.2), side * np.exp(dh * 0.2)
                    points = landms[0, row].reshape(5, 2) * 0.1 * side + (cx, cy)
                    box = (cx2 - w / 2, cy2 - h / 2, cx2 + w / 2, cy2 + h / 2)
                    wanted[row] = (np.array(box), points)
                    row += 1
    assert row == rows
    found = onnx_layouts.PriorBox().decode(
        {"a": loc.astype(np.float32), "b": conf, "c": landms.astype(np.float32)}, size
    )
    np.testing.assert_allclose(found.boxes, [box for box, _ in wanted.values()], atol=1e-3)
    np.testing.assert_allclose(found.landmarks, [p for _, p in wanted.values()], atol=1e-3)
    faces = ready(path).detect(np.zeros((*size, 3), np.uint8))
    assert faces[0].confidence == pytest.approx(0.99)
    np.testing.assert_allclose(faces[0].box, wanted[best[0]][0], atol=1e-3)


def test_insightface_with_five_levels_and_no_points(tmp_path):
    rng, size, strides = np.random.default_rng(6), (128, 128), (8, 16, 32, 64, 128)
    outputs = {}
    for stride in strides:
        rows = (128 // stride) ** 2
        outputs[f"s{stride}"] = np.zeros((rows, 1))
        outputs[f"b{stride}"] = rng.uniform(0, 2, (rows, 4))
    outputs["s64"][3] = 0.95  # row 1, column 1
    (face,) = ready(onnx_files.fixed_outputs(tmp_path / "m.onnx", size, outputs)).detect(
        np.zeros((*size, 3), np.uint8)
    )
    left, top, right, bottom = outputs["b64"][3]
    wanted = np.array([1 - left, 1 - top, 1 + right, 1 + bottom]) * 64
    np.testing.assert_allclose(face.box, wanted, rtol=1e-5)
    assert face.landmarks is None


def test_overlapping_boxes_as_opencv_leaves_them_out():
    rng = np.random.default_rng(7)
    for _ in range(50):
        corners = rng.uniform(0, 60, (40, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(5, 60, (40, 2))], axis=1)
        scores = rng.uniform(0.3, 1, 40)
        sizes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        wanted = cv2.dnn.NMSBoxes(sizes.tolist(), scores.tolist(), 0.5, 0.4)
        found = _best(Candidates(scores, boxes, None))
        np.testing.assert_array_equal(found.scores, scores[np.ravel(wanted)])
        np.testing.assert_array_equal(found.boxes, boxes[np.ravel(wanted)])


def test_letterbox_keeps_the_picture():
    rng = np.random.default_rng(8)
    image = cv2.resize(rng.integers(0, 256, (5, 9, 3), dtype=np.uint8), (90, 50))
    canvas, scale = _letterbox(image, (64, 64))
    assert canvas.shape == (64, 64, 3) and not canvas[36:].any()
    np.testing.assert_allclose(scale, [64 / 90, 36 / 50])
    back = cv2.resize(canvas[:36], (90, 50), interpolation=cv2.INTER_LINEAR)
    assert np.abs(back.astype(int) - image).mean() < 4


def test_files_that_are_no_detectors(tmp_path):
    with pytest.raises(ValueError, match=r"config.faces.model='none.onnx' is not a file"):
        OnnxDetector("none.onnx", 640)
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match="does not load"):
        ready(str(tmp_path / "text.onnx"))
    path = onnx_files.fixed_outputs(tmp_path / "m.onnx", (64, 64), {"logits": np.zeros((1, 1000))})
    with pytest.raises(ValueError, match=r"no known detector.*logits \[1, 1000\].*YuNet"):
        ready(path)
    path = onnx_files.fixed_outputs(
        tmp_path / "rows.onnx",
        (64, 64),
        {f"{n}{s}": np.zeros((7, w)) for s in STRIDES for n, w in (("s", 1), ("b", 4))},
    )
    with pytest.raises(ValueError, match="no known detector"):
        ready(path)
    graph = onnx_files.Graph((64, 64))
    graph.shape = [1, 1, 64, 64]
    graph.output(graph.add("Mul", "input", np.float32(1)), "o", 4)
    with pytest.raises(ValueError, match="takes 1 channels, must be 3"):
        ready(graph.save(tmp_path / "grey.onnx"))


def test_without_onnx_runtime(tmp_path, monkeypatch):
    path = onnx_files.red_square_detector(tmp_path / "m.onnx", 8, BOX, POINTS)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"config.faces.model=.*flip_jax\[curate\]"):
        OnnxDetector(path, 640)


def test_scores_that_are_no_probabilities(tmp_path):
    outputs = {}
    for stride in STRIDES:
        rows = 2 * (64 // stride) ** 2
        outputs |= {f"s{stride}": np.full((rows, 1), -4.0), f"b{stride}": np.ones((rows, 4))}
    detector = ready(onnx_files.fixed_outputs(tmp_path / "m.onnx", (64, 64), outputs))
    with pytest.raises(ValueError, match=r"scores from -4.0 to -4.0; they must be probabilities"):
        detector.detect(np.zeros((64, 64, 3), np.uint8))


def test_another_model_file_is_another_fingerprint(tmp_path):
    first = OnnxDetector(onnx_files.red_square_detector(tmp_path / "a.onnx", 8, BOX, POINTS), 640)
    same = OnnxDetector(onnx_files.red_square_detector(tmp_path / "b.onnx", 8, BOX, POINTS), 640)
    other = OnnxDetector(onnx_files.red_square_detector(tmp_path / "c.onnx", 16, BOX, POINTS), 640)
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()
    assert first.fingerprint() != OnnxDetector(first.model.path, 320).fingerprint()


def test_cascade_finds_drawn_faces():
    detector = pickle.loads(pickle.dumps(CascadeDetector(640, 48)))
    detector.setup()
    found = 0
    for identity in range(24):
        face = draw_face(0, identity, 0, 192)
        boxes = [each.box for each in detector.detect(face.image)]
        if boxes:
            start, end = (
                np.maximum(boxes[0][:2], face.box[:2]),
                np.minimum(boxes[0][2:], face.box[2:]),
            )
            common = np.prod(np.maximum(end - start, 0))
            areas = [np.prod(box[2:] - box[:2]) for box in (boxes[0], face.box)]
            found += common / (sum(areas) - common) > 0.35
    assert found >= 16


def test_cascade_scales_boxes_back_and_puts_the_largest_first():
    small, large = draw_face(0, 1, 0, 128).image, draw_face(0, 3, 0, 256).image
    image = np.full((256, 400, 3), 128, np.uint8)
    image[:, 144:], image[:128, :128] = large, small
    boxes = {}
    for side in (200, 400):
        detector = CascadeDetector(side, 32)
        detector.setup()
        boxes[side] = np.array([face.box for face in detector.detect(image)])
    sizes = boxes[400][:, 2] - boxes[400][:, 0]
    assert len(sizes) and np.all(np.diff(sizes) <= 0)
    np.testing.assert_allclose(boxes[200][0], boxes[400][0], atol=14)


@pytest.mark.parametrize("lacks", ["files", "class"])
def test_an_opencv_without_cascades_says_what_to_do(monkeypatch, tmp_path, lacks):
    """Such as version 5, which another package may have brought."""
    if lacks == "files":
        monkeypatch.setattr(cv2.data, "haarcascades", str(tmp_path))
    else:
        monkeypatch.delattr(cv2, "CascadeClassifier")
    with pytest.raises(ValueError, match="opencv-python-headless<5"):
        CascadeDetector(640, 128)
