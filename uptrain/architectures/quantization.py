"""Find how a checkpoint's weights are quantized: the scheme, the modules, and the tensors that are codes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from uptrain.checkpoint.header import FLOAT_DTYPES, ITEM_BITS, TensorInfo
from uptrain.checkpoint.jsonfile import read_json
from uptrain.checkpoint.reader import Checkpoint
from uptrain.errors import CheckpointError, UsageError

ORIGINAL = "Convert the full-precision original and quantize the result."

NAMES: Mapping[str, str] = MappingProxyType({
    "aqlm": "AQLM", "auto-round": "AutoRound", "awq": "AWQ", "bitnet": "BitNet", "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors", "eetq": "EETQ", "fbgemm_fp8": "FBGEMM fp8",
    "fouroversix": "Four over six", "fp8": "fp8 with block scales", "fp_quant": "FP-Quant", "gemma": "Gemma QAT",
    "gguf": "GGUF", "gptq": "GPTQ", "higgs": "HIGGS", "hqq": "HQQ", "metal": "Metal", "mlx": "MLX",
    "modelopt": "ModelOpt", "mxfp4": "MXFP4", "mxfp8": "MXFP8", "nvfp4": "NVFP4", "quanto": "quanto",
    "quark": "Quark", "sinq": "SINQ", "spqr": "SpQR", "torchao": "torchao", "vptq": "VPTQ",
})  # fmt: skip
"""The usual name of each `quant_method` of transformers, and of three schemes of other tools."""

_WIDTHS: Mapping[str, int] = MappingProxyType({
    "bitnet": 2, "eetq": 8, "fbgemm_fp8": 8, "fp8": 8, "mxfp4": 4, "mxfp8": 8, "nvfp4": 4,
})  # fmt: skip
"""Bits per code, where the scheme fixes them."""

_CODES = ("qweight", "weight_packed", "W_q", "weight._data", "_weight_qdata", "weight:_data", "codes", "dense_weights")
_SIGNS: tuple[tuple[str, str], ...] = (
    (r"weight\.quant_state\.bitsandbytes__\w+|weight\.(nested_)?(absmax|quant_map)|SCB", "bitsandbytes"),
    (r"weight_scale_inv", "fp8"),
    (r"weight_packed|weight_shape|weight_zero_point|weight_global_scale|input_global_scale", "compressed-tensors"),
    (r"g_idx", "gptq"),
    (r"qweight|qzeros", "awq"),
    (r"W_q", "hqq"),
    (r"weight\._(data|scale|shift)", "quanto"),
    (r"_weight_(qdata|scale|zero_point)|weight:_\w+", "torchao"),
    (r"weight_scales", "eetq"),
    (r"weight_scale_2", "modelopt"),
    (r"codebooks", "aqlm"),
    (r"dense_weights", "spqr"),
    (r"weight_scale|input_scale|activation_scale|output_scale|input_scale_ub", ""),
)
"""Endings of tensor names that only quantized modules have, and the scheme that each ending shows."""
_MARKS = re.compile(rf"(.*)\.(?:{'|'.join(f'(?P<s{number}>{sign[0]})' for number, sign in enumerate(_SIGNS))})")
_EXPERTS = re.compile(r"(.*\.\w+)_(blocks|scales|scale_inv)")
_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""The files of GPTQ, AWQ and ModelOpt that describe the quantization, with config.json or in place of it."""
_NOT_WEIGHTS = ("input_activations", "output_activations", "kv_cache_scheme")
_CACHE_SCALES = re.compile(r".*\.([kv]|kv|[kv]_cache)_scale")


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    Attributes:
        method: the `quant_method` of config.json; empty where only tensors show the scheme.
        scheme: the usual name of the scheme.
        bits: bits per code; None where nothing says it.
        declared: whether config.json declares it, as transformers' loader needs.
        codes: the tensors that hold codes in place of weights.
        floats: the codes that are 8-bit floating-point numbers.
        tensors: the codes, and their scales, zero points and shapes.
        cache: whether the key/value cache is quantized too, with measured scales.
    """

    method: str
    scheme: str
    bits: int | None
    declared: bool
    codes: frozenset[str]
    floats: frozenset[str]
    tensors: frozenset[str]
    cache: bool

    def describe(self) -> str:
        """Return the scheme's name and width: "GPTQ, 4 bits"."""
        return self.scheme if self.bits is None else f"{self.scheme}, {self.bits} bits"

    @property
    def scaled(self) -> bool:
        """Tell whether there are codes that need scales; 8-bit floats without scales do not."""
        return len(self.tensors) > len(self.floats)

    def parameters(self, tensors: Mapping[str, TensorInfo]) -> int:
        """Count a checkpoint's parameters: packed codes one by one, and nothing that only belongs to codes."""
        count = 0
        for name, info in tensors.items():
            packed = self.bits and not info.dtype.startswith("F") and self.bits < ITEM_BITS[info.dtype]
            if name in self.codes and packed:
                count += info.nbytes * 8 // (self.bits or 8)
            elif name in self.codes or name not in self.tensors:
                count += math.prod(info.shape)
        return count


