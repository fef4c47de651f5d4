"""Frozen encoders: an image or a caption in, one feature vector out, and a fingerprint of both."""

from features.encoders.backends import ENCODERS, load_text_encoder, resolve
from features.encoders.image import ImageEncoder, load_image_encoder
from features.encoders.text import TextEncoder

__all__ = [
    "ENCODERS",
    "ImageEncoder",
    "TextEncoder",
    "load_image_encoder",
    "load_text_encoder",
    "resolve",
]
