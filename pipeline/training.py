"""Stage two as a run: the recipe's store and settings in, the best checkpoint out."""

from pathlib import Path

from align.trainer import train
from features.errors import TrainingError
from features.store import FeatureStore
from pipeline.config import RunConfig
from pipeline.device import prepare_device
from pipeline.export import export_model
from pipeline.interrupt import Stopped, StopRequest
from pipeline.progress import ProgressLine
from pipeline.run import start_run


def align_run(config: RunConfig, stop: StopRequest) -> Path:
    """Train the head of a recipe on the store of its training split; return its best checkpoint.

    The best head is exported to `run.dir/model` as well.

    Raises:
        TrainingError: The store has not all the rows done that the recipe trains on.
        Stopped: A signal came; the last checkpoint is on disk.
    """
    folder = start_run(config)
    store = FeatureStore.open(folder.store(config.align.split))
    image, text = config.aligned_encoder("image"), config.aligned_encoder("text")
    for name in [f"image/{image}", *(f"text/{text}/{field}" for field in store.fields)]:
        if pending := store.column(name).pending():
            raise TrainingError(
                f"{store.path}/{name} has {len(pending)} chunks that are not done. A complete "
                f"column was expected. Finish it with `sail extract`."
            )
    with ProgressLine("align", None, "steps") as line:

        def on_step(step: int, total: int, note: str) -> None:
            line.set(step, total, note)

        best = train(
            store,
            config.align,
            image=image,
            text=text,
            run_dir=folder.align,
            device=prepare_device(config.run),
            seed=config.run.seed,
            should_stop=stop,
            on_step=on_step,
        )
    if best is None:
        raise Stopped
    export_model(best, folder.model)
    return best
