"""The PyTorch peer against tensors recorded from the official classes (`../shared/golden`).

The recording is float32; `A_meta.json` states how far each output is from float64. The peer in
float64 therefore has to differ by just that much, the peer in float32 by a few times as much.
"""

import json
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the peer needs PyTorch (extra `torch`)")
safetensors = pytest.importorskip("safetensors.torch", reason="the recording is in safetensors")

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.torch_peer import (  # noqa: E402
    PeerConfig,
    TorchFlip,
    itm_scores,
    make_optimizer,
    official_name,
    train_step,
)

GOLDEN = ROOT.parent / "shared" / "golden"
pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the recorded tensors (../shared/golden) are not here"
)

ALPHA = 0.4
NAMES = {  # recorded name -> name in the result of `losses`
    "vision_last_hidden_state": "image_tokens",
    "text_last_hidden_state": "text_states",
    "mm_pos_last_hidden_state": "fused_states_pos",
    "loss_ita": "loss_itc",
    "temp_after_clamp": "temp",
}
FIRST_TOKENS = {  # recorded: position 0 only
    "vision_pooler_output": "image_tokens",
    "vision_m_last_hidden_state_cls": "image_tokens_m",
    "text_m_last_hidden_state_cls": "text_states_m",
    "mm_neg_last_hidden_state_cls": "fused_states_neg",
}
UNUSED = {"pos_idx_unused"}  # the official code computes it and never reads it

precisions = pytest.mark.parametrize(
    ("dtype", "attention"),
    [(torch.float32, "sdpa"), (torch.float32, "eager"), (torch.float64, "sdpa")],
    ids=["float32-sdpa", "float32-eager", "float64-sdpa"],
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small are slower on several threads, by far on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(name):
    return safetensors.load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="module")
def meta():
    return json.loads((GOLDEN / "A_meta.json").read_text())


@pytest.fixture(scope="module")
def record():
    return load("A_io")


@pytest.fixture(scope="module")
def start():
    return load("A_params")


@pytest.fixture
def make_model(meta, start):
    def make(dtype, attention="sdpa"):
        sizes = meta["config"]
        vision, text = sizes["vision_config"], sizes["bert_config"]
        config = PeerConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            vision_width=vision["hidden_size"],
            vision_depth=vision["num_hidden_layers"],
            vision_heads=vision["num_attention_heads"],
            vision_mlp=vision["intermediate_size"],
            vocab_size=meta["special_ids"]["len"],
            positions=text["max_position_embeddings"],
            text_width=text["hidden_size"],
            text_depth=text["num_hidden_layers"],
            text_heads=text["num_attention_heads"],
            text_mlp=text["intermediate_size"],
            dropout=text["hidden_dropout_prob"],
            embed_dim=sizes["embed_dim"],
            queue_size=sizes["queue_size"],
            momentum=sizes["momentum"],
            temperature=sizes["temp"],
            enc_id=meta["special_ids"]["enc"],
            attention=attention,
        )
        model = TorchFlip(config).to(dtype)
        model.load_official(start)
        return model

    return make


def step_batch(record, step, dtype):
    """Batch of one training step; step 0 is the batch of the recorded forward."""
    names = {"image": "pixel_values", "ids": "input_ids", "mask": "attention_mask", "idx": "idx"}
    batch = {name: record[f"train/{recorded}"][step] for name, recorded in names.items()}
    batch["image"] = batch["image"].to(dtype)
    batch["negatives"] = record["train/neg_image_idx"][step], record["train/neg_text_idx"][step]
    return batch


def assert_close(actual, expected, atol, what):
    assert actual.shape == expected.shape, what
    difference = (actual.double() - expected.double()).abs().max().item()
    assert difference <= atol, f"{what}: {difference:.2e} > {atol:.2e}"


def without_zero_gradients(names, meta):
    """Leaves out the key biases, online and momentum: Adam makes steps of their rounding noise."""
    zero = set(meta["params_with_zero_gradient_in_exact_arithmetic"])
    zero |= {name.replace("_encoder.", "_encoder_m.", 1) for name in zero}
    return sorted(set(names) - zero)


@precisions
def test_forward(make_model, record, meta, dtype, attention):
    model = make_model(dtype, attention).train()
    out = model.losses(**step_batch(record, 0, dtype), alpha=ALPHA)
    noise = meta["float32_minus_float64_max_abs"]
    outputs = [name for name in record if name.startswith("out/")]
    assert outputs
    for recorded in outputs:
        name = recorded.removeprefix("out/")
        if name in UNUSED:
            continue
        first = FIRST_TOKENS.get(name)
        actual = out[first][:, 0] if first else out[NAMES.get(name, name)]
        atol = 5e-6
        if recorded in noise:
            atol = noise[recorded] * (1.001 if dtype == torch.float64 else 4)
        assert_close(actual, record[recorded], atol, recorded)
    after = model.to_official()
    for name, tensor in record.items():
        if name.startswith("after/"):
            assert_close(after[name.removeprefix("after/")], tensor, 5e-7, name)


