"""The objective is the textbook's, whatever the family, and never holds the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from tests.conftest import tiny_config
from tests.conftest import tiny_model as tiny_from
from uptrain.architectures.decoders import FAMILIES
from uptrain.errors import UsageError
from uptrain.models.logit_head import LogitHead
from uptrain.models.register import register
from uptrain.training import distillation as subject
from uptrain.training.distillation import Objective
from uptrain.training.losses import IGNORED, hidden_distance, token_losses
from uptrain.training.recipe import Distill

FAMILY_NAMES = ["gpt2", "llama", "gemma2", "granite", "cohere", "starcoder2"]
IDS = torch.randint(0, 64, (3, 17), generator=torch.manual_seed(0))


def targets() -> torch.Tensor:
    out = torch.cat([IDS[:, 1:], torch.full((3, 1), IGNORED)], dim=1)
    out[1, 5] = IGNORED
    return out


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    return tiny_from(tiny_config(family, **changes), seed)


def spec(**values: Any) -> Distill:
    return Distill.model_validate(values)


def textbook(model: Any, teacher: Any, weight: float, heat: float) -> torch.Tensor:
    """Return the summed loss from whole logits and PyTorch's own losses."""
    logits = model(input_ids=IDS).logits.float().flatten(0, 1)
    wanted = targets().flatten()
    loss = (1 - weight) * functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
    if weight:
        with torch.no_grad():
            taught = teacher(input_ids=IDS).logits.float().flatten(0, 1)
        counted = wanted != IGNORED
        logs = (logits[counted] / heat).log_softmax(-1)
        loss = loss + weight * heat**2 * functional.kl_div(
            logs, (taught[counted] / heat).log_softmax(-1), log_target=True, reduction="sum"
        )
    return loss


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(("weight", "heat"), [(0.0, 1.0), (1.0, 1.0), (0.3, 2.0)])
def test_loss_and_gradients_equal_those_of_whole_logits(
    family: str, weight: float, heat: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few logits at once that a chunk ends inside a sequence, and the last one is short.
    monkeypatch.setattr(subject, "_LOGITS", 7 * 64)
    model, teacher = tiny_model(family, seed=1), tiny_model(family, seed=2)
    textbook(model, teacher, weight, heat).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss = textbook(model, teacher, weight, heat)
    model.zero_grad()

    objective = Objective(model, spec(weight=weight, temperature=heat), teacher if weight else None)
    assert objective._head.split
    total, cross_entropy, divergence, _ = objective(IDS, targets())
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-5)
    total.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4, msg=name)
    assert all(p.grad is None for p in teacher.parameters())
    assert bool(divergence > 0) == (weight > 0)
    torch.testing.assert_close(cross_entropy, textbook(model, teacher, 0.0, 1.0), rtol=1e-5, atol=1e-5)


# A decoder that reads an encoder gives whole logits: tests/training/test_seq2seq_training.py.
DECODERS = sorted(name for name, entry in FAMILIES.items() if name != "uptrain_gpt_neo" and not entry.cross)


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_is_served_a_few_logits_at_a_time(family: str) -> None:
    register()
    model = tiny_model(family, **({"logits_scaling": 4.0} if family == "granite" else {}))
    head = LogitHead(model)
    assert head.split
    with torch.no_grad():
        mine = head.logits(head.hidden(IDS)[0].flatten(0, 1))
        torch.testing.assert_close(mine, model(input_ids=IDS).logits.flatten(0, 1))


@pytest.mark.parametrize("said", [0.5, "inv_sqrt_d_model"])
def test_a_scale_of_the_config_that_its_class_does_not_read(said: float | str) -> None:
    model = tiny_model("mpt", logit_scale=said)
    head = LogitHead(model)
    with torch.no_grad():
        mine = head.logits(head.hidden(IDS)[0].flatten(0, 1))
        torch.testing.assert_close(mine, model(input_ids=IDS).logits.flatten(0, 1))


