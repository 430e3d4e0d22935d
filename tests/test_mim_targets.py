"""MIM with codes of a tokenizer and with hard patches: losses, whole steps, runs."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_mim import MIM, MODEL
from test_partition import assert_same_steps, run
from test_visual_tokenizer import SMALL, small  # noqa: F401, a fixture
from tiny_run import batches

from flip_jax import checkpoint, config, main, partition
from flip_jax.compile.step import abstract_batch, abstract_tokenizer
from flip_jax.config import CheckpointConfig, MeshConfig
from flip_jax.losses.mim import code_errors, rank_loss
from flip_jax.models import flip
from flip_jax.models.mim import TEACHER
from flip_jax.models.vit import normalize_pixels
from flip_jax.optim import hard_share, make_optimizer
from flip_jax.same_run import check_same_run
from flip_jax.train import Compiled, init_state, make_train_step
from flip_jax.visual_tokenizer.saved import save_tokenizer, tokenizer_of

# Codes as targets and hard patches, both in one model. Parts of a batch would draw other dropout.
TEXT = replace(MODEL.text, dropout=0.0)
BOTH = replace(
    MIM,
    model=replace(MODEL, mim_vocab=SMALL.codes, mim_loss_head=True, text=TEXT),
    loss=replace(
        MIM.loss, mim_target="tokens", mim_tokenizer="vq", mim_masking="hard", mim_share=0.5
    ),
)


def test_errors_of_codes_against_float64():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(3, 5, 11)).astype(np.float32)
    codes = rng.integers(0, 11, (3, 5)).astype(np.int32)
    codes[0] = logits[0].argmax(-1)
    wide = logits.astype(np.float64)
    probabilities = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probabilities, codes[..., None], -1)[..., 0])
    found = code_errors(logits, codes)
    np.testing.assert_allclose(found["errors"], expected, rtol=1e-5)
    np.testing.assert_array_equal(found["right"], wide.argmax(-1) == codes)
    gradient = jax.grad(lambda x: code_errors(x, codes)["errors"].sum())(logits)
    np.testing.assert_allclose(gradient, probabilities - np.eye(11)[codes], atol=1e-6)


def test_rank_loss_against_a_loop_in_float64():
    rng = np.random.default_rng(1)
    predicted = rng.normal(scale=2, size=(3, 6)).astype(np.float32)
    errors = rng.uniform(size=(3, 6)).astype(np.float32)
    errors[1, 4] = errors[1, 2]  # no order between these two
    errors[2] = 0.5  # and none at all
    total, pairs, expected_gradient = 0.0, 0, np.zeros((3, 6))
    for b in range(3):
        for i in range(6):
            for j in range(6):
                if errors[b, i] == errors[b, j]:
                    continue
                apart = np.float64(predicted[b, i]) - np.float64(predicted[b, j])
                says_i, i_is = 1 / (1 + np.exp(-apart)), errors[b, i] > errors[b, j]
                total -= np.log(says_i) if i_is else np.log(1 - says_i)
                expected_gradient[b, i] += says_i - i_is
                expected_gradient[b, j] -= says_i - i_is
                pairs += 1
    assert pairs == 2 * (15 + 14)
    loss, (to_predicted, to_errors) = jax.value_and_grad(rank_loss, (0, 1))(predicted, errors)
    assert float(loss) == pytest.approx(total / pairs, rel=1e-6)
    np.testing.assert_allclose(to_predicted, expected_gradient / pairs, atol=1e-7)
    assert not np.any(to_errors)
    assert rank_loss(predicted, np.ones((3, 6))) == 0


def test_the_hard_share_grows_to_a_half():
    share = hard_share(200)
    assert [float(share(jnp.int32(step))) for step in (0, 50, 200, 300)] == [0, 0.125, 0.5, 0.5]


def test_twins_hold_what_the_teacher_needs_and_only_then():
    tx = make_optimizer(BOTH.optim, lambda _: 1e-3)
    state = jax.eval_shape(lambda: init_state(BOTH, tx))
    assert set(state["momentum"]["mim"]) == set(TEACHER)
    assert set(state["params"]["mim"]) == {*TEACHER, "mask_token", "out"}
    assert "mim" not in jax.eval_shape(lambda: init_state(MIM, tx))["momentum"]
    params = {"mim": {name: 1 for name in (*TEACHER, "out")}, "vit": 1, "temperature": 1}
    twins = jax.tree.map(lambda _: 2, flip.twin_params(params))
    assert flip.with_twins(params, twins) == {
        "mim": {**dict.fromkeys(TEACHER, 2), "out": 1},
        "vit": 2,
        "temperature": 1,
    }


@pytest.mark.release
def test_same_steps_on_a_mesh_and_in_parts(small):  # noqa: F811
    alone = run(1, 1, BOTH, tokenizer=small)
    assert {"loss_mim", "mim_accuracy", "loss_mim_rank"} <= set(alone[0][0])
    parts = replace(BOTH, optim=replace(BOTH.optim, accum_steps=2))
    assert_same_steps(run(8, 2, parts, tokenizer=small), alone)


@pytest.mark.release
def test_the_step_learns_resumes_and_takes_the_tokenizer_as_an_argument(small, tmp_path):  # noqa: F811
    mesh = partition.make_mesh(MeshConfig(), jax.devices()[:2])
    # Steps large enough to learn.
    optim = replace(BOTH.optim, lr=3e-3, warmup_steps=0, schedule="constant", weight_decay=0.0)
    cfg = replace(BOTH, optim=optim)
    compiled = Compiled(cfg, mesh, steps_per_epoch=40, steps=40)
    assert "mim" in compiled.target["momentum"]
    batch = partition.to_global(next(batches(1)), mesh)
    tokenizer = partition.replicated(small, mesh)
    meta = {"config": config.to_dict(cfg), "vocab_hash": "", "data_hash": ""}
    meta["visual_tokenizer"] = "a" * 64

    state, seen = compiled.init(), []
    with checkpoint.Checkpointer(tmp_path, CheckpointConfig(), meta) as saving:
        for step in range(1, 41):
            state, metrics = compiled.step(state, batch, tokenizer)
            seen.append({name: float(value) for name, value in metrics.items()})
            if step == 37:
                saving.save(step, state)
    assert seen[0]["loss_mim"] == pytest.approx(np.log(SMALL.codes), rel=0.1)
    assert np.mean([s["loss_mim"] for s in seen[-5:]]) < 0.8 * seen[0]["loss_mim"]
    assert np.mean([s["mim_accuracy"] for s in seen[-5:]]) > 0.3
    assert seen[0]["loss_mim_rank"] == pytest.approx(np.log(2), rel=0.1)
    # Blind guessing, ln 2 = 0.69, is left behind; noise pictures are learnt by heart, and slowly.
    assert np.mean([s["loss_mim_rank"] for s in seen[-5:]]) < 0.66

    with checkpoint.Checkpointer(tmp_path, CheckpointConfig(), meta) as resuming:
        resumed = resuming.restore(compiled.target)
    for _ in range(3):
        resumed, _ = compiled.step(resumed, batch, tokenizer)
    jax.tree.map(np.testing.assert_array_equal, resumed, state)

    # Another tokenizer of the same sizes: no new program, other codes.
    others = {**small.params, "codebook": small.params["codebook"][::-1]}
    other = partition.replicated(replace(small, params=others), mesh)
    programs = compiled.step._cache_size()
    _, metrics = compiled.step(resumed, batch, other)
    assert compiled.step._cache_size() == programs
    assert float(metrics["loss_mim"]) > 2 * seen[-1]["loss_mim"]


@pytest.mark.slow
def test_regions_steer_the_step():
    """With one region that is all that is hidden, the loss is of its patches."""
    cfg = replace(MIM, loss=replace(MIM.loss, mim_masking="region", mim_share=0.25))
    tx = make_optimizer(cfg.optim, lambda _: 1e-3)
    step = jax.jit(make_train_step(cfg, tx, lambda _: jnp.float32(1e-3), lambda _: 0.0))
    state, (batch,) = init_state(cfg, tx), batches(1)
    batch["regions"] = np.zeros((16, 16), np.uint32)
    batch["regions"][:, [0, 1, 4, 5]] = 1 << 9

    def loss(image):
        return float(step(state, batch | {"image": image})[1]["loss_mim"])

    pixels = np.asarray(normalize_pixels(jnp.asarray(batch["image"])))
    flat = pixels.copy()
    flat[:, :16, :16] = 0.0
    assert loss(pixels) == pytest.approx(1.0, abs=0.1)
    assert loss(flat) < 0.2  # nothing varies in the hidden patches


@pytest.fixture
def folder(small, tmp_path):  # noqa: F811
    save_tokenizer(tmp_path / "vq", small, {})
    return tmp_path / "vq"


def test_the_tokenizer_of_a_run(folder, small):  # noqa: F811
    cfg = replace(BOTH, loss=replace(BOTH.loss, mim_tokenizer=str(folder)))
    found, digest = tokenizer_of(cfg)
    assert found.cfg == small.cfg and len(digest) == 64
    assert tokenizer_of(MIM) is None
    wrong = replace(cfg, model=replace(cfg.model, mim_vocab=9))
    with pytest.raises(ValueError, match=r"model\.mim_vocab=9: .* has 24 codes; set --config"):
        tokenizer_of(wrong)
    absent = replace(cfg, loss=replace(cfg.loss, mim_tokenizer="nowhere"))
    with pytest.raises(FileNotFoundError, match=r"loss\.mim_tokenizer='nowhere': .* holds no"):
        tokenizer_of(absent)


def test_another_tokenizer_is_another_run(tmp_path):
    stored = {"config": {}, "vocab_hash": "v", "data_hash": "d", "step": 3}
    check_same_run(stored, stored | {"visual_tokenizer": None}, tmp_path)
    with pytest.raises(ValueError, match="visual_tokenizer is 'a' in the checkpoint and 'b' now"):
        check_same_run(
            stored | {"visual_tokenizer": "a"}, stored | {"visual_tokenizer": "b"}, tmp_path
        )


@pytest.mark.release
def test_a_run_from_data_to_another_tokenizer(folder, small, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Codes and regions of drawn faces; the digest is in the checkpoint and guards it."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    fields = ["loss.weights.mim=1", "loss.weights.itm=0", "model.mim_depth=1", "epochs=0.5"]
    fields += ["model.vision.patch_size=8", "loss.mim_masking=region", "eval.rerank=0"]
    fields += ["loss.mim_target=tokens", f"loss.mim_tokenizer={folder}", "model.mim_vocab=24"]
    command = ["--config", "configs/debug.py", "--workdir", str(tmp_path / "run")]
    command += [f"--config.{field}" for field in fields]
    assert main.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert {"loss_mim", "mim_accuracy"} <= set(rows[1])
    meta = checkpoint.read_meta(tmp_path / "run")
    digest = json.loads((folder / "tokenizer.json").read_text())["digest"]
    assert meta["visual_tokenizer"] == digest
    assert not any("codebook" in name for name in meta["arrays"]["params"])
    moved = jax.tree.map(lambda x: x + 1, small.params)
    save_tokenizer(tmp_path / "other", replace(small, params=moved), {})
    capsys.readouterr()
    assert main.main([*command, f"--config.loss.mim_tokenizer={tmp_path / 'other'}"]) == 1
    assert "visual_tokenizer is" in capsys.readouterr().err


def test_the_compile_command_knows_the_step(folder):
    loss = replace(BOTH.loss, mim_tokenizer=str(folder), mim_masking="region")
    model = replace(BOTH.model, mim_loss_head=False)
    cfg, mesh = replace(BOTH, loss=loss, model=model), partition.make_mesh(MeshConfig())
    inputs = abstract_batch(cfg, mesh), abstract_tokenizer(cfg, mesh)
    assert inputs[0]["regions"].shape == (16, 16)
    compiled = Compiled(cfg, mesh, steps_per_epoch=1, steps=1)
    _, metrics = compiled.step.trace(compiled.target, *inputs).out_info
    assert metrics["mim_accuracy"].shape == ()
    assert abstract_tokenizer(MIM, mesh) is None