@precisions
def test_gradients(make_model, record, meta, dtype, attention):
    model = make_model(dtype, attention).train()
    out = model.losses(**step_batch(record, 0, dtype), alpha=ALPHA)
    (out["loss_itc"] + out["loss_itm"]).backward()
    grads = {official_name(name): p.grad for name, p in model.named_parameters()}
    trained = {name.removeprefix("grad/") for name in record if name.startswith("grad/")}
    assert {name for name, grad in grads.items() if grad is not None} == trained
    informative = without_zero_gradients(trained, meta)
    for name in informative:
        expected = record[f"grad/{name}"]
        assert_close(grads[name], expected, 1e-5 * expected.abs().max().item(), name)
    for name in trained - set(informative):
        assert grads[name].abs().max() < 1e-7, name


@precisions
def test_three_steps(make_model, record, meta, dtype, attention):
    model = make_model(dtype, attention)
    optimizer = make_optimizer(model, **{k: meta["optimizer"][k] for k in ("lr", "weight_decay")})
    for step, expected in enumerate(meta["losses_float64_same_negatives"]):
        losses = train_step(model, optimizer, step_batch(record, step, dtype), ALPHA)
        # The recorded float64 run has float32(1 - alpha) on the diagonal of the targets: 2e-7.
        assert losses["loss_itc"] == pytest.approx(expected[0], abs=3e-6)
        assert losses["loss_itm"] == pytest.approx(expected[1], abs=2e-6)
        assert losses["temp"] == pytest.approx(record["train/temp_in_forward"][step].item(), 1e-6)
    after, expected = model.to_official(), load("A_params_after3")
    assert after.keys() == expected.keys()
    for name in without_zero_gradients(expected, meta):
        assert_close(after[name], expected[name], 2e-5, name)


def test_first_loss_in_float64_to_the_last_digit(make_model, record, meta):
    out = (
        make_model(torch.float64)
        .train()
        .losses(**step_batch(record, 0, torch.float64), alpha=ALPHA)
    )
    itc, itm = meta["losses_float64_same_negatives"][0]
    assert out["loss_itm"].item() == pytest.approx(itm, abs=1e-12)
    # The official target is `(1 - alpha) * eye` with a float32 eye, so the recorded diagonal is
    # off by the rounding of 0.6.
    rounding = torch.tensor(1 - ALPHA, dtype=torch.float32).item() - (1 - ALPHA)
    diagonal = [out[f"sim_{d}"].log_softmax(1).diagonal().mean().item() for d in ("i2t", "t2i")]
    assert out["loss_itc"].item() - rounding * sum(diagonal) / 2 == pytest.approx(itc, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_re_ranking_scores(make_model, dtype):
    model, record = make_model(dtype), load("A_eval")
    image, ids, mask = (
        record[f"in/{name}"] for name in ("pixel_values", "input_ids", "attention_mask")
    )
    for k, suffix in ((8, ""), (12, "_k12")):
        scores = itm_scores(model, image.to(dtype), ids, mask, k)
        assert_close(scores["sims_i2t"], record["out/sims_i2t"], 2e-6, "similarity")
        for name in ("score_i2t", "score_t2i"):
            assert_close(scores[name], record[f"out/{name}{suffix}"], 5e-6, f"{name} k {k}")
    every = len(image)  # the smaller side: row t of t2i holds all images
    for first_token in ("cls", "enc"):
        scores = itm_scores(model, image.to(dtype), ids, mask, every, first_token)
        logits = scores["score_t2i"].T - scores["sims_i2t"]
        assert_close(logits, record[f"out/itm_logit1_all_pairs_{first_token}"], 5e-6, first_token)


def test_state_keeps_every_bit(make_model, start):
    state = make_model(torch.float32).to_official()
    assert state.keys() == start.keys()
    for name, tensor in start.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def test_names_and_shapes_at_base_size():
    models = json.loads((GOLDEN / "state_dict_base.json").read_text())["models"]
    expected = models["fflip_pretrain.FFLIP_Pretrain"]["keys"]
    with torch.device("meta"):
        model = TorchFlip(PeerConfig())
    state = model.to_official()
    assert {key["name"]: tuple(key["shape"]) for key in expected} == {
        name: tuple(tensor.shape) for name, tensor in state.items()
    }
    trained = {official_name(name) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        key["name"] for key in expected if key["kind"] == "param" and key["requires_grad"]
    }
