"""Packed documents are learnt from as if each stood alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from tests.conftest import tiny_config, tiny_model
from uptrain.data.boundary import Boundary
from uptrain.models.register import register
from uptrain.training.batches import batch_of
from uptrain.training.distillation import Objective
from uptrain.training.losses import IGNORED

register()
END = 7
SIZES: dict[str, dict[str, Any]] = {
    "uptrain_gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "num_key_value_heads": 2},
    "deepseek_v3": {
        "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "first_k_dense_replace": 2,
    },
}  # fmt: skip


@given(blocks=st.lists(st.lists(st.integers(5, 9), min_size=6, max_size=6), min_size=1, max_size=4), ends=st.booleans())
def test_positions_and_targets_are_those_of_documents_cut_out_by_hand(blocks: list[list[int]], ends: bool) -> None:
    batch = batch_of(np.array(blocks), Boundary(END, ends))
    for row, block in enumerate(blocks):
        documents: list[list[int]] = [[]]
        for at, token in enumerate(block):
            if at and ((ends and block[at - 1] == END) or (not ends and token == END)):
                documents.append([])
            documents[-1].append(token)
        places = [place for document in documents for place in range(len(document))]
        wanted = [token for document in documents for token in [*document[1:], IGNORED]]
        assert batch.targets[row].tolist() == wanted
        if batch.position_ids is not None:
            assert batch.position_ids[row].tolist() == places
        else:
            assert places == list(range(len(block)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "uptrain_gpt2", "deepseek_v3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_equals_the_loss_of_each_document_alone(family: str, attention: str) -> None:
    model = tiny_model(tiny_config(family, **SIZES.get(family, {})))
    model.set_attn_implementation(attention)
    random = np.random.default_rng(0)
    documents = [[*random.integers(8, 60, size).tolist(), END] for size in (5, 1, 9, 12, 3)]
    packed = np.array([token for document in documents for token in document]).reshape(1, -1)
    batch = batch_of(packed, Boundary(END, True))
    with torch.no_grad():
        together = Objective(model)(batch.ids, batch.targets, batch.position_ids)[0]
        apart = torch.zeros(())
        for document in documents:
            ids = torch.tensor([document])
            logits = model(input_ids=ids).logits[0, :-1]
            apart += functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        leaking = Objective(model)(batch.ids, batch.targets, None)[0]
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-4)
    assert abs(float(leaking - apart)) > 1e-2


def test_a_block_of_one_document_needs_no_mask() -> None:
    assert batch_of(np.arange(10, 20).reshape(1, 10), Boundary(END, True)).position_ids is None
    # Its end of text is the block's last token: nothing follows that could be kept apart.
    assert batch_of(np.array([[5, 6, END]]), Boundary(END, True)).position_ids is None


def test_processes_and_micro_batches_share_a_batch_out() -> None:
    batch = batch_of(np.arange(48).reshape(8, 6), Boundary(20, True))
    rows = [part.ids for process in range(2) for part in batch.share(process, 2, 2)]
    assert [len(each) for each in rows] == [2] * 4
    assert sorted(torch.cat(rows)[:, 0].tolist()) == batch.ids[:, 0].tolist()
