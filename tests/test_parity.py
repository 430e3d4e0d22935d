"""Our whole train step in float32 against the PyTorch peer in float64, three steps in a row.

The peer shares no line with this code. Weights, twins, queue, batches and negatives are drawn by
numpy, exact in float32; dropout is off. The recorded tensors of `test_golden.py` cover one case,
these are the others.
"""

import collections
import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flip_jax import optim
from flip_jax.config import (
    Config,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    VisionConfig,
)
from flip_jax.convert import torch_flip
from flip_jax.losses.flip import flip_loss
from flip_jax.models import flip
from flip_jax.train import TrainState, make_train_step

torch = pytest.importorskip("torch", reason="the peer needs PyTorch (extra `torch`)")
from benchmarks.torch_peer import PeerConfig, TorchFlip, make_optimizer, official_name  # noqa: E402

# Where AdamW itself keeps float32 noise small. optax takes 1 - beta2**step in float32, which
# cancels: at 0.999 its steps are 1e-5 too short, so the betas are exact in float32. And Adam turns
# noise n in a gradient near zero into a step of lr * n / eps: n is some 1e-7 here.
OPTIM = OptimConfig(lr=1e-3, beta1=1 - 2**-3, beta2=1 - 2**-8, eps=1e-4)
ALPHAS = (0.3, 0.0, 0.4)
# Tiny arrays: compile time is all that counts.
QUICK = {"xla_backend_optimization_level": 0}
SMALL = ModelConfig(
    vision=VisionConfig(image_size=21, patch_size=7, width=24, depth=2, heads=3, mlp_width=40),
    text=TextConfig(
        vocab_size=30, max_length=7, positions=9, width=20, depth=2, heads=2, mlp_width=36
    ),
    embed_dim=7,
    dtype="float32",
)
OTHER = ModelConfig(
    vision=VisionConfig(image_size=20, patch_size=5, width=18, depth=1, heads=2, mlp_width=50),
    text=TextConfig(
        vocab_size=25, max_length=6, positions=6, width=33, depth=3, heads=3, mlp_width=34
    ),
    embed_dim=13,
    dtype="float32",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What differs from four rows of distinct groups, a pointer of 0 and the start temperature."""

    model: ModelConfig = SMALL
    rows: int = 4
    queue_size: int = 12
    pointer: int = 0
    temperature: float = 0.07
    groups: tuple[int, ...] | None = None  # of every batch; None = distinct

    @property
    def cfg(self) -> Config:
        text = dataclasses.replace(self.model.text, dropout=0.0)
        return Config(
            model=dataclasses.replace(self.model, text=text),
            loss=LossConfig(queue_size=self.queue_size, candidates="global"),
        )


CASES = {
    "pointer wraps": Case(pointer=8),
    "temperature above its range": Case(temperature=0.9),
    "temperature below its range": Case(temperature=-0.3),
    "repeated groups": Case(groups=(5, 5, 6, 5)),
    "other sizes": Case(OTHER, rows=3, queue_size=9),
}
parametrize = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


# Both sides ---------------------------------------------------------------------------------------


def official_start(case: Case) -> dict[str, np.ndarray]:
    """Online weights, twins and queue under the official names; no norm or bias is trivial."""
    rng = np.random.default_rng(0)
    state = {}
    for name, value in make_peer(case).to_official().items():
        draw = rng.normal(size=tuple(value.shape))
        if name.endswith("_queue"):
            draw /= np.linalg.norm(draw, axis=0)
        elif "norm" in name.lower():
            draw = 0.2 * draw + name.endswith("weight")
        elif value.ndim > 1:
            draw /= value[0].numel() ** 0.5
        else:
            draw *= 0.2
        state[name] = draw.astype(np.float32)
    groups = case.groups or (0,)
    state["idx_queue"] = rng.choice([*groups, -100], (1, case.queue_size))
    state["ptr_queue"] = np.array([case.pointer])
    state["temp"] = np.float32(case.temperature)
    return state


def make_peer(case: Case) -> TorchFlip:
    vision, text = case.model.vision, case.model.text
    config = PeerConfig(
        **{f"vision_{n}": getattr(vision, n) for n in ("width", "depth", "heads")},
        **{f"text_{n}": getattr(text, n) for n in ("width", "depth", "heads")},
        vision_mlp=vision.mlp_width,
        text_mlp=text.mlp_width,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        vocab_size=text.vocab_size,
        positions=text.positions,
        enc_id=text.enc_id,
        embed_dim=case.model.embed_dim,
        queue_size=case.queue_size,
        dropout=0.0,
    )
    return TorchFlip(config).double().train()


def start(case: Case) -> tuple[TorchFlip, dict, dict, dict]:
    """The peer, and the same params, twins and queue in our trees."""
    state, model = official_start(case), case.cfg.model
    peer = make_peer(case)
    peer.load_official({name: torch.from_numpy(np.asarray(v)) for name, v in state.items()})
    params = torch_flip.params_from_official(state, model)
    twins = torch_flip.params_from_official(state, model, twin=True)
    return peer, params, twins, torch_flip.queue_from_official(state)


def batch_of(case: Case, step: int) -> dict:
    """A batch in our layout, with one negative per row that respects the groups.

    Texts of 1, 2, 3 ... tokens, going on from step to step and round at the longest.
    """
    rng = np.random.default_rng(100 + step)
    vision, text = case.model.vision, case.model.text
    group = np.asarray(case.groups or range(10 * step, 10 * step + case.rows), np.int32)
    others = [np.flatnonzero(group != g) for g in group]
    shape = (case.rows, vision.image_size, vision.image_size, 3)
    # torch gives [PAD] = 0 no gradient wherever it stands; it stands on padding only.
    ids = rng.integers(1, text.vocab_size - 1, (case.rows, text.max_length))
    length = 1 + (case.rows * step + np.arange(case.rows)) % text.max_length
    return {
        "image": rng.normal(size=shape).astype(np.float32),
        "token_ids": ids.astype(np.int32),
        "token_mask": np.arange(text.max_length) < length[:, None],
        "group": group,
        "negatives": {n: np.array([rng.choice(o) for o in others]) for n in ("image", "text")},
    }


def for_peer(batch: dict, rows: slice = slice(None)) -> dict:
    """The batch as `TorchFlip.losses` takes it."""
    tensors = {
        "image": np.ascontiguousarray(batch["image"].transpose(0, 3, 1, 2)).astype(np.float64),
        "ids": batch["token_ids"].astype(np.int64),
        "mask": batch["token_mask"].astype(np.int64),
        "idx": batch["group"].astype(np.int64),
    }
    tensors = {name: torch.from_numpy(value[rows]) for name, value in tensors.items()}
    negatives = (torch.from_numpy(batch["negatives"][n]) for n in ("image", "text"))
    return tensors | {"negatives": tuple(negatives)}


@functools.cache
def our_gradient(cfg: Config):
    graphdef = flip.build(cfg.model)

    def gradient(params, twins, queue, batch, alpha):
        def loss(params):
            return flip_loss(
                params,
                twins,
                queue,
                batch,
                alpha,
                None,
                cfg=cfg,
                graphdef=graphdef,
                negatives=batch["negatives"],
            )

        twins = flip.update_twin(twins, params, cfg.loss.momentum)
        return jax.grad(loss, has_aux=True)(params)

    return jax.jit(gradient, compiler_options=QUICK)


@functools.cache
def our_step(cfg: Config):
    alphas, rate = jnp.asarray(ALPHAS), lambda _: jnp.float32(OPTIM.lr)
    tx = optim.make_optimizer(OPTIM, rate)
    step = make_train_step(cfg, tx, rate, lambda number: alphas[number])
    return tx, jax.jit(step, compiler_options=QUICK)


# Comparison ---------------------------------------------------------------------------------------


def has_no_gradient(name: str) -> bool:
    """Softmax does not change when one number is added to all logits of a row."""
    return name.endswith(("k_proj.bias", "key.bias"))


def close(ours, expected, atol, what):
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape, what
    np.testing.assert_allclose(ours, expected, rtol=0, atol=atol, err_msg=what)


def close_loss(ours, expected: torch.Tensor | float, what) -> None:
    """1e-5, or four units of float32 where a loss is too large for that."""
    expected = float(expected.detach() if isinstance(expected, torch.Tensor) else expected)
    close(ours, expected, max(1e-5, 4 * np.spacing(np.float32(expected))), what)


def check_gradients(grads: dict, expected: dict[str, torch.Tensor], cfg: Config, atol) -> None:
    grads = torch_flip.params_to_official(grads, cfg.model)
    assert set(grads) == set(expected)
    for name, value in expected.items():
        value = value.numpy()
        if has_no_gradient(name):
            assert np.abs(value).max() < 1e-12, name
            kernel = expected[name.replace("bias", "weight")]
            close(grads[name], value, atol * float(kernel.abs().max()), name)
        else:
            close(grads[name], value, atol * np.abs(value).max(), name)


def peer_gradients(peer: TorchFlip, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {official_name(n): p for n, p in peer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    pairs = zip(named.items(), grads, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


@parametrize
@pytest.mark.parametrize(("alpha", "number"), [(0.0, 0), (0.4, 1)])
def test_gradients(case, alpha, number):
    cfg, batch = case.cfg, batch_of(case, number)
    peer, params, twins, queue = start(case)
    low, high = cfg.loss.temperature_min, cfg.loss.temperature_max
    params["temperature"] = np.clip(params["temperature"], np.float32(low), np.float32(high))
    out = peer.losses(**for_peer(batch), alpha=alpha)
    grads, aux = our_gradient(cfg)(params, twins, queue, batch, alpha)
    for name in ("loss_itc", "loss_itm"):
        close_loss(aux["metrics"][name], out[name], name)
    for name in ("image", "text"):
        close(aux["twin_embeds"][name], out[f"{name}_feat_m"], 1e-5, f"twin {name}")
    close(aux["itm_logits"], out["itm_logits"].detach(), 1e-5, "itm logits")
    expected = peer_gradients(peer, out["loss_itc"] + out["loss_itm"])
    check_gradients(grads, expected, cfg, 1e-5)


@parametrize
def test_three_steps(case):
    cfg, model = case.cfg, case.cfg.model
    peer, params, twins, queue = start(case)
    optimizer = make_optimizer(peer, OPTIM.lr, OPTIM.weight_decay)
    optimizer.param_groups[0] |= {"betas": (OPTIM.beta1, OPTIM.beta2), "eps": OPTIM.eps}
    tx, step = our_step(cfg)
    state = jax.tree.map(
        jnp.asarray,
        TrainState(
            step=np.int32(0), params=params, opt_state=tx.init(params), momentum=twins, queue=queue
        ),
    )
    for number, alpha in enumerate(ALPHAS):
        batch = batch_of(case, number)
        state, metrics = step(state, batch)
        optimizer.zero_grad()
        out = peer.losses(**for_peer(batch), alpha=alpha)
        (out["loss_itc"] + out["loss_itm"]).backward()
        optimizer.step()
        for name in ("loss_itc", "loss_itm"):
            close_loss(metrics[name], out[name], f"{name} of step {number}")
        close(metrics["temperature"], out["temp"], 1e-6, "temperature")
    ours = torch_flip.params_to_official(state["params"], model)
    ours |= torch_flip.params_to_official(state["momentum"], model, twin=True)
    ours |= torch_flip.queue_to_official(state["queue"])
    expected = {n: v for n, v in peer.to_official().items() if not n.endswith("position_ids")}
    assert set(ours) == set(expected)
    for name, value in expected.items():
        if not has_no_gradient(name):  # pure noise, the larger the lower the temperature
            close(ours[name], value.detach(), 1e-5, name)
    assert int(ours["ptr_queue"][0]) == (case.pointer + 3 * case.rows) % case.queue_size
    np.testing.assert_array_equal(ours["idx_queue"], expected["idx_queue"])


def test_local_candidates():
    """As two ranks of the reference: each its own ITC, one queue, one ITM over all rows."""
    case = CASES["repeated groups"]
    loss = dataclasses.replace(case.cfg.loss, candidates="local", local_batch=2)
    cfg, batch = dataclasses.replace(case.cfg, loss=loss), batch_of(case, 0)
    peer, params, twins, queue = start(case)
    expected_itc, expected = 0.0, collections.defaultdict(float)

    def add_gradients(model: TorchFlip, loss: torch.Tensor) -> None:
        for name, value in peer_gradients(model, loss).items():
            expected[name] += value

    for rows in (slice(0, 2), slice(2, 4)):
        rank = copy.deepcopy(peer)
        unused = {"negatives": (torch.tensor([1, 0]),) * 2}
        itc = rank.losses(**for_peer(batch, rows) | unused, alpha=0.4)["loss_itc"] / 2
        add_gradients(rank, itc)
        expected_itc += itc.item()
    out = peer.losses(**for_peer(batch), alpha=0.4)
    add_gradients(peer, out["loss_itm"])
    grads, aux = our_gradient(cfg)(params, twins, queue, batch, 0.4)
    close_loss(aux["metrics"]["loss_itc"], expected_itc, "itc")
    close_loss(aux["metrics"]["loss_itm"], out["loss_itm"], "itm")
    assert abs(expected_itc - out["loss_itc"].item()) > 1e-3  # the whole batch gives another loss
    check_gradients(grads, expected, cfg, 1e-5)
