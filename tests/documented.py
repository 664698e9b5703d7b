"""The commands that the documentation shows, as a person reads them, and a folder where the names in them exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from tests.corpus import checkpoint, corpus
from uptrain.conversion.request import Request
from uptrain.conversion.run.convert import convert
from uptrain.training import recipes

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("MODEL", "llama", "my-llama")
CONVERTED = {
    "OUT": Request("gqa", 2), "converted": Request("gqa", 2), "demo-gqa4": Request("gqa", 4),
    "llama-gqa4": Request("gqa", 4), "llama-mqa": Request("mqa"),
    "llama-mla": Request("mla", kv_lora_rank=512), "llama-7b-gqa8": Request("gqa", 8),
}  # fmt: skip
TEXTS = ("text", "my.txt", "text.txt", "heldout.txt", "wiki.txt", "corpus/some.txt")


def documents() -> list[str]:
    """Return the documents that show commands, by their path from the root."""
    found = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.yaml")]
    return sorted(str(path.relative_to(ROOT)) for path in found if commands(path))


def commands(path: Path) -> list[list[str]]:
    """Return a document's commands, each as its words; what a line says after several spaces is prose."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        lines = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        blocks = "\n".join(re.sub(r"^.*?: (?=.*-m uptrain )", "", line) for line in lines)
    else:
        blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    out = []
    for line in re.sub(r"\s*\\\n\s*", " ", blocks).splitlines():
        if line.startswith("uptrain ") or " -m uptrain " in line:
            words = shlex.split(re.sub(r"\s{2,}\S+( \S+)*$", "", line), comments=True)
            out.append([word for word in words if "…" not in word])
    return out


def furnish(folder: Path) -> None:
    """Make the checkpoints and texts that the documents name."""
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "corpus").mkdir()
    for name in TEXTS:
        corpus(folder / name, 400)
    lines = "".join(f'{{"text": "{line}"}}\n' for line in (folder / "text").read_text().splitlines())
    for name in ("code.jsonl", "corpus/some.jsonl"):
        (folder / name).write_text(lines, encoding="utf-8")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 1}
    for name in SOURCES:
        checkpoint(folder / name, "llama", **heads, max_position_embeddings=2048)
        (folder / name / "README.md").write_text("---\nlicense: mit\n---\n# Source\n")
    for name, request in CONVERTED.items():
        convert("demo" if name.startswith("demo") else str(folder / "llama"), folder / name, request)
    if keygen := shutil.which("ssh-keygen"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", folder / "id_ed25519"], check=True)
        public = (folder / "id_ed25519.pub").read_text()
        (folder / "allowed_signers").write_text(f"me@example.org {public}", encoding="utf-8")


def thrifty(words: list[str]) -> list[str]:
    """Return an uptrain command with options after its own that make it short."""
    match words[0]:
        case "train":
            recipe = recipes.load_recipe(words[1])
            given = {word.partition("=")[0] for word in words}
            text = [name for name in ("data", "held_out") if getattr(recipe, name) and name not in given]
            new = ["tokenizer.vocab_size=300"] if recipe.config else []
            return [
                *words, "steps=1", "block_size=32", "batch_size=2", "held_out_tokens=128", "gradient_accumulation=1",
                *(f"{name}=[text.txt]" for name in text), *new,
            ]  # fmt: skip
        case "convert" if "--calibrate" in words:
            heal = ["--heal", "256"] if "--heal" in words else []
            return [*words, "--calibration-tokens", "2048", "--repair-steps", "1", *heal]
        case "eval":
            return [*words, "--tokens", "512"]
        case "sign":
            return [word.replace("~/.ssh/", "") for word in words]
        case "sweep":
            # The last two targets, of one kind each.
            targets = ",".join(words[words.index("--to") + 1].split(",")[-2:])
            return [*words, "--to", targets, "--tokens", "512", "--calibration-tokens", "2048", "--repair-steps", "1"]
        case _:
            return words
