"""Make a small rotary model of 8 heads by `uptrain train`: the real MHA source with rotary keys, QK-normed or not.

    python -m benchmarks make_rotary --out rotary-mha
    python -m benchmarks make_rotary --recipe qknorm-mha --out qknorm-mha

The recipes are in benchmarks/recipes. Interrupted, the same command goes on.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import options
from uptrain.cli.app import run

RECIPES = Path(__file__).parent / "recipes"


def main() -> int:
    parser = options()
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    parser.add_argument("--recipe", default="rotary-mha", choices=known)
    parser.add_argument("--out", required=True, help="the model's folder")
    arguments = parser.parse_args()
    return run(["train", str(RECIPES / f"{arguments.recipe}.yaml"), f"output={arguments.out}"])
