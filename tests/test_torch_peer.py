"""The PyTorch peer against plain arithmetic in float64, its side effects and its sampling.

The plain functions restate both towers from elementary operations under the official key names,
so the peer is checked to the letter without the recorded tensors of `test_torch_peer_golden.py`.
"""

import dataclasses
import math
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the peer needs PyTorch (extra `torch`)")

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.torch_peer import (  # noqa: E402
    PeerConfig,
    TorchFlip,
    draw_negatives,
    itm_scores,
    make_optimizer,
    train_step,
)

# The widths differ, so that a mixed-up projection cannot pass.
TINY = PeerConfig(
    image_size=8,
    patch_size=4,
    vision_width=8,
    vision_depth=2,
    vision_heads=2,
    vision_mlp=16,
    vocab_size=20,
    positions=10,
    text_width=12,
    text_depth=2,
    text_heads=3,
    text_mlp=24,
    dropout=0.0,
    embed_dim=6,
    queue_size=12,
    enc_id=19,
)
ALPHA = 0.3
SHIFTED = (torch.tensor([1, 2, 3, 0]),) * 2  # negatives, where a test does not draw them


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small are slower on several threads, by far on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(config=TINY, seed=0):
    """Float64 model in which no norm, bias or momentum weight is trivial."""
    torch.manual_seed(seed)
    model = TorchFlip(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp":
                parameter.normal_(0.0, 0.3)
    return model.train()


def make_batch(seed=1, size=4, idx=None):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([6, 4, 3, 5])[:size]
    ids = torch.randint(5, 18, (size, 6), generator=generator)
    ids[:, 0] = 2
    mask = (torch.arange(6) < lengths[:, None]).long()
    image = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
    idx = torch.arange(size) if idx is None else torch.tensor(idx)
    return {"image": image, "ids": ids * mask, "mask": mask, "idx": idx}


def assert_close(actual, expected, atol, what=""):
    difference = (actual.double() - expected.double()).abs().max().item()
    assert actual.shape == expected.shape and difference <= atol, f"{what}: {difference:.2e}"


# Plain towers -------------------------------------------------------------------------------------


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, x, eps):
    x = x - x.mean(-1, keepdim=True)
    return (
        x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]
        + (w[f"{name}.bias"])
    )


def attend(query, key, value, heads, visible=None):
    """Each head on its own slice of the channels; `visible` [B, keys] bool."""
    results = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value)), strict=True):
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, :], -math.inf)
        results.append(scores.softmax(-1) @ v)
    return torch.cat(results, dim=-1)


def plain_vision(w, image, config, suffix=""):
    root, size = f"visual_encoder{suffix}.vision_model", config.patch_size
    patches = image.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5)
    kernel = w[f"{root}.embeddings.patch_embedding.weight"].flatten(1)
    x = patches.flatten(3).flatten(1, 2) @ kernel.T
    first = w[f"{root}.embeddings.class_embedding"].expand(len(image), 1, -1)
    x = torch.cat([first, x], dim=1) + w[f"{root}.embeddings.position_embedding.weight"]
    x = norm(w, f"{root}.pre_layrnorm", x, 1e-5)
    for i in range(config.vision_depth):
        layer = f"{root}.encoder.layers.{i}"
        h = norm(w, f"{layer}.layer_norm1", x, 1e-5)
        q, k, v = (linear(w, f"{layer}.self_attn.{p}_proj", h) for p in "qkv")
        h = attend(q, k, v, config.vision_heads)
        x = x + linear(w, f"{layer}.self_attn.out_proj", h)
        h = linear(w, f"{layer}.mlp.fc1", norm(w, f"{layer}.layer_norm2", x, 1e-5))
        x = x + linear(w, f"{layer}.mlp.fc2", h / (1 + torch.exp(-1.702 * h)))
    return norm(w, f"{root}.post_layrnorm", x, 1e-5)


