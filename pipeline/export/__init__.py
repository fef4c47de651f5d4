"""A trained run as a folder that other programs open: `sail export`.

Each form is a module here. Its `write(parts, folder)` fills an empty folder, and returns in
Markdown how the folder is used.
"""

FORMS = {
    "embedding-atlas": "embedding_atlas",
    "hf": "huggingface",
    "llava": "llava",
    "onnx": "onnx",
    "open_clip": "open_clip",
    "sentence-transformers": "sentence_transformers",
}
"""The module of each form of `sail export --to`."""
