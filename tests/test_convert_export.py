"""Weights for others, and the official key list."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_weights
import torch
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

import flip_jax
from flip_jax import config, weights
from flip_jax.checkpoint import CheckpointError, load_momentum, load_params, read_meta, save_weights
from flip_jax.config import Config, DataConfig, ModelConfig, TextConfig, VisionConfig
from flip_jax.convert import torch_flip, torch_models
from flip_jax.convert.__main__ import main
from flip_jax.convert.conversion import ConversionError
from flip_jax.convert.exporter import export_weights
from flip_jax.convert.foreign import Options
from flip_jax.convert.importer import import_weights
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models import flip

DOCS = Path(__file__).resolve().parent.parent / "docs" / "convert.md"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A checkpoint without momentum."""
    return write_ours(tmp_path_factory.mktemp("ours") / "checkpoint", tiny_weights.model_config())


def write_ours(folder, model):
    params = jax.jit(lambda: flip.init_params(model, 0.07, jax.random.key(0)))()
    cfg = Config(model=model, data=DataConfig(tokenizer="grammar"))
    tokenizer = Tokenizer.load("grammar", model.text.max_length)
    meta = {
        "config": config.to_dict(cfg),
        "vocab_hash": tokenizer.vocab_hash,
        "data_hash": None,
    }
    save_weights(folder, params, meta)
    return folder


