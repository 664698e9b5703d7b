"""Convert every family as people really have it, and compare each result with transformers' own class.

    python -m benchmarks survey [--families llama,gpt2] [--settings tied] [--jobs 2] [--json]

Each row is a family and an odd setting: how embeddings are tied, how rotary parameters are spelled, how files are laid
out, which head the model has. The oracle is the source in its own class, with its heads pooled in place by torch; of a
latent at full rank, the source as it is. What is printed is the largest difference of any logit (or hidden state),
divided by the largest logit where that is above 1: at GQA, MQA and, where the family has one, MLA. A conversion that
is refused says why, and counts apart. The exit code is 1 where a difference is above 1e-5.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from benchmarks.common import options
from tests.conftest import tiny_config, tiny_model
from tests.conversion.test_families import FAMILY_NAMES, TOKENS, family, read
from tests.oracle import pool_model
from uptrain.architectures.description import ModelDescription
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.errors import UptrainError
from uptrain.models.register import own_class

LIMIT = 1e-5
HEAD, EMBEDDINGS = "lm_head.weight", ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class Setting:
    """One odd way to have a checkpoint: changes of the tiny config, and an edit of the folder it is saved to."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[Path], None] = lambda folder: None
    task: str = ""
    key_value_heads: int = 4
    shard: str = "5GB"


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change config.json of a folder."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def older_spelling(config: dict[str, Any]) -> None:
    """Spell rotary parameters as transformers 4 did: at the top level, the scaling in a section of its own."""
    said = dict(config.pop("rope_parameters"))
    config["rope_theta"] = said.pop("rope_theta")
    if "partial_rotary_factor" in said:
        config["partial_rotary_factor"] = said.pop("partial_rotary_factor")
    kind = said.pop("rope_type", "default")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **said}


