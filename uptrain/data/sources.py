"""Which text sources exist, in a recipe or after `--text`: files, datasets, built-in text, text by the teacher."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from uptrain.errors import UsageError

FORMAT_READERS = frozenset(
    {
        "arrow", "audiofolder", "cache", "conll", "csv", "eval", "fasta", "fastq", "generator", "genbank", "harbor",
        "hdf5", "iceberg", "imagefolder", "json", "lance", "meshfolder", "mmcif", "niftifolder", "pandas", "parquet",
        "pdb", "pdffolder", "spark", "sql", "text", "tsfile", "videofolder", "vortex", "webdataset", "xml",
    }
)  # fmt: skip
"""Names that `datasets.load_dataset` takes for a file format. It then reads every such file of the current folder."""
TEXT_ENDINGS = (".txt", ".md", ".rst", ".text", ".py", ".jsonl", ".ndjson", ".parquet")


BUILTIN_TEXT = "python-stdlib"
_WEIGHTED = re.compile(r"(.+):([^:/\\]*)")


class Strict(BaseModel):
    """A frozen section of a recipe; a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class WeightedSource(Strict):
    """A source of text; `weight` is its share of the blocks relative to the weights of the other sources."""

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class RowSource(WeightedSource):
    """A source with rows: text in `text_field`, or a conversation (a list of {role, content}) in `chat_field`."""

    text_field: str = "text"
    chat_field: str | None = None

    @model_validator(mode="after")
    def _one_field(self) -> RowSource:
        if self.chat_field is not None and self.text_field not in ("text", self.chat_field):
            raise ValueError("give either text_field or chat_field: a row's text is one or the other")
        return self


class Files(RowSource):
    """Local files, by name or glob: a text file is one document, a row of a JSONL or Parquet file is one document."""

    files: str | list[str]


class Dataset(RowSource):
    """A dataset that the `datasets` library can load: a Hub id or a local folder."""

    dataset: str
    name: str | None = None
    split: str = "train"
    stream: bool = False

    @field_validator("dataset")
    @classmethod
    def _no_format(cls, name: str) -> str:
        if name in FORMAT_READERS:
            raise ValueError(f"there is no file {name}, and it is the name of a file format, not of a dataset")
        return name


class Builtin(WeightedSource):
    """Text that every machine has: the documentation and source code of the running Python's standard library."""

    builtin: Literal["python-stdlib"]
    split: Literal["train", "held-out"] = "train"


HELD_OUT = Builtin(builtin="python-stdlib", split="held-out")
"""The text that evaluations score by default."""


class TeacherText(WeightedSource):
    """Text that the teacher model writes, for a model whose training data is not available.

    Each document starts from the beginning-of-text token, or from the first tokens of a document of `prompts`.
    """

    source: Literal["teacher"]
    tokens: int = Field(gt=0)
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    batch_size: int = Field(32, gt=0)
    prompts: Prompts | None = None
    prompt_tokens: int = Field(8, gt=0)

    @model_validator(mode="after")
    def _prompts_in_order(self) -> TeacherText:
        if self.prompts is not None and self.prompts.weight is not None:
            raise ValueError("prompts has no weight: it gives the beginnings, and no blocks of its own")
        return self


TextSource = Files | Dataset | Builtin | TeacherText
TEXT_SOURCES: Mapping[str, type[TextSource]] = MappingProxyType(
    {"files": Files, "dataset": Dataset, "builtin": Builtin, "source": TeacherText}
)
"""Every kind of text source: the key that names it in a recipe, and its class. `documents.pieces` reads them."""


def has_chats(source: TextSource) -> bool:
    """Return whether a source's rows hold conversations."""
    return isinstance(source, RowSource) and source.chat_field is not None


def is_stream(source: TextSource) -> bool:
    """Return whether a source is tokenised while it is read, without a file of tokens."""
    return isinstance(source, Dataset) and source.stream