@pytest.mark.parametrize("kind", ["flip", "safetensors", "no file"])
def test_all_that_is_read_is_of_one_step(tmp_path, monkeypatch, kind):
    """Of the step that was the newest at the start, while a training writes the next one."""
    model, steps = tiny_weights.model_config(), tmp_path / "run" / "checkpoints"
    torch.save({"model": tiny_weights.official_state()}, tmp_path / "source")
    import_weights("flip", tmp_path / "source", steps / "1", Options(tokenizer="grammar"))
    params, momentum = load_params(steps / "1"), load_momentum(steps / "1")

    def reading(path):
        meta = read_meta(path)
        zeros = jax.tree.map(np.zeros_like, {"params": params, "momentum": momentum})
        if not (steps / "2").exists():
            save_weights(steps / "2", zeros["params"], meta, momentum=zeros["momentum"])
        return meta

    monkeypatch.setattr(weights, "read_meta", reading)
    wanted = params
    if kind == "no file":
        found = weights.read_weights(tmp_path / "run").params
    elif kind == "safetensors":
        export_weights(kind, tmp_path / "run", tmp_path / "out")
        found = weights.read_weights(tmp_path / "out").params
    else:
        export_weights(kind, tmp_path / "run", tmp_path / "out")
        state = torch.load(tmp_path / "out", weights_only=True)["model"]
        found = {name: value.numpy() for name, value in state.items()}
        twins_and_queue = momentum["twins"], momentum["queue"]
        wanted = dict(torch_flip.state_to_official(params, *twins_and_queue, model))
    assert (steps / "2").exists()
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("kind", ["hf", "safetensors"])
def test_all_files_may_be_read_by_those_who_may_read_new_ones(ours, tmp_path, kind):
    export_weights(kind, ours, tmp_path / "out")
    (tmp_path / "new").touch()
    modes = {file.stat().st_mode for file in (tmp_path / "out").rglob("*.*") if file.is_file()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_a_step_without_meta_is_damaged(ours, tmp_path):
    shutil.copytree(ours, tmp_path / "checkpoints" / "7")
    (tmp_path / "checkpoints" / "7" / "meta" / "metadata").unlink()
    for path in (tmp_path, tmp_path / "checkpoints" / "7"):
        with pytest.raises(CheckpointError, match="7 is damaged: meta cannot be read"):
            weights.read_weights(path)


def test_counts_of_the_base_model():
    """1049 keys, 6 of them int64; 223,453,187 trained values, 446,904,835 with the twins."""
    online = torch_flip.official_shapes(Config().model)
    twin = torch_flip.official_shapes(Config().model, twin=True)
    ids = torch_flip.position_ids(Config().model)
    assert len(online) + len(twin) + len(ids) + len(torch_flip.QUEUE_NAMES) == 1049
    trained = sum(math.prod(shape) for shape in online.values())
    assert trained == 223_453_187
    assert trained + sum(math.prod(shape) for shape in twin.values()) == 446_904_835


def narrow(depth: int) -> dict[str, np.ndarray]:
    """The whole official state dict of a model of some depth and next to no width."""
    tower = {"width": 4, "heads": 1, "mlp_width": 4, "depth": depth}
    model = ModelConfig(
        vision=VisionConfig(image_size=8, patch_size=4, **tower),
        text=TextConfig(vocab_size=9, **tower),
        embed_dim=3,
    )
    shapes = jax.eval_shape(lambda: flip.init_params(model, 0.07, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    queue = jax.tree.map(np.asarray, flip.init_queue(6, 3, jax.random.key(0)))
    return torch_flip.state_to_official(params, flip.twin_params(params), queue, model)


def test_names_order_shapes_and_types_of_the_base_model(golden):
    listed = json.loads((golden / "state_dict_base.json").read_text())["models"]
    keys = listed["fflip_pretrain.FFLIP_Pretrain"]["keys"]
    state = narrow(depth=12)
    assert list(state) == [key["name"] for key in keys]
    assert [str(v.dtype) for v in state.values()] == [key["dtype"] for key in keys]
    model = Config().model
    shapes = torch_flip.official_shapes(model) | torch_flip.official_shapes(model, twin=True)
    shapes |= {name: ids.shape for name, ids in torch_flip.position_ids(model).items()}
    shapes |= {"image_queue": (256, 61440), "text_queue": (256, 61440)}
    shapes |= {"idx_queue": (1, 61440), "ptr_queue": (1,)}
    assert {key["name"]: tuple(key["shape"]) for key in keys} == shapes


def test_order_rule_at_another_depth():
    state = narrow(depth=3)
    assert len(state) == 4 + 1 + 4 + 2 * (5 + 2 + 3 * 16 + 4 + 3 * 26 + 4) + 2
    first = ["temp", "image_queue", "text_queue", "idx_queue", "ptr_queue"]
    modules = list(dict.fromkeys(name.split(".")[0] for name in state))
    towers = ["visual_encoder", "text_encoder", "vision_proj", "text_proj"]
    assert modules == [*first, *towers, "itm_head", *(f"{tower}_m" for tower in towers)]
    assert state["temp"].shape == () and state["ptr_queue"].shape == (1,)


def test_golden_case_end_to_end(golden, tmp_path):
    """Recorded weights through the importer and `flip_jax.load`; outputs as recorded."""
    meta = json.loads((golden / "A_meta.json").read_text())
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in meta["vocab"]))
    command = ["--from", "flip", str(golden / "A_params.safetensors"), str(tmp_path / "a")]
    heads = meta["config"]["vision_config"]["num_attention_heads"]
    command += ["--vision-heads", str(heads), "--text-heads", str(heads)]
    assert main([*command, "--tokenizer", str(tmp_path / "vocab.txt")]) == 0

    model, io = flip_jax.load(tmp_path / "a"), load_file(golden / "A_io.safetensors")

    def close(found, name):
        np.testing.assert_allclose(found, io[f"out/{name}"], rtol=0, atol=5e-6, err_msg=name)

    assert model.tokenizer.enc_id == meta["special_ids"]["enc"]
    token_ids, token_mask = model.tokenizer.encode(meta["captions"][0])  # recorded uncleaned
    np.testing.assert_array_equal(token_ids, io["in/input_ids"])
    clean = [row for row, caption in enumerate(meta["captions"][0]) if "." not in caption]
    texts = model.encode_text([meta["captions"][0][row] for row in clean])
    np.testing.assert_allclose(texts, io["out/text_feat"][clean], rtol=0, atol=5e-6)
    sizes = dataclasses.replace(model.cfg.model, dtype="float32")
    whole = nnx.merge(flip.build(sizes), load_params(tmp_path / "a"))
    image_tokens, image_embed = whole.encode_image(io["in/pixel_values"].transpose(0, 2, 3, 1))
    close(image_tokens, "vision_last_hidden_state")
    close(image_embed, "image_feat")
    text_tokens, text_embed = whole.encode_text(token_ids, token_mask)
    close(text_tokens, "text_last_hidden_state")
    close(text_embed, "text_feat")
    fused = whole.match(jnp.asarray(token_ids), token_mask, image_tokens)
    np.testing.assert_allclose(fused, io["out/itm_logits"][:8], rtol=0, atol=5e-6)

    momentum = load_momentum(tmp_path / "a")
    state = load_file(golden / "A_params.safetensors")
    again = torch_flip.state_to_official(
        load_params(tmp_path / "a"), momentum["twins"], momentum["queue"], model.cfg.model
    )
    assert again.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
        assert again[name].shape == value.shape and again[name].dtype == value.dtype, name


@pytest.mark.slow
def test_base_size_round_trip_within_six_gigabytes(tmp_path):
    """A checkpoint with momentum and queue, in and out again, bit for bit."""
    model = Config().model
    shapes = torch_flip.official_shapes(model) | torch_flip.official_shapes(model, twin=True)
    shapes |= {"image_queue": (256, 61440), "text_queue": (256, 61440)}
    generator = torch.Generator().manual_seed(0)
    state = {n: 0.02 * torch.randn(s, generator=generator) for n, s in shapes.items()}
    state |= {"idx_queue": torch.full((1, 61440), -100), "ptr_queue": torch.tensor([640])}
    torch.save({"model": state}, tmp_path / "source.pth")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"word{index}" for index in range(model.text.vocab_size - 2 - len(special))]
    (tmp_path / "vocab.txt").write_text("\n".join([*special, *words]))
    usage = []  # wall seconds, gigabytes
    for command in (
        ["--from", "flip", "source.pth", "ours", "--tokenizer", "vocab.txt"],
        ["--to", "flip", "ours", "again.pth"],
    ):
        # VmHWM and not ru_maxrss: that one starts at the peak of the process that started this one.
        script = (
            "import sys; from flip_jax.convert.__main__ import main; "
            "assert main(sys.argv[1:]) == 0; "
            "status = dict(line.split(':', 1) for line in open('/proc/self/status')); "
            "print(status['VmHWM'].split()[0])"
        )
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script, *command],
            cwd=tmp_path,
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(DOCS.parent.parent)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        usage.append((time.perf_counter() - start, int(done.stdout.split()[-1]) * 1024 / 1e9))
    print(usage)
    again = torch.load(tmp_path / "again.pth", weights_only=True, mmap=True)["model"]
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor), name
    assert max(peak for _, peak in usage) < 6, usage


