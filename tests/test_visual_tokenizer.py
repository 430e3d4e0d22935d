"""The visual tokenizer: quantisation, its gradient, its codebook, its folder, its command."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_docs import ROOT, blocks, commands

from flip_jax.config import DrawnConfig
from flip_jax.data.records import RecordSource
from flip_jax.data.sources import write_drawn
from flip_jax.main import parse
from flip_jax.models.visual_tokenizer import (
    TokenizerConfig,
    VisualTokenizer,
    init_tokenizer,
    nearest,
    straight_through,
    unit_pixels,
)
from flip_jax.models.vit import normalize_pixels
from flip_jax.named_arrays import named_leaves
from flip_jax.visual_tokenizer import training
from flip_jax.visual_tokenizer.__main__ import main
from flip_jax.visual_tokenizer.command import evaluate
from flip_jax.visual_tokenizer.pictures import first_pictures
from flip_jax.visual_tokenizer.saved import load_tokenizer, save_tokenizer, tokenizer_of

PAGE = ROOT / "docs" / "visual_tokenizer.md"
SMALL = TokenizerConfig("vq", codes=24, width=8, blocks=1, code_width=4)


@pytest.fixture(scope="module")
def small():
    params = jax.jit(lambda: init_tokenizer(SMALL, jax.random.key(0)))()
    params["codebook"] = 0.1 * jax.random.normal(jax.random.key(1), (24, 4))
    return VisualTokenizer(params, SMALL)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)


def test_nearest_is_the_nearest_by_brute_force():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2, 5, 5, 6)).astype(np.float32)
    codebook = rng.normal(size=(40, 6)).astype(np.float32)
    apart = states.astype(np.float64)[..., None, :] - codebook.astype(np.float64)
    expected = np.argmin((apart**2).sum(-1), axis=-1)
    np.testing.assert_array_equal(nearest(states, codebook), expected)


def test_the_gradient_goes_straight_through():
    """To the states as if no code were between, to the codebook not at all."""
    rng = np.random.default_rng(1)
    states, weights = rng.normal(size=(2, 7, 3)).astype(np.float32)
    codebook = rng.normal(size=(5, 3)).astype(np.float32)

    def f(states, codebook):
        chosen, codes = straight_through(states, codebook)
        return jnp.sum(weights * chosen**2), (chosen, codes)

    (to_states, to_codebook), (chosen, codes) = jax.grad(f, (0, 1), has_aux=True)(states, codebook)
    np.testing.assert_allclose(chosen, codebook[codes], atol=1e-6)
    np.testing.assert_allclose(to_states, 2 * weights * codebook[codes], atol=1e-5)
    assert not np.any(to_codebook)


def test_gradient_of_the_loss_against_differences(small, images):
    """In the last bias, where the loss is a parabola; the codebook has none."""
    pixels = jnp.asarray(images[:, :16, :16] / 255.0, jnp.float32)
    params = {name: small.params[name] for name in ("encoder", "decoder")}
    codebook = small.params["codebook"]

    @jax.jit
    def loss_and_gradient(scale, codebook):
        def loss(scale, codebook):
            out = params["decoder"]["out"] | {"bias": params["decoder"]["out"]["bias"] + scale}
            moved = params | {"decoder": params["decoder"] | {"out": out}}
            return training.vq_loss(moved, codebook, pixels, SMALL, 0.25)[0]

        return jax.value_and_grad(loss, (0, 1))(scale, codebook)

    above, below = (loss_and_gradient(scale, codebook)[0] for scale in (0.5, -0.5))
    _, (slope, of_codebook) = loss_and_gradient(0.0, codebook)
    assert slope == pytest.approx(float(above - below), rel=1e-3)
    assert not np.any(of_codebook)


def test_the_codebook_is_a_moving_average_and_dead_codes_revive():
    rng = np.random.default_rng(2)
    codebook = rng.normal(size=(6, 2)).astype(np.float32)
    uses = np.array([5.0, 4.0, 3.0, 0.5, 0.51, 7.0], np.float32)
    state = training.VqState(
        0, {}, (), jnp.asarray(codebook), jnp.asarray(uses), jnp.asarray(uses[:, None] * codebook)
    )
    states = rng.normal(size=(30, 2)).astype(np.float32)
    codes = rng.choice([0, 1, 5], 30)  # an even share is 5, so that below 0.5 a code is dead
    found, new_uses, sums, revived = training.update_codebook(
        state, states, codes, 0.9, jax.random.key(0)
    )
    expected_uses, expected = np.zeros(6), np.zeros((6, 2))
    for code in range(6):
        chosen = states[codes == code].astype(np.float64)
        expected_uses[code] = 0.9 * uses[code] + 0.1 * len(chosen)
        total = 0.9 * uses[code] * codebook[code] + 0.1 * chosen.sum(0)
        expected[code] = total / expected_uses[code]
    dead = expected_uses < 0.5
    assert list(np.flatnonzero(dead)) == [3, 4] and revived == 2
    np.testing.assert_allclose(found[~dead], expected[~dead], rtol=1e-5)
    np.testing.assert_allclose(new_uses, np.where(dead, 5.0, expected_uses), rtol=1e-6)
    for code in (3, 4):
        assert (np.abs(states - found[code]).max(axis=1) < 1e-6).any()
    np.testing.assert_allclose(sums, new_uses[:, None] * found, rtol=1e-5)


def test_perplexity_and_psnr():
    assert float(training.perplexity(jnp.array([3, 3, 0, 3, 3]))) == pytest.approx(4.0)
    assert float(training.perplexity(jnp.array([0, 9, 0]))) == pytest.approx(1.0)
    skewed = 0.5**-0.5 * 0.25**-0.25 * 0.25**-0.25
    assert float(training.perplexity(jnp.array([2, 1, 1]))) == pytest.approx(skewed)
    assert float(training.psnr(jnp.float32(0.001))) == pytest.approx(30.0)


def test_any_picture_becomes_the_grid_that_is_asked_for(small, images):
    codes = np.asarray(small.codes(images, 4))
    assert codes.shape == (3, 16) and codes.dtype == np.int32 and len(np.unique(codes)) > 1
    # Normalised pixels are the same picture.
    as_float = np.asarray(small.codes(normalize_pixels(jnp.asarray(images)), 4))
    assert (codes == as_float).mean() > 0.95
    assert small.codes(images, 6).shape == (3, 36)


@pytest.mark.parametrize("size", [32, 80])
def test_pictures_are_resized_as_pillow_does(size):
    rng = np.random.default_rng(3)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((48, 48), 2)
    ours = 255 * np.asarray(unit_pixels(np.asarray(smooth)[None], size))[0]
    theirs = np.asarray(smooth.resize((size, size), Image.Resampling.BICUBIC))
    assert np.abs(ours - theirs).max() < 1.5  # Pillow rounds after each axis


def test_a_folder_gives_the_same_codes_and_shows_damage(small, images, tmp_path):
    save_tokenizer(tmp_path / "vq", small, {"why": "test"})
    loaded, about = load_tokenizer(tmp_path / "vq")
    assert about["why"] == "test" and loaded.cfg == SMALL and "decoder" not in loaded.params
    np.testing.assert_array_equal(loaded.codes(images, 6), small.codes(images, 6))
    whole, again = load_tokenizer(tmp_path / "vq", whole=True)
    jax.tree.map(np.testing.assert_array_equal, whole.params, jax.device_get(small.params))
    assert again["digest"] == about["digest"] and len(about["digest"]) == 64

    arrays = {name: np.array(leaf) for name, leaf in named_leaves(small.params).items()}
    arrays["codebook"][3, 1] = np.nextafter(arrays["codebook"][3, 1], 1)
    np.savez(tmp_path / "vq" / "arrays.npz", **arrays)
    with pytest.raises(ValueError, match=r"arrays\.npz is not the file that tokenizer\.json"):
        load_tokenizer(tmp_path / "vq")
    (tmp_path / "vq" / "arrays.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="no whole visual tokenizer"):
        load_tokenizer(tmp_path / "vq")
    (tmp_path / "vq" / "tokenizer.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="'other' of version None"):
        load_tokenizer(tmp_path / "vq")
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


TINY = ["--codes=24", "--code-width=4", "--width=8", "--blocks=1", "--size=32", "--batch-size=8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Drawn faces, and the tokenizer that the command makes of them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    drawn = DrawnConfig(train_identities=8, test_identities=4, pictures=2, captions=1, size=64)
    data = write_drawn(drawn, folder / "data")
    command = ["train", "--data", str(data), "--out", str(folder / "vq"), "--lr=1e-2"]
    assert main([*command, *TINY, "--steps=150", "--limit=6"]) == 0
    return data, folder / "vq", command


def test_the_command_trains_and_reports(trained):
    data, out, _ = trained
    about = json.loads((out / "tokenizer.json").read_text())
    found = about["held_out"]
    # Better than the best picture of one colour: the loss has fallen, also where it was trained.
    assert found["pictures"] == 6 and found["psnr"] > found["psnr_of_means"] + 0.3
    seen = first_pictures(RecordSource(data, "train"), 32, 16, 1)
    figures, _ = evaluate(load_tokenizer(out, whole=True)[0], seen, 8)
    assert figures["psnr"] > figures["psnr_of_means"] + 0.3
    assert 4 < found["perplexity"] <= found["codes_used"] <= 24
    assert about["settings"]["steps"] == 150 and about["train_seconds"] > 0
    with Image.open(out / "report.png") as sheet:
        assert sheet.size == (6 * 32 * 4, 2 * 32 * 4)


def test_nothing_is_left_where_it_cannot_be_done(trained, tmp_path, capsys):
    _, out, command = trained
    before = (out / "tokenizer.json").read_bytes()
    assert main([*command, *TINY]) == 1
    assert "exists" in capsys.readouterr().err
    command = [*command[:3], "--out", str(tmp_path / "new")]
    for field, message in (
        ("--size=60", "settings.size=60: must be a multiple of 8"),
        ("--codes=1", "settings.codes=1: must be at least 2"),
        ("--code=9", "did you mean settings.codes"),
        ("--decay=1.0", "settings.decay=1.0"),
        ("--eval-split=val", "has no split 'val'"),
    ):
        assert main([*command, *TINY, field]) == 1
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert (out / "tokenizer.json").read_bytes() == before


def test_dalle_encoder_of_transformers(tmp_path, capsys):
    """Random weights of another size than the published ones; both spellings of the names."""
    torch = pytest.importorskip("torch", reason="conversion needs the extra [torch]")
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    from flip_jax.convert.__main__ import main as convert

    torch.manual_seed(0)
    model = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=16, vocab_size=96)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.01 if parameter.ndim == 1 else 1.4 / parameter[0].numel() ** 0.5
            parameter.copy_(scale * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "flava")
    assert convert(["--from", "dalle", str(tmp_path / "flava"), str(tmp_path / "a")]) == 0
    assert "128 codes of 2 pictures are the same" in capsys.readouterr().out
    openai = {}
    for name, value in model.state_dict().items():
        name = name.replace(".group.block", ".block").replace(".path.", ".")
        openai[name.replace(".weight", ".w").replace(".bias", ".b")] = value
    torch.save(openai, tmp_path / "openai.pt")
    assert convert(["--from", "dalle", str(tmp_path / "openai.pt"), str(tmp_path / "b")]) == 0
    (ours, about), (_, other) = (load_tokenizer(tmp_path / name) for name in "ab")
    assert about["digest"] == other["digest"] and ours.cfg.codes == 96

    image = np.random.default_rng(0).integers(0, 256, (2, 14, 14, 3), dtype=np.uint8)
    image = image.repeat(8, 1).repeat(8, 2)  # noise looks alike everywhere
    pixels = torch.tensor(image).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        logits = model(0.8 * pixels + 0.1)
        theirs = model.get_codebook_indices(0.8 * pixels + 0.1).flatten(1)
    from flip_jax.models.visual_tokenizer import dalle_logits

    found = dalle_logits(ours, unit_pixels(image, 112)).transpose(0, 3, 1, 2)
    assert float(logits.std()) > 0.05  # so that the comparison means something
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-4)
    np.testing.assert_array_equal(ours.codes(image, 14), theirs.numpy())
    assert len(np.unique(theirs)) > 5

    capsys.readouterr()
    del openai["blocks.output.conv.b"]
    openai["blocks.extra.w"] = torch.zeros(1)
    torch.save(openai, tmp_path / "bad.pt")
    assert convert(["--from", "dalle", str(tmp_path / "bad.pt"), str(tmp_path / "c")]) == 1
    error = capsys.readouterr().err
    assert "blocks.output.conv.bias is missing" in error and "extra.weight is unexpected" in error
    torch.save(model, tmp_path / "module.pt")  # a pickled module is never opened
    assert convert(["--from", "dalle", str(tmp_path / "module.pt"), str(tmp_path / "c")]) == 1
    assert "could run code" in capsys.readouterr().err and not (tmp_path / "c").exists()


@pytest.mark.slow
def test_the_page_runs(trained, tmp_path, monkeypatch):
    """Its training command on few pictures and steps, its run's fields, its Python."""
    data, _, _ = trained
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    (training_command,) = commands(PAGE, "flip_jax.visual_tokenizer")
    quick = ["--steps=2", "--width=8", "--blocks=1", "--batch-size=4", "--limit=4"]
    assert main([*training_command, *quick]) == 0
    program = next(text for language, text in blocks(PAGE) if language == "python")
    exec(compile(program, str(PAGE), "exec"), {})
    monkeypatch.chdir(ROOT)
    (run_command,) = commands(PAGE, "flip_jax.main")
    cfg, _, _ = parse(run_command)
    found, _ = tokenizer_of(
        replace(cfg, loss=replace(cfg.loss, mim_tokenizer=str(tmp_path / "runs" / "tokenizer")))
    )
    grid = cfg.model.vision.image_size // cfg.model.vision.patch_size
    assert f"--size={8 * grid}" in training_command and found.cfg.codes == cfg.model.mim_vocab
