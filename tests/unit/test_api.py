"""What `import tag2mask` offers."""

import importlib
import pkgutil

import pytest

import tag2mask
from tag2mask import api
from tag2mask.errors import UserError
from tag2mask.recipe import load

NET, TRAIN = "{name: cam, backbone: {name: resnet18}}", "{epochs: 1}"


@pytest.mark.parametrize("name", tag2mask.__all__)
def test_functions_of_the_package_are_not_hidden_by_its_modules(name):
    for module in pkgutil.iter_modules(tag2mask.__path__):
        importlib.import_module(f"tag2mask.{module.name}")  # this sets tag2mask.<module>
    assert getattr(tag2mask, name) is getattr(api, name)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="segmnt"):
        _ = tag2mask.segmnt


@pytest.mark.parametrize("path", ["plain", "with space", "ümlaut 🐑", "a: b # c", "it's", 'a"b', "- x", "{y}"])
def test_any_folder_name_reaches_the_data(tmp_path, path):
    recipe = api.folder_recipe(tmp_path / path, {"tags": path + ".csv", "classes": ["a b", "no", "1"], "masks": None})
    assert recipe.data["images"] == str(tmp_path / path)
    assert recipe.data["tags"] == path + ".csv"
    assert recipe.data["classes"] == ["a b", "no", "1"]
    assert recipe.data["masks"] is None


def test_a_recipe_on_a_benchmark_works_on_a_folder(tmp_path):
    """What it says of its own data is dropped; a recipe for folders keeps what it says."""
    benchmark = load("voc12-ppc-seam", ["data.root=x", "classify.train.seed=3"])
    recipe = api.folder_recipe(tmp_path, {"tags": "tags.csv"}, ["classify.train.seed=3"], recipe="voc12-ppc-seam")
    assert (recipe.data["name"], recipe.data["images"], recipe.data["tags"]) == ("folder", str(tmp_path), "tags.csv")
    assert recipe.stages == benchmark.stages
    own = tmp_path / "own.yaml"
    own.write_text(
        f"data: {{name: folder, classes: [a, b]}}\nstages: {{c: {{do: classify, net: {NET}, train: {TRAIN}}}}}"
    )
    assert api.folder_recipe("x", {}, recipe=str(own)).data["classes"] == ["a", "b"]


def test_overrides_for_every_network_of_a_recipe():
    found = api.network_overrides("folder", backbone="resnet18", weights="none", epochs=2)
    recipe = api.folder_recipe("x", {}, found)
    for stage in ("classify", "segment"):
        assert (
            recipe.stages[stage]["net"]["backbone"] | {"name": "resnet18", "weights": None}
            == (recipe.stages[stage]["net"]["backbone"])
        )
    assert (recipe.stages["classify"]["train"]["epochs"], recipe.stages["segment"]["train"]["epochs"]) == (2, 5)


def test_a_folder_without_a_model_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no trained segmenter"):
        api.find_model(tmp_path)