def test_docs_examples(ours, tmp_path, monkeypatch):
    """Both programs of docs/convert.md run and agree with each other."""
    monkeypatch.chdir(tmp_path)
    export_weights("hf", ours, Path("flip-hf"))
    export_weights("safetensors", ours, Path("flip-base"))
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (50, 40, 3)), ("b.png", (40, 60, 3))):  # both shrink to 32
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(name)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    library, transformers = ({} for _ in range(2))
    exec(blocks[0], library)
    exec(blocks[1], transformers)
    # Other tools round a few pixels otherwise; a resize without antialiasing is off by 5e-2.
    np.testing.assert_allclose(library["images"], transformers["image_embed"], atol=1e-2)
    np.testing.assert_allclose(library["texts"], transformers["text_embed"], atol=1e-5)
    match = library["flip"].match(["a.png", "b.png"], transformers["captions"])
    np.testing.assert_allclose(
        match, transformers["itm_logits"].softmax(-1)[:, 1].numpy(), atol=1e-2
    )


@pytest.mark.parametrize("kind", ["clip", "farl"])
def test_openai_names_in_and_out_again(kind, tmp_path, capsys):
    """What was read is written, bit for bit; only what FLIP has no place for is gone."""
    state = tiny_weights.openai_state(tiny_weights.clip_model())
    torch.save({"state_dict": state} if kind == "farl" else state, tmp_path / "source.pth")
    names = [str(tmp_path / name) for name in ("source.pth", "ours", "again.pth")]
    assert main(["--from", kind, *names[:2]]) == 0
    assert main(["--to", kind, *names[1:]]) == 0
    assert "image_tokens" in capsys.readouterr().out
    again = torch.load(names[2], weights_only=True)
    again = again["state_dict"] if kind == "farl" else again
    kept = {n: t for n, t in state.items() if n.startswith("visual.") and n != "visual.proj"}
    assert again.keys() == kept.keys()
    for name, tensor in kept.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name


