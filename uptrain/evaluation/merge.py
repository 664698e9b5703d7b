"""Merge a new measurement into an eval.json: what was not measured again stays, with the run it came from.

Every entry of a list names its run. Every run names the digests of the weights and of the baseline that it measured.
Entries of other weights, or of another baseline, are stale: they stay in the file, in lists of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

PARTS: Mapping[str, str] = {
    "rows": "quality", "tasks": "tasks", "needle": "retrieval", "samples": "samples", "speeds": "speed",
}  # fmt: skip
"""The lists of an evaluation, and the name of each in sentences."""
_KEYS: Mapping[str, tuple[str, ...]] = {
    "rows": ("text", "context", "stride", "tokens"), "tasks": ("task", "metric", "filter", "samples"),
    "needle": ("length", "depth", "samples"), "samples": ("text", "prompt"), "speeds": ("batch", "context"),
}  # fmt: skip
"""The keys that identify a measurement: the same text at another context is another measurement."""
_ORDER: Mapping[str, tuple[str, ...]] = {"rows": ("context",), "needle": ("length", "depth"), "speeds": ("batch",)}
_OF_ROW = (
    "kl", "kl_interval", "perplexity_ratio", "perplexity_ratio_interval", "top1_agreement", "top5_agreement",
    "flip_rate", "tokens", "windows", "context", "stride",
)  # fmt: skip
_OF_CELL = ("prefill_tokens_per_second", "decode_tokens_per_second", "decode_range")


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One entry of a list of an evaluation.

    - `part`: the list's name.
    - `values`: the entry's values, without its run.
    - `run`: the run that measured it.
    - `order`: the run's number; a newer run has a larger one.
    - `stale`: whether the entry was stale in its file already.
    """

    part: str
    values: Mapping[str, Any]
    run: Mapping[str, Any]
    order: int
    stale: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        dtype = self.run.get("dtype") if self.part == "rows" else None
        return (self.part, *(str(self.values.get(name)) for name in _KEYS[self.part]), dtype)

    @property
    def compared(self) -> bool:
        return self.run.get("baseline") is not None

    @property
    def text_digests(self) -> Mapping[str, str] | None:
        """Return the digests of the text by number of tokens; None where the run recorded none."""
        settings = self.run.get("settings")
        known = settings.get("text_digests") if isinstance(settings, Mapping) else None
        found = known.get(self.values.get("text")) if isinstance(known, Mapping) else None
        return found if isinstance(found, Mapping) else None


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Merge `new`, an evaluation of one run, into `old`; return the result and sentences for the user.

    A new entry replaces an older one of the same measurement, unless only the older one was compared with a baseline.
    The metrics outside the lists are those of the newest run that was compared.
    """
    now = new["runs"][0]
    before = list(_entries(old))
    after = max((entry.order for entry in before), default=-1) + 1
    fresh = [replace(entry, order=after) for entry in _entries(new)]
    against = _baseline(now) or _newest_baseline(before, now["weights"])
    texts = _newest_texts([*before, *fresh])
    found = {entry.key: entry for entry in fresh}
    stale: dict[tuple[Any, ...], _Entry] = {}
    others: list[_Entry] = []
    held: set[str] = set()
    for entry in before:
        own = _baseline(entry.run)
        text = entry.text_digests
        other = text is not None and not _same_text(text, texts[entry.values["text"]])
        if entry.run.get("weights") != now["weights"] or (entry.compared and own != against) or other:
            stale[(*entry.key, entry.run.get("weights"), own, json.dumps(text and dict(text)))] = entry
        elif entry.key not in found:
            others.append(entry)
        elif entry.compared and not found[entry.key].compared:
            found[entry.key] = entry
            held.add(entry.part)
    entries = [*others, *found.values()]
    out = {**new, **_lists(entries, list(stale.values()))}
    _headlines(out, entries, old, now)
    return out, list(_notes(others, held, list(stale.values())))


def _entries(found: Mapping[str, Any]) -> Iterator[_Entry]:
    listed = found.get("runs")
    runs = [_whole(run) for run in listed if isinstance(run, Mapping)] if isinstance(listed, list) else []
    stale = found.get("stale")
    for lists, is_stale in ((stale if isinstance(stale, Mapping) else {}, True), (found, False)):
        for part in PARTS:
            rows = lists.get(part)
            for row in rows if isinstance(rows, list | tuple) else ():
                if isinstance(row, Mapping):
                    at = row.get("run")
                    known = isinstance(at, int) and 0 <= at < len(runs)
                    values = {name: value for name, value in row.items() if name != "run"}
                    run = runs[at] if known else _unknown(found)  # type: ignore[index]
                    order = at if known else -1
                    yield _Entry(part=part, values=values, run=run, order=order, stale=is_stale)  # type: ignore[arg-type]


def _whole(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the run; where another program has broken its settings, the run without them."""
    settings = run.get("settings")
    whole = isinstance(settings, Mapping) and isinstance(settings.get("speed_contexts") or [], list)
    return run if whole else {**run, "settings": {}}


