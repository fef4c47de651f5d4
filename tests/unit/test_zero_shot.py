"""Zero-shot classification: prompts, class embeddings, ranks and confusions in small cases."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluate.classification import class_embeddings, classify
from evaluate.confusion import confusion_matrix
from evaluate.prompts import make_prompts, read_prompts, read_templates
from evaluate.results import Items
from evaluate.statistics import value_of
from features.errors import EvaluationError

CLASSES = torch.eye(3)


def test_every_name_is_put_into_every_template_class_by_class() -> None:
    assert make_prompts(["cat", "{dog}"], ["a {}", "{}, one {}"]) == [
        ["a cat", "cat, one cat"],
        ["a {dog}", "{dog}, one {dog}"],
    ]


def test_a_template_without_a_place_for_the_name_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"has 'a photo', which has no place"):
        make_prompts(["cat"], ["a {}", "a photo"])


def test_templates_are_a_list_the_name_of_a_data_set_or_a_file_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"templates": ["one {}"]}))
    assert read_templates(["a {}"]) == ("a {}",)
    assert read_templates(str(own)) == ("one {}",)
    assert len(read_templates("imagenet-1k")) == 80
    assert read_templates("food-101") == ("a photo of {}, a type of food.",)


def test_each_class_may_have_prompts_of_its_own(tmp_path: Path) -> None:
    own = tmp_path / "CuPL.json"
    own.write_text(json.dumps({"tench": ["A fish.", "It swims."], "Goldfish": ["Orange."]}))
    assert read_prompts(str(own), ["goldfish", "tench"]) == [["Orange."], ["A fish.", "It swims."]]
    assert read_prompts(["a {}"], ["cat"]) == [["a cat"]]
    with pytest.raises(EvaluationError, match=r"no prompts for 1 of 2 classes, of which 'shark'"):
        read_prompts(str(own), ["tench", "shark"])
    own.write_text(json.dumps({"tench": "A fish."}))
    with pytest.raises(EvaluationError, match=r"The templates .* cannot be read"):
        read_prompts(str(own), ["tench"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"templates": "a {}"}', '{"templates": [1]}'])
def test_a_file_without_templates_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(EvaluationError, match=r"The templates .* cannot be read"):
        read_templates(str(tmp_path / "own.json"))


def test_templates_of_an_unknown_name_say_which_there_are() -> None:
    with pytest.raises(EvaluationError, match=r"'imagenet-80' cannot be read.*imagenet-1k"):
        read_templates("imagenet-80")


def test_a_long_prompt_weighs_no_more_than_a_short_one() -> None:
    prompts = torch.tensor([[[10.0, 0.0], [0.0, 0.1]]])
    assert class_embeddings(prompts).tolist() == [pytest.approx([0.5**0.5, 0.5**0.5])]


def test_the_nearest_class_is_predicted() -> None:
    image = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    found = classify(image, CLASSES, np.array([0, 1, 2]))
    assert found.predicted.tolist() == [0, 0, 0]
    assert found.ranks.tolist() == [0, 1, 2]


def test_a_tie_goes_to_the_wrong_class() -> None:
    found = classify(torch.ones(1, 3), CLASSES, np.array([0]))
    assert found.ranks.tolist() == [2]
    assert found.predicted[0] != 0


def test_an_image_that_is_not_a_number_is_wrong() -> None:
    found = classify(torch.full((1, 3), torch.nan), CLASSES, np.array([1]))
    assert found.ranks.tolist() == [2]
    assert found.predicted[0] != 1


def test_mean_per_class_weighs_rare_classes_like_frequent_ones() -> None:
    image = CLASSES[[0, 0, 0, 1, 0]]
    found = classify(image, CLASSES, np.array([0, 0, 0, 1, 1]))
    right = (found.ranks == 0).astype(np.int64)
    assert value_of(Items(right)) == pytest.approx(4 / 5)
    assert value_of(Items(right, classes=found.labels)) == pytest.approx(
        (1 + 1 / 2) / 2
    )  # class 2 has no image


def test_confusions_have_the_true_class_as_row() -> None:
    matrix = confusion_matrix(np.array([0, 0, 2]), np.array([0, 1, 1]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]


def test_blocks_do_not_change_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    image, classes = torch.randn(30, 4, generator=generator), torch.randn(7, 4, generator=generator)
    labels = np.arange(30) % 7
    whole = classify(image, class_embeddings(classes[:, None]), labels)
    monkeypatch.setattr("evaluate.classification.COSINES_AT_ONCE", 20)
    blocked = classify(image, class_embeddings(classes[:, None]), labels)
    assert blocked.ranks.tolist() == whole.ranks.tolist()
    assert blocked.predicted.tolist() == whole.predicted.tolist()


def test_a_split_without_images_gives_no_predictions() -> None:
    found = classify(torch.empty(0, 3), CLASSES, np.empty(0, dtype=np.int64))
    assert len(found.predicted) == len(found.ranks) == 0
