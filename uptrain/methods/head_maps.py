"""One attention layer's projections by head, as tensors: what the mathematics takes and returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadMaps:
    """One layer's projections by head, float64. H query heads, G key/value heads, input size d.

    - `q`, `k`, `v`, `o`: (H, D, d), (G, D, d), (G, Dv, d) and (out, H, Dv).
    - `q_bias`, `k_bias`, `v_bias`: (H, D), (G, D) and (G, Dv); None where the layer has no biases.

    Query heads h·H/G … (h+1)·H/G − 1 read key/value head h, as in transformers' `repeat_kv`. The bias of `o` is not
    here, because no method changes it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None

    @property
    def query_heads(self) -> int:
        """Count the query heads, H."""
        return self.q.shape[0]

    @property
    def kv_heads(self) -> int:
        """Count the key/value heads, G."""
        return self.k.shape[0]

    @property
    def queries_per_kv(self) -> int:
        """Count the query heads that read one key/value head, H/G."""
        return self.query_heads // self.kv_heads

    @property
    def q_rows(self) -> Tensor:
        """Return the queries' map of x̃ = [x; 1], (H, D, d+1)."""
        return with_bias_column(self.q, self.q_bias)

    @property
    def k_rows(self) -> Tensor:
        """Return the keys' map of x̃ = [x; 1], (G, D, d+1)."""
        return with_bias_column(self.k, self.k_bias)

    @property
    def v_rows(self) -> Tensor:
        """Return the values' map of x̃ = [x; 1], (G, Dv, d+1)."""
        return with_bias_column(self.v, self.v_bias)

    def with_rows(
        self,
        q_rows: Tensor | None = None,
        k_rows: Tensor | None = None,
        v_rows: Tensor | None = None,
        o: Tensor | None = None,
    ) -> HeadMaps:
        """Return the layer with new maps of x̃ = [x; 1]; None leaves a projection as it is.

        A projection without a bias drops the bias column, which then is zero.

        - `q_rows`: (H, D, d+1).
        - `k_rows`: (G, D, d+1), of any number of heads G.
        - `v_rows`: (G, Dv, d+1).
        - `o`: (out, H, Dv).
        """
        q, q_bias = _without_bias_column(q_rows, self.q, self.q_bias)
        k, k_bias = _without_bias_column(k_rows, self.k, self.k_bias)
        v, v_bias = _without_bias_column(v_rows, self.v, self.v_bias)
        return HeadMaps(q, k, v, self.o if o is None else o, q_bias, k_bias, v_bias)


def with_bias_column(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Append the bias as one more input column, so that W̃ [x; 1] = W x + b; zeros where there is none."""
    column = torch.zeros_like(weight[..., :1]) if bias is None else bias[..., None].to(weight.dtype)
    return torch.cat([weight, column], dim=-1)


def _without_bias_column(rows: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if rows is None:
        return weight, bias
    return rows[..., :-1], None if bias is None else rows[..., -1]