def _unknown(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known about the run of an eval.json that records no runs."""
    baseline = found.get("baseline")
    named = {"name": baseline.get("name"), "weights": None} if isinstance(baseline, Mapping) else None
    settings = {name: found.get(name) for name in ("texts", "context", "stride", "speed_context")}
    known = {name: found.get(name) for name in ("dtype", "device", "speed_dtype", "speed_repeats", "versions")}
    return {"weights": None, "baseline": named, **known, "settings": settings}


def _baseline(run: Mapping[str, Any]) -> str | None:
    baseline = run.get("baseline")
    return str(baseline.get("weights")) if isinstance(baseline, Mapping) else None


def _newest_baseline(entries: Sequence[_Entry], weights: str) -> str | None:
    compared = [entry for entry in entries if entry.compared and entry.run.get("weights") == weights]
    return _baseline(max(compared, key=lambda entry: entry.order).run) if compared else None


def _newest_texts(entries: Sequence[_Entry]) -> dict[str, Mapping[str, str]]:
    """Return the newest digests of each text: a name can mean another text in a later run."""
    known = sorted((entry for entry in entries if entry.text_digests), key=lambda entry: entry.order)
    return {str(entry.values["text"]): entry.text_digests or {} for entry in known}


def _same_text(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Tell whether two texts are the same as far as both were read: compare the longest prefix that both digested."""
    common = max(one.keys() & other.keys(), key=int, default=None)
    return common is None or one[common] == other[common]


def _lists(entries: Sequence[_Entry], stale: Sequence[_Entry]) -> dict[str, Any]:
    """Return the lists, whose entries name their runs by number, the runs, and the stale entries."""
    runs: dict[str, int] = {}
    for entry in sorted((*stale, *entries), key=lambda entry: entry.order):
        runs.setdefault(json.dumps(entry.run, sort_keys=True), len(runs))

    def numbered(chosen: Sequence[_Entry], part: str) -> list[dict[str, Any]]:
        own = sorted((entry for entry in chosen if entry.part == part), key=_place(part))
        return [{**entry.values, "run": runs[json.dumps(entry.run, sort_keys=True)]} for entry in own]

    aside = {part: rows for part in PARTS if (rows := numbered(stale, part))}
    lists: dict[str, Any] = {part: numbered(entries, part) for part in PARTS}
    return {**lists, "runs": [json.loads(run) for run in runs], "stale": aside}


def _place(part: str) -> Callable[[_Entry], tuple[float, ...]]:
    def place(entry: _Entry) -> tuple[float, ...]:
        values = (entry.values.get(name) for name in _ORDER.get(part, ()))
        return tuple(float(value) if isinstance(value, int | float) else 0.0 for value in values)

    return place


def _headlines(out: dict[str, Any], entries: Sequence[_Entry], old: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Write the metrics of the newest compared run of quality, and of speed, outside the lists."""
    rows, cells = _newest(entries, "rows"), _newest(entries, "speeds")
    whole = out["baseline"] or (old.get("baseline") if any(entry.compared for entry in (*rows, *cells)) else None)
    model, baseline = dict(out["model"]), dict(whole) if isinstance(whole, Mapping) else None
    out["parts"] = {"quality": None, "speed": None}
    for name, chosen in (("quality", rows), ("speed", cells)):
        if chosen:
            out["parts"][name] = out["runs"].index(json.loads(json.dumps(chosen[0].run)))
    if rows and rows[0].run is not now:
        row, run = rows[-1].values, rows[-1].run
        out.update({name: row.get(name) for name in _OF_ROW})
        out.update({"texts": run["settings"].get("texts"), "dtype": run.get("dtype"), "device": run.get("device")})
        _copy(("perplexity", "bits_per_byte"), row, model, baseline)
    if cells and cells[0].run is not now:
        run = cells[0].run
        first = (run["settings"].get("speed_contexts") or [None])[0]
        cell = next((each.values for each in cells if each.values.get("context") == first), cells[0].values)
        out.update({"speed_context": cell.get("context"), "speed_dtype": run.get("speed_dtype")})
        out["speed_repeats"] = run.get("speed_repeats")
        _copy(_OF_CELL, cell, model, baseline)
    out.update({"model": model, "baseline": baseline})


def _newest(entries: Sequence[_Entry], part: str) -> list[_Entry]:
    """Return the entries of the newest run that was compared; where none was, of the newest run."""
    own = [entry for entry in entries if entry.part == part]
    if not own:
        return []
    best = max(own, key=lambda entry: (entry.compared, entry.order))
    return sorted((entry for entry in own if entry.run is best.run), key=_place(part))


def _copy(
    names: Sequence[str], values: Mapping[str, Any], model: dict[str, Any], baseline: dict[str, Any] | None
) -> None:
    for name in names:
        model[name] = values.get(name)
        if baseline is not None:
            baseline[name] = values.get(f"baseline_{name}")


def _notes(others: Sequence[_Entry], held: set[str], stale: Sequence[_Entry]) -> Iterator[str]:
    names = [PARTS[part] for part in PARTS if any(entry.part == part for entry in others)]
    if names:
        yield f"It still has {', '.join(names)} of earlier runs on the same weights."
    if held:
        named = ", ".join(PARTS[part] for part in PARTS if part in held)
        yield f"This run had no baseline, so results of earlier runs against a baseline stay: {named}."
    names = [PARTS[part] for part in PARTS if any(entry.part == part and not entry.stale for entry in stale)]
    if names:
        yield (
            "Results of other weights, of another text by the same name, or against another baseline are marked stale: "
            f"{', '.join(names)}. Measure them again to compare them with the rest."
        )
