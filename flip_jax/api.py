"""A trained model behind four functions: pictures and texts in, numpy arrays out."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from flip_jax.config import Config
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.data.transforms import BadImage, decode_image, resize_image, rgb_array
from flip_jax.models import beam, flip
from flip_jax.weights import EXPORT_FILES, Weights, read_tokenizer, read_weights

# A path, a PIL image, the bytes of an image file, or uint8 [H, W, 3].
Picture = str | os.PathLike | bytes | Image.Image | np.ndarray


def load(
    path: str | os.PathLike,
    *,
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    batch_size: int = 64,
) -> FlipModel:
    """Loads a model for use.

    Args:
      path: a workdir or checkpoint, a folder written by `python -m flip_jax.convert --to
        safetensors`, or `owner/name` of such a folder on the Hugging Face hub.
      tokenizer: the vocabulary, where the name in the config no longer leads to it; as
        `Tokenizer.load` takes it.
      dtype: compute type; bfloat16 is faster on accelerators, slower on CPU.
      batch_size: most rows that run at once.

    Raises:
      FileNotFoundError: nothing of the kind there.
      OSError: the hub or the vocabulary cannot be had, or stored data is damaged.
      ValueError: only a part of a model, another version, or another vocabulary.
    """
    folder = Path(path)
    if not folder.exists():
        folder = _from_hub(os.fspath(path))
    weights = read_weights(folder)
    return FlipModel(weights, read_tokenizer(folder, weights, tokenizer), dtype, batch_size)


class FlipModel:
    """A trained FLIP. B pictures, N texts, E joint embedding.

    Attributes:
      cfg: the config it was trained with.
      tokenizer: its vocabulary; cleans captions as in training.
      step: optimizer steps it was trained for.
    """

    def __init__(
        self,
        weights: Weights,
        tokenizer: Tokenizer,
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_size: int = 64,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {dtype!r}; allowed are 'float32' and 'bfloat16'")
        self.cfg: Config = weights.cfg
        self.step: int = weights.meta["step"]
        self.tokenizer = tokenizer
        self._batch_size = batch_size
        self._params = jax.device_put(weights.params)
        graphdef = flip.build(dataclasses.replace(weights.cfg.model, dtype=dtype, remat="none"))
        self._graphdef = graphdef

        def jitted(method: Callable[..., Any]) -> Callable[..., Any]:
            return jax.jit(lambda params, *arrays: method(nnx.merge(graphdef, params), *arrays))

        self._image = jitted(flip.Flip.encode_image)
        self._text = jitted(flip.Flip.embed_text)
        self._match = jitted(flip.Flip.match)
        self._captions = jax.jit(self._write, static_argnums=(2, 3, 4))

    def preprocess(self, pictures: Picture | Sequence[Picture]) -> np.ndarray:
        """Decodes, and squashes to a square of the model's image size.

        Args:
          pictures: one or several; EXIF orientation is applied, transparency dropped.

        Returns:
          uint8 [B, S, S, 3]; B = 1 for one picture.

        Raises:
          BadImage: no whole picture, or not of 8 bits per channel; names the file, or the index in
            `pictures`.
          FileNotFoundError: no such file.
          ValueError: an array of another dtype or shape.
        """
        return self._images(pictures)[:]

    def encode_image(self, pictures: Picture | Sequence[Picture]) -> np.ndarray:
        """Embeddings float32 [B, E], unit norm; `pictures` as for `preprocess`."""
        images = self._images(pictures)
        embed = self._batched(lambda image: self._image(self._params, image)[1], images)
        return embed if embed is not None else np.zeros((0, self.cfg.model.embed_dim), np.float32)

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings float32 [N, E], unit norm; their product with those of images is the cosine.

        Raises:
          ValueError: a single string, or an item that is no string.
        """
        embed = self._batched(lambda *rows: self._text(self._params, *rows), *self.tokenizer(texts))
        return embed if embed is not None else np.zeros((0, self.cfg.model.embed_dim), np.float32)

    def match(self, pictures: Picture | Sequence[Picture], texts: Sequence[str]) -> np.ndarray:
        """How well picture n and text n match, by the image-grounded text tower.

        Args:
          pictures: as for `preprocess`, as many as texts; or one, for all texts.
          texts: N captions.

        Returns:
          float32 [N], probability of a match.

        Raises:
          ValueError: the numbers of pictures and texts differ.
        """
        images, (token_ids, token_mask) = self._images(pictures), self.tokenizer(texts)
        if len(images) not in (1, len(token_ids)):
            raise ValueError(
                f"{len(images)} pictures and {len(token_ids)} texts; give as many pictures as "
                "texts, or one"
            )
        if len(images) == 1:
            tokens = self._image(self._params, images[:])[0]
            index = np.zeros(len(token_ids), np.int32)

            def logits(ids: np.ndarray, mask: np.ndarray, index: np.ndarray) -> jax.Array:
                return self._match(self._params, ids, mask, tokens, index)

            rows = token_ids, token_mask, index
        else:

            def logits(ids: np.ndarray, mask: np.ndarray, image: np.ndarray) -> jax.Array:
                return self._match(self._params, ids, mask, self._image(self._params, image)[0])

            rows = token_ids, token_mask, images
        found = self._batched(lambda *arrays: jax.nn.softmax(logits(*arrays))[:, 1], *rows)
        return found if found is not None else np.zeros(0, np.float32)

    def caption(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        beams: int = 1,
        max_length: int | None = None,
        length_penalty: float = 0.0,
    ) -> list[str]:
        """A caption of each picture, word by word, as trained by `loss.weights.caption`.

        Args:
          pictures: as for `preprocess`.
          beams: captions that are followed side by side; 1 takes the likeliest word each time.
          max_length: tokens, first and last included; None = as long as in training.
          length_penalty: 0 chooses the likeliest of the beams, which favours short ones; 1 the one
            with the likeliest words on average.

        Raises:
          ValueError: a model that was not trained to write captions, or a number out of range.
        """
        places = self.cfg.model.text.max_length if max_length is None else max_length
        most = self.cfg.model.text.positions
        if not self.cfg.model.caption_head:
            raise ValueError(
                "this model cannot write captions: it was trained with loss.weights.caption=0; "
                "see configs/captioner.py"
            )
        if beams < 1 or not 2 <= places <= most:
            raise ValueError(
                f"beams={beams} must be 1 or more, max_length={places} must be 2..{most}"
            )

        def write(image: np.ndarray) -> jax.Array:
            return self._captions(self._params, image, places, beams, length_penalty)

        ids = self._batched(write, self._images(pictures))
        return [] if ids is None else [self.tokenizer.decode(row) for row in ids]

    def _write(
        self, params: flip.Params, image: jax.Array, places: int, beams: int, penalty: float
    ) -> jax.Array:
        """Token ids int32 [B, places] of captions of uint8 [B, S, S, 3]."""
        words, model = self.tokenizer, nnx.merge(self._graphdef, params)
        # What captions are not made of. An unknown word is none that could be read.
        special = [words.pad_id, words.unk_id, words.cls_id, words.mask_id]
        special += [words.dec_id, words.enc_id]
        allowed = np.ones(words.vocab_size, bool)
        allowed[special] = False
        ids = {"sep_id": words.sep_id, "pad_id": words.pad_id}
        options = {"places": places, "beams": beams, "length_penalty": penalty}
        tokens = model.encode_image(image)[0]
        return beam.write_captions(model, tokens, jnp.asarray(allowed), **ids, **options)[0]

    def _images(self, pictures: Picture | Sequence[Picture]) -> _Images:
        return _Images(pictures, self.cfg.model.vision.image_size)

    def _batched(
        self, run: Callable[..., jax.Array], *arrays: np.ndarray | _Images
    ) -> np.ndarray | None:
        """`run` over rows in batches; None if there is no row.

        The last batch is filled up to a power of two, so few shapes are ever compiled.
        """
        parts = []
        for start in range(0, len(arrays[0]), self._batch_size):
            rows = [array[start : start + self._batch_size] for array in arrays]
            count = len(rows[0])
            padded = min(1 << (count - 1).bit_length(), self._batch_size)
            filled = [np.concatenate([r, np.repeat(r[-1:], padded - count, 0)]) for r in rows]
            parts.append(np.asarray(run(*filled))[:count])
        return np.concatenate(parts) if parts else None


