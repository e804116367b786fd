"""What every engine is told."""

from __future__ import annotations

from aipo.config.sections import RolloutConfig
from aipo.rollout.base import Sampling


def test_training_draws_as_its_config_says() -> None:
    config = RolloutConfig(max_tokens=7, temperature=0.7, top_p=0.9, top_k=40)
    assert Sampling.of(config) == Sampling(max_tokens=7, temperature=0.7, top_p=0.9, top_k=40)
