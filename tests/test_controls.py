"""Controls without a teacher, for the evidence."""

import pytest
import torch.nn.functional as F
from conftest import assert_close, build_student, parameters
from controls import DeepSupervision, LabelSmoothing  # scripts/evidence/controls.py


@pytest.mark.parametrize(
    ("control", "smoothing", "factor"),
    [(LabelSmoothing(), 0.1, 1.0), (DeepSupervision(student_layer=-1, stop="1dur", anneal="constant"), 0.0, 2.0)],
)
def test_the_loss_is_that_of_torch(control, smoothing, factor, tokenizer, train):
    """Deep supervision of the last block is the model's own loss once more."""

    def loss(outputs, batch):
        logits, labels = outputs.logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:]
        return factor * F.cross_entropy(logits, labels, label_smoothing=smoothing)

    other = build_student(tokenizer)
    other.loss = loss
    own = train(control, max_duration="2ba")
    assert_close(parameters(own), parameters(train(max_duration="2ba", model=other)))
