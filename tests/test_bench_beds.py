"""What bench/beds.py concludes from its rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from aipo.campaign.plots import draw_bands
from aipo.config import CONFIG_FOLDER, load_config
from aipo.errors import UserError
from bench.beds import (
    CONDITIONS,
    CONTROLS,
    area,
    best,
    check_made,
    configured,
    contrasts,
    counts,
    made_of,
    main,
    picture,
    table,
    twins,
    write,
)
from tests.tiny import make_tiny

BEDS = sorted(path.stem for path in (CONFIG_FOLDER / "beds").glob("*.yaml"))


@pytest.mark.parametrize("bed", BEDS)
def test_every_condition_is_a_config_of_every_bed(bed: str) -> None:
    conditions = [path.stem for path in CONDITIONS.glob("*.yaml")]
    assert set(CONTROLS) <= set(conditions)
    for condition in conditions:
        config = load_config(f"beds/{bed}.yaml", method=str(CONDITIONS / f"{condition}.yaml"))
        assert config.name == f"{bed}-{condition}"
        assert config.rollout.engine == "hf"


def rows(finals: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"condition": name, "seed": seed, "curve": [[0, 0.25], [10, final]], "selected": 0.25, "seconds": 60.0}
        for name, values in finals.items()
        for seed, final in enumerate(values)
    ]


def test_area_is_a_mean_over_steps() -> None:
    assert area([(0, 0.2), (10, 0.4), (40, 0.4)]) == pytest.approx((10 * 0.3 + 30 * 0.4) / 40)


def test_pairs_are_of_one_seed() -> None:
    made = rows({"oracle": [0.9, 0.8, 0.7], "random": [0.5, 0.5]})
    ((difference, p, seeds),) = contrasts(made, [("oracle", "random")])
    assert (round(difference, 6), seeds) == (35.0, 2)
    assert 0.05 < p < 0.2


def test_a_bed_counts_only_if_both_controls_are_apart() -> None:
    apart = {"oracle": [0.9, 0.92, 0.91, 0.9], "random": [0.6, 0.63, 0.6, 0.61], "inverse": [0.2, 0.21, 0.2, 0.22]}
    assert counts(rows(apart)).startswith("The bed counts (")
    assert counts(rows(apart | {"inverse": [0.6, 0.62, 0.61, 0.6]})).startswith("The bed does not count (")
    assert counts(rows({"oracle": [0.9], "random": [0.1], "inverse": [0.0]})).startswith("The bed does not count (")
    lines = table(rows(apart)).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["oracle", "random", "inverse"]


def test_a_right_gold_is_told_beside_its_wrong_one() -> None:
    made = rows({"mi": [0.9, 0.8, 0.9], "mi_wrong_gold": [0.6, 0.6, 0.5], "mi_low": [0.1, 0.2, 0.3], "random": [0.5]})
    assert twins(made).startswith("Right against wrong gold: mi - mi_wrong_gold: +30.0 points, p ")
    assert "mi_low" not in twins(made)
    assert twins(rows({"mi": [0.9]})) == ""


def test_the_signal_that_ended_highest_is_tested_against_all_others() -> None:
    finals = {"oracle": [0.9, 0.9, 0.8], "all": [0.8, 0.9, 0.7], "random": [0.5, 0.6, 0.5], "entropy": [0.2, 0.1, 0.2]}
    made = rows(finals | {"mi": [0.6, 0.7, 0.5], "mi_wrong_gold": [0.7, 0.8, 0.9]})
    controls, signal = best(made).split("\n\n")
    assert controls.startswith("The controls: oracle - all: +6.7 points, p ")
    assert [pair.split(":")[0] for pair in signal.removeprefix("The signal that ended highest: ").split("; ")] == [
        f"mi - {other}" for other in ("oracle", "all", "random", "entropy")
    ]
    assert best(rows({"random": [0.5]})) == ""


def test_a_table_draws_its_own_bed_and_all_that_stand_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bed in ("chain-fixed", "chain"):
        lines = [json.dumps(row) for row in rows({"oracle": [0.8, 0.9], "random": [0.5, 0.6], "mi_low": [0.25, 0.35]})]
        (tmp_path / f"beds-{bed}.jsonl").write_text("\n".join(lines) + "\n")
    drawn = {}
    monkeypatch.setattr("bench.beds.picture", lambda bands, path: drawn.update({path.name: bands}))
    assert "random | 2 |" in write("chain", tmp_path / "beds-chain")
    assert (tmp_path / "beds-chain.md").read_text().startswith("# Bed chain\n")
    assert [*drawn] == ["beds-chain.png", "beds.png"]
    assert [*drawn["beds-chain.png"]] == [("", "oracle"), ("", "random"), ("", "mi_low")]  # the highest first
    assert [*drawn["beds.png"]] == [(bed, name) for bed in ("chain", "chain-fixed") for name in ("oracle", "random")]
    steps, mean, low, high = drawn["beds.png"]["chain", "oracle"]
    assert (steps.tolist(), mean.tolist()) == ([0, 10], pytest.approx([25, 85]))
    assert low.tolist() == pytest.approx([25, 80])
    assert high.tolist() == pytest.approx([25, 90])


def test_a_picture_of_bands(tmp_path: Path) -> None:
    """A panel a bed with all its conditions; of more than seven conditions a panel each, the others in grey."""
    x = np.array([0.0, 10.0])
    bands = {("chain", "oracle"): (x, x + 1, x, x + 2), ("chain", "mi"): (x, x + 2, x, x), ("fork", "mi"): (x, x, x, x)}
    sheet = draw_bands(bands, across="step", up="accuracy")
    lines = {ax.get_title(): [line.get_ydata().tolist() for line in ax.lines] for ax in sheet.axes}
    assert lines == {"chain": [[1, 11], [2, 12]], "fork": [[0, 10]]}
    assert [text.get_text() for text in sheet.legends[0].get_texts()] == ["oracle", "mi"]
    first, second = sheet.axes
    assert first.lines[1].get_color() == second.lines[0].get_color() != first.lines[0].get_color()  # mi in both
    band = first.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0, 12)

    many = draw_bands({("", str(i)): (x, x + i, x, x) for i in range(8)}, across="step", up="accuracy")
    assert [ax.get_title() for ax in many.axes] == [str(i) for i in range(8)]
    assert [line.get_color() == "0.85" for line in many.axes[2].lines] == [i != 2 for i in range(8)]
    assert not many.legends
    picture(bands, tmp_path / "beds.png")
    assert imread(tmp_path / "beds.png").ndim == 3


def test_runs_with_other_keys_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"model.path={tmp_path}/made/model"
    old = {"bed": "chain", "condition": "mi", "seed": 0, "settings": ["mi.sigma=5", model]}
    (tmp_path / "beds-made.jsonl").write_text(json.dumps(old) + "\n")

    def said(bed: str, *keys: str) -> str:
        start = ["beds.py", bed, "--name", "made", "--out", str(tmp_path), "--conditions", "mi,all", *keys]
        monkeypatch.setattr(sys, "argv", start)
        assert main() == 2
        return capsys.readouterr().err

    assert "has mi with other keys" in said("chain", "mi.sigma=24", model)
    assert "is of chain model.path=" in said("chain", "mi.sigma=5")
    assert "not of fork" in said("fork", "mi.sigma=5", model)
    assert f"the bed {tmp_path}/made is not there" in said("chain", "mi.sigma=5", model)


def test_what_a_run_is_made_of(tmp_path: Path) -> None:
    """Settings, data and weights, but not the name, the place and the seed; data and weights are one bed's."""
    make_tiny(tmp_path / "model")
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(40)))
    keys = [f"model.path={tmp_path}/model", f"data.train={data}", f"data.validation={data}"]

    def made(*more: str) -> tuple[str, str]:
        return made_of(configured("chain", "mi", [*keys, *more]))

    first = made()
    assert made("seed=3", "name=other", f"runs={tmp_path}") == first
    for key in ("mi.sigma=5", "optim.steps=7", "optim.lr=1"):
        settings, bed = made(key)
        assert settings != first[0]
        assert bed == first[1]
    kept = [{"condition": "mi", "made_of": list(first)}, {"condition": "all"}]  # as read from a file; a first result
    check_made(kept, {"mi": first, "oracle": first}, tmp_path)
    with pytest.raises(UserError, match="has mi by other settings"):
        check_made(kept, {"mi": made("mi.sigma=5")}, tmp_path)
    data.write_text(data.read_text().replace("39", "93"))
    other = made()
    assert other[1] != first[1]
    with pytest.raises(UserError, match="other data or weights"):
        check_made(kept, {"oracle": other}, tmp_path)
    make_tiny(tmp_path / "model", seed=1)
    assert made()[1] != other[1]
