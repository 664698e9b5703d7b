"""What the package names costs nothing before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["uptrain.data", "uptrain.training"])
def test_a_package_lists_its_names_without_importing_what_they_need(package: str) -> None:
    code = f"""
import sys, {package} as package
print(sorted(package.__all__) == [name for name in dir(package) if name in package.__all__])
print(any(name in sys.modules for name in ("torch", "transformers", "datasets", "yaml")))
print(all(getattr(package, name).__module__.startswith("{package}.") for name in package.__all__))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True"]
