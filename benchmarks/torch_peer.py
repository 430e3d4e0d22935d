"""One FLIP pretraining step in PyTorch, built from the modules of `transformers`.

It shares no line with `flip_jax` and serves twice: as the peer whose speed `train_step.py` quotes,
and as the oracle of the parity tests (float32 and float64). It follows the official
implementation (FaceCaption-15M, `models/fflip_pretrain.py`) to the letter; where a choice exists
that changes no result, the faster one is taken: fused attention in both towers, one `foreach`
momentum update, fused AdamW.

    model = TorchFlip(PeerConfig())
    optimizer = make_optimizer(model, lr=3e-5)
    losses = train_step(model, optimizer, dict(image=..., ids=..., mask=..., idx=...), alpha=0.4)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import BlipTextConfig, BlipTextModel, CLIPVisionConfig, CLIPVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

TEMPERATURE_RANGE = (0.001, 0.5)
OUTSIDE_TOP_K = -100.0  # the official score of a pair that re-ranking does not look at


@dataclass(frozen=True)
class PeerConfig:
    """Sizes of both towers and constants of the losses. Default: the published model."""

    image_size: int = 224  # pixels, square
    patch_size: int = 16
    vision_width: int = 768
    vision_depth: int = 12
    vision_heads: int = 12
    vision_mlp: int = 3072
    vocab_size: int = 30524
    positions: int = 512
    text_width: int = 768
    text_depth: int = 12
    text_heads: int = 12
    text_mlp: int = 3072
    dropout: float = 0.1  # of the text towers; the vision towers have none
    embed_dim: int = 256
    queue_size: int = 61_440
    momentum: float = 0.995
    temperature: float = 0.07
    enc_id: int = 30523  # [ENC], which replaces [CLS] in the fused passes
    attention: Literal["sdpa", "eager"] = "sdpa"

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_width {width} is no multiple of {tower}_heads {heads}")
        if not 0 <= self.enc_id < self.vocab_size:
            raise ValueError(f"enc_id {self.enc_id} is not below vocab_size {self.vocab_size}")
        if self.attention not in ("sdpa", "eager"):
            raise ValueError(f"attention is {self.attention!r}; allowed: 'sdpa', 'eager'")


class SdpaTextAttention(BlipTextSelfAttention):
    """`BlipTextSelfAttention`, which `transformers` only has in eager form, on fused attention."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

        # Cross-attention comes without a mask: every image token is visible.
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = heads(self.query(hidden_states))
        context = F.scaled_dot_product_attention(
            query,
            heads(self.key(source)),
            heads(self.value(source)),
            # Under autocast the mask comes in the type of the embeddings, not of the query.
            attn_mask=None if attention_mask is None else attention_mask.to(query.dtype),
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return context.transpose(1, 2).flatten(2), None


class Towers(nn.Module):
    """Vision tower, text tower and their projections: what exists online and as momentum twin."""

    def __init__(self, config: PeerConfig) -> None:
        super().__init__()
        vision = CLIPVisionConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_size=config.vision_width,
            num_hidden_layers=config.vision_depth,
            num_attention_heads=config.vision_heads,
            intermediate_size=config.vision_mlp,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
            attn_implementation=config.attention,
        )
        text = BlipTextConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.positions,
            hidden_size=config.text_width,
            encoder_hidden_size=config.vision_width,
            num_hidden_layers=config.text_depth,
            num_attention_heads=config.text_heads,
            intermediate_size=config.text_mlp,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            layer_norm_eps=1e-12,
            is_decoder=True,  # builds the cross-attention; the forward passes stay bidirectional
            bos_token_id=None,  # these three are for generation, and must be inside the vocabulary
            eos_token_id=None,
            sep_token_id=None,
        )
        self.visual_encoder = CLIPVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        if config.attention == "sdpa":
            for module in self.text_encoder.modules():
                if isinstance(module, BlipTextSelfAttention):
                    module.__class__ = SdpaTextAttention  # the same parameters, another forward
        self.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
        self.text_proj = nn.Linear(config.text_width, config.embed_dim)

    def image_tokens(self, image: Tensor) -> Tensor:
        """Normalised image [B, 3, H, W] -> tokens [B, 1 + patches, vision_width].

        The last norm is applied to all tokens, where CLIP has it on the class token only.
        """
        states = self.visual_encoder(pixel_values=image).last_hidden_state
        return self.visual_encoder.post_layernorm(states)

    def text_states(self, ids: Tensor, mask: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        """Token ids and mask [B, S] -> states [B, S, text_width].

        With `image_tokens` [B, N, vision_width] every layer attends to them (fused pass).
        """
        return self.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=image_tokens
        ).last_hidden_state

    def image_feat(self, image_tokens: Tensor) -> Tensor:
        """Image tokens [B, N, vision_width] -> unit vectors [B, embed_dim]."""
        return F.normalize(self.vision_proj(image_tokens[:, 0]), dim=-1)

    def text_feat(self, text_states: Tensor) -> Tensor:
        """Text states [B, S, text_width] -> unit vectors [B, embed_dim]."""
        return F.normalize(self.text_proj(text_states[:, 0]), dim=-1)


