"""One place decides where numbers are computed, and how; a full memory is one sentence, and models are freed."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel

from tests.corpus import NO_DROPOUT, checkpoint, corpus
from uptrain.checkpoint.events import Events
from uptrain.cli.app import run
from uptrain.conversion.calibration.layer_search import LayerSearch
from uptrain.conversion.calibration.statistics import by_distance
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.data.sources import Files
from uptrain.errors import UsageError
from uptrain.evaluation import EvaluationSettings, evaluate
from uptrain.evaluation.settings import NeedleSettings
from uptrain.models import devices
from uptrain.training import recipes
from uptrain.training.accelerator import seed_process
from uptrain.training.losses import IGNORED, token_losses
from uptrain.training.recipe import Distill
from uptrain.training.run import train
from uptrain.workflows import SweepSettings, sweep

training = importlib.import_module("uptrain.training.setup")


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that makes the CPU one with those instructions, whatever this machine has."""

    def have(**capabilities: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, **capabilities})
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        devices._cpu_has_bf16.cache_clear()

    yield have
    monkeypatch.undo()
    devices._cpu_has_bf16.cache_clear()


def small_recipe(tmp_path: Path, **changes: Any) -> recipes.Recipe:
    corpus(tmp_path / "text.txt")
    if not (tmp_path / "model").exists():
        checkpoint(tmp_path / "model", **NO_DROPOUT)
    return recipes.parse_recipe({
        "model": str(tmp_path / "model"), "output": str(tmp_path / "out"), "data": [str(tmp_path / "text.txt")],
        "block_size": 32, "batch_size": 4, "steps": 3, "learning_rate": 1e-3, "warmup": 0, **changes,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": False, "avx_ne_convert": True}, False),
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"bf16": True, "sve_bf16": False}, True),
        ({"bf16": False, "sve_bf16": False}, False),
    ],
)
def test_bfloat16_counts_only_where_the_cpu_has_instructions_for_it(
    capabilities: dict[str, bool], fast: bool, hardware: Callable[..., None]
) -> None:
    hardware(**capabilities)
    assert devices.has_fast_bf16(torch.device("cpu")) == fast
    assert devices.precision("auto", torch.device("cpu")) == ("bf16" if fast else "fp32")
    assert devices.precision("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.parametrize("faster", [True, False])
def test_a_cpu_that_says_nothing_is_timed(
    faster: bool, hardware: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware()
    monkeypatch.setattr(devices, "_bf16_is_faster", lambda: faster)
    assert devices.has_fast_bf16(torch.device("cpu")) == faster


def test_emulated_bfloat16_is_neither_trained_in_nor_timed(tmp_path: Path, hardware: Callable[..., None]) -> None:
    hardware(avx512_bf16=False, amx_bf16=False)
    done = train(small_recipe(tmp_path))
    assert done is not None and done.precision == "fp32"
    checkpoint(tmp_path / "low", dtype=torch.bfloat16)
    text = [Files(files=str(tmp_path / "text.txt"))]
    found = evaluate(
        str(tmp_path / "low"), EvaluationSettings(text=text, context=32, tokens=64, speed_context=8, repeats=1)
    )
    assert found.to_dict()["speed_dtype"] == "float32"


def test_the_device_is_what_the_command_says_else_the_environment_else_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = {"cuda": 2, "xpu": 1}

    def module(device: torch.device) -> Any:
        count = there.get(device.type, 0)
        return SimpleNamespace(is_available=lambda: count > 0, device_count=lambda: count)

    monkeypatch.setattr(torch, "get_device_module", module)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert devices.device() == torch.device("cuda")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "xpu")
    assert devices.device() == torch.device("xpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert devices.device() == torch.device("cpu")
    with devices.using("cuda:1"):
        assert devices.device() == torch.device("cuda:1")
        with devices.using(None):
            assert devices.device() == torch.device("cuda:1")
        with devices.using("auto"):
            assert devices.device() == torch.device("cpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "maybe")
    with pytest.raises(UsageError, match=r"ACCELERATE_USE_CPU.*'maybe'"):
        devices.device()
    for no in ("false", "", "No"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", no)
        assert devices.device() == torch.device("xpu")
    # Each process of a launch takes its own; one that is named can't be all of theirs.
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with devices.using("cuda"):
        assert devices.device() == torch.device("cuda:1")
    with pytest.raises(UsageError, match="cuda:1 is one, and 4 processes"), devices.using("cuda:1"):
        pass
    for wrong in ("cuda:2", "mps", "meta", "no-such-device"):
        with pytest.raises(UsageError, match=f"--device {wrong} is no"), devices.using(wrong):
            pass


@pytest.mark.parametrize("command", ["eval", "calibrate", "rope pairs", "train", "sweep"])
def test_every_command_that_computes_asks_for_the_same_device(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small_recipe(tmp_path)
    checkpoint(tmp_path / "llama", "llama", attention_bias=False, max_position_embeddings=32)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "no-such-device")
    text = str(tmp_path / "text.txt")
    latent = {"kv_lora_rank": 16, "qk_rope_head_dim": 6, "rope": "longrope"}
    calls: dict[str, Callable[[], object]] = {
        "eval": lambda: evaluate(
            str(tmp_path / "model"), EvaluationSettings(text=made.data, context=32, tokens=64, repeats=0)
        ),
        "calibrate": lambda: convert(str(tmp_path / "llama"), tmp_path / "new", Request("mqa", method="calibrated",
                                     calibrate=text, calibration_tokens=128)),
        "rope pairs": lambda: convert(str(tmp_path / "llama"), tmp_path / "new", Request("mla", method="calibrated",
                                 calibrate=text, calibration_tokens=128, **latent)),
        "train": lambda: train(made),
        "sweep": lambda: sweep(
            str(tmp_path / "model"), ["mqa"], SweepSettings(methods=["mean"]), out=tmp_path / "sweep"
        ),
    }  # fmt: skip
    with pytest.raises(UsageError, match="no-such-device"):
        calls[command]()
    # An option that is typed counts more than the environment.
    if command in ("eval", "train"):
        with devices.using("cpu"):
            calls[command]()


def test_device_is_refused_where_nothing_is_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "model", "llama", attention_bias=False)
    assert run(["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "mqa", "--device", "cpu"]) == 2
    assert "--device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert devices.chosen() is None


def test_calibrating_pins_fp32_and_gives_back_what_was_set(tmp_path: Path) -> None:
    corpus(tmp_path / "text.txt")
    checkpoint(tmp_path / "model", "llama", attention_bias=False, max_position_embeddings=32)
    request = Request("mqa", method="calibrated", calibrate=str(tmp_path / "text.txt"), calibration_tokens=128,
                      repair_steps=0)  # fmt: skip
    backends, seen = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), list[str]()
    earlier = [each.fp32_precision for each in backends]
    try:
        for each, value in zip(backends, ("tf32", "bf16"), strict=True):
            each.fp32_precision = value
        convert(
            str(tmp_path / "model"), tmp_path / "out", request,
            events=Events(layer=lambda done, layers: seen.extend(each.fp32_precision for each in backends)),
        )  # fmt: skip
        assert {*seen} == {"ieee"}
        assert [each.fp32_precision for each in backends] == ["tf32", "bf16"]
    finally:
        for each, value in zip(backends, earlier, strict=True):
            each.fp32_precision = value


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:12])
def test_what_backends_say_of_a_full_memory_is_known(error: Exception) -> None:
    assert devices.is_full(error)
    said = pytest.raises(devices.OutOfMemory, match=r"Trying .*Lower it")
    with said, devices.enough_memory("Trying", "Lower it."):
        raise error


def test_what_torch_and_numpy_really_raise_is_known_and_nothing_else() -> None:
    for wanted in (lambda: torch.empty(2**58), lambda: np.empty(2**58)):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            wanted()
        assert devices.is_full(raised.value)
    with pytest.raises(RuntimeError, match="shapes"), devices.enough_memory("Trying", "Lower it."):
        torch.ones(2, 3) @ torch.ones(2, 3)


def fails_with(error: Exception, after: int, plain: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def call(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        return plain(*args, **named)

    return call


def test_a_full_memory_ends_training_in_a_sentence_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small_recipe(tmp_path, save_every=1, precision="fp32", isolate_documents=False)
    with monkeypatch.context() as patch:
        patch.setattr(training.Objective, "forward", fails_with(FULL[0], 2, training.Objective.forward))
        with pytest.raises(devices.OutOfMemory, match="gradient_accumulation") as raised:
            train(made)
        assert raised.value.exit_code == 1
    # What it says helps is no other run.
    done = train(small_recipe(tmp_path, save_every=1, precision="fp32", isolate_documents=False,
                              gradient_accumulation=2))  # fmt: skip
    assert done is not None and done.resumed_from == 2


@pytest.mark.parametrize(
    ("place", "options", "lower"),
    [
        ("uptrain.evaluation.quality.predicted", {}, "--context"),
        ("uptrain.evaluation.samples.greedy", {"samples": 1, "sample_tokens": 4}, "--sample-tokens"),
        ("uptrain.evaluation.run.cache_bytes_per_token", {}, "--dtype"),
        ("needle", {"needle": NeedleSettings(lengths=(120,), depths=(0.5,), trials=1)}, "--needle-lengths"),
    ],
)
def test_a_full_memory_ends_each_part_of_eval_in_a_sentence(
    place: str, options: dict[str, Any], lower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = corpus(tmp_path / "text.txt")
    checkpoint(tmp_path / "model", n_positions=256)
    if place == "needle":
        plain = GPT2LMHeadModel.forward

        def forward(self: Any, *args: Any, **named: Any) -> Any:
            if named.get("logits_to_keep"):
                raise FULL[1]
            return plain(self, *args, **named)

        monkeypatch.setattr(GPT2LMHeadModel, "forward", forward)
    else:
        module, _, name = place.rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), name, fails_with(FULL[1], 0, lambda: None))
    with pytest.raises(devices.OutOfMemory, match=lower):
        settings = EvaluationSettings(text=[Files(files=str(text))], context=32, tokens=64, repeats=0, **options)
        evaluate(str(tmp_path / "model"), settings)


def test_a_full_memory_ends_a_calibration_and_a_sweep_in_a_sentence_and_layers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = corpus(tmp_path / "text.txt")
    source = checkpoint(tmp_path / "model", "llama", attention_bias=False, max_position_embeddings=32)
    request = Request("mqa", method="calibrated", calibrate=str(text), calibration_tokens=128, repair_steps=0)
    counted = list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(LayerSearch, "convert", fails_with(FULL[2], 1, LayerSearch.convert))
        with pytest.raises(devices.OutOfMemory, match="--calibration-tokens"):
            convert(str(source), tmp_path / "out", request)
        with pytest.raises(devices.OutOfMemory, match="--calibration-tokens"):
            calibration = {"calibrate": str(text), "calibration_tokens": 128, "repair_steps": 0}
            settings = SweepSettings(methods=["calibrated"], **calibration)
            sweep(str(source), ["mqa"], settings, out=tmp_path / "sweep")
    assert not (tmp_path / "out").exists()
    convert(str(source), tmp_path / "out", request, events=Events(layer=lambda done, layers: counted.append(done)))
    assert counted == [2], "the first layer was made before"


def test_random_numbers_go_on_as_before_on_whatever_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device, states = torch.device("xpu"), [torch.ones(3)]
    module = SimpleNamespace(
        get_rng_state=lambda place: states[-1], set_rng_state=lambda state, place: states.append(state)
    )
    monkeypatch.setattr(torch, "get_device_module", lambda place: module)
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    with devices.seeded(3, device):
        inside = torch.rand(3)
        states.append(torch.zeros(3))
    assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(states[-1], torch.ones(3))
    torch.manual_seed(3)
    assert torch.equal(inside, torch.rand(3))


def test_each_process_but_the_first_draws_numbers_of_its_own() -> None:
    drawn = []
    for index in (0, 1, 2, 1):
        torch.manual_seed(5)
        seed_process(5, SimpleNamespace(process_index=index))  # type: ignore[arg-type]
        drawn.append(torch.rand(4))
    torch.manual_seed(5)
    assert torch.equal(drawn[0], torch.rand(4))
    assert torch.equal(drawn[1], drawn[3])
    assert not any(torch.equal(drawn[one], drawn[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


class _Adds(TorchDispatchMode):
    """Counts what accelerators sum in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        accumulating = "index_put" in str(func) and len(args) > 3 and args[3]
        if any(name in str(func) for name in ("scatter_add", "scatter_reduce", "index_add")) or accumulating:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("top_k", [None, 3])
def test_sums_have_one_order(top_k: int | None) -> None:
    with _Adds() as adds:
        by_distance(torch.rand(2, 5, 5))
        token_losses(torch.randn(4, 9), torch.randn(4, 9), torch.tensor([1, IGNORED, 3, 3]),
                     Distill(weight=0.5, top_k=top_k))  # fmt: skip
        token_losses(torch.randn(4, 9), None, torch.tensor([1, IGNORED, 3, 3]), Distill())
    assert not adds.found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ends", ["whole", "failing"])
def test_models_are_freed_when_training_ends_without_a_garbage_collection(
    precision: str, ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "source", "llama", attention_bias=False)
    convert(str(source), tmp_path / "model", Request("mqa"))
    made = small_recipe(tmp_path, precision=precision, distill={"weight": 0.5, "hidden_weight": 0.1})
    held: list[weakref.ref[Any]] = []
    plain = training.Objective

    def objective(student: Any, distill: Any, teacher: Any) -> Any:
        held.extend(map(weakref.ref, (student, teacher, next(student.parameters()), next(teacher.parameters()))))
        return plain(student, distill, teacher)

    monkeypatch.setattr(training, "Objective", objective)
    if ends == "failing":
        monkeypatch.setattr(plain, "forward", fails_with(FULL[0], 3, plain.forward))
    gc.collect()
    gc.disable()
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    try:
        if ends == "failing":
            with pytest.raises(devices.OutOfMemory):
                train(made)
        else:
            train(made)
        assert [each() is None for each in held] == [True] * 4
    finally:
        gc.enable()
