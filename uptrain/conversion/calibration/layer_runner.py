"""A causal language model of which one decoder layer at a time is in memory, run by its own class's code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Thread
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from uptrain.architectures.description import CheckpointDescription
from uptrain.architectures.embeddings import stored_table
from uptrain.checkpoint.dtypes import as_float32
from uptrain.conversion.calibration.attention_probabilities import CAPTURE, Reached, in_parts
from uptrain.conversion.calibration.recorded_calls import BlockCall, Call, LayerCalls
from uptrain.data.boundary import Boundary, positions_of
from uptrain.errors import CheckpointError

Parameters = dict[str, Tensor]
"""Weights and biases by name inside the attention module ("q_proj.weight"), (out, in) as the family stores them."""


NumberedBlocks = Iterable[tuple[int, Tensor]]
"""Blocks of hidden states (T, d) float32, each after its number in the text."""
Attend = Callable[[Tensor, Tensor | None], Tensor]
"""Maps an attention's input (T, d) and its mask to its output (T, d)."""


@dataclass(frozen=True)
class Trace:
    """One block in a layer, float32: the output of its `attention` and its own `output`, both (T, d)."""

    attention: Tensor
    output: Tensor


class Layer:
    """One decoder layer with float32 weights. `on` says which block it runs on, which decides what it sees of it.

    - `module`: the layer.
    - `attention`: the path of its attention.
    - `output`: the path of the output projection in the attention.
    - `config`: the model's config.
    - `calls`: what the model passes to its layers.
    - `index`: the layer's number.
    """

    def __init__(
        self, module: nn.Module, attention: str, output: str, config: Any, calls: LayerCalls, index: int
    ) -> None:
        self.module, self.attention, self._output, self._config = module, attention, output, config
        self._calls, self._index = calls, index

    def on(self, block: int) -> LayerOnBlock:
        """Return the layer as it runs on the block of this number."""
        return self._as_called(self._calls.on(self._index, block))

    def on_beginning(self, block: int) -> LayerOnBlock:
        """Return the layer as it runs on the first half of a block, or on all of a block of several documents."""
        return self._as_called(self._calls.on_beginning(self._index, block))

    def _as_called(self, call: BlockCall) -> LayerOnBlock:
        return LayerOnBlock(self.module, self.attention, self._output, self._config, call)


class LayerOnBlock:
    """One decoder layer with float32 weights, run on one block, with its own or another attention.

    - `module`: the layer.
    - `attention`: the path of its attention.
    - `output`: the path of the output projection in the attention.
    - `config`: the model's config.
    - `call`: what the model passes to the layer on this block.
    """

    def __init__(self, module: nn.Module, attention: str, output: str, config: Any, call: BlockCall) -> None:
        self.module, self.attention, self._config, self._call = module, attention, config, call
        self._inner = module.get_submodule(attention)
        self._output = self._inner.get_submodule(output)

    def run(self, hidden: Tensor, parameters: Parameters | None = None) -> Tensor:
        """Return the layer's output (T, d) for hidden states (T, d), with `parameters` in place of its attention's."""
        return self._run(hidden, parameters, self._config._attn_implementation)

    def _run(self, hidden: Tensor, parameters: Parameters | None, kind: str) -> Tensor:
        call = self._call.by_kind(kind)
        replaced = {f"{self.attention}.{name}": value for name, value in (parameters or {}).items()}
        return _hidden(functional_call(self.module, replaced, (hidden[None], *call.args), call.kwargs))

    def run_with(self, hidden: Tensor, attend: Attend) -> Tensor:
        """Return the layer's output (T, d) for hidden states (T, d), with `attend` in place of its attention."""

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            x = args[0] if args else kwargs["hidden_states"]
            return attend(x[0], kwargs.get("attention_mask"))[None], None

        self._inner.forward = forward
        try:
            return self.run(hidden)
        finally:
            del self._inner.forward

    @property
    def positions(self) -> Tensor:
        """Return the positions (T,) int64 of the block's tokens."""
        return self._call.positions

    @property
    def scale(self) -> float:
        """Return what the attention's logits are multiplied by."""
        scaling: Any = self._inner.scaling
        return float(scaling)

    def trace(self, hidden: Tensor) -> Trace:
        """Run the layer on hidden states (T, d) and return its attention's output as well."""
        seen: list[Tensor] = []
        # Not the attention's own output, to which some families have added the residual already.
        hook = self._output.register_forward_hook(lambda _module, _args, output: seen.append(_hidden(output)))
        try:
            output = self.run(hidden)
        finally:
            hook.remove()
        return Trace(seen[0], output)

    def mix(self, hidden: Tensor, parameters: Parameters | None = None) -> Tensor:
        """Return only the mixed heads (T, H·Dv), the output projection's input, for hidden states (T, d)."""

        def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise Reached(args[0][0])

        hook = self._output.register_forward_pre_hook(stop)
        try:
            self.run(hidden, parameters)
        except Reached as reached:
            mixed: Tensor = reached.value
            return mixed
        finally:
            hook.remove()
        raise RuntimeError("the layer never reached its output projection")

    def attention_weights(
        self, hidden: Tensor, parameters: Parameters | None = None
    ) -> tuple[Tensor, Iterator[Tensor]]:
        """Return the attention's input (T, d), and its probabilities (H, R, S) of R queries at a time, in order.

        They are those for hidden states (T, d). S is the number of keys up to the last one that these queries see. R
        and S are T where the family's code computes them all at once.
        """
        seen: list[Tensor] = []

        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.append(args[0][0] if args else kwargs["hidden_states"][0])

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            raise Reached(iter(output[1]))

        hooks = (
            self._inner.register_forward_pre_hook(before, with_kwargs=True),
            self._inner.register_forward_hook(after),
        )
        # Only the plain implementation returns its probabilities.
        kind = CAPTURE if in_parts(type(self._inner)) else "eager"
        try:
            with implementation(self._config, kind):
                self._run(hidden, parameters, "eager")
        except Reached as reached:
            return seen[0], reached.value
        finally:
            for hook in hooks:
                hook.remove()
        raise RuntimeError("the layer never reached its attention")


