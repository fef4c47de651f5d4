"""All three stages with shards and stores on a real S3 server: the same bytes as on local disk."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from features.storage.place import as_place
from pipeline.cli import cli
from pipeline.interrupt import StopRequest
from pipeline.run.align import align_run
from pipeline.run.config import load_config
from pipeline.run.evaluate import evaluate_run
from pipeline.run.extract import extract
from pipeline.stores.inspect import describe_row, describe_store
from tests import tiny
from tests.feature_stores import make_store, on_disk
from tests.servers import Bucket, Proxy, reach_s3


def run_stages(run_file: Path, *overrides: str) -> Path:
    """Run the three stages and return the path of the results."""
    config = load_config(str(run_file), overrides)
    extract(config, StopRequest())
    align_run(config, StopRequest())
    return evaluate_run(config, StopRequest())


def on_s3(run_file: Path, s3: Bucket) -> tuple[str, ...]:
    """Upload the shards of a run file; returns what makes it read and write there."""
    s3.upload(run_file.parent / "shards", "shards")
    names = s3.url("shards/classes.txt")
    return (
        f"run.dir={run_file.parent / 'elsewhere'}",
        f"extract.store={s3.url('stores')}",
        f"data.train.path={s3.url('shards/train-*.tar')}",
        f"data.train.class_names={names}",
        f"data.test.path={s3.url('shards/test-{0..0}.tar')}",
        f"data.test.class_names={names}",
    )


def stored(s3: Bucket, store: str) -> dict[str, bytes]:
    """The files of a store on S3, but for the source in its attributes."""
    return without_source(s3.content(f"stores/{store}"))


def stored_locally(folder: Path, store: str) -> dict[str, bytes]:
    """The files of a store of the local run, but for the source in its attributes."""
    root = folder / "run" / "features" / store
    files = (path for path in root.rglob("*") if path.is_file())
    return without_source({path.relative_to(root).as_posix(): path.read_bytes() for path in files})


def without_source(files: dict[str, bytes]) -> dict[str, bytes]:
    """Leave out in what the runs differ: where the shards are, and the digests of that."""
    metadata = json.loads(files["zarr.json"])
    del metadata["attributes"]["source"]
    manifest = json.loads(files["manifest/zarr.json"])
    del manifest["attributes"]["metadata"]["zarr.json"], manifest["attributes"]["sha256"]
    changed = {"zarr.json": metadata, "manifest/zarr.json": manifest}
    return files | {name: json.dumps(document).encode() for name, document in changed.items()}


@pytest.mark.slow
def test_shards_and_stores_on_s3_give_the_bytes_and_numbers_of_a_local_run(
    tmp_path: Path, s3: Bucket
) -> None:
    run_file = tiny.world(tmp_path)
    identical = "align.loss.positives=identical"  # so that captions are read in training too
    local = run_stages(run_file, identical)
    remote = run_stages(run_file, identical, *on_s3(run_file, s3))
    for split in ("train.zarr", "test.zarr"):
        assert stored(s3, split) == stored_locally(tmp_path, split)
    assert [row["value"] for row in json.loads(remote.read_text())["results"]] == [
        row["value"] for row in json.loads(local.read_text())["results"]
    ]
    url = s3.url("stores/train.zarr")
    assert CliRunner().invoke(cli, ["verify", url]).stdout == f"{url} is whole.\n"


@pytest.mark.slow
def test_shards_are_appended_to_a_store_on_s3_as_to_a_local_one(tmp_path: Path, s3: Bucket) -> None:
    run_file = tiny.world(tmp_path, rows=20)
    overrides = on_s3(run_file, s3)
    extract(load_config(str(run_file)), StopRequest())
    extract(load_config(str(run_file), overrides), StopRequest())
    tiny.write_tar(tmp_path / "shards" / "train-2.tar", tiny.samples(9, first=50))
    s3.upload(tmp_path / "shards", "shards")
    extract(load_config(str(run_file)), StopRequest(), append=True)
    extract(load_config(str(run_file), overrides), StopRequest(), append=True)
    assert stored(s3, "train.zarr") == stored_locally(tmp_path, "train.zarr")


def test_a_store_on_s3_is_inspected_by_its_url(tmp_path: Path, s3: Bucket) -> None:
    store = make_store(tmp_path / "local.zarr", bad_images=(3,))
    s3.upload(tmp_path / "local.zarr", "remote.zarr")
    url = s3.url("remote.zarr")
    run = CliRunner()
    shown = json.loads(run.invoke(cli, ["inspect", url, "--json"]).stdout)
    assert shown == describe_store(store.path) | {"path": url}
    row = json.loads(run.invoke(cli, ["inspect", url, "--row", "3", "--json"]).stdout)
    assert row == describe_row(store.path, 3)


def test_a_row_on_s3_costs_the_same_however_many_chunks_there_are(
    tmp_path: Path, s3: Bucket, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []
    for rows in (32, 320):  # 2 and 20 chunks
        store = make_store(tmp_path / f"{rows}.zarr", rows=rows)
        s3.upload(tmp_path / f"{rows}.zarr", f"{rows}.zarr")
        with Proxy(s3_port) as proxy:
            reach_s3(proxy.port, monkeypatch)
            found = describe_row(as_place(s3.url(f"{rows}.zarr")), 20)
        assert found == describe_row(store.path, 20)
        requests.append(len(proxy.requests))
    assert requests[0] == requests[1]


def test_verify_names_a_chunk_on_s3_that_is_damaged(tmp_path: Path, s3: Bucket) -> None:
    store = make_store(tmp_path / "local.zarr")
    file = on_disk(store.column(store.columns()[0]).features_file(1))
    file.write_bytes(file.read_bytes()[:-20])
    s3.upload(tmp_path / "local.zarr", "remote.zarr")
    done = CliRunner().invoke(cli, ["verify", s3.url("remote.zarr")])
    assert done.exit_code == 1
    assert "features/c/1/0: it has" in done.stderr


@pytest.mark.slow
def test_further_shards_and_captions_on_s3_give_the_bytes_of_a_local_extraction(
    tmp_path: Path, s3: Bucket
) -> None:
    run_file = tiny.world(tmp_path, rows=19)
    remote = on_s3(run_file, s3)
    short = "data.train.captions=['short']"
    extract(load_config(str(run_file), [*remote, short]), StopRequest())
    tiny.write_tar(tmp_path / "shards" / "train-2.tar", tiny.samples(7, first=500))
    later = tmp_path / "later"
    tiny.write_tar(later / "train-2.tar", tiny.samples(7, first=500))
    s3.upload(later, "shards")
    extract(load_config(str(run_file), remote), StopRequest(), append=True)
    extract(load_config(str(run_file)), StopRequest())
    assert stored(s3, "train.zarr") == stored_locally(tmp_path, "train.zarr")