def plain_text(w, ids, mask, config, image_tokens=None, suffix=""):
    root, eps = f"text_encoder{suffix}", 1e-12
    x = w[f"{root}.embeddings.word_embeddings.weight"][ids]
    x = x + w[f"{root}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(w, f"{root}.embeddings.LayerNorm", x, eps)

    def attention(name, x, source, visible):
        q = linear(w, f"{name}.self.query", x)
        k, v = (linear(w, f"{name}.self.{p}", source) for p in ("key", "value"))
        h = linear(w, f"{name}.output.dense", attend(q, k, v, config.text_heads, visible))
        return norm(w, f"{name}.output.LayerNorm", h + x, eps)

    for i in range(config.text_depth):
        layer = f"{root}.encoder.layer.{i}"
        x = attention(f"{layer}.attention", x, x, mask.bool())
        if image_tokens is not None:
            x = attention(f"{layer}.crossattention", x, image_tokens, None)
        h = linear(w, f"{layer}.intermediate.dense", x)
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        x = norm(w, f"{layer}.output.LayerNorm", linear(w, f"{layer}.output.dense", h) + x, eps)
    return x


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def test_towers_and_losses_equal_plain_arithmetic():
    """Everything a forward returns, recomputed from the official weights in float64."""
    model, batch = make_model(), make_batch()
    w = {name: t.clone() for name, t in model.to_official().items()}
    for name in w:  # the twin moves before it is used
        if "_m." in name and "position_ids" not in name:
            w[name] = 0.995 * w[name] + 0.005 * w[name.replace("_m.", ".", 1)]
    negatives = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1])
    out = model.losses(**batch, alpha=ALPHA, negatives=negatives)
    image, ids, mask = batch["image"], batch["ids"], batch["mask"]
    feats = {}
    for suffix in ("", "_m"):
        tokens = plain_vision(w, image, TINY, suffix)
        states = plain_text(w, ids, mask, TINY, suffix=suffix)
        feats[f"image{suffix}"] = unit(linear(w, f"vision_proj{suffix}", tokens[:, 0]))
        feats[f"text{suffix}"] = unit(linear(w, f"text_proj{suffix}", states[:, 0]))
        assert_close(out[f"image_tokens{suffix}"], tokens, 1e-12, "image tokens")
        assert_close(out[f"text_states{suffix}"], states, 1e-12, "text states")
    loss = 0.0
    for name, query, key in (("i2t", "image", "text"), ("t2i", "text", "image")):
        candidates = torch.cat([feats[f"{key}_m"], w[f"{key}_queue"].T])
        sim = feats[query] @ candidates.T / w["temp"]
        teacher = (feats[f"{query}_m"] @ candidates.T / w["temp"]).softmax(1)
        targets = ALPHA * teacher + (1 - ALPHA) * torch.eye(4, 16).double()
        assert_close(out[f"sim_{name}"], sim, 1e-10, name)
        assert_close(out[f"sim_{name}_targets"], targets, 1e-10, "targets")
        loss = loss - (targets * sim.log_softmax(1)).sum(1).mean() / 2
    assert_close(out["loss_itc"], loss, 1e-10, "itc")
    ids = torch.cat([torch.full((4, 1), 19), ids[:, 1:]], dim=1)
    tokens = plain_vision(w, image, TINY)
    texts, images = [0, 1, 2, 3] * 2 + [2, 3, 0, 1], [0, 1, 2, 3, 1, 2, 3, 0, 0, 1, 2, 3]
    fused = plain_text(w, ids[texts], mask[texts], TINY, tokens[images])
    logits = linear(w, "itm_head", fused[:, 0])
    assert_close(out["itm_logits"], logits, 1e-11, "itm logits")
    assert out["itm_labels"].tolist() == [1] * 4 + [0] * 8
    expected = -logits.log_softmax(1)[range(12), [1] * 4 + [0] * 8].mean()
    assert_close(out["loss_itm"], expected, 1e-11, "itm")


def test_fused_and_eager_attention_agree():
    # CLIP's eager attention takes its softmax in float32, hence not 1e-12.
    results = []
    for attention in ("sdpa", "eager"):
        model = make_model(dataclasses.replace(TINY, attention=attention))
        out = model.losses(**make_batch(), alpha=ALPHA, negatives=SHIFTED)
        (out["loss_itc"] + out["loss_itm"]).backward()
        results.append((out, [p.grad for p in model.parameters() if p.requires_grad]))
    (fused, fused_grads), (eager, eager_grads) = results
    for name in ("image_tokens", "text_states", "fused_states_pos", "fused_states_neg"):
        assert_close(fused[name], eager[name], 1e-6, name)
    for a, b in zip(fused_grads, eager_grads, strict=True):
        assert_close(a, b, 1e-5)


# Side effects and sampling ------------------------------------------------------------------------


def test_queue_holds_momentum_features_and_wraps():
    model = make_model()
    start = model.image_queue.clone()
    outs = []
    for step in range(4):  # 3 batches of 4 fill the 12 columns
        assert model.ptr_queue.tolist() == [4 * step % 12]
        before = model.text_queue.clone()
        outs.append(model.losses(**make_batch(seed=step, idx=[step] * 3 + [99]), alpha=ALPHA))
        # The candidates were those before this batch was written.
        tail = outs[-1]["image_feat"] @ before / outs[-1]["temp"]
        assert_close(outs[-1]["sim_i2t"][:, 4:], tail, 1e-12)
        if step == 0:
            assert torch.equal(model.image_queue[:, 4:], start[:, 4:])
    for first, step in ((0, 3), (4, 1), (8, 2)):
        columns = slice(first, first + 4)
        assert torch.equal(model.image_queue[:, columns], outs[step]["image_feat_m"].T)
        assert torch.equal(model.text_queue[:, columns], outs[step]["text_feat_m"].T)
        assert model.idx_queue[0, columns].tolist() == [step] * 3 + [99]