def text_name(source: TextSource) -> str:
    """Return the name of a text, as `--text` would spell it."""
    if isinstance(source, Builtin):
        return f"{source.builtin}:{source.split}"
    if isinstance(source, Dataset):
        return source.dataset
    if isinstance(source, Files):
        return source.files if isinstance(source.files, str) else ", ".join(source.files)
    return source.source


def parse_source(value: Any) -> Any:
    """Turn an entry of a recipe's `data`, or the value of `--text`, into a source.

    A string is `python-stdlib`, `python-stdlib:held-out`, a file, a glob or a dataset. Other values are returned as
    they are, for pydantic to check.

    Raises:
        ValueError: a mapping has none of the keys of `TEXT_SOURCES`.
    """
    if isinstance(value, str):
        kind, _, split = value.partition(":")
        if kind == "python-stdlib":
            return Builtin(builtin=kind, **({"split": split} if split else {}))  # type: ignore[arg-type]
        if value.endswith(TEXT_ENDINGS) or any(char in value for char in "*?[") or _is_file(value):
            return Files(files=value)
        return Dataset(dataset=value)
    if isinstance(value, Mapping):
        for key, source in TEXT_SOURCES.items():
            if key in value:
                return source.model_validate(value)
        raise ValueError("a source is a file name, a dataset name, or a mapping with files, dataset, builtin or source")
    return value


def text_of_option(option: str, name: str) -> TextSource:
    """Return the text source that a command line names after `option`.

    Raises:
        UsageError: `name` can't be the name of a text.
    """
    try:
        found: TextSource = parse_source(name)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(
            f"{option} {name} is not a text: {reason}.",
            "Name a file with its ending, such as corpus.txt, a glob, ./FOLDER, or a dataset as OWNER/NAME.",
        ) from None
    return found


def weighted_names(option: str, value: str) -> dict[str, float]:
    """Return the names and weights in TEXT[:WEIGHT],…, in order; a text without a weight has 1.

    The name of an existing file is a file's name, even where it has a comma or ends like a weight.

    Raises:
        UsageError: a name is empty or given twice, or a weight is not a positive number.
    """
    found: dict[str, float] = {}
    for item in _items(value):
        name, weight = _weighted(option, item)
        if not name or name in found:
            problem = f"names {name} twice" if name else "names an empty text"
            raise UsageError(f"{option} {value} {problem}.", "Write TEXT:WEIGHT,TEXT:WEIGHT, each text once.")
        found[name] = weight
    return found


def _items(value: str) -> list[str]:
    """Split a value at its commas, except those in the names of existing files; the longest such name counts."""
    parts, items = value.split(","), []
    while parts:
        taken = next((end for end in range(len(parts), 1, -1) if _names_file(",".join(parts[:end]).strip())), 1)
        items.append(",".join(parts[:taken]).strip())
        del parts[:taken]
    return items


def _names_file(item: str) -> bool:
    weighted = _WEIGHTED.fullmatch(item)
    return _is_file(item) or (weighted is not None and "," not in weighted[2] and _is_file(weighted[1]))


def _weighted(option: str, item: str) -> tuple[str, float]:
    parts = None if _is_file(item) else _WEIGHTED.fullmatch(item)
    if parts is None:
        return item, 1.0
    try:
        weight = float(parts[2])
    except ValueError:
        if not parts[1].endswith(TEXT_ENDINGS):
            return item, 1.0
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UsageError(
            f"{option} {item}: the weight {parts[2]} is not a positive number.", f"For example {parts[1]}:2."
        )
    return parts[1], weight


def _is_file(name: str) -> bool:
    with suppress(OSError):  # of a name that no file can have
        return Path(name).is_file()
    return False


ParsedSource = Annotated[TextSource, BeforeValidator(parse_source)]
Prompts = Annotated[Files | Dataset | Builtin, BeforeValidator(parse_source)]
TeacherText.model_rebuild()
