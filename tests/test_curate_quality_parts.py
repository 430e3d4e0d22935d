"""Parts of the quality report against plain ways to the same numbers."""

import json
import math
from collections import Counter

import cv2
import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="curation needs the extra `curate`")

from benchmarks.quality import plain_brisque
from flip_jax.curate.quality import balance, figures, numbers
from flip_jax.curate.quality.brisque import MAX_SIDE, MIN_SIDE, brisque
from flip_jax.curate.quality.clip_iqa import PROMPTS, ClipIqa
from flip_jax.curate.quality.distinct import Distinct, key_of
from flip_jax.curate.quality.facts import KINDS, SIDE_EDGES
from flip_jax.curate.quality.history import STAGES, place_of
from flip_jax.curate.quality.words import WordCounts
from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.drawn_faces import draw_face


def noise(height: int, width: int, seed: int) -> np.ndarray:
    """uint8 [H, W, 3]: grey noise with the spectrum of photographs."""
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequencies[0, 0] = 1
    rng = np.random.default_rng(seed)
    grey = np.fft.ifft2(np.fft.fft2(rng.standard_normal((height, width))) / frequencies).real
    grey = 128 + 40 * (grey - grey.mean()) / grey.std()
    return np.repeat(np.clip(np.round(grey), 0, 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("size", [(64, 64), (97, 120), (33, 70)])
def test_brisque_is_the_plain_formula(size):
    image = noise(*size, seed=size[1])
    assert brisque(image) == pytest.approx(plain_brisque(image), abs=2e-3)
    blurred = cv2.GaussianBlur(image, (0, 0), 1)
    assert brisque(blurred) == pytest.approx(plain_brisque(blurred), abs=2e-3)


def test_brisque_in_colour_is_that_of_the_grey_picture():
    face = draw_face(seed=0, identity=1, picture=0, size=128).image
    grey = cv2.cvtColor(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    assert brisque(face) == brisque(grey)
    assert brisque(face) != brisque(np.ascontiguousarray(face[..., ::-1]))


def test_distortions_raise_brisque():
    for seed in range(3):
        image = noise(128, 128, seed)
        score = brisque(image)
        rng = np.random.default_rng(seed)
        noisy = np.clip(image + rng.normal(0, 30, (128, 128, 1)), 0, 255).astype(np.uint8)
        ends = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 8])[1], 1)
        for worse in (noisy, ends, cv2.GaussianBlur(image, (0, 0), 2)):
            assert brisque(worse) > score + 10


def test_where_brisque_is_not_defined():
    assert math.isnan(brisque(np.full((64, 64, 3), 0, np.uint8)))
    assert math.isnan(brisque(noise(MIN_SIDE - 1, 64, 0)))
    assert math.isfinite(brisque(noise(MIN_SIDE, MIN_SIDE, 0)))