def quantization_of(checkpoint: Checkpoint) -> Quantization | None:
    """Return how a checkpoint is quantized, from its config and its tensors' names and dtypes; None where it isn't.

    Raises:
        CheckpointError: a quantize_config.json or the like that can't be read.
    """
    return find_quantization(checkpoint.config, checkpoint.tensors, checkpoint.path)


def check_scheme(found: Quantization | None, methods: Iterable[str], name: str) -> None:
    """Refuse codes that a loader would take for weights: config.json or the loader does not know the scheme.

    - `found`: how the checkpoint is quantized.
    - `methods`: the schemes that the loader knows.
    - `name`: what the user called the checkpoint.

    Raises:
        CheckpointError: there are such codes.
    """
    check_declared(found, name)
    known = found is None or any(method.startswith(found.method or "?") for method in methods)
    if found is not None and found.scaled and not known:
        raise CheckpointError(
            f"{name} is quantized with {found.describe()}, which transformers doesn't know: it would take codes for "
            "weights.",
            "Use the full-precision original.",
        )


def check_declared(found: Quantization | None, name: str) -> None:
    """Refuse codes that config.json does not mention, because every loader takes them for weights.

    Raises:
        CheckpointError: there are such codes.
    """
    if found is not None and found.scaled and not found.declared:
        raise CheckpointError(
            f"{name} is quantized with {found.describe()}, but its config.json doesn't say so: every loader would take "
            "codes for weights.",
            "Get its whole config.json, or use the full-precision original.",
        )


def check_read(found: Quantization | None, left: Iterable[str], name: str) -> None:
    """Refuse a loaded model that left out scales, zero points or codes.

    Its class then has modules that its loader can't quantize, and took their codes for weights.

    - `found`: how the checkpoint is quantized.
    - `left`: the tensors for which the model had no place.
    - `name`: what the user called the checkpoint.

    Raises:
        CheckpointError: the model left out such tensors.
    """
    lost = sorted(found.tensors.intersection(left)) if found is not None else []
    if found is not None and lost:
        raise CheckpointError(
            f"{name} is quantized with {found.describe()}, and transformers has no place for its tensor {lost[0]}.",
            "Use the full-precision original.",
        )


def check_trainable(found: Quantization | None, name: str) -> None:
    """Refuse to train a model whose weights are codes: no optimizer step is small enough for codes.

    Raises:
        UsageError: the weights are codes.
    """
    if found is not None:
        raise UsageError(
            f"{name} is quantized with {found.describe()}, and codes can't be trained.",
            "Train the full-precision model and quantize the result.",
        )


def declared_scheme(config: Mapping[str, Any]) -> str:
    """Return the scheme that a config declares ("GPTQ, 4 bits"), empty where it declares none."""
    said = _said(config)
    method = str(said.get("quant_method") or "")
    bits = _bits(method, said)
    return "" if not said else NAMES.get(method, method or "MLX") + (f", {bits} bits" if bits else "")


