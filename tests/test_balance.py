"""Weights that set themselves: the formulas, and in a run."""

import math

import pytest
import torch
from conftest import build_data, build_student, copy_teacher, counted, metrics
from transformers import LlamaForCausalLM

from let_composer import LET, RKD, alignment_loss
from let_composer.balance import (
    GradientRatio,
    RunningMean,
    histogram,
    lead_share,
    lead_sum,
    measured,
    sampled,
    stacking_weight,
)
from let_composer.teacher import Teacher


def test_what_is_measured_is_the_gradients_norm_and_nothing_changes():
    torch.manual_seed(0)
    hidden, sink = torch.randn(3, 4, requires_grad=True), torch.zeros((), requires_grad=True)
    for _ in range(2):  # two microbatches
        (measured(hidden, sink) ** 3).sum().backward()
    assert hidden.grad is not None and sink.grad is not None
    torch.testing.assert_close(hidden.grad, 6 * hidden.detach() ** 2)
    torch.testing.assert_close(sink.grad, 2 * (3 * hidden.detach() ** 2).square().sum())


def test_a_ratio_of_running_means_within_its_range():
    ratio = GradientRatio()
    assert ratio.weight == 0.1
    ratio.update(2.0, 0.5)
    assert ratio.weight == 4.0
    ratio.update(4.0, 0.5)
    assert ratio.weight == pytest.approx((0.9 * 2 + 0.1 * 4) / 0.5)
    before = ratio.weight
    for model, term in ((math.inf, 1.0), (1.0, math.nan), (0.0, 1.0), (1.0, 0.0)):
        ratio.update(model, term)
    assert ratio.weight == before
    for model, term, weight in ((1.0, 1e-9, 1e4), (1e-9, 1.0, 1e-3)):
        extreme = GradientRatio()
        extreme.update(model, term)
        assert extreme.weight == weight


def test_the_share_is_the_one_under_which_the_mixture_predicts_best():
    torch.manual_seed(0)
    student, teacher = torch.rand(5000) ** 2, torch.rand(5000)
    mask = torch.rand(5000) > 0.2
    found = stacking_weight(histogram((teacher / student).log(), mask))
    shares = torch.linspace(0, 1, 1001)
    likelihood = [(u * teacher + (1 - u) * student)[mask].log().mean() for u in shares]
    assert found == pytest.approx(float(shares[torch.stack(likelihood).argmax()]), abs=0.02)
    assert stacking_weight(histogram(torch.full((9,), 3.0), torch.ones(9).bool())) > 0.99
    assert stacking_weight(histogram(torch.full((9,), -3.0), torch.ones(9).bool())) < 0.01
    assert stacking_weight(histogram(torch.zeros(9), torch.zeros(9).bool())) == 0.5


def test_a_lead_counts_in_full_from_half_a_nat():
    assert [lead_share(nats) for nats in (None, 9.0, 0.5, 0.3, 0.0, -1.0)] == pytest.approx([1, 1, 1, 0.6, 0, 0])


def test_a_sample_is_an_eighth_of_a_row_at_most_64_positions_and_never_none():
    assert [len(range(length)[sampled(length)]) for length in (1, 5, 24, 512, 2048, 2050)] == [1, 1, 3, 64, 64, 62]
    assert [list(range(length)[sampled(length)]) for length in (3, 24)] == [[1], [4, 12, 20]]


def test_a_running_mean_is_plain_at_first_and_settles():
    mean, batches = RunningMean(), [4.0, math.nan, *range(9)]
    for found in batches:
        assert not mean.settled
        mean.update(found)
    assert mean.settled and mean.value == pytest.approx((4 + sum(range(9))) / 10)
    mean.update(14.0)
    assert mean.value == pytest.approx(0.9 * 4 + 0.1 * 14)