def test_of_a_huge_picture_the_middle_is_scored():
    image = noise(64, 64, 0)
    wide = np.zeros((64, MAX_SIDE + 20, 3), np.uint8)
    wide[:, 10 : MAX_SIDE + 10] = np.tile(image, (1, MAX_SIDE // 64, 1))
    assert brisque(wide) == brisque(np.ascontiguousarray(wide[:, 10 : MAX_SIDE + 10]))


def test_distinct_is_exact_below_its_limit():
    rng = np.random.default_rng(0)
    keys = rng.integers(2**64, size=300, dtype=np.uint64)
    table, seen, sums = Distinct(1, pending=50), Counter(), Counter()
    for _ in range(20):
        chosen, marks = rng.choice(keys, 40), rng.integers(1, 8, 40).astype(np.uint64)
        table.add(chosen, marks, np.arange(40)[:, None])
        for key, mark, weight in zip(chosen.tolist(), marks.tolist(), range(40), strict=True):
            seen[key] |= mark
            sums[key] += weight
    found = table.found()
    assert found.share == 1
    assert found.marks.tolist() == [seen[key] for key in sorted(seen)]
    assert found.counts[:, 0].tolist() == [sums[key] for key in sorted(seen)]


def test_distinct_beyond_its_limit_is_a_sample():
    rng = np.random.default_rng(1)
    keys = rng.integers(2**64, size=100_000, dtype=np.uint64)
    table = Distinct(1, limit=4000, pending=3000)
    for _ in range(2):  # twice each, in another order
        for part in np.array_split(rng.permutation(keys), 50):
            table.add(part, part & np.uint64(1), np.ones((len(part), 1), np.int64))
    found = table.found()
    assert 2000 <= len(found.marks) <= 4000 and found.share < 1
    assert (found.counts == 2).all()
    assert found.estimate(found.marks >= 0) == pytest.approx(100_000, rel=0.06)
    assert found.estimate(found.marks == 1) == pytest.approx(50_000, rel=0.08)


def plain_words(texts: list[str]) -> tuple[set, set]:
    words, grams = set(), set()
    for text in texts:
        bare = [word.strip(".,!\"'()") for word in text.lower().split()]
        bare = [word for word in bare if word]
        words.update(bare)
        grams.update(tuple(bare[n : n + 4]) for n in range(len(bare) - 3))
    return words, grams


def test_words_are_those_of_sets():
    rng = np.random.default_rng(0)
    vocabulary = ["A", "man,", "WITH", "(hat)", "blue", "-", "eyes.", "she", "he's", "old"]
    texts = [" ".join(rng.choice(vocabulary, rng.integers(1, 12))) for _ in range(400)]
    tenths = rng.integers(10, size=400)
    counts = WordCounts()
    for start in range(0, 400, 37):
        counts.add(texts[start : start + 37], tenths[start : start + 37])
    found = counts.summary()
    assert found["captions"] == 400
    assert found["words"] == sum(len(text.split()) for text in texts)
    assert found["distinct_captions"] == len(set(texts))
    assert found["vocabulary"] == len(plain_words(texts)[0] - {"-"})
    for tenth in range(10):
        some = [text for text, t in zip(texts, tenths, strict=True) if t <= tenth]
        some = [" ".join(word for word in text.split() if word != "-") for text in some]
        assert found["distinct_4grams"][tenth] == len(plain_words(some)[1])


def test_words_that_are_forgotten_are_the_same_again(monkeypatch):
    monkeypatch.setattr("flip_jax.curate.quality.words._CACHED_WORDS", 3)
    counts = WordCounts()
    counts.add(["one two three four five", "five four three two one"] * 3, np.zeros(6, int))
    found = counts.summary()
    assert (found["vocabulary"], found["distinct_4grams"][0]) == (5, 4)


def test_percentiles_of_counts():
    values = np.random.default_rng(0).integers(3, 90, 1001)
    found = numbers.of_counts(np.bincount(values))
    assert found["mean"] == pytest.approx(values.mean(), abs=1e-4)
    for percent in numbers.PERCENTILES:
        assert found[f"p{percent}"] == np.percentile(values, percent, method="inverted_cdf")
    assert numbers.of_counts(np.array([2, 2]))["p50"] == 0
    assert numbers.of_counts(np.zeros(5, int)) is None
    edges = np.array([0, 10, 50, 200])
    assert (numbers.binned(np.bincount(values), edges) == np.histogram(values, edges)[0]).all()


def test_the_mode_is_the_middle_of_the_fullest_bin():
    assert numbers.of_values(np.array([1.0, 4.1, 4.2, 5.9, -9.0]), 2, 3)["mode"] == 5.0
    assert numbers.of_values(np.zeros(0), 2, 3) is None


def test_without_labels_nothing_is_said_of_balance():
    labels = np.zeros((len(ATTRIBUTES), 3), np.int64)
    labels[:, 0] = 9
    cells = balance.cells(labels, np.zeros((len(balance.CROSSINGS), 3, 3), np.int64))
    (said,) = balance.warnings(cells, 9, 0.1)
    assert said.startswith("No picture has a label")


def test_every_attribute_is_of_one_kind():
    assert sorted(name for names in KINDS.values() for name in names) == sorted(ATTRIBUTES)


def test_stages_are_those_of_the_pipeline():
    from flip_jax.curate import fetch, groups, inputs
    from flip_jax.curate.config import CurateConfig
    from flip_jax.curate.pipeline import COUNTS, make_stages
    from flip_jax.curate.quality import history
    from flip_jax.curate.storage import Work

    names = [stage.name for stage in make_stages(CurateConfig(), Work("nowhere"))]
    assert [name for name in STAGES if name in names] == names
    assert STAGES[:2] == (inputs.INPUT, fetch.STAGE) and STAGES[-2:] == (groups.STAGE, groups.KEPT)
    assert place_of("faces/in") < place_of("dedupe/dropped: equal picture") < place_of("other/x")
    assert history.COUNTS == COUNTS


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP with random weights and a byte-level tokenizer."""
    torch = pytest.importorskip("torch", reason="the CLIP-IQA-type score needs the extra `torch`")
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    pieces += ["go", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\ng o\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    last = len(pieces) - 1
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tower
        | {"vocab_size": len(pieces), "bos_token_id": last - 1, "eos_token_id": last},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_clip_iqa_is_the_softmax_over_the_two_prompts(clip_folder):
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model, tokenizer = (kind.from_pretrained(clip_folder) for kind in (CLIPModel, CLIPTokenizer))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    images = [
        draw_face(seed=0, identity=n, picture=0, size=96).image[: 96 - 20 * n] for n in (0, 1)
    ]
    with torch.inference_mode():
        logits = model(
            **tokenizer(list(PROMPTS), padding=True, return_tensors="pt"),
            **processor(images, return_tensors="pt"),
        ).logits_per_image
    wanted = torch.softmax(logits, dim=1)[:, 0].numpy()
    judge = ClipIqa(clip_folder)
    found = judge.scores(np.stack([judge.prepare(image) for image in images]))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert judge.name.startswith(clip_folder.name + ", weights ")


def test_a_report_with_clip(clip_folder, tmp_path):
    from flip_jax.config import DrawnConfig
    from flip_jax.curate.quality.report import ReportConfig, write_report
    from flip_jax.data.sources import write_drawn

    cfg = DrawnConfig(train_identities=4, test_identities=1, pictures=1, size=64)
    write_drawn(cfg, tmp_path / "data", processes=1)
    told = write_report(tmp_path / "data", tmp_path / "out", ReportConfig(clip=clip_folder))
    assert 0 < told["quality"]["clip_iqa"]["p50"] < 1
    assert sum(told["quality"]["clip_iqa"]["histogram"]["counts"]) == 5
    assert told["settings"]["clip"].startswith(clip_folder.name)
    assert "not measured" not in (tmp_path / "out" / "report.md").read_text()


def without(folder, tmp_path, *patterns):
    copy = tmp_path / "clip"
    copy.mkdir()
    left_out = {file for pattern in patterns for file in folder.glob(pattern)}
    for file in set(folder.iterdir()) - left_out:
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_a_clip_that_is_not_whole(clip_folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    for patterns, message in (
        (["config.json"], "holds no config.json"),
        (["*.safetensors"], "holds no weights"),
        (["*token*", "vocab*", "merges*"], "no tokenizer"),
    ):
        folder = tmp_path / patterns[0].strip("*")
        folder.mkdir()
        with pytest.raises(FileNotFoundError, match=message):
            ClipIqa(without(clip_folder, folder, *patterns))
    folder = without(clip_folder, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights are missing .* text_projection\.weight"):
        ClipIqa(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type 'bert'"):
        ClipIqa(folder)


def test_keys_are_not_those_of_a_split():
    assert key_of(b"a") != key_of(b"b")
    assert key_of(b"a") < 2**64


def test_a_figure_of_tiny_pictures():
    """Sides below the least bin, 8 px: no bar, and no error."""
    counts = np.zeros(20, np.int64)
    counts[1] = 3
    side = numbers.of_counts(counts)
    found = {
        "width": side,
        "height": side,
        "shorter_side": side,
        "shorter_side_histogram": {
            "edges": SIDE_EDGES.tolist(),
            "counts": numbers.binned(counts, SIDE_EDGES).tolist(),
        },
    }
    assert not any(found["shorter_side_histogram"]["counts"])
    assert len(figures._resolution({"pictures": found}).axes) == 2
