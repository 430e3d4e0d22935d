"""A score of the CLIP-IQA type: is a picture nearer to "Good photo." or to "Bad photo."?

Source: Wang, Chan and Loy, "Exploring CLIP for Assessing the Look and Feel of Images", AAAI 2023.
They take a ResNet-50 without its position table, at the picture's own size; here it is whatever
CLIP is in the folder, at that model's size, so numbers of different models do not compare.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PROMPTS = ("Good photo.", "Bad photo.")
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZER = ("tokenizer.json", "vocab.json")


class ClipIqa:
    """A CLIP model as judge of pictures.

    Args:
      folder: as `transformers` saves one: config.json, weights, a tokenizer, and, where the
        normalisation is not OpenAI's, preprocessor_config.json. Nothing is downloaded.

    Attributes:
      name: of the model, for the report: the folder's name and a hash of its weights.

    Raises:
      FileNotFoundError: no such folder, or a file is missing.
      ValueError: it is not a whole CLIP.
      ImportError: PyTorch is not installed.
    """

    def __init__(self, folder: Path):
        config, weights = _files(folder)
        try:
            import torch
            from transformers import AutoTokenizer, CLIPModel
        except ImportError as error:
            raise ImportError(
                f"--clip needs PyTorch ({error}); pip install 'flip_jax[torch]', or leave it out"
            ) from error
        self._torch = torch
        try:
            model, told = CLIPModel.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
        except (OSError, RuntimeError, KeyError) as error:
            raise ValueError(f"--clip {folder}: cannot be loaded as a CLIP: {error}") from error
        lacking = sorted(map(str, (*told["missing_keys"], *told["mismatched_keys"])))
        if lacking:
            raise ValueError(
                f"--clip {folder}: weights are missing or of another shape: "
                f"{', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}"
            )
        self._model = model.eval()
        self._side = config["vision_config"].get("image_size", 224)
        self._mean, self._std = _normalisation(folder)
        self.name = f"{folder.resolve().name}, weights {_digest(weights)}"
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._anchors = self._embed_prompts(tokenizer)

    def _embed_prompts(self, tokenizer: Any) -> np.ndarray:
        tokens = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
        with self._torch.inference_mode():
            out = self._model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
        return _unit(out)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] to float32 [3, side, side]: the shorter side to the model's, the middle
        cut out, normalised."""
        picture = Image.fromarray(image)
        scale = self._side / min(picture.size)
        size = tuple(max(int(side * scale), self._side) for side in picture.size)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = ((side - self._side) // 2 for side in size)
        picture = picture.crop((left, top, left + self._side, top + self._side))
        pixels = (np.asarray(picture, np.float32) / 255 - self._mean) / self._std
        return pixels.transpose(2, 0, 1)

    def scores(self, prepared: np.ndarray) -> np.ndarray:
        """float32 [B, 3, side, side] to float64 [B]: 0 = like a bad photo, 1 = like a good one."""
        with self._torch.inference_mode():
            out = self._model.get_image_features(pixel_values=self._torch.from_numpy(prepared))
            scale = float(self._model.logit_scale.exp())
        good, bad = scale * (_unit(out) @ self._anchors.T).T
        return 1 / (1 + np.exp(bad - good))


def _files(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """config.json and the weight files."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--clip {folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--clip {folder}: holds no config.json")
    try:
        config = json.loads((folder / "config.json").read_bytes())
        kind = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"--clip {folder}: config.json cannot be read: {error}") from error
    if kind != "clip" or "vision_config" not in config:
        raise ValueError(
            f"--clip {folder}: config.json is of model_type {kind!r}; a whole CLIP, image and text "
            "tower, is needed: model_type 'clip'"
        )
    # transformers would go on with a tokenizer that knows no words.
    if not any((folder / name).is_file() for name in _TOKENIZER):
        raise FileNotFoundError(f"--clip {folder}: holds no tokenizer ({' or '.join(_TOKENIZER)})")
    found = next((files for each in _WEIGHTS if (files := sorted(folder.glob(each)))), None)
    if found is None:
        raise FileNotFoundError(f"--clip {folder}: holds no weights ({' or '.join(_WEIGHTS)})")
    return config, found


def _normalisation(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    file = folder / "preprocessor_config.json"
    told = json.loads(file.read_bytes()) if file.is_file() else {}
    mean, std = told.get("image_mean", _MEAN), told.get("image_std", _STD)
    return np.array(mean, np.float32), np.array(std, np.float32)


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def _unit(out: Any) -> np.ndarray:
    """Features of either tower, float64 [B, D], of length 1."""
    features = out.pooler_output.double().numpy()
    return features / np.linalg.norm(features, axis=1, keepdims=True)
