"""How far stored patch tokens are from the teacher's: 1 − cosine of a token, mean (largest).

As they are, and *standardised*, with mean 0 and variance 1 in each dimension, so that no dimension dominates. ``int8
each`` has an offset and a scale for each token in place of those for all tokens of a view.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from pipeline.cache.format.codec import decode, encode, stored_outputs
from pipeline.tasks import OutputSpec

_NUM_TRAINED, _NUM_STEPS, _BATCH, _NUM_LARGE = 1500, 600, 64, 16
_DIMENSION, _FACTOR = 7, 40
"""A dimension that is made as many times larger."""


def run() -> None:
    torch.manual_seed(0)
    images_NCHW, label_N = _digits()
    shown_NCHW = images_NCHW[_NUM_TRAINED:]
    vit, share = _trained(images_NCHW, label_N)
    dino = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0)
    tokens_NPD = _tokens(dino, interpolate(shown_NCHW[:_NUM_LARGE], (224, 224), mode="bicubic"))
    pooled_NDgg = avg_pool2d(tokens_NPD.transpose(1, 2).unflatten(2, (16, 16)), 2)
    outlier_NPD = tokens_NPD.clone()
    outlier_NPD[..., _DIMENSION] *= _FACTOR
    for name, values_NPD in {
        "architecture of DINOv2 ViT-S/14, random weights": tokens_NPD,
        "the same, pooled to 8×8": pooled_NDgg.flatten(2).transpose(1, 2),
        f"ViT trained on digits, {share:.0%} right": _tokens(vit, shown_NCHW),
        f"the first, with one dimension times {_FACTOR}": outlier_NPD,
    }.items():
        exact_NPD = values_NPD.contiguous().numpy()
        stored = {kind: _stored(exact_NPD, kind) for kind in ("fp16", "int8")} | {"int8 each": _int8_each(exact_NPD)}
        print(f"  {name}, [P,D] = {list(exact_NPD.shape[1:])}")
        for kind, stored_NPD in stored.items():
            print(
                f"    {kind:<10}{_distance(exact_NPD, stored_NPD)}, standardised {_standardised(exact_NPD, stored_NPD)}"
            )


def _digits() -> tuple[Tensor, Tensor]:
    """[N,3,16,16] from -1 to 1, and labels, shuffled."""
    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images_NCHW = torch.from_numpy(digits.images[order] / 8 - 1).float()[:, None].expand(-1, 3, -1, -1)
    return interpolate(images_NCHW, (16, 16), mode="bilinear"), torch.from_numpy(digits.target[order])


def _trained(images_NCHW: Tensor, label_N: Tensor) -> tuple[Any, float]:
    """A ViT of 8×8 tokens, and its accuracy on the other images."""
    vit: Any = timm.models.VisionTransformer(
        img_size=16, patch_size=2, embed_dim=64, depth=4, num_heads=4, num_classes=10
    )
    optimizer = torch.optim.AdamW(vit.parameters(), 1e-3)
    for _ in range(_NUM_STEPS):
        rows_B = torch.randint(_NUM_TRAINED, (_BATCH,))
        optimizer.zero_grad()
        cross_entropy(vit(images_NCHW[rows_B]), label_N[rows_B]).backward()
        optimizer.step()
    with torch.no_grad():
        predicted_N = vit.eval()(images_NCHW[_NUM_TRAINED:]).argmax(1)
    return vit, float((predicted_N == label_N[_NUM_TRAINED:]).float().mean())


@torch.no_grad()
def _tokens(vit: Any, images_NCHW: Tensor) -> Tensor:
    """[N,P,D] without class token."""
    return vit.eval().forward_features(images_NCHW)[:, vit.num_prefix_tokens :]


def _stored(exact_NPD: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    (output,) = stored_outputs([OutputSpec("tokens", exact_NPD.shape[1:], kind)])
    return decode(encode(exact_NPD, output), output)


def _int8_each(exact_NPD: NDArray[np.float32]) -> NDArray[np.float32]:
    return _stored(exact_NPD.reshape(-1, 1, exact_NPD.shape[2]), "int8").reshape(exact_NPD.shape)


def _standardised(exact_NPD: NDArray[np.float32], stored_NPD: NDArray[np.float32]) -> str:
    mean_D, std_D = exact_NPD.mean((0, 1), dtype=np.float64), exact_NPD.std((0, 1), dtype=np.float64)
    return _distance((exact_NPD - mean_D) / std_D, (stored_NPD - mean_D) / std_D)


def _distance(exact_NPD: NDArray[np.floating], stored_NPD: NDArray[np.floating]) -> str:
    exact, stored = exact_NPD.astype(np.float64), stored_NPD.astype(np.float64)
    norm_NP = np.linalg.norm(exact, axis=2) * np.linalg.norm(stored, axis=2)
    distance_NP = 1 - (exact * stored).sum(2) / norm_NP
    return f"{distance_NP.mean():.1e} ({distance_NP.max():.1e})"