class LayerRunner:
    """Builds the source's own class without weights, and lends its decoder layers one by one, each with its weights."""

    def __init__(self, source: CheckpointDescription, device: torch.device) -> None:
        self.source, self.device = source, device
        config = AutoConfig.from_pretrained(source.checkpoint.path, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        self._base = whole.base_model.eval()
        self._base.config.use_cache = False
        self.config = self._base.config
        self._path, self._attention = source.family.inside()
        self.layers: nn.ModuleList = self._base.get_submodule(self._path)
        self._calls = LayerCalls(torch.empty(0, 0, dtype=torch.int64))
        self._table = stored_table(source)

    @torch.no_grad()
    def embed(self, blocks: Tensor, boundary: Boundary | None = None) -> Iterator[Tensor]:
        """Yield each block's hidden states (T, d) before the first layer, from blocks (n, T) int64.

        Of the table of tokens only the rows that the blocks name are read, since it can outweigh all else. The first
        block also records what the model passes to each of its layers, which is the same for all blocks that are one
        document; each block of several documents records its own.

        - `blocks`: (n, T) int64.
        - `boundary`: the token between documents that are kept apart, which positions that start at 0 in each do. None
          for attention over the whole block; a model that `isolates` none has no other.
        """
        starts = np.zeros(blocks.shape, np.bool_) if boundary is None else boundary.starts(blocks.numpy())
        self._calls = LayerCalls(torch.from_numpy(positions_of(starts)))
        usual = self.config._attn_implementation
        kinds = dict.fromkeys((usual, "eager"))
        with self._embedding(blocks):
            for kind in kinds:
                self._calls.record(None, kind, self._enter(blocks[:1], kind=kind)[1])
            beginning = blocks[:1, : self._calls.beginning]
            self._calls.record_beginning(usual, self._enter(beginning, kind=usual)[1])
            for number, block in enumerate(blocks):
                if self._calls.is_straight(number):
                    yield self._enter(block[None])[0]
                    continue
                own = self._calls.positions[number][None]
                for kind in () if self._calls.has(number) else kinds:
                    self._calls.record(number, kind, self._enter(block[None], own, kind)[1])
                yield self._enter(block[None], own)[0]

    @torch.no_grad()
    def isolates(self, token: int) -> bool:
        """Return whether positions that start at 0 keep documents in a block apart; not every class does that.

        The model's own forward is given the same `token` twice, as two documents. They must be the same to it, and
        every layer must be given a mask that hides the first from the second. Ends the runner's use.
        """
        block = torch.tensor([[token, token]])
        with self._embedding(block):
            try:
                hidden, calls = self._enter(block, torch.zeros_like(block), "eager")
            except TypeError:  # the class has no parameter for positions
                return False
        return torch.equal(hidden[0], hidden[1]) and all(map(_hides_first, calls.values()))

    @contextmanager
    def _embedding(self, blocks: Tensor) -> Iterator[None]:
        """Have the weights of all that is not a layer for a while; of the table of tokens, the rows of `blocks`."""
        others = list(self._other_modules())
        table, wanted = self._base.get_input_embeddings(), blocks.unique()
        for owner, name, path in others:
            self._fill(owner.get_submodule(name), f"{self.source.prefix}{path}.", {table: wanted})
        table.padding_idx = None
        table.register_forward_pre_hook(partial(_renumbered, wanted.to(self.device)))
        yield
        for owner, name, _ in others:
            setattr(owner, name, nn.Identity())

    def _other_modules(self) -> Iterator[tuple[nn.Module, str, str]]:
        """Yield every module that does not contain the layers: its owner, its name in the owner, and its path."""
        owner, above = self._base, ""
        for part in self._path.split("."):
            yield from ((owner, name, above + name) for name, _ in owner.named_children() if name != part)
            owner, above = owner.get_submodule(part), f"{above}{part}."

    @contextmanager
    def layer(self, index: int) -> Iterator[Layer]:
        """Lend decoder layer `index` with its weights read; they are dropped afterwards. The next one's are read ahead.

        Raises:
            CheckpointError: a tensor of the layer is missing.
        """
        module = self.layers[index]
        self._fill(module, self._base_of(index))
        following = [name for name in self.source.tensors if name.startswith(self._base_of(index + 1))]
        # In a thread, because the call waits while the disk's queue is full.
        Thread(target=self.source.checkpoint.prefetch, args=(following,), daemon=True).start()
        output = self.source.family.projections.o
        try:
            yield Layer(module, self._attention, output, self.config, self._calls, index)
        finally:
            self.layers[index] = nn.Identity()

    def _base_of(self, index: int) -> str:
        return f"{self.source.prefix}{self._path}.{index}."

    def _enter(
        self, block: Tensor, positions: Tensor | None = None, kind: str | None = None
    ) -> tuple[Tensor, dict[int, Call]]:
        """Run the model's own forward with layers that pass their input on.

        Return the first layer's input (T, d), and what each layer is passed.

        - `block`: (1, T) int64.
        - `positions`: (1, T) int64, None for 0 … T − 1.
        - `kind`: the implementation of attention, None for the model's usual one.
        """
        seen: list[Tensor] = []
        calls: dict[int, Call] = {}

        def stand_in(index: int) -> Any:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                seen.append(hidden_states)
                calls[index] = Call(args, kwargs)
                # The first layer's, because models that take a layer's tuple apart take apart a tensor here.
                return seen[0]

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = stand_in(index)
        placed = {} if positions is None else {"position_ids": positions.to(self.device)}
        try:
            with implementation(self.config, kind or self.config._attn_implementation):
                self._base(input_ids=block.to(self.device), use_cache=False, **placed)
        finally:
            for layer in self.layers:
                del layer.forward
        return seen[0][0], calls

    def _fill(self, module: nn.Module, base: str, rows: Mapping[nn.Module, Tensor] = MappingProxyType({})) -> None:
        """Read a module's parameters; of a module in `rows` only those rows."""
        for name, _ in list(module.named_parameters()):
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            value = nn.Parameter(self._read(base + name, rows.get(owner)), requires_grad=False)
            owner.register_parameter(leaf, value)
        module.to(self.device)

    def _read(self, name: str, rows: Tensor | None) -> Tensor:
        own, stored = self._table
        name = stored if name == own else name
        if name not in self.source.tensors:
            raise CheckpointError(f"Tensor {name} is missing.", "Download the checkpoint again.")
        array = (
            self.source.checkpoint.read(name) if rows is None else self.source.checkpoint.read_rows(name, rows.tolist())
        )
        return torch.from_numpy(as_float32(array)).to(self.device)


@contextmanager
def implementation(config: Any, name: str) -> Iterator[None]:
    """Let the model's attention run by implementation `name` ("eager", "sdpa") for a while."""
    usual = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = usual


def _renumbered(wanted: Tensor, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Replace token ids by their places in the ascending `wanted`: the table has the rows of those alone."""
    return (torch.searchsorted(wanted, args[0]), *args[1:])


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden[0]


def _hides_first(call: Call) -> bool:
    """Return whether a call has a mask that hides the first of two tokens from the second."""
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, Tensor) and value.shape[-2:] == (2, 2):
            # Whatever says so in this family's masks, it is what hides the second from the first.
            first, unseen, itself = value[..., 1, 0], value[..., 0, 1], value[..., 1, 1]
            return bool((first == unseen).all() and (first != itself).all())
    return False
