"""What `import uptrain` offers is what its documentation says, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import uptrain

SCRIPT = """
import uptrain
assert {*uptrain.__all__} <= {*dir(uptrain)}
import uptrain.conversion.run.convert, uptrain.conversion.inspection
assert uptrain.inspect("demo").num_hidden_layers == 4
from uptrain import convert
from uptrain.conversion.run.convert import convert as same
assert convert is same is uptrain.convert
assert "torch" not in __import__("sys").modules
import uptrain.evaluation.run, uptrain.workflows.sweeps.run, uptrain.workflows.demo.run
assert uptrain.evaluation.evaluate is uptrain.evaluate is uptrain.evaluation.run.evaluate
assert uptrain.workflows.sweep is uptrain.sweep is uptrain.workflows.sweeps.run.sweep
assert uptrain.workflows.run_demo is uptrain.workflows.demo.run.run_demo
"""


def test_a_submodule_does_not_take_its_functions_place() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


def test_all_public_names_can_be_called() -> None:
    assert all(callable(getattr(uptrain, name)) for name in uptrain.__all__)
