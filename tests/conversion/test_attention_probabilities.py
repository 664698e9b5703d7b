"""Which keys the queries of a part can see is read from the mask, whatever the mask is made of."""

import pytest
import torch

from uptrain.conversion.calibration.attention_probabilities import _ends

TOKENS = 6


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16])
def test_causal_windows_and_documents_end_where_their_last_key_is(dtype: torch.dtype) -> None:
    causal = torch.ones(TOKENS, TOKENS).tril().bool()
    window = causal & ~torch.ones(TOKENS, TOKENS).tril(-2).bool()
    apart = causal & (torch.arange(TOKENS)[:, None] // 3 == torch.arange(TOKENS)[None] // 3)
    for seen in (causal, window, apart):
        mask = seen if dtype == torch.bool else torch.zeros(seen.shape, dtype=dtype).masked_fill(
            ~seen, torch.finfo(dtype).min
        )  # fmt: skip
        assert _ends(mask[None, None], TOKENS) == [1, 2, 3, 4, 5, 6]


def test_a_prefix_that_all_see_and_a_query_that_sees_nothing_are_not_cut() -> None:
    prefix = torch.ones(TOKENS, TOKENS).tril().bool()
    prefix[:, :3] = True
    assert _ends(prefix[None, None], TOKENS) == [3, 3, 3, 4, 5, 6]
    blind = torch.ones(TOKENS, TOKENS).tril().bool()
    blind[1] = False
    assert _ends(blind[None, None], TOKENS) == [1, 6, 3, 4, 5, 6]
    heads = torch.stack([prefix, prefix.tril()])
    assert _ends(heads[None], TOKENS) == [3, 3, 3, 4, 5, 6]
    assert _ends(None, 2) == [2, 2]