class TorchFlip(nn.Module):
    """The pretraining model with its momentum twin, queues and both losses.

    Args:
        config: Sizes and constants. All weights are random; `load_official` sets them.
    """

    def __init__(self, config: PeerConfig) -> None:
        super().__init__()
        self.config = config
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        shape = (config.embed_dim, config.queue_size)
        self.register_buffer("image_queue", F.normalize(torch.randn(shape), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(shape), dim=0))
        self.register_buffer("idx_queue", torch.full((1, config.queue_size), -100))
        self.register_buffer("ptr_queue", torch.zeros(1, dtype=torch.long))
        self.online = Towers(config)
        self.itm_head = nn.Linear(config.text_width, 2)
        self.twin = copy.deepcopy(self.online).requires_grad_(False)
        self._average = get_ema_multi_avg_fn(config.momentum)

    def losses(
        self,
        image: Tensor,
        ids: Tensor,
        mask: Tensor,
        idx: Tensor,
        alpha: float,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """One forward of pretraining, with its side effects in the official order.

        Temperature clamped in place, online features, momentum update, momentum features, ITC
        against the given batch and the queue, queue write, ITM.

        Args:
            image: Normalised images [B, 3, H, W], the model's float type.
            ids: Token ids [B, S] int64, [CLS] at position 0.
            mask: 1 for a token, 0 for padding, [B, S] int64.
            idx: Identity of each image [B] int64; equal ones are never each other's negatives in
                ITM. ITC does not look at it.
            alpha: Weight of the momentum targets, 0 to 1.
            negatives: Index into the batch of the image for each text and of the text for each
                image, two [B] int64. Drawn from the global generator if None.

        Returns:
            `loss_itc` and `loss_itm` (to be added), and every intermediate result by name.

        Raises:
            ValueError: The batch does not divide the queue, or a row has no possible negative.
        """
        batch_size, queue_size = len(image), self.config.queue_size
        if queue_size % batch_size:
            raise ValueError(
                f"queue_size {queue_size} is not a multiple of the batch size {batch_size}; "
                "the official queue never wraps inside a batch"
            )
        with torch.no_grad():
            self.temp.clamp_(*TEMPERATURE_RANGE)
        # A copy, because the optimizer changes the parameter in place.
        out = {"temp": self.temp.detach().clone()}
        out["image_tokens"] = self.online.image_tokens(image)
        out["image_feat"] = self.online.image_feat(out["image_tokens"])
        out["text_states"] = self.online.text_states(ids, mask)
        out["text_feat"] = self.online.text_feat(out["text_states"])
        out |= self._momentum_features(image, ids, mask)
        out |= self._contrast(out, alpha)
        self._enqueue(out["image_feat_m"], out["text_feat_m"], idx)
        out |= self._negatives(out, idx, negatives)
        out |= self._match(out, ids, mask)
        return out

    @torch.no_grad()
    def _momentum_features(self, image: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Moves the twin towards the online towers, then encodes with it."""
        self._average(list(self.twin.parameters()), list(self.online.parameters()), None)
        tokens = self.twin.image_tokens(image)
        states = self.twin.text_states(ids, mask)
        return {
            "image_tokens_m": tokens,
            "image_feat_m": self.twin.image_feat(tokens),
            "text_states_m": states,
            "text_feat_m": self.twin.text_feat(states),
        }

    def _contrast(self, out: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
        """ITC: soft cross-entropy of [B, B + Q] similarities, both directions."""
        images = torch.cat([out["image_feat_m"].t(), self.image_queue], dim=1)
        texts = torch.cat([out["text_feat_m"].t(), self.text_queue], dim=1)
        result = {}
        for name, feat, candidates in (("i2t", "image_feat", texts), ("t2i", "text_feat", images)):
            with torch.no_grad():
                sim_m = out[f"{feat}_m"] @ candidates / self.temp
                targets = F.softmax(sim_m, dim=1).mul_(alpha)
                targets.diagonal().add_(1 - alpha)
            sim = out[feat] @ candidates / self.temp
            result[f"sim_{name}"] = sim
            result[f"sim_{name}_m"] = sim_m
            result[f"sim_{name}_targets"] = targets
            result[f"loss_{name}"] = F.cross_entropy(sim, targets)
        result["loss_itc"] = (result["loss_i2t"] + result["loss_t2i"]) / 2
        return result

    @torch.no_grad()
    def _enqueue(self, image_feat_m: Tensor, text_feat_m: Tensor, idx: Tensor) -> None:
        columns = self.ptr_queue + torch.arange(len(idx), device=idx.device)
        self.image_queue[:, columns] = image_feat_m.t().to(self.image_queue.dtype)
        self.text_queue[:, columns] = text_feat_m.t().to(self.text_queue.dtype)
        self.idx_queue[:, columns] = idx
        self.ptr_queue.copy_((self.ptr_queue + len(idx)) % self.config.queue_size)

    @torch.no_grad()
    def _negatives(
        self, out: Mapping[str, Tensor], idx: Tensor, given: tuple[Tensor, Tensor] | None
    ) -> dict[str, Tensor]:
        """Sampling weights [B, B] from the online similarities, and the negatives."""
        sim = out["image_feat"] @ out["text_feat"].t() / self.temp
        same = idx[:, None] == idx[None, :]
        weights_i2t = F.softmax(sim, dim=1).masked_fill(same, 0)
        weights_t2i = F.softmax(sim.t(), dim=1).masked_fill(same, 0)
        if given is None:  # all images first, then all texts
            given = draw_negatives(weights_t2i), draw_negatives(weights_i2t)
        return {
            "itm_weights_i2t": weights_i2t,
            "itm_weights_t2i": weights_t2i,
            "neg_image_idx": given[0],
            "neg_text_idx": given[1],
        }

    def _match(self, out: Mapping[str, Tensor], ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """ITM: B positives, then B texts with a negative image, then B images with a negative text.

        Two fused passes (B and 2B rows), as the official forward has them.
        """
        tokens, ids = out["image_tokens"], self.with_enc(ids)
        wrong_image, wrong_text = out["neg_image_idx"], out["neg_text_idx"]
        positive = self.online.text_states(ids, mask, tokens)
        negative = self.online.text_states(
            torch.cat([ids, ids[wrong_text]]),
            torch.cat([mask, mask[wrong_text]]),
            torch.cat([tokens[wrong_image], tokens]),
        )
        logits = self.itm_head(torch.cat([positive[:, 0], negative[:, 0]]))
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(ids)] = 1
        return {
            "fused_states_pos": positive,
            "fused_states_neg": negative,
            "itm_logits": logits,
            "itm_labels": labels,
            "loss_itm": F.cross_entropy(logits, labels),
        }

    def with_enc(self, ids: Tensor) -> Tensor:
        """Token ids [B, S] with [ENC] in place of the first token."""
        ids = ids.clone()
        ids[:, 0] = self.config.enc_id
        return ids

    @torch.no_grad()
    def load_official(self, state: Mapping[str, Tensor]) -> None:
        """Sets all weights and queues from a state dict with the official key names.

        Args:
            state: Name -> tensor. The constant `position_ids` may be there or not.

        Raises:
            ValueError: A key is missing or left over, or a shape differs.
        """
        own = {official_name(name): tensor for name, tensor in self.state_dict().items()}
        state = {name: t for name, t in state.items() if not name.endswith(".position_ids")}
        missing, left_over = sorted(own.keys() - state), sorted(state.keys() - own)
        if missing or left_over:
            raise ValueError(f"not this model's state: missing {missing}, left over {left_over}")
        for name, tensor in state.items():
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, this model {tuple(own[name].shape)}"
                )
        for name, tensor in state.items():
            own[name].copy_(tensor)

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the official key names, `position_ids` included (no copies)."""
        state = {official_name(name): tensor for name, tensor in self.state_dict().items()}
        for suffix, towers in (("", self.online), ("_m", self.twin)):
            vision, text = towers.visual_encoder.embeddings, towers.text_encoder.embeddings
            name = f"visual_encoder{suffix}.vision_model.embeddings.position_ids"
            state[name] = vision.position_ids
            state[f"text_encoder{suffix}.embeddings.position_ids"] = text.position_ids
        return state


def draw_negatives(weights: Tensor) -> Tensor:
    """One column per row, drawn with probability proportional to `weights` [B, B] -> [B] int64.

    Raises:
        ValueError: On a CPU, a row has no positive weight (all `idx` equal, or underflow).
    """
    barren = weights.sum(dim=1) <= 0
    # A GPU would be waited for here; its multinomial refuses such rows by itself.
    if weights.is_cpu and barren.any():
        rows = barren.nonzero().flatten().tolist()
        raise ValueError(
            f"rows {rows} have no possible negative: every other row of the batch has the same "
            "idx or a weight that underflows; use batches with at least two different idx"
        )
    return torch.multinomial(weights, 1).squeeze(1)


def official_name(name: str) -> str:
    """Key of `TorchFlip.state_dict()` -> key of the official checkpoint."""
    owner, _, rest = name.partition(".")
    if owner not in ("online", "twin"):
        return name
    module, _, leaf = rest.partition(".")
    if module == "visual_encoder":  # one level more, and the official spelling of the last norm
        leaf = "vision_model." + leaf.replace("post_layernorm", "post_layrnorm")
    return f"{module}{'_m' if owner == 'twin' else ''}.{leaf}"


def make_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.05) -> torch.optim.AdamW:
    """AdamW with one group: everything trained decays, norms, biases and temperature too."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trained, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True
    )


def compile_layers(model: TorchFlip, backend: str = "inductor") -> None:
    """Has `torch.compile` make kernels for the layers of all towers, once for all of a kind.

    A layer is what it fuses; whole towers take minutes to compile and hold nothing else to fuse.

    Args:
        model: Its layers are compiled when they are next called.
        backend: Of `torch.compile`.
    """
    torch.compiler.reset()
    # Both kinds of layers count as one function: in two towers each, with and without an image.
    torch._dynamo.config.recompile_limit = 64
    for towers in (model.online, model.twin):
        layers = *towers.visual_encoder.encoder.layers, *towers.text_encoder.encoder.layer
        for layer in layers:
            layer.compile(dynamic=False, backend=backend)


def train_step(
    model: TorchFlip,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Any],
    alpha: float,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """`update`, and waits for it.

    Returns:
        `loss_itc`, `loss_itm` and the temperature of this forward, `temp`.
    """
    out = update(model, optimizer, batch, alpha, autocast)
    return {name: value.item() for name, value in out.items()}


def update(
    model: TorchFlip,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Any],
    alpha: float,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Forward, backward and update.

    Args:
        model: Changed in place, left in train mode.
        optimizer: Over the model's trained parameters.
        batch: The arguments of `TorchFlip.losses` except `alpha`.
        alpha: Weight of the momentum targets.
        autocast: Type of the matrix products, `None` for the parameters' own.

    Returns:
        As `train_step`, not yet computed where the device works on its own.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    device = batch["image"].device.type
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        out = model.losses(**batch, alpha=alpha)
    (out["loss_itc"] + out["loss_itm"]).backward()
    optimizer.step()
    return {name: out[name].detach() for name in ("loss_itc", "loss_itm", "temp")}


@torch.no_grad()
def itm_scores(
    model: TorchFlip,
    image: Tensor,
    ids: Tensor,
    mask: Tensor,
    k: int,
    first_token: Literal["cls", "enc"] = "cls",
) -> dict[str, Tensor]:
    """Re-ranking scores of a gallery, as `eval/pretrain_eval.py` computes them.

    Args:
        model: Put into eval mode for the call.
        image: Normalised images [I, 3, H, W].
        ids: Token ids [T, S] int64, [CLS] at position 0.
        mask: [T, S] int64.
        k: Candidates per query that the fused pass looks at, at most min(I, T).
        first_token: Token at position 0 of the fused pass; the official evaluation leaves [CLS].

    Returns:
        `sims_i2t` [I, T] cosines; `score_i2t` [I, T] and `score_t2i` [T, I]: logit of a match plus
        cosine for the k most similar candidates of each row, -100 elsewhere.

    Raises:
        ValueError: k is not between 1 and min(I, T), or `first_token` is another word.
    """
    if not 1 <= k <= min(len(image), len(ids)):
        raise ValueError(f"k is {k}; {len(image)} images, {len(ids)} texts allow 1 to the smaller")
    if first_token not in ("cls", "enc"):
        raise ValueError(f"first_token is {first_token!r}; allowed: 'cls', 'enc'")
    was_training = model.training
    model.eval()
    towers = model.online
    tokens = towers.image_tokens(image)
    sims = towers.image_feat(tokens) @ towers.text_feat(towers.text_states(ids, mask)).t()
    if first_token == "enc":
        ids = model.with_enc(ids)

    def match_logit(images: Tensor, texts: Tensor) -> Tensor:
        states = towers.text_states(ids[texts], mask[texts], tokens[images])
        return model.itm_head(states[:, 0])[:, 1]

    score_i2t = torch.full_like(sims, OUTSIDE_TOP_K)
    for row in range(len(image)):
        top = sims[row].topk(k)
        logit = match_logit(top.indices.new_full((k,), row), top.indices)
        score_i2t[row, top.indices] = logit + top.values
    score_t2i = torch.full_like(sims.t(), OUTSIDE_TOP_K)
    for row in range(len(ids)):
        top = sims[:, row].topk(k)
        logit = match_logit(top.indices, top.indices.new_full((k,), row))
        score_t2i[row, top.indices] = logit + top.values
    model.train(was_training)
    return {"sims_i2t": sims, "score_i2t": score_i2t, "score_t2i": score_t2i}