def both_spellings(config: dict[str, Any]) -> None:
    """Add an older section to the newer one, as in a checkpoint that was edited for long context."""
    config["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    config["rope_theta"] = 5_000.0


def rotary(folder: Path) -> bool:
    said = json.loads((folder / "config.json").read_text()).get("rope_parameters")
    return isinstance(said, dict) and "rope_theta" in said


def head_stored(folder: Path, different: bool) -> None:
    """Store a head as well as the embedding that it is tied to: an equal one, or another."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(EMBEDDINGS))
    head = tensors[name].clone()
    tensors[HEAD] = head + torch.randn(head.shape, generator=torch.Generator().manual_seed(3)) if different else head
    save_file(tensors, path, {"format": "pt"})


def stale_index(folder: Path) -> None:
    """Leave the index of a sharded download next to the single file that replaced it."""
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SETTINGS = (
    Setting("as saved"),
    Setting("2 of 4 key/value heads", key_value_heads=2),
    Setting("in shards", shard="30KB"),
    Setting("stale index", edit=stale_index),
    Setting("tied", {"tie_word_embeddings": True}),
    Setting("tied, equal head stored", {"tie_word_embeddings": True}, lambda folder: head_stored(folder, False)),
    Setting("tied, other head stored", {"tie_word_embeddings": True}, lambda folder: head_stored(folder, True)),
    Setting("untied", {"tie_word_embeddings": False}),
    Setting("rope: linear", {"rope_parameters": LINEAR}),
    Setting("rope: yarn", {"rope_parameters": YARN}),
    Setting("rope: older spelling", edit=lambda folder: edited(folder, older_spelling)),
    Setting("rope: both spellings", edit=lambda folder: edited(folder, both_spellings)),
    Setting("no head", task="AutoModel"),
    Setting("classifier", {"num_labels": 3}, task="AutoModelForSequenceClassification"),
)


@dataclass(frozen=True)
class Row:
    """One family and setting: the largest difference by target, or why the target was refused."""

    family: str
    setting: str
    differences: dict[str, float]
    refused: dict[str, str]


def fits(name: str, setting: Setting) -> bool:
    """Tell whether a family has what a setting is about."""
    entry, config = family(name), tiny_config(name)
    said = getattr(config, "rope_parameters", None)
    described = ModelDescription(family=entry, config=config.to_dict(), name=name)
    rotates = described.position.rotates and isinstance(said, dict) and "rope_theta" in said
    if setting.name.startswith("rope"):
        return rotates
    if setting.key_value_heads != 4:
        return entry.native and name != "falcon"
    if setting.name.startswith("tied,"):
        return hasattr(config, "tie_word_embeddings") and not config.is_encoder_decoder
    if setting.task:
        mapping = getattr(transformers, setting.task)._model_mapping
        return type(config) in mapping and not config.is_encoder_decoder
    return True


def saved(name: str, setting: Setting, folder: Path) -> None:
    """Save a tiny model of a family in a setting."""
    changes = dict(setting.changes)
    said = getattr(tiny_config(name), "rope_parameters", None) or {}
    if "rope_parameters" in changes and "partial_rotary_factor" in said:
        changes["rope_parameters"] = {**changes["rope_parameters"], "partial_rotary_factor": 0.5}
    heads = setting.key_value_heads if setting.key_value_heads != 4 else None
    model: Any = tiny_model(tiny_config(name, heads, **changes))
    if setting.task:
        torch.manual_seed(1)
        other = getattr(transformers, setting.task).from_config(model.config).float()
        known = getattr(model, model.base_model_prefix).state_dict()
        body = other if setting.task == "AutoModel" else getattr(other, other.base_model_prefix)
        body.load_state_dict(known)
        model = other
    model.save_pretrained(folder, max_shard_size=setting.shard)
    setting.edit(folder)


def loaded(folder: Path) -> PreTrainedModel:
    """Load a checkpoint in the class that its config names."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = (own_class(name) or getattr(transformers, name)).from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def computed(model: PreTrainedModel) -> torch.Tensor:
    """Return what a model says of TOKENS: its logits or, without a head, its last hidden states."""
    if model.config.is_encoder_decoder:
        return model(**read(model, TOKENS.flip(1)), decoder_input_ids=TOKENS).logits
    out = model(TOKENS)
    return out.logits if "logits" in out else out.last_hidden_state


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to values above 1; infinity where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def requests(name: str, setting: Setting, folder: Path) -> Iterator[tuple[str, Request, int | None]]:
    """Yield each target with the groups that its oracle pools to, None where nothing is pooled."""
    if setting.key_value_heads == 4 and name != "falcon":
        yield "gqa", Request("gqa", 2), 2
    yield "mqa", Request("mqa"), 1
    entry = family(name)
    if not entry.targets.get("mla"):
        return
    config = json.loads((folder / "config.json").read_text())
    described = ModelDescription(family=entry, config=config, name=name)
    spec = described.attention[0]
    # One value more than the input has: a latent so wide holds every key and value, their biases too.
    rank = min(2 * spec.num_key_value_heads * spec.head_dim, int(config.get("hidden_size", 48)) + 1)
    rope = "re-rotate" if described.position.rotates else None
    yield "mla", Request("mla", kv_lora_rank=rank, **({"rope": rope} if rope else {})), None


def survey(name: str, setting: Setting) -> Row:
    """Convert one family in one setting to every target."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    differences: dict[str, float] = {}
    refused: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="uptrain-survey-") as work, contextlib.redirect_stderr(io.StringIO()):
        source = Path(work) / "source"
        try:
            saved(name, setting, source)
            computed(loaded(source))
        except Exception as error:
            return Row(name, setting.name, {}, {"source": f"transformers can't: {error!r}"[:120]})
        for target, request, groups in requests(name, setting, source):
            try:
                convert(str(source), Path(work) / target, request)
                found = computed(loaded(Path(work) / target))
            except UptrainError as error:
                refused[target] = str(error).splitlines()[0].replace(work, "")
            except Exception as error:
                differences[target] = float("inf")
                refused[target] = f"{error!r}"[:120]
            else:
                model = loaded(source)
                differences[target] = difference(
                    found, computed(model if groups is None else pool_model(model, groups))
                )
    return Row(name, setting.name, differences, refused)


def main() -> None:
    parser = options("--json")
    parser.add_argument("--families", help="comma-separated; default: all")
    parser.add_argument("--settings", help="only settings whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    names = arguments.families.split(",") if arguments.families else FAMILY_NAMES
    chosen = [each for each in SETTINGS if (arguments.settings or "") in each.name]
    work = [(name, setting) for name in names for setting in chosen if fits(name, setting)]
    rows = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(survey_at, [(name, SETTINGS.index(setting)) for name, setting in work]):
            rows.append(row)
            print(json.dumps(asdict(row)) if arguments.json else line(row), flush=True)
    found = [value for row in rows for value in row.differences.values()]
    worst = max(found, default=0.0)
    refusals = sum(len(row.refused) for row in rows)
    print(
        f"{len(rows)} rows, {len(found)} results, largest difference {worst:.1e}; {refusals} refused", file=sys.stderr
    )
    sys.exit(any(not value <= LIMIT for value in found))


def survey_at(place: tuple[str, int]) -> Row:
    """Survey a family in the setting of that place: functions in a setting don't travel between processes."""
    name, index = place
    return survey(name, SETTINGS[index])


def line(row: Row) -> str:
    """Return a row as text."""
    cells = [f"{target} {value:.1e}" for target, value in row.differences.items()]
    cells += [f"{target} refused: {why}" for target, why in row.refused.items()]
    flag = "" if all(value <= LIMIT for value in row.differences.values()) else "  <-- above the limit"
    return f"{row.family:<18} {row.setting:<26} {'  '.join(cells)}{flag}"
