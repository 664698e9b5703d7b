"""Each speed is a median over rounds in which the models alternate, on a clock that the test sets."""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.corpus import checkpoint, corpus
from uptrain.data.sources import Files
from uptrain.errors import UsageError
from uptrain.evaluation import EvaluationSettings, evaluate, speed
from uptrain.evaluation.speed import SpeedPlan, time_cell


class Clocked:
    """Stands in for a model: each prefill and each decoding step of a round takes the seconds that the test gives."""

    device = torch.device("cpu")
    config = SimpleNamespace(is_encoder_decoder=False)

    def __init__(self, clock: list[float], seconds: list[tuple[float, float]], calls: list[Any]) -> None:
        self.clock, self.seconds, self.calls, self.round = clock, seconds, calls, -1

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        prefill = input_ids.shape[1] > 1
        self.round += prefill
        self.calls.append((self, input_ids))
        self.clock[0] += self.seconds[self.round][not prefill]
        return CausalLMOutputWithPast(logits=torch.zeros(len(input_ids), 1, 5), past_key_values=())

    def __call__(self, **given: Any) -> Any:
        return self.forward(**given)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    return now


def test_metrics_are_medians_ranges_and_ratios_of_one_turn(clock: list[float]) -> None:
    ours = [(90.0, 90.0), (2.0, 0.5), (4.0, 0.25), (3.0, 1.0)]
    theirs = [(90.0, 90.0), (1.0, 1.0), (8.0, 1.0), (2.0, 4.0)]
    calls: list[Any] = []
    pair = [Clocked(clock, ours, calls), Clocked(clock, theirs, calls)]
    found = time_cell(pair, torch.arange(10), SpeedPlan(batch=4, context=16, decode_tokens=3, repeats=3))
    # The first round only warms up; 4 sequences of 16 tokens, then 3 steps of 4 tokens.
    for seconds, of in ((ours[1:], ""), (theirs[1:], "baseline_")):
        prefill = [4 * 16 / each for each, _ in seconds]
        decode = [4 * 3 / (3 * each) for _, each in seconds]
        for name, values in (("prefill", prefill), ("decode", decode)):
            assert getattr(found, f"{of}{name}_tokens_per_second") == pytest.approx(statistics.median(values))
            assert getattr(found, f"{of}{name}_range") == pytest.approx((min(values), max(values)))
    assert found.decode_ratio == pytest.approx(4)
    assert found.decode_ratio_range == pytest.approx((2, 4))
    shapes = [tuple(ids.shape) for _, ids in calls]
    assert shapes == [(4, 16), *[(4, 1)] * 3] * 8
    rounds = [who for who, ids in calls if ids.shape[1] > 1]
    assert all(one is not other for one, other in pairwise(rounds))
    assert len({tuple(row.tolist()) for row in calls[0][1]}) == 4


def test_a_model_that_does_not_fit_leaves_the_other_s_metrics(clock: list[float]) -> None:
    class Full(Clocked):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            raise torch.OutOfMemoryError

    pair = [Clocked(clock, [(1.0, 1.0)] * 3, []), Full(clock, [], [])]
    found = time_cell(pair, torch.arange(10), SpeedPlan(batch=1, context=4, decode_tokens=2, repeats=2))
    assert found.decode_tokens_per_second == 1
    assert (found.baseline_decode_tokens_per_second, found.decode_ratio) == (None, None)


def test_every_batch_is_timed_at_every_context_and_one_sequence_stands_first(tmp_path: Path) -> None:
    folder, text = checkpoint(tmp_path / "model"), Files(files=str(corpus(tmp_path / "text.txt", 20)))
    settings = EvaluationSettings(
        text=[text], context=32, tokens=60, speed_context=[20, 59, 8], speed_batch=3, decode_tokens=4, repeats=1
    )
    with pytest.raises(UsageError, match="speed-context"):
        evaluate(str(folder), replace(settings, speed_context=[20, 60]))
    found = evaluate(str(folder), settings)
    # 64 positions, of which 4 are decoded into.
    cells = [(cell.batch, cell.context) for cell in found.speeds]
    assert cells == [(batch, context) for batch in (1, 3) for context in (20, 59, 8)]
    assert found.speed_context == 20
    assert found.model.decode_tokens_per_second == found.speeds[0].decode_tokens_per_second
    assert found.speeds[0].baseline_decode_tokens_per_second is None