def find_quantization(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], path: Path) -> Quantization | None:
    """Return how weights are quantized; None where they are not.

    - `config`: what config.json holds.
    - `tensors`: the stored tensors by name; empty where they are not known.
    - `path`: the checkpoint's folder, which can hold further files about the quantization.

    Raises:
        CheckpointError: a quantize_config.json or the like that can't be read.
    """
    said = _said(config)
    signs: dict[str, str] = {}
    for name, info in tensors.items():
        module, method = _sign(name, info)
        if module and not signs.get(module):
            signs[module] = method
    # Old GPTQ and AWQ differ by the order of rows that only GPTQ has.
    found = {method for method in signs.values() if method} - ({"awq"} if "gptq" in signs.values() else set())
    if not said and not signs:
        return None
    method = str(said.get("quant_method") or "") or next(iter(sorted(found)), "")
    for file in _FILES:
        if (path / file).is_file():
            said = {**read_json(path / file), **said}
    belonging = _belonging(tensors, signs)
    cache = said.get("kv_cache_scheme") or (said.get("quantization") or {}).get("kv_cache_quant_algo")
    codes = frozenset(name for name in belonging if _is_code(name, tensors[name]))
    bits = _bits(method, said) or _width_of(tensors, codes)
    return Quantization(
        str(said.get("quant_method") or ""),
        NAMES.get(method, method) or _unnamed(tensors, codes, said),
        bits,
        bool(_said(config)),
        codes,
        frozenset(name for name in codes if tensors[name].dtype.startswith("F8")),
        frozenset(belonging),
        bool(cache) or any(_CACHE_SCALES.fullmatch(name) for name in tensors),
    )


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of config.json about quantization, empty where there is none."""
    inner = config.get("text_config")
    for section in (config, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if section.get(key):
                found = section[key]
                return dict(found) if isinstance(found, dict) else {"quant_method": str(found)}
    return {}


def _sign(name: str, info: TensorInfo) -> tuple[str, str]:
    """Return the module that a tensor shows to be quantized (or nothing), and the scheme that its name shows."""
    if info.dtype in FLOAT_DTYPES.values() and name.endswith((".weight", ".bias")):
        return "", ""
    match = _MARKS.fullmatch(name)
    if match:
        sign = next(key for key, value in match.groupdict().items() if value is not None)
        return match[1], _SIGNS[int(sign[1:])][1]
    experts = _EXPERTS.fullmatch(name)
    if experts and (info.dtype == "U8" or experts[2] == "scale_inv"):
        return experts[1], "fp8" if experts[2] == "scale_inv" else "mxfp4"
    if info.dtype.startswith("F8"):
        return name.removesuffix(".weight"), ""
    if name.endswith(".weight") and info.dtype in ("I8", "U8", "I16", "U16", "I32", "U32"):
        return name.removesuffix(".weight"), "mlx" if info.dtype == "U32" else ""
    return "", ""


def _belonging(tensors: Mapping[str, TensorInfo], modules: Iterable[str]) -> list[str]:
    """Return the tensors of quantized modules; their biases are plain numbers."""
    known = set(modules)
    out = []
    for name in tensors:
        experts = _EXPERTS.fullmatch(name)
        parts = name.split(".")
        inside = any(".".join(parts[:count]) in known for count in range(len(parts) + 1))
        if (inside or (experts and experts[1] in known)) and not name.endswith(".bias"):
            out.append(name)
    return out


def _is_code(name: str, info: TensorInfo) -> bool:
    if info.dtype in FLOAT_DTYPES.values():
        return False
    experts = _EXPERTS.fullmatch(name)
    if experts:
        return experts[2] == "blocks"
    return any(name.endswith(f".{one}") for one in (*_CODES, "weight")) or (
        info.dtype.startswith("F8") and not name.endswith(("scale", "scales", "scale_inv"))
    )


def _bits(method: str, said: Mapping[str, Any]) -> int | None:
    """Return the bits per code from a quantization_config, whose keys depend on the scheme."""
    for key in ("bits", "w_bit", "nbits", "num_bits"):
        if type(said.get(key)) is int:
            return int(said[key])
    for bits in (4, 8):
        if said.get(f"load_in_{bits}bit"):
            return bits
    for key in ("weights", "quant_type", "_type", "quant_algo"):
        digits = re.search(r"(?:int|float|fp)(\d+)", str(said.get(key)).lower())
        if digits and isinstance(said[key], str):
            return int(digits[1])
    for key, value in said.items():
        found = _bits("", value) if isinstance(value, dict) and key not in _NOT_WEIGHTS else None
        if found is not None:
            return found
    return _WIDTHS.get(method)


def _width_of(tensors: Mapping[str, TensorInfo], codes: Iterable[str]) -> int | None:
    """Return 8 where all codes are 8-bit floats, which no scheme packs."""
    dtypes = {tensors[name].dtype for name in codes}
    return 8 if dtypes and all(dtype.startswith("F8") for dtype in dtypes) else None


def _unnamed(tensors: Mapping[str, TensorInfo], codes: Iterable[str], said: Mapping[str, Any]) -> str:
    if {"bits", "group_size"} <= said.keys():
        return NAMES["mlx"]
    dtypes = sorted({tensors[name].dtype for name in codes})
    return f"a scheme that config.json doesn't name ({', '.join(dtypes)})" if dtypes else "an unnamed scheme"
