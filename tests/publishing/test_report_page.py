"""The page shows the figures there are and says which there aren't, and a browser needs nothing else to show it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import checkpoint
from uptrain.checkpoint.manifest import verify
from uptrain.cli.app import run


class Document(HTMLParser):
    """Collects what a reader sees, by tag, and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.tables: list[list[list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in ("meta", "link", "use", "path", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words += data
        if {"td", "th"} & {*self.open}:
            self.tables[-1][-1][-1] += data


EVALUATION: dict[str, Any] = {
    "format": 1, "texts": ["/home/me/wiki.txt"], "tokens": 7999, "windows": 15, "context": 1024, "stride": 512,
    "dtype": "float32", "device": "cpu", "speed_context": 512, "speed_dtype": "float32", "kl": 0.0321,
    "kl_interval": [0.0301, 0.0341], "perplexity_ratio": 1.25, "perplexity_ratio_interval": [1.2, 1.3],
    "top1_agreement": 0.875, "flip_rate": 0.0321,
    "model": {"name": "x", "perplexity": 12.5, "cache_bytes_per_token": 96, "decode_tokens_per_second": 77.0,
              "decode_range": [70.0, 80.0]},
    "baseline": {"name": "y", "perplexity": 10.0, "cache_bytes_per_token": 384, "decode_tokens_per_second": 55.0,
                 "decode_range": [50.0, 60.0]},
    "rows": [{"text": "/home/me/wiki.txt", "context": 1024, "perplexity": 12.5, "baseline_perplexity": 10.0,
              "kl": 0.0321, "kl_interval": None, "top1_agreement": 0.875, "top5_agreement": 0.9125,
              "flip_rate": 0.0321}],
}  # fmt: skip
LOG = [{"step": n, "tokens": 100 * n, "loss": 4 / n, "lr": 0.1, "tokens_per_s": 50} for n in range(1, 6)]


def headings(text: str) -> set[str]:
    return {*re.findall(r"<h2>(.*?)</h2>", text)}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    source = checkpoint(folder / "source", "llama", attention_bias=False)
    options = ["--to", "mqa", "--method", "svd", "--diagnose"]
    assert run(["convert", str(source), str(folder / "results/a<b>-mqa"), *options]) == 0
    return folder / "results/a<b>-mqa"


@pytest.fixture
def page(converted: Path, tmp_path: Path) -> Callable[..., tuple[Document, str]]:
    def write(directory: Path | None = None) -> tuple[Document, str]:
        out = tmp_path / "page.html"
        assert run(["report", str(directory or converted), "--out", str(out)]) == 0
        text = out.read_text()
        return Document(text), text

    return write


def test_measurements_stand_on_the_page(converted: Path, page: Callable[..., tuple[Document, str]]) -> None:
    (converted / "eval.json").write_text(json.dumps(EVALUATION))
    (converted / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    document, text = page()
    original, model = document.tables[0][1:]
    assert original[:4] == ["the original", "384 B", "100 %", "10.00"]
    assert model == ["a<b>-mqa", "192 B", "25 %", "12.50", "1.250(1.200 to 1.300)", "0.0321(0.0301 to 0.0341)", "87.5%",
                     "3.21%"]  # fmt: skip
    (row,) = document.tables[1][1:]
    assert row == ["a<b>-mqa", "wiki.txt", "1,024", "12.50", "10.00", "0.0321", "87.5%", "91.2%", "3.21%"]
    assert "a<b>-mqa: 77" in document.words and "the original: 55" in document.words
    stage = json.loads((converted / "uptrain.json").read_text())["stages"][-1]
    kept = stage["energy_kept"]
    shown = {tuple(row[1:]) for row in document.tables[2][1:]}
    assert shown == {
        (layer, method, f"{sides['keys']:.1%}", f"{sides['values']:.1%}")
        for layer, methods in kept.items() for method, sides in methods.items()
    }  # fmt: skip
    assert [row[1:] for row in document.tables[3][1:]] == [
        [layer, *(f"{kinds[kind][side]:.1%}" for side in ("keys", "values") for kind in ("stored", "aligned"))]
        for layer, kinds in stage["head_similarity"].items()
    ]
    assert "Head similarity by layer" in headings(text)
    assert "/home/me" not in text
    assert document.tags["svg"] == 6 and 'class="missing"' not in text
    verify(converted)


GRID: dict[str, Any] = {
    "rows": [
        {"text": text, "context": context, "perplexity": 10 * ratio, "baseline_perplexity": 10.0, "kl": 0.1,
         "perplexity_ratio": ratio, "perplexity_ratio_interval": [ratio - 0.05, ratio + 0.05]}
        for text in ("wiki.txt", "code.txt", "all") for context, ratio in ((256, 1.25), (1024, 1.5))
    ],
    "tasks": [
        {"task": "piqa", "metric": "acc", "filter": "none", "higher_is_better": True, "samples": 1838, "value": 0.6125,
         "stderr": 0.0114, "baseline_value": 0.6834, "baseline_stderr": 0.0109, "difference_interval": [-0.09, -0.046]},
        {"task": "lambada", "metric": "perplexity", "filter": "none", "higher_is_better": False, "samples": 50,
         "value": 44.25, "stderr": 1.5, "baseline_value": 18.5, "baseline_stderr": None, "difference_interval": None},
    ],
    "needle": [
        {"length": length, "depth": depth, "samples": 10, "exact_match": 0.7 * (1 - depth),
         "exact_match_interval": [0.4, 0.9], "log_probability": -1.25, "log_probability_interval": [-2.0, -0.5],
         "baseline_exact_match": 0.9, "baseline_exact_match_interval": [0.6, 1.0], "baseline_log_probability": -0.125,
         "baseline_log_probability_interval": None, "difference_interval": [-1.5, -0.5]}
        for length in (512, 4096) for depth in (0.0, 0.5)
    ],
    "speeds": [
        {"batch": batch, "context": context, "prefill_tokens_per_second": 1234.0, "prefill_range": [1200.0, 1300.0],
         "decode_tokens_per_second": 99.0 * batch, "decode_range": [90.0 * batch, 101.0 * batch],
         "baseline_prefill_tokens_per_second": 1100.0, "baseline_prefill_range": [1000.0, 1111.0],
         "baseline_decode_tokens_per_second": 55.0, "baseline_decode_range": [50.0, 60.0], "decode_ratio": 1.8,
         "decode_ratio_range": [1.5, 2.0]}
        for batch in (1, 8) for context in (512, 4096)
    ],
}  # fmt: skip


@pytest.mark.slow
def test_tasks_retrieval_contexts_and_speeds_stand_on_the_page(
    converted: Path, page: Callable[..., tuple[Document, str]]
) -> None:
    (converted / "eval.json").write_text(json.dumps({**EVALUATION, **GRID}))
    document, text = page()
    tables = {table[0][1]: table for table in document.tables}
    assert [row[1:] for row in tables["task"][1:]] == [
        ["piqa", "acc", "1,838", "0.6834 ± 0.011", "0.6125 ± 0.011", "-0.09 to -0.046"],
        ["lambada", "perplexity", "50", "18.5", "44.25 ± 1.5", "–"],
    ]
    assert [row[1:] for row in tables["length"][1:]] == [
        [length, depth, "10", "90%(60% to 100%)", "-0.12", f"{found}(40% to 90%)", "-1.25"]
        for length in ("512", "4,096") for depth, found in (("0%", "70%"), ("50%", "35%"))
    ]  # fmt: skip
    assert [row[1:] for row in tables["batch"][1:]] == [
        [batch, context, "1,100(1,000 to 1,111)", "1,234(1,200 to 1,300)", "55(50 to 60)", decode, "1.80(1.50 to 2.00)"]
        for batch, decode in (("1", "99(90 to 101)"), ("8", "792(720 to 808)")) for context in ("512", "4,096")
    ]  # fmt: skip
    contexts = [row[2:4] for row in tables["text"][1:]]
    assert contexts == [["256", "12.50"], ["1,024", "15.00"]] * 3
    assert {"Tasks", "Retrieval", "Decode speed", "Quality against cache"} <= headings(text)
    pictures = dict(re.findall(r'<figure role="img" aria-label="([^"]*)">(.*?)</figure>', text, re.DOTALL))
    (grid,) = (Document(svg).words for says, svg in pictures.items() if says.startswith("Keys found"))
    shown = Counter(grid.split())
    # Twelve numbers of each grid's cells: the original's four, and the converted model's by depth.
    assert (shown["90%"], shown["70%"], shown["35%"]) == (4, 2, 2) and shown["-1.2"] == shown["-0.1"] == 4
    (tasks,) = (Document(svg).words for says, svg in pictures.items() if says.startswith("Score of each"))
    assert "piqa" in tasks and "lambada" not in tasks, "a perplexity is no share of 100 %"
    assert any(says.startswith("Decoded tokens per second of a&lt;b&gt;-mqa") for says in pictures)
    assert any(says.startswith("Perplexity over the original") for says in pictures)


@pytest.mark.slow
def test_lists_of_another_shape_still_give_a_page(converted: Path, page: Callable[..., tuple[Document, str]]) -> None:
    odd = [{}, "x", {"task": None, "value": "a", "depth": [], "batch": {}, "context": 512, "decode_range": [1]}]
    broken = dict(zip(GRID, (odd, 7, odd, odd), strict=True))
    (converted / "eval.json").write_text(json.dumps({**EVALUATION, **broken, "samples": odd}))
    document, text = page()
    assert document.tables[0][2][3] == "12.50"
    assert "against the context, by batch" not in text, "one context makes no line"


@pytest.mark.slow
def test_a_manifest_that_knows_no_head_similarity_gives_a_page_without(
    converted: Path, page: Callable[..., tuple[Document, str]]
) -> None:
    whole = (converted / "uptrain.json").read_text()
    manifest = json.loads(whole)
    del manifest["stages"][-1]["head_similarity"]
    try:
        (converted / "uptrain.json").write_text(json.dumps(manifest))
        assert "Head similarity by layer" not in headings(page()[1])
    finally:
        (converted / "uptrain.json").write_text(whole)


@pytest.mark.slow
def test_samples_stand_side_by_side_as_they_were_written(
    converted: Path, page: Callable[..., tuple[Document, str]]
) -> None:
    written = {"text": "t", "prompt": "if a <b>:", "continuation": " x\n  [y]", "baseline_continuation": " z<script>"}
    (converted / "eval.json").write_text(json.dumps({**EVALUATION, "samples": [{**written, "common_tokens": 0}]}))
    document, _ = page()
    for words in ("if a <b>:", "the original", " x\n  [y]", " z<script>"):
        assert words in document.words
    assert document.tags["script"] == 0 and document.tags["pre"] == 3
    (converted / "eval.json").write_text(json.dumps(EVALUATION))
    assert "Samples" not in page()[0].words


@pytest.mark.slow
def test_what_was_not_measured_is_said_and_not_drawn(
    converted: Path, page: Callable[..., tuple[Document, str]]
) -> None:
    for name in ("eval.json", "train_log.jsonl"):
        (converted / name).unlink(missing_ok=True)
    document, text = page()
    assert document.tags["svg"] == 3
    assert not {"Tasks", "Retrieval", "Samples"} & headings(text), "a heading over nothing"
    for words in (
        "not measured against its original: uptrain eval",
        "No model here was trained",
        "speed of a<b>-mqa was not",
    ):
        assert words in document.words
    assert document.tables[0][1][3:] == ["–"] * 5


@pytest.mark.slow
def test_a_browser_needs_nothing_but_the_file(converted: Path, page: Callable[..., tuple[Document, str]]) -> None:
    (converted / "eval.json").write_text(json.dumps({**EVALUATION, **GRID}))
    document, text = page()
    assert document.tags["script"] == 0 and "<b>" not in text
    assert "http" not in text and "//" not in text.replace("<!--", "")
    ids = [value for name, value in document.attributes if name == "id"]
    assert len(ids) == len({*ids}), "pictures share ids, so one would show another's parts"
    links = [value for name, value in document.attributes if name in ("href", "src")]
    assert all(link == "data:," or link.startswith("#") for link in links)
    used = {link[1:] for link in links if link.startswith("#")} | {*re.findall(r"url\(#([^)]+)\)", text)}
    assert used and used <= {*ids}
    # Colours are the page's, or a dark page would have dark letters.
    drawn = text.partition("</style>")[2]
    assert "#1c2430" not in drawn and "var(--ink)" in drawn and "prefers-color-scheme" in text


@pytest.mark.slow
def test_a_request_s_memory_is_the_definition_s(page: Callable[..., tuple[Document, str]]) -> None:
    """Four heads of 12 dims in two layers of float32, keys and values; DeepSeek-V2: 4 heads' dims and half a head's."""
    document, _ = page()
    sizes = {row[0].partition("(")[0].strip(): row[1:] for row in document.tables[-1]}
    assert sizes["attention"] == ["4 K", "16 K", "64 K", "256 K", "1 M", "of the largest"]
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    for form, values in {"MHA": 2 * 4 * 12, "GQA-2": 2 * 2 * 12, "MQA": 2 * 12, "MLA-54": 4 * 12 + 6}.items():
        for tokens, shown in zip((4, 16, 64, 256, 1024), sizes[form], strict=False):
            count, unit = shown.split()
            assert float(count) * units[unit] == pytest.approx(values * 2 * 4 * tokens * 1024, rel=1e-3)


@pytest.mark.slow
def test_several_are_compared_and_pictures_lie_beside_the_page(
    converted: Path, tmp_path: Path, page: Callable[..., tuple[Document, str]]
) -> None:
    from PIL import Image

    (converted / "eval.json").write_text(json.dumps(EVALUATION))
    other = converted.parent / "gqa2"
    if not other.exists():
        assert run(["convert", str(converted.parent.parent / "source"), str(other), "--groups", "2"]) == 0
    (other / "eval.json").write_text(json.dumps({**EVALUATION, "tokens": 50}))
    document, _ = page(converted.parent)
    names = [row[0] for row in document.tables[0][1:]]
    assert names == ["the original", "a<b>-mqa", "the original", "gqa2"]
    assert "gqa2 was measured on other text or with other settings than a<b>-mqa" in document.words
    assert "gqa2 has no head similarity: uptrain convert --diagnose measures it." in document.words
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [
        "page-energy-a_3cb_3e-mqa.png", "page-memory.png", "page-quality.png", "page-similarity-a_3cb_3e-mqa.png",
        "page-speed.png",
    ]  # fmt: skip
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 900 and len({*picture.convert("RGB").get_flattened_data()}) > 10


def test_a_folder_without_a_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path)]) == 2
    assert "checkpoint" in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())