def test_heads_survive_the_way_out_and_back(tmp_path):
    """Where there are more than one for 64 of the width, which the tensors do not tell."""
    model = tiny_weights.model_config()
    towers = {n: dataclasses.replace(getattr(model, n), heads=4) for n in ("vision", "text")}
    model = dataclasses.replace(model, **towers)
    ours = write_ours(tmp_path / "ours", model)
    export_weights("flip", ours, tmp_path / "flip.pth")
    import_weights("flip", tmp_path / "flip.pth", tmp_path / "again", Options(tokenizer="grammar"))
    found = read_meta(tmp_path / "again")["config"]["model"]
    assert (found["vision"]["heads"], found["text"]["heads"]) == (4, 4)
    given = Options(tokenizer="grammar", vision_heads=2)
    import_weights("flip", tmp_path / "flip.pth", tmp_path / "other", given)
    assert read_meta(tmp_path / "other")["config"]["model"]["vision"]["heads"] == 2


def test_a_model_as_farl_users_load_it(ours, tmp_path):
    """Into a module of OpenAI's names, strictly; the tower comes back with the same bits."""
    out = tmp_path / "farl.pth"
    printed = export_weights("farl", ours, out)
    assert "visual.proj" in printed and "image_feature" in printed
    state = torch.load(out, weights_only=True)["state_dict"]
    params, model = load_params(ours), tiny_weights.model_config()
    np.testing.assert_array_equal(state.pop("visual.proj"), params["image_proj"]["kernel"])
    module = torch_models.OpenAiVision(model.vision)
    module.load_state_dict({n.removeprefix("visual."): t for n, t in state.items()}, strict=True)
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = module.eval()(torch.tensor(pixels).permute(0, 3, 1, 2))
    model = dataclasses.replace(model, dtype="float32")
    tokens, _ = nnx.merge(flip.build(model), params).encode_image(pixels)
    np.testing.assert_allclose(tokens, theirs, rtol=0, atol=2e-5)
    assert main(["--from", "farl", str(out), str(tmp_path / "back")]) == 0
    jax.tree.map(
        np.testing.assert_array_equal, load_params(tmp_path / "back")["vit"], params["vit"]
    )


def test_openai_export_refuses_what_has_no_image_tower(ours, tmp_path, capsys):
    meta = {name: read_meta(ours)[name] for name in ("config", "vocab_hash", "data_hash")}
    save_weights(tmp_path / "text", {"bert": load_params(ours)["bert"]}, meta)
    assert main(["--to", "clip", str(tmp_path / "text"), str(tmp_path / "out.pth")]) == 1
    assert "no image tower, only bert" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()


def test_a_wrong_export_is_caught(ours, tmp_path, monkeypatch):
    to_official = torch_flip._to_official

    def forget_to_transpose(value, layout):
        square = value.ndim == 2 and value.shape[0] == value.shape[1]
        return value if layout == "linear" and square else to_official(value, layout)

    monkeypatch.setattr(torch_flip, "_to_official", forget_to_transpose)
    for kind in ("flip", "hf", "clip"):
        with pytest.raises(ConversionError, match="do not compute the same"):
            export_weights(kind, ours, tmp_path / kind)
        assert not (tmp_path / kind).exists()


def test_a_tower_alone_is_not_exported(ours, tmp_path, capsys):
    meta = {name: read_meta(ours)[name] for name in ("config", "vocab_hash", "data_hash")}
    save_weights(tmp_path / "tower", {"vit": load_params(ours)["vit"]}, meta)
    assert main(["--to", "flip", str(tmp_path / "tower"), str(tmp_path / "out.pth")]) == 1
    assert "not a whole model" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()
