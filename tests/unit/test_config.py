"""The run file: what is accepted, what is refused, and in which words."""

import re
from pathlib import Path

import pytest

from evaluate.measures.zero_shot import ZeroShotSettings
from features.errors import ConfigError
from pipeline.reference import reference
from pipeline.run.config import dump_config, load_config

ROOT = Path(__file__).parents[2]
MINIMAL = """
[data.train]
kind = "webdataset"
path = "shards/*.tar"
[encoders.image.tiny]
model = "weights"
"""


def write(folder: Path, text: str) -> str:
    path = folder / "my-run.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("recipe", ["demo", "sail-small", "sail", "sail-paper"])
def test_shipped_recipe_is_valid_and_its_resolved_copy_is_the_same_run(
    recipe: str, tmp_path: Path
) -> None:
    config = load_config(recipe)
    copy = tmp_path / "config.toml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(copy)) == config


def test_all_faults_are_listed_at_once_with_place_and_suggestion(tmp_path: Path) -> None:
    text = MINIMAL + "poolling = 'cls'\n[align]\nbatch_size = 0\n[data.test]\nkind = 'folder'\n"
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    message = str(error.value)
    assert (
        "encoders.image.tiny.poolling: there is no such setting. Did you mean 'pooling'?" in message
    )
    assert "align.batch_size: Input should be greater than 0, got 0" in message
    assert "data.test.path: this setting is needed" in message


def test_a_single_fault_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, MINIMAL + "[algn]\n"))
    assert "\n" not in str(error.value)
    assert "algn: there is no such setting. Did you mean 'align'?" in str(error.value)


def test_an_override_is_read_as_toml_and_a_bare_word_as_text(tmp_path: Path) -> None:
    overrides = [
        "align.batch_size=32",
        "encoders.image.tiny.pooling=mean",
        " align.head.kind = linear ",
        "align.fields=['a','b']",
    ]
    config = load_config(write(tmp_path, MINIMAL), overrides)
    assert config.align.batch_size == 32
    assert config.encoders.image["tiny"].pooling == "mean"
    assert config.align.fields == ("a", "b")
    assert config.align.head.kind == "linear"


