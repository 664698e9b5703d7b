"""OUT.run belongs to one run: another that is refused leaves it as it is."""

from pathlib import Path

import pytest

from uptrain.errors import UsageError
from uptrain.training.recipe import Recipe
from uptrain.training.run_folder import RunFolder


def test_a_run_that_is_refused_leaves_the_folder_of_the_run_that_has_saved_nothing_yet(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {"model": "demo", "output": tmp_path / "out", "data": ["python-stdlib"], "tokens": 1024}
    )
    with RunFolder(recipe.output) as first:
        first.open(recipe)
        before = {path.name for path in first.path.iterdir()}
        with pytest.raises(UsageError, match=r"out\.run"), RunFolder(recipe.output) as second:
            second.open(recipe)
        with pytest.raises(UsageError, match=r"out\.run"):
            RunFolder(recipe.output).discard()
        assert {path.name for path in first.path.iterdir()} == before
    RunFolder(recipe.output).discard()
    assert not first.path.exists()
