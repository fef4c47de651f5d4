"""The demo world: drawn scenes with captions, labels and masks, and the encoder trained on them."""

from features.scenes.shards import write_shards
from features.scenes.world import CLASS_NAMES, COLOURS, HELD_OUT, SHAPES, TEXTURES

__all__ = ["CLASS_NAMES", "COLOURS", "HELD_OUT", "SHAPES", "TEXTURES", "write_shards"]
