"""Datasets that the `datasets` library loads, and the text of their rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from uptrain.data.row_text import RowText
from uptrain.data.sources import Dataset
from uptrain.errors import UptrainError, UsageError, needing

if TYPE_CHECKING:
    import datasets


def open_dataset(source: Dataset) -> datasets.Dataset | datasets.IterableDataset:
    """Load a dataset with the `datasets` library, as a stream if the source says so.

    Raises:
        UsageError: the library is not installed, or the dataset, its configuration or its split does not exist.
    """
    with needing("Reading a dataset"):
        import datasets
    try:
        return datasets.load_dataset(source.dataset, source.name, split=source.split, streaming=source.stream)
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"The dataset {source.dataset} can't be loaded: {reason.rstrip('.')}.",
            "Name a Hub dataset, a folder of data files, or text files ending in .txt, .jsonl or .parquet.",
        ) from None


def dataset_texts(dataset: Iterable[Any], source: Dataset, text: RowText) -> Iterator[str]:
    """Yield the text of each row of a dataset, which `open_dataset(source)` returned; `text` reads its rows.

    Raises:
        UptrainError: a row lacks the source's field.
    """
    for row in dataset:
        try:
            yield text.text_of(row, f"The dataset {source.dataset}")
        except UsageError as error:
            raise UptrainError(error.message, error.hint) from None
