"""The baselines: the loss against its formula in fp64, and what differs from LET in a run."""

import pytest
import torch
from conftest import Sizes, assert_close, build_student, counted, metrics, parameters
from torch import nn

from let_composer import LET, RKD
from let_composer.loss.distillation import compare_logits
from let_composer.teacher import Teacher


def distillation_loss(student, logits, mask, temperature=1.0):
    """Of logits on both sides, with labels that nobody looks at."""
    return compare_logits(student, logits, mask, mask.long(), lambda rows: rows, temperature)[0]


@pytest.mark.parametrize("chunk", [3, 1024])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_by_its_formula(temperature, chunk):
    torch.manual_seed(0)
    student = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    states, head = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
    p = ((states @ head)[..., :7] / temperature).softmax(-1)
    divergence = p * (p.log() - (student / temperature).log_softmax(-1))
    expected = temperature**2 * divergence.sum(-1)[mask].mean()
    found, _ = compare_logits(student, states, mask, mask.long(), lambda rows: rows @ head, temperature, chunk)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    gradient, wanted = (torch.autograd.grad(loss, student)[0] for loss in (found, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


def test_no_tokens_cost_nothing():
    logits = torch.randn(1, 4, 6, requires_grad=True)
    none = torch.zeros(1, 4, dtype=torch.bool)
    loss = distillation_loss(logits, logits.detach() + torch.randn(6), none)
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None and not logits.grad.any()


def test_weight_one_trains_on_the_teacher_alone(train, teacher_folder, tokenizer):
    """One step of SGD against the same step by hand."""
    found = train(RKD(teacher_folder, weight=1.0, temperature=2.0), max_duration="1ba")
    data = next(iter(found.state.train_dataloader))
    student = build_student(tokenizer)
    teacher = Teacher(teacher_folder, head=True)
    logits = teacher.project(teacher.hidden(data["input_ids"]))
    distillation_loss(student(data)["logits"], logits, counted(data), 2.0).backward()
    torch.optim.SGD(student.parameters(), lr=0.1).step()
    assert_close(parameters(found), {name: p.detach() for name, p in student.named_parameters()})


def test_no_tensor_of_the_teachers_logits_is_larger_than_a_chunk():
    student, states = torch.randn(4, 64, 32, requires_grad=True), torch.randn(4, 64, 8)
    project, mask = nn.Linear(8, 32, bias=False).requires_grad_(False), torch.ones(4, 64).bool()
    with Sizes(torch.ops.aten.mm.default) as sizes:
        compare_logits(student, states, mask, mask.long(), project, chunk=16)[0].backward()
    assert sizes.found == [16 * 32] * 2 * 16  # forward, and again in the backward pass


def test_a_student_without_blocks_that_can_be_told(train, tokenizer, teacher_folder):
    model = build_student(tokenizer)
    model.model.more = nn.ModuleList(nn.ReLU() for _ in range(4))  # which list of four are the blocks?
    with pytest.raises(ValueError, match="expected one list of decoder blocks"):
        train(LET(teacher_folder, weight=0.1), model=model, fit=False)
    train(RKD(teacher_folder), model=model, max_duration="1ba")


def test_the_head_counts(train, teacher_folder):
    found = train(algorithm := RKD(teacher_folder), max_duration="1ba", fit=False)
    flops = 2 * (Teacher(teacher_folder).parameters + 64 * 24)
    found.fit()
    share = flops / (flops + 6 * algorithm.student_parameters)
    assert metrics(found, "kd/teacher_flops_share") == [pytest.approx(share)]
