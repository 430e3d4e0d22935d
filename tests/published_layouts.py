"""Tiny data sets of drawn faces in the layouts in which real ones are published.

Each function fills a folder; `LAYOUTS` has them by the name of their reader. Identity of picture n
is n // 2.
"""

import functools
import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.io

from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.drawn_faces import DrawnFace, draw_face
from flip_jax.data.readers.celeba_hq import CelebAMaskHQ
from flip_jax.data.transforms import encode_jpeg

SIDE = 64
# Pictures 0-5 train, 6-7 val, 8-11 test: nobody is in two.
PARTITION = [0] * 6 + [1] * 2 + [2] * 4
POINTS = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")


@functools.cache
def face(number: int) -> DrawnFace:
    return draw_face(seed=0, identity=number // 2, picture=number % 2, size=SIDE)


@functools.cache
def jpeg(number: int) -> bytes:
    return encode_jpeg(face(number).image)


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def sketch(number: int) -> np.ndarray:
    """Grey [H, W]: dark lines on white."""
    drawing = np.full((SIDE, SIDE), 255, np.uint8)
    lines = [np.round(line).astype(np.int32) for line in face(number).strokes]
    return cv2.polylines(drawing, lines, False, 0)


def save(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def five_points(number: int) -> np.ndarray:
    """Whole numbers [5, 2] in CelebA's order."""
    points = face(number).landmarks
    eyes = points[36:42].mean(0), points[42:48].mean(0)
    return np.round([*eyes, points[30], points[48], points[54]]).astype(int)


def headed_table(columns, rows, first="") -> str:
    """A table of CelebA: number of rows, columns, rows with runs of spaces."""
    lines = [f"{name} " + " ".join(f"{value:2d}" for value in row) for name, row in rows.items()]
    return "\n".join([str(len(rows)), first + " ".join(columns) + " ", *lines]) + "\n"


def celeba_tables(root: Path, folders: dict[str, str]) -> None:
    names = [f"{number + 1:06d}.jpg" for number in range(len(PARTITION))]
    labels = {name: 2 * face(n).attributes - 1 for n, name in enumerate(names)}
    anno, evaluation = (root / folders.get(name, "") for name in ("Anno", "Eval"))
    save(anno / "list_attr_celeba.txt", headed_table(ATTRIBUTES, labels))
    partition = zip(names, PARTITION, strict=True)
    save(evaluation / "list_eval_partition.txt", "".join(f"{n} {p}\n" for n, p in partition))
    identities = (f"{name} {100 + number // 2}\n" for number, name in enumerate(names))
    save(anno / "identity_CelebA.txt", "".join(identities))


def celeba(root: Path, folders: dict[str, str] | None = None) -> None:
    folders = folders or {}
    celeba_tables(root, folders)
    points = {}
    for number in range(len(PARTITION)):
        name = f"{number + 1:06d}.jpg"
        save(root / folders.get("Img", "") / "img_align_celeba" / name, jpeg(number))
        points[name] = five_points(number).ravel()
    columns = [f"{point}_{axis}" for point in POINTS for axis in "xy"]
    path = root / folders.get("Anno", "") / "list_landmarks_align_celeba.txt"
    save(path, headed_table(columns, points))


def celeba_in_the_wild(root: Path) -> None:
    celeba_tables(root, {})
    boxes = {}
    for number in range(len(PARTITION)):
        name = f"{number + 1:06d}.jpg"
        save(root / "img_celeba" / name, jpeg(number))
        boxes[name] = [number, 2, 30, 40] if number else [0, 0, 0, 0]
    path = root / "list_bbox_celeba.txt"
    save(path, headed_table(("x_1", "y_1", "width", "height"), boxes, first="image_id "))


def dialog(names: list[str]) -> str:
    entry = {"attribute_wise_captions": {"Bangs": "No bangs.", "Young": None}}
    entries = {name: entry | {"overall_caption": f"Face {name} is here."} for name in names}
    entries[names[-1]]["overall_caption"] = None
    return json.dumps(entries)


def celeba_dialog(root: Path) -> None:
    celeba(root)
    # 000003.jpg is not in CelebA-Dialog, the last one has no caption.
    numbers = [n for n in range(len(PARTITION)) if n != 2]
    save(root / "text" / "captions.json", dialog([f"{n + 1:06d}.jpg" for n in numbers]))


def face2text(root: Path) -> None:
    celeba(root)
    # Divides pictures, not people: number 1 and its other picture 0 are in two splits.
    for name, numbers in {"train": [0, 2, 3, 4], "dev": [1], "test": [8, 9]}.items():
        entries = [
            {
                "response_id": f"{number}{copy}",
                "filename": f"{number + 1:06d}.jpg",
                "user_id": "2",
                "description": f" Description {copy} of {number}. ",
            }
            for number in numbers
            for copy in range(1 + number % 2)
        ]
        save(root / f"clean_{name}_2.1.json", json.dumps(entries))


def hq_tables(root: Path) -> list[int]:
    """CelebA-HQ's picture n is CelebA's picture 11 - n; returns its numbers."""
    celeba_tables(root, {})
    numbers = list(range(len(PARTITION)))
    mapping = "idx   orig_idx   orig_file\n"
    labels = {}
    for n in numbers:
        original = len(PARTITION) - 1 - n
        mapping += f"{n:<10}{original:<10}{original + 1:06d}.jpg\n"
        labels[f"{n}.jpg"] = 2 * face(original).attributes - 1
        save(root / "CelebA-HQ-img" / f"{n}.jpg", jpeg(original))
    save(root / "CelebA-HQ-to-CelebA-mapping.txt", mapping)
    save(root / "CelebAMask-HQ-attribute-anno.txt", headed_table(ATTRIBUTES, labels))
    return numbers


def hq_mask(number: int) -> np.ndarray:
    """Masks of half the side: classes of the drawn mask, folded into CelebAMask-HQ's 19."""
    mask = face(len(PARTITION) - 1 - number).mask[::2, ::2]
    return (mask % len(CelebAMaskHQ.CLASSES)).astype(np.uint8)


def celeba_mask_hq(root: Path) -> None:
    for number in hq_tables(root):
        mask = hq_mask(number)
        stem = root / "CelebAMask-HQ-mask-anno" / str(number // 2000) / f"{number:05d}"
        for value, part in enumerate(CelebAMaskHQ.CLASSES):
            if value and (mask == value).any():
                # The skin lies below all other parts.
                pixels = mask > 0 if part == "skin" else mask == value
                save(Path(f"{stem}_{part}.png"), png(pixels.astype(np.uint8) * 255))


def celeba_dialog_hq(root: Path) -> None:
    numbers = hq_tables(root)
    save(root / "captions_hq.json", dialog([f"{number}.jpg" for number in numbers]))


def mm_celeba_hq(root: Path) -> None:
    numbers = hq_tables(root)
    for number in numbers:
        lines = [f"This person {number} has text {line}. " for line in range(10)]
        save(root / "text" / "celeba-caption" / f"{number}.txt", "\n".join(lines) + "\n")
    for split, part in {"train": numbers[:9], "test": numbers[9:]}.items():
        # Python 2 wrote protocol 2.
        names = pickle.dumps([str(number) for number in part], protocol=2)
        save(root / split / "filenames.pickle", names)


PEOPLE = {"Ann_Lee": 2, "Bo_Chan": 1, "Cy_O_Neil": 3, "Di_Ngo": 2}


def lfw_files(folder: Path | None = None, people: dict[str, int] = PEOPLE) -> list[str]:
    files = [
        f"{name}/{name}_{n + 1:04d}.jpg" for name, count in people.items() for n in range(count)
    ]
    for number, file in enumerate(files if folder else ()):
        save(folder / file, jpeg(number))
    return files


def lfw(root: Path) -> None:
    lfw_files(root / "lfw")
    people = list(PEOPLE.items())
    for split, part in {"Train": people[:2], "Test": people[2:]}.items():
        rows = "".join(f"{name}\t{count}\n" for name, count in part)
        save(root / f"peopleDev{split}.txt", f"{len(part)}\n{rows}")


def save_mat73(path: Path, numbers: dict[str, np.ndarray], texts: dict[str, list[str]]) -> None:
    """A MATLAB 7.3 file: HDF5 behind 512 bytes, columns first, texts as references to UTF-16."""
    import h5py

    with h5py.File(path, "w", userblock_size=512) as file:
        for name, value in numbers.items():
            file[name] = np.asarray(value, np.float64).T
        for name, words in texts.items():
            cells = []
            for number, word in enumerate(words):
                place = f"#refs#/{name}{number}"
                file[place] = np.array([[ord(letter)] for letter in word], np.uint16)
                cells.append(file[place].ref)
            file.create_dataset(name, data=np.array([cells], dtype=h5py.ref_dtype))
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Mon ".ljust(124))
        file.write(b"\x00\x02IM")


def lfwa(
    root: Path,
    train: tuple[int, ...] = (1, 2, 4, 5, 6),
    test: tuple[int, ...] = (3, 7, 8),
    people: dict[str, int] = PEOPLE,
) -> None:
    """Rows of pictures count from 1."""
    files = lfw_files(root / "lfw-deepfunneled", people)
    labels = np.stack([face(number).attributes for number in range(len(files))])
    save_mat73(
        root / "lfw_att_40.mat",
        {"label": labels[:, ::-1]},
        {
            "name": [file.replace("/", "\\") for file in files],
            "AttrName": [name.replace("_", " ") for name in reversed(ATTRIBUTES)],
        },
    )
    rows = {"indices_img_train": np.array([train]).T, "indices_img_test": np.array([test]).T}
    save_mat73(root / "indices_train_test.mat", rows, {})


def lapa(root: Path) -> None:
    for number, split in enumerate(["train", "train", "val", "test", "test"]):
        name = f"{number}_{number}"
        points = np.tile(face(number).landmarks, (2, 1))[:106]
        rows = "".join(f"{x:.6f} {y:.6f}\n" for x, y in points)
        save(root / split / "images" / f"{name}.jpg", jpeg(number))
        save(root / split / "labels" / f"{name}.png", png(face(number).mask % 11))
        save(root / split / "landmarks" / f"{name}.txt", f"106\n{rows}")


def pts(points: np.ndarray) -> str:
    rows = "".join(f"{x:.6f} {y:.6f}\n" for x, y in points)
    return f"version: 1\nn_points:  {len(points)}\n{{\n{rows}}}\n"


def faces_300w(root: Path) -> None:
    stems = ["afw/1_1", "helen/trainset/2_1", "lfpw/trainset/image_0001", "helen/testset/3_1"]
    stems += ["lfpw/testset/image_0001", "ibug/image_092 _01"]
    for number, stem in enumerate(stems):
        if stem.startswith("lfpw"):
            save(root / f"{stem}.png", png(face(number).image[:, :, ::-1]))
        else:
            save(root / f"{stem}.jpg", jpeg(number))
        save(root / f"{stem}.pts", pts(face(number).landmarks + 1))


def wflw(root: Path) -> None:
    files = ["37--Soccer/37_Soccer_1.jpg", "37--Soccer/37_Soccer_1.jpg", "0--Parade/0_Parade_2.jpg"]
    flags = ["0 0 0 0 0 0", "1 0 0 0 1 0", "0 1 1 1 0 1"]
    for split in ("train", "test"):
        lines = ""
        for number, (file, flag) in enumerate(zip(files, flags, strict=True)):
            save(root / "WFLW_images" / file, jpeg(number))
            points = np.tile(face(number).landmarks, (2, 1))[:98]
            words = " ".join(f"{value:.6f}" for value in points.ravel())
            lines += f"{words} {number} 2 40 50 {flag} {file}\n"
        name = f"list_98pt_rect_attr_{split}.txt"
        save(root / "WFLW_annotations" / "list_98pt_rect_attr_train_test" / name, lines)


def aflw19(root: Path) -> None:
    """Six faces; tests set the number of training faces to 4. Two faces are in one picture."""
    files = [f"{n % 4}/image0{n}.jpg" for n in (0, 2, 3, 6, 7, 7)]
    points = np.stack([face(number).landmarks[:19] for number in range(6)])
    visible = np.ones((6, 19))
    visible[[0, 3], 5] = 0
    for number, file in enumerate(files):
        save(root / "data" / "flickr" / file, jpeg(number))
    table = {
        "bbox": np.stack([[n, 40, 2, 50] for n in range(6)]).astype(np.float64),
        "data": np.concatenate([points[:, :, 0], points[:, :, 1]], 1).astype(np.float64),
        "mask_new": visible.astype(np.uint8),
        "nameList": np.array([[file] for file in files], object),
        "ra": np.array([[6, 2, 1, 3, 4, 5]], np.uint16),
    }
    scipy.io.savemat(root / "AFLWinfo_release.mat", table)


FS2K = {
    "train": ["photo1/image0003", "photo1/image0017", "photo2/image0001"],
    "test": ["photo1/image0002", "photo3/image0154", "photo3/image0161"],
}


def fs2k(root: Path) -> None:
    number = 0
    for split, names in FS2K.items():
        entries = []
        for name in names:
            labels = dict(zip(ATTRIBUTES, face(number).attributes.tolist(), strict=True))
            drawing = name.replace("photo", "sketch").replace("image", "sketch")
            suffix = ".png" if name.startswith("photo2") else ".jpg"
            encoded = cv2.imencode(suffix, sketch(number))[1].tobytes()
            save(root / "photo" / f"{name}.jpg", jpeg(number))
            save(root / "sketch" / f"{drawing}{suffix}", encoded)
            entries.append(
                {
                    "image_name": name,
                    "skin_patch": [30, 30],
                    "lip_color": [float("nan"), 82.5, 79.0],
                    "eye_color": [],
                    "hair": int(number == 3),
                    "hair_color": number % 5,  # brown, black, red, none, golden
                    "gender": 1 - labels["Male"],
                    "earring": 1 - labels["Wearing_Earrings"],
                    "smile": 1 - labels["Smiling"],
                    "frontal_face": 0,
                    "style": number % 3,
                }
            )
            number += 1
        save(root / f"anno_{split}.json", json.dumps(entries))


def fs2k_sde(root: Path) -> None:
    """Sketches grow in 11 steps, named without leading zeros. The split is not that of FS2K."""
    fs2k(root)
    sketches = {"dataset1": {"train": ["3", "2"], "test": ["17"]}}
    sketches["dataset2"] = {"train": ["161"], "test": ["154"]}
    for part, splits in sketches.items():
        for split, names in splits.items():
            for name in names:
                folder = root / part / "sketch" / split / f"sketch{int(name):04d}"
                for step in range(11):
                    drawing = sketch(int(name) % 5)
                    drawing[(step + 1) * SIDE // 11 :] = 255
                    save(folder / f"{step}.png", png(drawing))


def face_caption(root: Path) -> None:
    """Six rows in two row groups."""
    table = pa.table(
        {
            "_id": [f"id{n}" for n in range(6)],
            "url": [
                *("https://a.example/0.jpg", "https://a.example/1.jpg, UNKNOWN", "UNKNOWN"),
                *(None, " https://a.example/4.jpg", ""),
            ],
            "caption": [[f"Caption {n}."] for n in range(5)] + [[]],
            "laion_caption": [["Alt 0"], ["Alt 1"], [None], [], None, ["Alt 5"]],
            "box": [
                *("[1, 2, 30, 40]", "[1.5, 2, 30, 40]", "[30, 2, 1, 40]", "[1, 2, 3]"),
                *("none", None),
            ],
            "other": list(range(6)),
        }
    )
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, root / "FaceCaption-v2.parquet", row_group_size=4)


def laion_face(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for part in range(2):
        numbers = [2.0**41 + 10 * part + n for n in range(3)]
        table = pa.table(
            {
                "SAMPLE_ID": pa.array([*numbers, None], pa.float64()),
                "URL": [f"https://b.example/{part}/{n}.jpg" for n in range(4)],
                "TEXT": ["a face", None, "two faces, one page", "no id"],
                "HEIGHT": [100] * 4,
                "WIDTH": [100] * 4,
                "LICENSE": ["?", "CC-BY", None, "?"],
                "NSFW": ["UNLIKELY"] * 4,
                "similarity": [0.3] * 4,
            }
        )
        pq.write_table(table, root / f"laion_face_part_{part:05d}.parquet")


LAYOUTS = {
    "celeba": celeba,
    "celeba_in_the_wild": celeba_in_the_wild,
    "celeba_dialog": celeba_dialog,
    "celeba_dialog_hq": celeba_dialog_hq,
    "mm_celeba_hq": mm_celeba_hq,
    "face2text": face2text,
    "lfw": lfw,
    "lfwa": lfwa,
    "celeba_mask_hq": celeba_mask_hq,
    "lapa": lapa,
    "300w": faces_300w,
    "wflw": wflw,
    "aflw19": aflw19,
    "fs2k": fs2k,
    "fs2k_sde1": fs2k_sde,
    "fs2k_sde2": fs2k_sde,
}