def test_fresh_queue():
    model = TorchFlip(TINY)
    for queue in (model.image_queue, model.text_queue):
        assert_close(queue.norm(dim=0), torch.ones(12), 1e-6)
    assert set(model.idx_queue[0].tolist()) == {-100}


@pytest.mark.parametrize(("value", "used"), [(0.9, 0.5), (1e-5, 0.001), (-0.2, 0.001), (0.2, 0.2)])
def test_temperature_is_clamped_in_place_before_use(value, used):
    model = make_model()
    with torch.no_grad():
        model.temp.fill_(value)
    out = model.losses(**make_batch(), alpha=ALPHA, negatives=SHIFTED)
    assert out["temp"].item() == pytest.approx(used) and model.temp.item() == pytest.approx(used)
    cosine = out["image_feat"] @ out["text_feat_m"].T
    assert_close(out["sim_i2t"][:, :4], cosine / used, 1e-9)
    (out["loss_itc"] + out["loss_itm"]).backward()
    assert model.temp.grad.abs() > 0  # the clamp does not stop the gradient


def test_targets_ignore_idx_and_alpha_zero_is_the_diagonal():
    out = make_model().losses(**make_batch(idx=[7, 7, 8, 9]), alpha=0.0)
    assert torch.equal(out["sim_i2t_targets"], torch.eye(4, 16, dtype=torch.float64))
    out = make_model().losses(**make_batch(idx=[7, 7, 8, 9]), alpha=1.0)
    assert_close(out["sim_t2i_targets"], out["sim_t2i_m"].softmax(1), 1e-15)


def test_equal_idx_is_never_a_negative():
    model, batch = make_model(), make_batch(idx=[7, 7, 8, 9])
    out = model.losses(**batch, alpha=ALPHA)
    sim = out["image_feat"] @ out["text_feat"].T / out["temp"]
    same = batch["idx"][:, None] == batch["idx"]
    for name, rows in (("i2t", sim), ("t2i", sim.T)):
        assert torch.equal(out[f"itm_weights_{name}"] == 0, same)
        expected = rows.softmax(1)[~same]
        assert_close(out[f"itm_weights_{name}"][~same], expected, 1e-12, name)
    for seed in range(5):  # images for the texts first, then texts for the images
        torch.manual_seed(seed)
        out = model.losses(**batch, alpha=ALPHA)
        torch.manual_seed(seed)
        assert torch.equal(out["neg_image_idx"], draw_negatives(out["itm_weights_t2i"]))
        assert torch.equal(out["neg_text_idx"], draw_negatives(out["itm_weights_i2t"]))


def test_draws_follow_the_weights():
    torch.manual_seed(0)
    weights = torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.0, 0.0], [0.2, 0.2, 0.0]])
    draws = torch.stack([draw_negatives(weights) for _ in range(2000)])
    frequency = torch.stack([(draws == column).double().mean(0) for column in range(3)], dim=1)
    assert_close(frequency, weights / weights.sum(1, keepdim=True), 0.05)


def test_row_without_a_negative_is_refused():
    with pytest.raises(ValueError, match=r"rows \[0, 1, 2, 3\] have no possible negative"):
        make_model().losses(**make_batch(idx=[5, 5, 5, 5]), alpha=ALPHA)


def test_padding_is_never_attended_to():
    model, batch = make_model(), make_batch()
    out = model.losses(**batch, alpha=ALPHA, negatives=SHIFTED)
    (out["loss_itc"] + out["loss_itm"]).backward()
    grad = model.online.text_encoder.embeddings.word_embeddings.weight.grad
    assert torch.equal(grad[0], torch.zeros(12, dtype=torch.float64))
    assert grad[2].abs().max() > 0 and grad[TINY.enc_id].abs().max() > 0


# Training -----------------------------------------------------------------------------------------


def test_one_optimizer_group_decays_everything_trained():
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, lr=1e-3)
    assert len(optimizer.param_groups) == 1
    train_step(model, optimizer, make_batch(), ALPHA)
    name = "online.text_encoder.embeddings.word_embeddings.weight"
    unused = 18  # not in the batch: zero gradient, decayed all the same
    decayed = before[name][unused] * (1 - 1e-3 * 0.05)
    assert_close(model.get_parameter(name)[unused], decayed, 1e-15)
    for name, parameter in model.named_parameters():
        if name.startswith("twin."):  # moved by the average, not by the optimizer
            online = before[name.replace("twin.", "online.", 1)]
            assert_close(parameter, 0.995 * before[name] + 0.005 * online, 1e-14, name)
        else:
            assert not torch.equal(parameter, before[name]), name