@pytest.mark.parametrize(
    ("override", "words"), [("align.batch_size", "has no value"), ("run.name.x=1", "not a section")]
)
def test_a_wrong_override_says_what_was_expected(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(write(tmp_path, MINIMAL + "[run]\nname = 'x'\n"), [override])


def test_paths_are_relative_to_the_run_file_and_the_run_is_named_after_it(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    config = load_config(write(tmp_path, MINIMAL))
    assert getattr(config.data["train"], "path", None) == str(tmp_path / "shards/*.tar")
    assert config.encoders.image["tiny"].model == str(tmp_path / "weights")
    assert config.run.dir == Path("runs/my-run")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = ["run.dir=~/runs", "extract.store=~/stores", "data.train.path=~/*.tar"]
    config = load_config(write(tmp_path, MINIMAL), overrides)
    assert (config.run.dir, config.extract.store) == (tmp_path / "runs", tmp_path / "stores")
    assert getattr(config.data["train"], "path", None) == str(tmp_path / "*.tar")


@pytest.mark.parametrize("place", ["", " ", "s3://bucket/run", "5"])
def test_a_run_folder_that_is_none_is_refused_rather_than_made_here(
    place: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir: a folder of this machine was expected, got"):
        load_config(write(tmp_path, MINIMAL), [f"run.dir={place}"])


def test_a_run_file_of_an_editor_that_marks_utf8_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_config(str(path)).run.name == "run"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("eval.retrieval=train", 'an array was expected, as ["a", "b"], got \'train\''),
        ("align.head=glu", "align.head: a section was expected, got 'glu'"),
        ("run.name=5", 'text in quotes was expected, as "a", got 5'),
        ("data.train.kind=cifar", "data.train.split: this setting is needed"),
    ],
)
def test_a_wrong_type_is_told_in_the_words_of_toml(
    override: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(write(tmp_path, MINIMAL), [override])


def test_a_hub_id_is_left_alone_when_no_such_folder_exists(tmp_path: Path) -> None:
    text = MINIMAL.replace('"weights"', '"facebook/dinov2-large"')
    assert (
        load_config(write(tmp_path, text)).encoders.image["tiny"].model == "facebook/dinov2-large"
    )


def test_an_unknown_recipe_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'demo'"):
        load_config("demoo")


def test_a_file_that_is_not_toml_is_refused_with_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1"):
        load_config(write(tmp_path, "this is not toml"))


def test_a_split_that_is_not_in_the_data_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"align\.split names the split 'trian'"):
        load_config(write(tmp_path, MINIMAL + "[align]\nsplit = 'trian'\n"))


def test_choosing_among_several_encoders_is_left_to_the_user(tmp_path: Path) -> None:
    text = MINIMAL + "[encoders.image.other]\nmodel = 'x'\n"
    with pytest.raises(ConfigError, match=r"2 image encoders \(tiny, other\)"):
        load_config(write(tmp_path, text)).aligned_encoder("image")


def test_the_reference_of_the_run_file_is_not_stale() -> None:
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == reference(), (
        "run `make format`"
    )


def test_every_setting_is_documented() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    undocumented = [row for row in rows if row.rstrip(" |").endswith("|") or "|  |" in row]
    assert [row for row in undocumented if not row.startswith("| `kind`")] == []


@pytest.mark.parametrize(
    "override",
    [
        "align.optimizer.learning_rate=inf",
        "align.loss.initial_bias=nan",
        "align.loss.field_weights.a=inf",
        "align.mix.train=inf",
        "align.epochs=inf",
        "eval.knn_temperature=inf",
    ],
)
def test_a_number_that_is_not_finite_is_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Input should be a finite number, got"):
        load_config(write(tmp_path, MINIMAL), [override])


@pytest.mark.parametrize(
    "override", ["align.fields=['a','a']", "eval.knn=['a','a']", "eval.knn_k=[1,1]"]
)
def test_what_is_named_twice_is_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stands twice; name each once"):
        load_config(write(tmp_path, MINIMAL), [override])


@pytest.mark.parametrize("section", ["run", "eval", "data.drawn", "eval.segmentation.drawn"])
def test_a_seed_below_zero_is_refused(section: str, tmp_path: Path) -> None:
    scenes = '[data.drawn]\nkind = "scenes"\nsplit = "test"\nrows = 5\n'
    masks = '[eval.segmentation.drawn]\nkind = "scenes"\nsplit = "test"\n'
    with pytest.raises(ConfigError, match="seed: Input should be greater than or equal to 0"):
        load_config(write(tmp_path, MINIMAL + scenes + masks), [f"{section}.seed=-1"])


def test_cknna_of_one_neighbour_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cknna needs two neighbours at least"):
        load_config(write(tmp_path, MINIMAL), ["eval.alignment_k=1"])


def test_a_scale_above_its_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="initial_scale: Input should be less than or equal to"):
        load_config(write(tmp_path, MINIMAL), ["align.loss.initial_scale=101"])


def test_patience_without_held_out_rows_is_refused(tmp_path: Path) -> None:
    overrides = ["align.patience=3", "align.holdout=0"]
    with pytest.raises(ConfigError, match="patience needs held-out rows"):
        load_config(write(tmp_path, MINIMAL), overrides)


def test_names_of_lists_are_no_paths_and_files_are_relative_to_the_run_file(tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        '[data.train]\nkind = "folder"\npath = "t.csv"\n'
        '[data.val]\nkind = "classes"\npath = "val"\nclass_names = "imagenet-1k"\n'
        '[data.own]\nkind = "classes"\npath = "own"\nnames = "names.json"\n'
        '[eval]\ntemplates = "imagenet-1k"\nsplit_templates = {own = "own.json"}\n'
    )
    config = load_config(str(run_file))
    assert [config.data[split].class_names for split in ("val", "own")] == [
        "imagenet-1k",
        tmp_path / "names.json",
    ]
    settings = config.eval.of(ZeroShotSettings)
    assert settings.templates == "imagenet-1k"
    assert settings.split_templates == {"own": str(tmp_path / "own.json")}


@pytest.mark.parametrize(
    ("source", "setting"),
    [
        ("kind = 'webdataset'", "path"),
        ("kind = 'folder'", "path"),
        ("kind = 'parquet'", "path"),
        ("kind = 'classes'", "path"),
        ("kind = 'cifar'\nsplit = 'test'", "path"),
        ("kind = 'annotations'\nformat = 'karpathy'", "path"),
        ("kind = 'annotations'\nformat = 'karpathy'\npath = 'a.json'", "images"),
        ("kind = 'classes'\npath = 'a'", "class_names"),
        ("kind = 'webdataset'\npath = 'a.tar'", "class_names"),
    ],
)
def test_every_path_of_a_source_is_relative_to_the_run_file(
    source: str, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = MINIMAL + f"[data.other]\n{source}\n{setting} = 'below/given.txt'\n"
    config = load_config(write(tmp_path, text))
    assert str(getattr(config.data["other"], setting)) == str(tmp_path / "below/given.txt")
