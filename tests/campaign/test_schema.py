"""Campaigns as YAML: what they mean, and that a mistake names key and file before anything runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aipo.campaign.schema import FIGURES, Campaign, load_campaign, settings
from aipo.config import CONFIG_FOLDER, load_config
from aipo.config.data import Source
from aipo.errors import UserError

MINIMAL = "base: tiny.yaml\nconditions:\n  all: {mask.rule: all}\n  random: {mask: {rule: random, fraction: 0.3}}\n"
EVALUATE = MINIMAL + "evaluate: {benchmarks: [embedded]"


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_conditions_by_seeds(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "seeds: 2\n")
    made = list(settings(load_campaign(path), path))
    assert [(each.condition, each.seed, each.config.seed) for each in made] == [
        ("all", 0, 0), ("all", 1, 1), ("random", 0, 0), ("random", 1, 1),
    ]  # fmt: skip
    assert made[2].config.mask.fraction == 0.3


def test_a_source_of_data_is_a_value_as_in_a_config_file(tmp_path: Path) -> None:
    text = "base: tiny.yaml\nseeds: 1\ncommon: {data.validation: {path: a.jsonl}}\nconditions:\n"
    text += "  dotted: {data.validation: {path: x.jsonl, rows: 10}}\n"
    text += "  nested: {data: {validation: {path: x.jsonl, rows: 10}, suffix: Why?}}\n  common: {}\n"
    path = write(tmp_path, text)
    dotted, nested, common = (each.config.data for each in settings(load_campaign(path), path))
    assert dotted.validation == nested.validation == Source(path="x.jsonl", rows=10)
    assert nested.suffix == "Why?"
    assert common.validation == Source(path="a.jsonl")


def test_any_text_is_a_value_as_in_a_config_file(tmp_path: Path) -> None:
    path = write(tmp_path, "base: tiny.yaml\nseeds: 1\ngrid: {data.suffix: [Think 🤔 τ, 2024-05-01]}\n")
    assert [each.config.data.suffix for each in settings(load_campaign(path), path)] == ["Think 🤔 τ", "2024-05-01"]


def test_a_plot_alone_needs_no_list(tmp_path: Path) -> None:
    for text in ("forest", "{kind: forest}"):
        campaign = load_campaign(write(tmp_path, f"{MINIMAL}control: all\nplots: {text}\n"))
        assert [plot.kind for plot in campaign.plots] == ["forest"]


def test_a_grid_crosses_and_the_nearest_wins(tmp_path: Path) -> None:
    text = MINIMAL + "common: {optim.lr: 1e-6, mask.decay: 0.5}\npanels: {A: {optim.lr: 2e-6}, B: {method: grpo}}\n"
    text += "grid:\n  optim.steps: [8, 12]\n"
    text += "  cuts: {low: {curriculum.cuts: [5, 15]}, high: {curriculum.cuts: [10, 20]}}\n"
    path = write(tmp_path, text + "seeds: [7]\n")
    made = {(each.panel, each.condition): each.config for each in settings(load_campaign(path), path)}
    assert len(made) == 2 * 2 * 2 * 2
    first, second = made["A", "all, steps=8, low"], made["B", "random, steps=12, high"]
    assert (first.optim.lr, first.optim.steps, first.curriculum.cuts, first.mask.decay) == (2e-6, 8, (5, 15), 0.5)
    assert (second.optim.lr, second.optim.steps, second.curriculum.cuts) == (1e-6, 12, (10, 20))
    assert second.loss.kl_beta == 0.04  # the method's
    assert second.mask.rule == "random"  # over the method's


def test_from_takes_what_it_does_not_say(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "seeds: 5\ncontrol: random\n", "first.yaml")
    campaign = load_campaign(write(tmp_path, "from: first.yaml\ncolumns: [mag, otf, tes]\n"))
    assert campaign.control == "random"
    assert len(campaign.seeds) == 5
    assert campaign.heading("mag") == "MAG (%)"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINIMAL + "sedes: 3\n", "mine.yaml: unknown key sedes; did you mean seeds?"),
        (MINIMAL + "control: randon\n", "mine.yaml: control: randon is no condition; did you mean random?"),
        (MINIMAL.replace("mask.rule", "mask.ruel"), "all: override mask.ruel=\"all\": unknown key mask.ruel; did you"),
        (MINIMAL.replace("0.3", "3"), "mine.yaml: random: override mask.fraction=3: mask.fraction"),
        (MINIMAL + "columns: [accuracy, otff]\n", "columns: otff is unknown; did you mean otf?"),
        (MINIMAL + "seeds: [1, 1]\n", "seeds must be distinct"),
        (MINIMAL + "read: later\n", "mine.yaml: read"),
        (MINIMAL + "plots: [forrest]\n", "mine.yaml: plots.0.kind"),
        (MINIMAL + "printed: {'': {all: [1, 2]}}\n", "printed: all has 2 figures for 1 columns"),
        (MINIMAL + "seeds: 0\n", "at least one"),
        (MINIMAL + "common: {seed: 3}\n", "seed is the campaign's to set, for each run: see seeds"),
        (MINIMAL + "base: tiny.yaml\n", "base stands in line 1 and in line 5"),
        ("conditions: {}\n", "mine.yaml: base is required"),
        (MINIMAL.replace("tiny.yaml", "tinny.yaml"), "did you mean tiny.yaml?"),
        (MINIMAL.replace("mask.rule: all", "method: grppo"), "all: --method grppo is unknown: did you mean grpo?"),
        (MINIMAL.replace("mask.rule: all", "intervene: drop"), "mine.yaml: all: intervene is of an evaluation"),
        (MINIMAL + "common: {intervene: drop}\n", "mine.yaml: all: intervene is of an evaluation"),
        (EVALUATE + "}\nread: 20\n", "say first, last or best"),
        (EVALUATE + "}\ncommon: {read: 2}\n", "mine.yaml: all: read: 2 with evaluate: say first, last or best"),
        (EVALUATE + "}\npanels: {A: {}, B: {read: 2}}\n", "mine.yaml: B: all: read: 2 with evaluate"),
        (EVALUATE + ", tokens_from_run: true}\ncommon: {read: first, intervene: drop}\n", "no run to take them from"),
        (MINIMAL + "evaluate: {benchmarks: [math, math500]}\n", "evaluate: benchmarks: math500 is named twice"),
        (MINIMAL + "evaluate: {benchmarks: [a/x.jsonl, b/x.jsonl]}\n", "x is named twice: leave one out, or rename"),
        (EVALUATE + ", options: [--out, x]}\n", "all: evaluate: options: --out is the campaign's to set"),
        (EVALUATE + ", options: [--se, '1']}\n", "evaluate: options: --seed is the campaign's"),
        (EVALUATE + ", options: [--avg8]}\n", "evaluate: options: --avg is the campaign's"),
        (EVALUATE + ", options: [--model, x]}\nread: first\n", "evaluate: options: --model is the campaign's"),
        (EVALUATE + ", options: [--engine, hf]}\n", "evaluate: options: --engine is the campaign's"),
        (EVALUATE + ", options: [--intervene, both]}\n", "evaluate: options: --intervene is the campaign's"),
        (EVALUATE + ", options: [--compare, a, b]}\n", "evaluate: options: --compare is the campaign's"),
        (EVALUATE + ", options: [--help]}\n", "evaluate: options: --help evaluates nothing"),
        (MINIMAL + "gpus: 3\n", "rollout.questions_per_step (4, 4 an update) is not divisible by the 3 processes"),
        (MINIMAL + "grid: {mask.kappa_start: []}\n", "mine.yaml: grid: mask.kappa_start has no values"),
        (MINIMAL + "grid: {cuts: {}}\n", "mine.yaml: grid: cuts has no values"),
        (MINIMAL + "plots: forrest\n", "mine.yaml: plots.0.kind: input should be"),
        (MINIMAL + "evaluate: {benchmarks: [embeded]}\n", "embeded is no JSONL file and unknown; did you mean emb"),
        (MINIMAL + "plots: [{kind: heatmap, key: curriculum.cutz}]\n", "two numbers; did you mean curriculum.cuts?"),
        (MINIMAL + "plots: [{kind: heatmap, key: mask.fraction}]\n", "mask.fraction is no key with two numbers"),
        (MINIMAL + "read: 20\ncommon: {optim.steps: 19}\n", "read: 20 is not measured: of 19 steps"),
        (MINIMAL + "read: 3\ncommon: {optim.steps: 19, validation.every: 2}\n", "all: read: 3 is not measured"),
        ("from: other.yaml\n", "from: other.yaml is not beside it"),
        ("from: mine.yaml\n", "goes in a circle"),
    ],
)  # fmt: skip
def test_a_mistake_names_key_and_file(text: str, says: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as raised:
        list(settings(load_campaign(path), path))
    assert says in str(raised.value)
    assert "mine.yaml" in str(raised.value)


def test_what_is_measured_can_be_read(tmp_path: Path) -> None:
    text = MINIMAL + "plots: [{kind: heatmap, key: curriculum.cuts}]\n"
    for more in ("read: 19\n", "read: 4\n", "read: 3\nmetric: reward/correct\n"):
        path = write(tmp_path, f"{text}{more}common: {{optim.steps: 19, validation.every: 2}}\n")
        assert len(list(settings(load_campaign(path), path))) == 6


def test_an_unknown_campaign_lists_those_there_are() -> None:
    with pytest.raises(UserError, match=r"did you mean laptop/table1\.yaml"):
        load_campaign(Path("laptop/tabel1.yaml"))


NAMED = ("table1", "table2", "table3", "table4", "figure2", "figure3", "figure4", "kappa_decay")


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["laptop", "paper"])
@pytest.mark.parametrize("name", NAMED)
def test_the_paper_by_name(name: str, scale: str) -> None:
    path = CONFIG_FOLDER / "campaigns" / scale / f"{name}.yaml"
    campaign = load_campaign(path)
    assert campaign.scale == scale
    made = list(settings(campaign, path))
    models = {each.config.model.path for each in made}
    assert all(model.startswith("embedded:" if scale == "laptop" else "Qwen/Qwen3-") for model in models)
    assert campaign.gpus == (8 if scale == "paper" else 1)
    assert bool(campaign.printed) == (scale == "paper" and name.startswith("table"))


@pytest.mark.slow
def test_campaigns_of_our_own_can_be_read() -> None:
    folder = CONFIG_FOLDER / "campaigns" / "laptop"
    own = {path.stem for path in folder.glob("*.yaml")} - set(NAMED)
    assert own >= {"beds", "recipe", "table1_beds", "table1_fork", "table1_chain", "table1_copy"}
    for name in own:
        made = list(settings(load_campaign(folder / f"{name}.yaml"), folder / f"{name}.yaml"))
        assert len({each.seed for each in made}) >= 3
    made = [each.config for each in settings(load_campaign(folder / "recipe.yaml"), folder / "recipe.yaml")]
    plain = load_config("smollm2_135m.yaml", [])
    for config in made:  # what is trained is what `make train` trains, but for the mask of the control
        assert config.optim == plain.optim
        assert config.rollout == plain.rollout
        assert (config.mask == plain.mask) == (config.mask.rule == "threshold")


def test_the_beds_campaign_sets_selections_of_one_size_beside_the_controls() -> None:
    path = CONFIG_FOLDER / "campaigns" / "laptop" / "beds.yaml"
    campaign = load_campaign(path)
    assert {"oracle", "all", "random", "inverse", "fillers", "MI, wrong gold"} <= campaign.conditions.keys()
    made = list(settings(campaign, path))
    assert len({each.config.model_dump_json(exclude={"name"}) for each in made}) == len(made)  # no two are one run
    for panel, share in (("chain", 0.235), ("fork", 0.0667)):
        assert {each.config.mask.fraction for each in made if each.panel == panel} == {share}


@pytest.mark.slow
def test_table_1_on_beds_has_every_method_beside_twins_and_controls() -> None:
    on_model, on_beds = (CONFIG_FOLDER / "campaigns" / "laptop" / f"{name}.yaml" for name in ("table1", "table1_beds"))
    campaign, methods = load_campaign(on_beds), load_campaign(on_model).conditions
    assert {each.method for each in methods.values()} == {p.stem for p in (CONFIG_FOLDER / "methods").glob("*.yaml")}
    controls = {"oracle", "inverse of oracle", "+ AIPO, inverse", "+ AIPO, wrong gold"}
    assert campaign.conditions.keys() == methods.keys() | controls
    made = list(settings(campaign, on_beds))
    for panel in campaign.panels:  # one budget a bed; GRPO is also the backbone, read before it trains
        own = [each for each in made if each.panel == panel and each.seed == 0]
        assert len({each.config.optim.generated_tokens for each in own}) == 1
        assert {each.config.model.path for each in own} == {f"data/beds/{panel}/model"}
        distinct = {each.config.model_dump_json(exclude={"name"}) for each in own}
        assert len(distinct) == len(own) - 1


def test_the_document_names_every_key_and_its_example_works(tmp_path: Path) -> None:
    text = (CONFIG_FOLDER.parent / "docs" / "campaigns.md").read_text()
    table = text[text.index("## Keys") : text.index("## What is run")]
    for name in (*Campaign.model_fields, *FIGURES):
        assert f"`{name}`" in table, name
    example = text[text.index("```yaml\n") + 8 :]
    example = example[: example.index("```")]
    assert len(example.splitlines()) == 7  # a comment with its name, and six lines
    path = write(tmp_path, example)
    assert len(list(settings(load_campaign(path), path))) == 9
    (grid,) = re.findall(r"`(grid: {cuts: .*)`", text)
    path = write(tmp_path, f"base: tiny.yaml\n{grid}\n")
    made = {each.condition: each.config for each in settings(load_campaign(path), path)}
    assert (made["low"].curriculum.bucket_by, made["low"].curriculum.cuts) == ("count", (5, 15))


@pytest.mark.slow
def test_table_2_and_3_read_the_runs_of_table_1() -> None:
    for scale in ("laptop", "paper"):
        made = {}
        for name in ("table1", "table2", "table3"):
            path = CONFIG_FOLDER / "campaigns" / scale / f"{name}.yaml"
            made[name] = {each.config.model_dump_json(exclude={"name"}) for each in settings(load_campaign(path), path)}
        assert made["table2"] == made["table1"]
        assert len(made["table3"] & made["table1"]) == (6 if scale == "laptop" else 9)
