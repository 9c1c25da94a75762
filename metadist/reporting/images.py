"""Images of examples as PNG inside the page."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image

LARGEST = 96
"""Pixels of the longer side; larger images are scaled down, so that a page stays small."""


def is_image(x: np.ndarray) -> bool:
    """Whether an input is `[channels, height, width]`, with 1 or 3 channels."""
    return x.ndim == 3 and x.shape[0] in (1, 3)


def image(x: np.ndarray, kind: str, label: str) -> str:
    """`[channels, height, width]` of values in [0, 1], as an element of the CSS classes `kind`."""
    pixels = (np.clip(np.moveaxis(x, 0, 2), 0, 1) * 255).round().astype(np.uint8)
    return _element(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), kind, label)


def signed_image(values: np.ndarray, kind: str, label: str) -> str:
    """`[channels, height, width]` summed over channels: red above 0, blue below, white at 0."""
    total = values.sum(0)
    # The largest few would leave the rest white.
    widest = float(np.quantile(np.abs(total), 0.99)) or 1.0
    share = np.clip(total / widest, -1, 1)[:, :, None]
    red, blue, white = np.array([192, 58, 58]), np.array([42, 111, 176]), np.array([255, 255, 255])
    colour = white + np.abs(share) * (np.where(share > 0, red, blue) - white)
    return _element(Image.fromarray(colour.round().astype(np.uint8)), kind, label)


def _element(picture: Image.Image, kind: str, label: str) -> str:
    picture.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    classes = f' class="{kind}"' if kind else ""
    return f'<img{classes} alt="{escape(label, quote=True)}" src="data:image/png;base64,{data}">'