def test_training_is_deterministic_and_learns():
    runs = []
    for _ in range(2):
        model = make_model(dataclasses.replace(TINY, dropout=0.1))
        optimizer = make_optimizer(model, lr=1e-2)
        torch.manual_seed(3)
        runs.append([train_step(model, optimizer, make_batch(), ALPHA) for _ in range(30)])
    assert runs[0] == runs[1]
    total = [losses["loss_itc"] + losses["loss_itm"] for losses in runs[0]]
    assert sum(total[-5:]) < 0.8 * sum(total[:5])


def test_dropout_is_in_the_text_towers_only():
    model, batch = make_model(dataclasses.replace(TINY, dropout=0.5)), make_batch()
    for towers in (model.online, model.twin):
        tokens = [towers.image_tokens(batch["image"]) for _ in range(2)]
        states = [towers.text_states(batch["ids"], batch["mask"]) for _ in range(2)]
        assert torch.equal(*tokens) and not torch.equal(*states)
    model.eval()
    states = [model.online.text_states(batch["ids"], batch["mask"]) for _ in range(2)]
    assert torch.equal(*states)


def test_bfloat16_autocast():
    model, batch = make_model().float(), make_batch()
    batch["image"] = batch["image"].float()
    batch["negatives"] = SHIFTED
    exact = model.losses(**batch, alpha=ALPHA)
    optimizer = make_optimizer(model, lr=1e-3)
    losses = train_step(model, optimizer, batch, ALPHA, autocast=torch.bfloat16)
    assert losses["loss_itm"] == pytest.approx(exact["loss_itm"].item(), rel=0.1)
    assert losses["loss_itm"] != exact["loss_itm"].item()
    assert all(p.dtype == torch.float32 for p in model.parameters())


# Evaluation, names, bad input ---------------------------------------------------------------------


@pytest.mark.parametrize("first_token", ["cls", "enc"])
def test_itm_scores_of_single_pairs(first_token):
    model, batch = make_model(), make_batch()
    image, ids, mask = batch["image"][:3], batch["ids"], batch["mask"]
    w = model.to_official()
    scores = itm_scores(model, image, ids, mask, 2, first_token)
    assert model.training
    tokens = plain_vision(w, image, TINY)
    images = unit(linear(w, "vision_proj", tokens[:, 0]))
    texts = unit(linear(w, "text_proj", plain_text(w, ids, mask, TINY)[:, 0]))
    if first_token == "enc":
        ids = torch.cat([torch.full((4, 1), 19), ids[:, 1:]], dim=1)
    for name, sims in (("i2t", images @ texts.T), ("t2i", texts @ images.T)):
        for a, row in enumerate(sims.tolist()):
            best = sorted(range(len(row)), key=row.__getitem__)[-2:]
            for b, cosine in enumerate(row):
                i, t = (a, b) if name == "i2t" else (b, a)
                fused = plain_text(w, ids[[t]], mask[[t]], TINY, tokens[[i]])[0, 0]
                expected = linear(w, "itm_head", fused)[1].item() + cosine if b in best else -100.0
                actual = scores[f"score_{name}"][a, b].item()
                assert actual == pytest.approx(expected, abs=1e-10), (name, a, b)


def test_official_state_round_trip_is_strict():
    model, other = make_model(seed=0), make_model(seed=5)
    state = model.to_official()
    other.load_official(state)
    for name, tensor in other.to_official().items():
        assert torch.equal(tensor, state[name]), name
    without_buffers = {n: t for n, t in state.items() if not n.endswith("position_ids")}
    other.load_official(without_buffers)
    with pytest.raises(ValueError, match=r"missing \['itm_head.bias'\], left over \['head'\]"):
        other.load_official({"head" if n == "itm_head.bias" else n: t for n, t in state.items()})
    with pytest.raises(ValueError, match=r"temp has shape \(1,\), this model \(\)"):
        other.load_official(state | {"temp": torch.ones(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "image_size 8 is not a multiple of patch_size 3"),
        ({"text_heads": 5}, "text_width 12 is no multiple of text_heads 5"),
        ({"enc_id": 20}, "enc_id 20 is not below vocab_size 20"),
        ({"attention": "flash"}, "attention is 'flash'"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_bad_batch_and_bad_gallery_arguments():
    model, batch = make_model(dataclasses.replace(TINY, queue_size=10)), make_batch()
    with pytest.raises(ValueError, match="queue_size 10 is not a multiple of the batch size 4"):
        model.losses(**batch, alpha=ALPHA)
    with pytest.raises(ValueError, match="k is 5; 4 images, 4 texts"):
        itm_scores(model, batch["image"], batch["ids"], batch["mask"], 5)
    with pytest.raises(ValueError, match="first_token is 'sep'"):
        itm_scores(model, batch["image"], batch["ids"], batch["mask"], 2, "sep")
