"""Every format of `python -m flip_jax.convert`, as a user calls it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_weights
import torch
from safetensors.numpy import load_file

from flip_jax.checkpoint import load_momentum, load_params, read_meta
from flip_jax.convert import torch_flip
from flip_jax.named_arrays import named_leaves


def convert(*args) -> str:
    """Runs the command; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "flip_jax.convert", *map(str, args)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """An official .pth and the checkpoint that the command makes of it."""
    folder = tmp_path_factory.mktemp("official")
    state = tiny_weights.official_state()
    torch.save({"model": state, "epoch": 3}, folder / "source.pth")
    printed = convert(
        "--from", "flip", folder / "source.pth", folder / "ours", "--tokenizer", "grammar"
    )
    return state, folder / "ours", printed


def test_from_flip(official):
    state, ours, printed = official
    model = tiny_weights.model_config()
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    momentum = load_momentum(ours)
    for found, wanted in (
        (load_params(ours), torch_flip.params_from_official(arrays, model)),
        (momentum["twins"], torch_flip.params_from_official(arrays, model, twin=True)),
        (momentum["queue"], torch_flip.queue_from_official(arrays)),
    ):
        found, wanted = named_leaves(found), named_leaves(wanted)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
            assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
    meta = read_meta(ours)
    assert meta["config"]["loss"]["queue_size"] == tiny_weights.QUEUE
    assert meta["config"]["model"]["vision"]["heads"] == tiny_weights.HEADS
    for output in ("image_embed", "text_embed", "itm_logits", "twin/image_embed", "relative"):
        assert output in printed


def test_export_of_import_is_the_identity(official, tmp_path):
    state, ours, _ = official
    convert("--to", "flip", ours, tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert list(again) == list(state)
    for name, tensor in state.items():
        assert again[name].dtype == tensor.dtype, name
        assert again[name].shape == tensor.shape, name
        assert torch.equal(again[name], tensor), name


def test_to_safetensors(official, tmp_path):
    _, ours, _ = official
    printed = convert("--to", "safetensors", ours, tmp_path / "plain")
    assert "bit for bit" in printed and [*tmp_path.iterdir()] == [tmp_path / "plain"]
    files = sorted(file.name for file in (tmp_path / "plain").iterdir())
    assert files == ["config.json", "model.safetensors", "vocab.txt"]
    plain, params = load_file(tmp_path / "plain/model.safetensors"), named_leaves(load_params(ours))
    assert plain.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(plain[name], value, err_msg=name)
        assert plain[name].shape == value.shape, name


@pytest.mark.slow
def test_from_clip_at_another_image_size(tmp_path):
    tiny_weights.clip_model().save_pretrained(tmp_path / "clip")
    printed = convert(
        "--from", "clip", tmp_path / "clip", tmp_path / "ours", "--image-size", 48, "--as-reference"
    )
    params = load_params(tmp_path / "ours")
    assert list(params) == ["vit"]
    assert params["vit"]["position_embed"].shape == (1 + 6 * 6, tiny_weights.WIDTH)
    assert np.all(params["vit"]["post_norm"]["scale"] == 1)
    assert read_meta(tmp_path / "ours")["config"]["model"]["vision"]["image_size"] == 48
    assert "resized to 6 x 6, bicubic" in printed and "image_tokens" in printed


@pytest.mark.slow
def test_from_farl(tmp_path):
    clip = tiny_weights.clip_model()
    torch.save({"state_dict": tiny_weights.openai_state(clip)}, tmp_path / "farl.pth")
    convert("--from", "farl", tmp_path / "farl.pth", tmp_path / "ours")
    vit = load_params(tmp_path / "ours")["vit"]
    layer = clip.vision_model.encoder.layers[1].self_attn
    for name, module in (("query", layer.q_proj), ("key", layer.k_proj), ("value", layer.v_proj)):
        kernel = vit["blocks"]["attn"][name]["kernel"][1]
        np.testing.assert_array_equal(kernel, module.weight.detach().numpy().T, err_msg=name)


def test_from_bert(tmp_path):
    tiny_weights.bert_model().save_pretrained(tmp_path / "bert")
    printed = convert(
        "--from", "bert", tmp_path / "bert", tmp_path / "ours", "--tokenizer", "grammar"
    )
    bert = load_params(tmp_path / "ours")["bert"]
    assert bert["word_embed"].shape == (tiny_weights.VOCAB, tiny_weights.WIDTH)
    assert "cross" not in bert["blocks"] and "ln_cross" not in bert["blocks"]
    assert (tmp_path / "ours/vocab.txt").is_file()
    assert "[DEC], [ENC]" in printed and "type-0" in printed


def test_help_names_every_format():
    text = convert("--help")
    for word in ("--from", "--to", "flip", "clip", "farl", "bert", "hf", "safetensors"):
        assert word in text
