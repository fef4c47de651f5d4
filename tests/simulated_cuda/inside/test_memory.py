"""A GPU that runs out of memory: training halves its parts or says what to set; nothing is lost."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from align.checkpoint import Checkpoint
from features.errors import TrainingError
from features.store import FeatureStore
from tests.commands import sail, the_error_of
from tests.feature_stores import make_run, make_store
from tests.simulated_cuda import gpu
from tests.simulated_cuda.inside.test_training import STEPS, settings, trained

ERRORS = [torch.OutOfMemoryError, torch.AcceleratorError]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("store") / "s.zarr")


@pytest.fixture(autouse=True)
def _whole_gpu() -> Iterator[None]:
    gpu.seen.clear()
    yield
    gpu.seen.clear()
    gpu.seen.fails_with = torch.OutOfMemoryError


def test_the_heads_run_over_half_as_many_rows_where_that_is_left_to_the_program(
    store: FeatureStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = trained(store, tmp_path / "a", "cuda:1", settings(micro_batch=12))
    gpu.seen.clear()
    gpu.seen.fails_in, gpu.seen.fails_at = "align/loss.py", 3
    gpu.seen.fails_with = torch.AcceleratorError
    halved = trained(store, tmp_path / "b", "cuda:1", settings())
    assert "goes on with align.micro_batch = 12" in caplog.text
    assert all(torch.equal(halved[name], expected[name]) for name in expected)


def test_a_fixed_number_of_rows_is_kept_to_and_the_steps_before_are_kept(
    store: FeatureStore, tmp_path: Path
) -> None:
    config = settings(micro_batch=12)
    gpu.seen.fails_in = "align/loss.py"
    whole = trained(store, tmp_path / "a", "cuda:1", config)
    per_step = gpu.seen.allocations // STEPS
    gpu.seen.clear()
    gpu.seen.fails_in, gpu.seen.fails_at = "align/loss.py", 4 * per_step - 1
    expected = r"ran out of memory on cuda:1, which has .* Set align\.micro_batch = 6;"
    with pytest.raises(TrainingError, match=expected):
        trained(store, tmp_path / "b", "cuda:1", config)
    kept = Checkpoint.open(tmp_path / "b" / "last").step
    assert kept == 3
    gpu.seen.clear()
    resumed = trained(store, tmp_path / "b", "cuda:1", config)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


ALIGN = 'batch_size = 24\nsteps = 3\nprecision = "float32"\nhead = { dim = 8, depth = 1 }'


@pytest.mark.slow
def test_no_memory_anywhere_in_a_training_is_one_line_and_the_next_one_ends_it(
    tmp_path: Path,
) -> None:
    run_file = make_run(tmp_path / "run", ALIGN)
    device = ("--set", "run.device=cuda:1", "--set", "align.micro_batch=24")

    def weights(name: str) -> bytes:
        found: bytes = (tmp_path / name / "align/last/model.safetensors").read_bytes()
        return found

    sail("align", run_file, *device)
    allocations, whole = gpu.seen.allocations, weights("run")
    assert allocations > 300
    for number in range(1, allocations, 41):
        folder = ("--set", f"run.dir={tmp_path / str(number)}")
        store = ("--set", f"run.features={tmp_path / 'run'}")
        gpu.seen.clear()
        gpu.seen.fails_at, gpu.seen.fails_with = number, ERRORS[number % 2]
        error = the_error_of(sail("align", run_file, *device, *folder, *store, expect=1))
        assert "ran out of memory on cuda:1" in error
        assert "Set align.micro_batch = 12" in error or "Lower align.memory_mb" in error
        gpu.seen.clear()
        sail("align", run_file, *device, *folder, *store)
        assert weights(str(number)) == whole
