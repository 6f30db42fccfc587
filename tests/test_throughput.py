"""Throughput with the teacher counted, beside SpeedMonitor."""

import pytest
import torch
from composer.callbacks import SpeedMonitor
from conftest import LENGTH

from let_composer import LET
from let_composer.throughput import GuidedThroughput


def test_throughput_with_the_teacher(train, tokenizer, teacher_folder):
    monitor = SpeedMonitor(window_size=2, gpu_flops_available=10**9)
    guided = GuidedThroughput(window_size=2)
    algorithm = LET(teacher_folder, stop="5ba", weight=0.1)
    trainer = train(algorithm, callbacks=[monitor, guided], max_duration="7ba", fit=False)
    flops = algorithm._teacher.flops(8 * LENGTH, LENGTH)
    share = flops / trainer.state.model.flops_per_batch({"input_ids": torch.zeros(8, LENGTH)})
    trainer.fit()
    logger = trainer.logger.destinations[0]
    for name in ("flops_per_sec", "mfu"):
        plain = {time.batch: value for time, value in logger.data[f"throughput/device/{name}"]}
        found = {time.batch: value for time, value in logger.data[f"let/throughput/device/{name}"]}
        assert list(plain) == [3, 4, 5, 6, 7] and list(found) == [3, 4, 5]
        for batch, value in found.items():
            assert value == pytest.approx(plain[batch] * (1 + share)), name