def test_a_lead_counts_tokens_that_both_models_know():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 50, 14, dtype=torch.float64), torch.randn(3, 50, 9, dtype=torch.float64)
    targets, mask = torch.randint(12, (3, 50)), torch.rand(3, 50) > 0.3
    targets[0, 0] = -100
    known = mask & (targets >= 0) & (targets < 9)
    logs = [x.log_softmax(-1).gather(-1, targets.clamp(0, 8).unsqueeze(-1))[known] for x in (student, teacher)]
    nats, count = lead_sum(student, teacher, targets, mask).tolist()
    assert 10 < count == known.sum() < mask.sum()
    assert nats == pytest.approx(float((logs[1] - logs[0]).sum()), rel=1e-5)


def test_the_weight_of_the_second_batch_is_the_ratio_of_the_firsts_gradients_times_the_lead(
    train, tokenizer, teacher_folder
):
    data = build_data(tokenizer, ragged=True)
    batch = next(iter(data.dataloader))
    trainer = train(LET(teacher_folder, stop="4ba", weight="auto"), data=data, device_train_microbatch_size=3)
    model, teacher = build_student(tokenizer), Teacher(teacher_folder)
    seen = []
    model.model.transformer.blocks[2].register_forward_hook(lambda module, args, output: seen.append(output[0]))
    lm = model.loss(outputs := model(batch), batch)
    mask = counted(batch)
    term = alignment_loss(seen[0], teacher.hidden(batch["input_ids"]), mask)
    norms = [torch.autograd.grad(loss, seen[0], retain_graph=True)[0].norm() for loss in (lm, term)]
    ratio = float(norms[0] / norms[1])
    logits = outputs.logits, LlamaForCausalLM.from_pretrained(teacher_folder)(batch["input_ids"]).logits
    labels, eighth = batch["labels"][:, 1:, None].clamp(0), (torch.arange(mask.shape[1] - 1) - 4) % 8 == 0
    ours, theirs = (-x[:, :-1].log_softmax(-1).gather(-1, labels)[mask[:, :-1] & eighth].mean() for x in logits)
    assert metrics(trainer, "let/lead")[0] == pytest.approx(lead := float(ours - theirs), rel=1e-4)
    assert metrics(trainer, "let/weight")[:2] == pytest.approx([0.1, 0.75 * ratio * min(1, lead / 0.5)], rel=1e-4)
    assert metrics(trainer, "let/gradient_ratio")[0] == pytest.approx(0.1 / ratio, rel=1e-4)


def test_a_gradient_scaler_changes_no_weight(train, let):
    """As under amp_fp16, which Composer has on CUDA only: the gradients that LET measures are scaled with the loss."""

    def run(scaled: bool) -> list[float]:
        trainer = train(let(stop="5ba", weight="auto"), device_train_microbatch_size=3, fit=False)
        if scaled:
            trainer.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
            trainer._use_grad_scaling = lambda precision, scaler: True
            trainer._use_closures = lambda: False  # torch's scaler takes none
        trainer.fit()
        assert not scaled or trainer.state.scaler.state_dict()["_growth_tracker"] == 6  # batches that it scaled
        return metrics(trainer, "let/weight")

    assert run(True) == pytest.approx(run(False), rel=1e-6)


@pytest.mark.parametrize(
    "method, reason",
    [
        (RKD, "the teacher's share in the best mixture of both models has fallen to 0.0"),
        (LET, "the student predicts as well as the teacher, which has nothing left to give"),
    ],
)
def test_a_teacher_with_nothing_to_give_is_released(train, teacher_folder, tmp_path, caplog, method, reason):
    teacher = copy_teacher(teacher_folder, tmp_path, lambda model: model.lm_head.weight.data.mul_(1000))  # always wrong
    trainer = train(algorithm := method(teacher, weight="auto", stop="40ba"), max_duration="12ba")
    name = f"{method.prefix}/active"
    assert metrics(trainer, name) == [1.0] * 10 + [0.0]  # the first nine might be chance
    trainer.fit(duration="2ba")
    assert metrics(trainer, name) == [1.0] * 10 + [0.0] and algorithm.state_dict()["end"] == "10ba"
    assert f"{method.__name__} ends early: {reason}" in caplog.text
