"""Write a trained model back, with what training does not change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from uptrain.architectures.embeddings import declare_loaded
from uptrain.checkpoint.jsonfile import dump_json
from uptrain.checkpoint.sidecars import code_named, copy_sidecars, sidecars_of
from uptrain.checkpoint.source import Source
from uptrain.checkpoint.weight_files import EXPLICIT


def save(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype, source: Source | None) -> None:
    """Write model and tokenizer into `folder`.

    - `model`: the trained model, which is converted to `dtype` in place.
    - `tokenizer`: written where there is no `source`.
    - `folder`: exists already.
    - `dtype`: of the stored weights.
    - `source`: the checkpoint that was trained. What training does not change, its tokenizer's files and its config
      included, is copied. None for a model that was made here.
    """
    model.to(dtype).save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        # safetensors writes 0600 whatever the umask is; config.json has the mode that the umask gives.
        path.chmod((folder / "config.json").stat().st_mode)
    if source is None:
        tokenizer.save_pretrained(folder)
        return
    sidecars = sidecars_of(source.path, source.listed, keeps_class=True)
    written = {path.name for path in folder.glob("*.py")}
    if written & {*sidecars.copied}:  # the source's own code, in as many files as it names
        for name in written - code_named(source.path, keeps_class=True):
            (folder / name).unlink()
    copy_sidecars(source.path, sidecars, folder)
    shutil.copyfile(source.path / "config.json", folder / "config.json")
    config = json.loads((folder / "config.json").read_text())
    before = dict(config)
    config.pop(EXPLICIT, None)  # the source's name for its weight file; the result has another
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    declare_loaded(config, set(model.all_tied_weights_keys))
    if config != before:
        (folder / "config.json").write_text(dump_json(config))