def test_a_family_with_an_unknown_head_still_gets_its_own_logits() -> None:
    model = tiny_model("llama", seed=1)
    plain = model.forward
    model.forward = lambda *args, **more: _twice(plain(*args, **more))
    head = LogitHead(model)
    assert not head.split
    hidden, _ = head.hidden(IDS)
    torch.testing.assert_close(head.logits(hidden.flatten(0, 1)), model(input_ids=IDS).logits.flatten(0, 1))
    total = Objective(model)(IDS, targets())[0]
    wanted = functional.cross_entropy(
        model(input_ids=IDS).logits.flatten(0, 1), targets().flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(total, wanted)


def _twice(out: Any) -> Any:
    out.logits = out.logits * 2
    return out


@given(seed=st.integers(0, 99), top_k=st.integers(1, 12))
def test_top_k_is_a_lower_bound_that_becomes_the_divergence(seed: int, top_k: int) -> None:
    # Merging events can only bring two distributions closer (data-processing inequality).
    random = torch.manual_seed(seed)
    logits, taught = (torch.randn(6, 12, generator=random) * 3 for _ in range(2))
    wanted = torch.arange(6)
    whole = token_losses(logits, taught, wanted, spec())[0][2]
    some = token_losses(logits, taught, wanted, spec(top_k=top_k))[0][2]
    assert -1e-5 <= some <= whole * (1 + 1e-5) + 1e-5
    if top_k >= 11:
        torch.testing.assert_close(some, whole, rtol=1e-3, atol=1e-4)


@given(
    seed=st.integers(0, 99), top_k=st.none() | st.integers(1, 12), weight=st.sampled_from([0.3, 1.0]),
    heat=st.sampled_from([1.0, 2.5]),
)  # fmt: skip
def test_the_gradient_is_what_differentiating_the_loss_gives(
    seed: int, top_k: int | None, weight: float, heat: float
) -> None:
    random = torch.manual_seed(seed)
    logits, taught = (torch.randn(6, 12, generator=random, dtype=torch.float64) * 3 for _ in range(2))
    wanted = torch.tensor([3, IGNORED, 0, 11, 5, IGNORED])
    settings = spec(top_k=top_k, weight=weight, temperature=heat)
    _, gradient = token_losses(logits, taught, wanted, settings)

    def total(leaf: torch.Tensor) -> torch.Tensor:
        counted = wanted != IGNORED
        mine, theirs = (leaf / heat).softmax(-1)[counted], (taught / heat).softmax(-1)[counted]
        if top_k is not None:
            order = theirs.argsort(-1, descending=True)
            mine, theirs = mine.gather(-1, order), theirs.gather(-1, order)
            if top_k < 12:  # the rest is summed up: 1 minus the others would keep few digits of a small one
                mine, theirs = (
                    torch.cat([each[:, :top_k], each[:, top_k:].sum(-1, keepdim=True)], -1) for each in (mine, theirs)
                )
        loss = functional.cross_entropy(leaf, wanted, ignore_index=IGNORED, reduction="sum")
        return (1 - weight) * loss + weight * heat**2 * (theirs * (theirs / mine).log()).sum()

    leaf = logits.clone().requires_grad_()
    # The loss has 1 minus the chosen ones' sum, which keeps few digits of a rest of 1e-10.
    torch.testing.assert_close(gradient, torch.autograd.grad(total(leaf), leaf)[0], rtol=1e-6, atol=2e-7)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn() -> None:
    model = tiny_model("llama", seed=3)
    objective = Objective(model, spec(weight=1.0, hidden_weight=1.0), tiny_model("llama", seed=3))
    total, _, divergence, far = objective(IDS, targets())
    assert abs(total.item()) < 1e-5
    assert abs(divergence.item()) < 1e-5
    assert far.item() == 0
    total.backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-4


def test_hidden_distance_is_relative_and_ignores_what_has_no_target() -> None:
    state = torch.randn(1, 4, 8)
    counted = torch.tensor([[True, True, False, True]])
    assert float(hidden_distance((state * 0,), (state,), counted)) == pytest.approx(3.0)
    moved = state.clone()
    moved[0, 2] += 5
    assert float(hidden_distance((moved,), (state,), counted)) == 0
    scaled = hidden_distance((state * 0.5 * 7,), (state * 7,), counted)
    assert float(scaled) == pytest.approx(0.75)


def test_the_hidden_term_reaches_every_layer() -> None:
    model, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    objective = Objective(model, spec(weight=1.0, hidden_weight=2.0), teacher)
    total, _, divergence, far = objective(IDS, targets())
    torch.testing.assert_close(total, divergence + 2 * far)
    states = [each(input_ids=IDS, output_hidden_states=True).hidden_states[1:] for each in (model, teacher)]
    torch.testing.assert_close(far, hidden_distance(*states, targets() != IGNORED), rtol=1e-4, atol=1e-4)


def test_the_teacher_is_neither_saved_nor_trained() -> None:
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    objective = Objective(student, spec(), teacher)
    assert {id(p) for p in objective.parameters()} == {id(p) for p in student.parameters()}
    assert set(objective.state_dict()) == {f"student.{name}" for name in student.state_dict()}
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_with_another_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match=r"64 .*63"):
        Objective(tiny_model("llama", vocab_size=63), spec(), tiny_model("llama"))