class _Images:
    """Pictures as uint8 [B, S, S, 3], decoded and resized when sliced: a long list of files is
    never in memory as a whole."""

    def __init__(self, pictures: Picture | Sequence[Picture], size: int):
        is_batch = isinstance(pictures, np.ndarray) and pictures.ndim == 4
        one = isinstance(pictures, Picture) and not is_batch
        self._pictures = [pictures] if one else list(pictures)
        self._size = size

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, rows: slice) -> np.ndarray:
        images = [self._image(index) for index in range(*rows.indices(len(self)))]
        return np.stack(images) if images else np.zeros((0, self._size, self._size, 3), np.uint8)

    def _image(self, index: int) -> np.ndarray:
        picture = self._pictures[index]
        try:
            return resize_image(_pixels(picture), self._size)
        except BadImage as error:
            is_path = isinstance(picture, str | os.PathLike)
            name = os.fspath(picture) if is_path else f"picture {index}"
            raise BadImage(f"{name}: {error}") from error


def _pixels(picture: Picture) -> np.ndarray:
    """uint8 RGB [H, W, 3] of one picture."""
    if isinstance(picture, Image.Image):
        return rgb_array(picture)
    if isinstance(picture, bytes):
        return decode_image(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(
                f"a picture as an array must be uint8 [H, W, 3], RGB; got {picture.dtype} "
                f"{list(picture.shape)}"
            )
        return picture
    return decode_image(Path(picture).read_bytes())


def _from_hub(name: str) -> Path:
    advice = (
        "Give a workdir, a checkpoint, a folder written by `python -m flip_jax.convert --to "
        "safetensors`, or owner/name of such a folder on the Hugging Face hub"
    )
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(f"no file or folder {name!r}. {advice}")
    import huggingface_hub  # slow, and seldom needed

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*EXPORT_FILES]))
    except (OSError, ValueError) as error:
        raise OSError(
            f"{name!r} is no local path and could not be had from the Hugging Face hub "
            f"({type(error).__name__}). {advice}; without a network, copy the folder here"
        ) from error
