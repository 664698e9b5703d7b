"""Memory per GPU and tokens per second for uptraining large models, from first principles: tables of docs/scaling.md.

python -m benchmarks scaling
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common import Llama, options, table

GIB = 2**30
LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Shape(Llama):
    """A Llama-like decoder."""

    name: str = ""

    @property
    def attention(self) -> int:
        """Parameters of all attention layers."""
        kv = self.hidden_size * self.num_key_value_heads // self.num_attention_heads
        return self.num_hidden_layers * (2 * self.hidden_size**2 + 2 * self.hidden_size * kv)

    @property
    def parameters(self) -> int:
        """All parameters, norms left out."""
        mlp = self.num_hidden_layers * 3 * self.hidden_size * self.intermediate_size
        return self.attention + mlp + 2 * self.vocab_size * self.hidden_size

    @property
    def largest_unit(self) -> int:
        """Parameters that FSDP makes whole at once: a layer, or embedding and head together."""
        layer = (self.parameters - 2 * self.vocab_size * self.hidden_size) // self.num_hidden_layers
        return max(layer, 2 * self.vocab_size * self.hidden_size)


MODELS = (
    Shape(32, 4096, 11008, 32000, 32, 32, name="7 B"),
    Shape(80, 8192, 28672, 128256, 64, 8, name="70 B"),
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    states: float
    teacher: float
    working: float

    @property
    def total(self) -> float:
        """Return all of it, in GiB."""
        return (self.states + self.teacher + self.working) / GIB


def memory(shape: Shape, gpus: int, tokens: int, attention_only: bool, sharded: bool = True) -> Memory:
    """Return what one GPU holds with `tokens` tokens in its micro-batch, activations recomputed.

    A trained parameter takes 16 bytes (fp32 weight, gradient and two moments), a frozen one 4, the teacher's 2.
    """
    trained = shape.attention if attention_only else shape.parameters
    share = gpus if sharded else 1
    states = (16 * trained + 4 * (shape.parameters - trained)) / share
    # Two units whole in bf16 (one in use, one on its way), and one gradient of a unit in fp32.
    units = 8 * shape.largest_unit if sharded else 2 * shape.parameters
    kept = shape.num_hidden_layers * tokens * shape.hidden_size * 2
    layer = tokens * (34 * shape.hidden_size + 6 * shape.intermediate_size)
    logits = 6 * 4 * LOGITS_AT_ONCE
    # The teacher's embeddings and head are on every GPU: they are used outside its own forward pass.
    ends = 2 * shape.vocab_size * shape.hidden_size
    teacher = 2 * ((shape.parameters - ends) / share + ends)
    return Memory(states, teacher, units + kept + layer + logits)


def tokens_per_second(shape: Shape, gpus: int, tokens: int, flops: float, bandwidth: float, teacher: bool) -> float:
    """Return tokens/s of all GPUs: the slower of computing and of exchanging weights, which overlap.

    Computing: 6 FLOPs a parameter and token, 2 more for recomputing activations, 2 for a teacher. Exchanging, a
    micro-batch: weights gathered twice in bf16, gradients scattered in fp32, the teacher's weights gathered once.
    """
    work = (8 + 2 * teacher) * shape.parameters * tokens / flops
    moved = (2 * 2 + 4 + 2 * teacher) * shape.parameters / bandwidth
    return gpus * tokens / max(work, moved)


def tables() -> str:
    """Return the page's tables, as Markdown."""
    figures = ("states", "teacher", "working", "together, GiB per GPU")
    memories = table(
        {"model": "left", "GPUs": "right", "what trains": "left", **dict.fromkeys(figures, "right")},
        (
            (shape.name, gpus, "attention" if attention_only else "all",
             *(f"{part / GIB:.1f}" for part in (one.states, one.teacher, one.working)), f"{one.total:.1f}")
            for shape in MODELS
            for gpus in (8, 64)
            for attention_only in (False, True)
            for one in [memory(shape, gpus, 8192, attention_only)]
        ),
    )  # fmt: skip
    return "\n\n".join([memories, speeds(), conversions()])


def speeds() -> str:
    """Return the table of tokens per second: 40 % of 989 TFLOPS per GPU."""
    rows = []
    for shape in MODELS:
        for gpus in (8, 64):
            # 400 GB/s between the GPUs of a machine, 50 GB/s per GPU between machines.
            bandwidth = 400e9 if gpus <= 8 else 50e9
            for tokens in (8192, 32768):
                plain, taught = (tokens_per_second(shape, gpus, tokens, 0.4 * 989e12, bandwidth, t) for t in (0, 1))
                hours = f"{1e9 / taught / 3600:.1f} h"
                rows.append((shape.name, gpus, f"{tokens:,}", f"{plain:,.0f}", f"{taught:,.0f}", hours))
    figures = ("GPUs", "tokens per GPU and step", "tokens/s, plain loss", "tokens/s, with a teacher", "1 B tokens")
    return table({"model": "left", **dict.fromkeys(figures, "right")}, rows)


def conversions() -> str:
    """Return the table of how long a conversion takes where the disk sets its pace: every byte is read and written."""
    disks = {"network disk, 0.5 GB/s": 0.5e9, "one NVMe, 3 GB/s": 3e9, "8 machines, 1.5 GB/s each": 12e9}
    rows = [
        (
            name,
            f"{2 * parameters / 1e9:,.0f} GB",
            *(f"{4 * parameters / each / 60:,.1f} min" for each in disks.values()),
        )
        for name, parameters in (("7 B", 6.74e9), ("70 B", 70.55e9), ("405 B", 405.9e9), ("671 B", 671e9))
    ]
    return table({"model": "left", **dict.fromkeys(("source", *disks), "right")}, rows)


def main() -> None:
    options().parse_args()
    print(tables())
