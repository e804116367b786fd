"""What is said of a base policy beside its weights."""

from __future__ import annotations

import pytest
import torch

from aipo.beds.base_policy import bandwidth, small_llama, word_tokenizer
from aipo.beds.worlds import WORLDS
from aipo.config import CONFIG_FOLDER, load_config


def test_the_bandwidth_is_of_the_states_before_the_final_norm() -> None:
    world = WORLDS["chain"]
    tokenizer = word_tokenizer(world.knobs.vocabulary())
    model = small_llama(len(tokenizer), width=16, layers=1)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(100)  # the residual stream starts with them; the norm takes that out
    wide = bandwidth(model, tokenizer, world, questions=8)
    coordinates = model.get_input_embeddings().weight.detach()[3:].reshape(-1, 1)  # of words, not of the three marks
    distance = torch.nn.functional.pdist(coordinates[:1000])
    assert wide == pytest.approx(float(distance.median()) / 2**0.5, rel=0.2)


@pytest.mark.parametrize("condition", ["mi", "mi_wrong_gold", "mi_low", "mi_low_wrong_gold", "mi_question"])
@pytest.mark.parametrize("bed", ["chain", "fork", "copy"])
def test_the_fixed_bandwidth_is_near_the_median_of_the_bed(bed: str, condition: str) -> None:
    config = load_config(f"beds/{bed}.yaml", method=str(CONFIG_FOLDER / "beds" / "conditions" / f"{condition}.yaml"))
    median = {"chain": 12.5, "fork": 13.2, "copy": 11.4}[bed]  # bed.json, as made by the default settings
    assert isinstance(config.mi.sigma, float)
    assert 0.8 < config.mi.sigma / median < 1.25
