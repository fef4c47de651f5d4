"""What lies on the Hugging Face hub as a model: a head, or a folder of `sail export --to hf`."""

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from features.errors import ConfigError

ADDRESS = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")


def fetched(place: str) -> Path:
    """Return the local copy of what an address of the hub names, fetched where it is not here.

    Args:
        place: `hf://owner/name[@revision]` for all of a repository of models, with `/file` behind
            it for a file; what does not begin with `hf://` is a path, and is returned as it is.

    Raises:
        ConfigError: It is no such address, or the hub does not have it, or does not answer.
    """
    if not place.startswith("hf://"):
        return Path(place)
    found = ADDRESS.fullmatch(place)
    if found is None:
        raise ConfigError(
            f"{place} is no address of the hub. hf://owner/name or hf://owner/name/file was "
            f"expected. Correct it."
        )
    repository, revision, file = found["repository"], found["revision"], found["file"]
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file, revision=revision))
        return Path(snapshot_download(repository, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{place} cannot be fetched: {str(error).splitlines()[0].rstrip('.')}. A repository of "
            f"models that the hub has was expected. Correct the address, look at the network, or "
            f"set HF_TOKEN."
        ) from error
