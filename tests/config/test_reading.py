"""YAML to a typed tree: what is inherited, what overrides, and the one line that every mistake gets."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from aipo.config.reading import (
    CONFIG_FOLDER,
    Config,
    dump_config,
    find_config,
    help_keys,
    help_sources,
    keys,
    load_config,
)
from aipo.errors import UserError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a config that is complete but for what a test adds to it."""

    def write(text: str = "", name: str = "mine.yaml", base: str | None = "base.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((f"base: {base}\n" if base else "") + text)
        return path

    return write


def message(path: Any, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(str(path), overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- layers -------------------------------------------------------------------------------------------------------


def test_base_inheritance_is_a_chain_of_which_the_nearest_wins(write: Write) -> None:
    write("optim: {lr: 1e-5, steps: 7}\nmask: {kappa_end: 0.2}", "a.yaml")
    write("optim: {lr: 2e-5}\nseed: 3", "b.yaml", base="a.yaml")
    config = load_config(str(write("seed: 4", "c.yaml", base="b.yaml")), ["mask.kappa_start=0.25"])
    assert config.optim.lr == 2e-5
    assert config.optim.steps == 7
    assert (config.mask.kappa_start, config.mask.kappa_end) == (0.25, 0.2)
    assert config.seed == 4
    assert config.optim.betas == Config.model_fields["optim"].default.betas
    assert config.name == "c"  # of the file, unless it says otherwise
    assert config.folder == Path("runs/c")


def test_base_is_looked_up_beside_the_file_then_in_configs(write: Write) -> None:
    write("optim: {steps: 7}", "methods/base.yaml", base=None)
    assert "required" in message(write("", "methods/mine.yaml", base="base.yaml"))  # not configs/base.yaml
    assert load_config(str(write("", "else/mine.yaml", base="base"))).optim.steps == 500
    write("optim: {steps: 8}", "shared.yaml")
    assert load_config(str(write("", "methods/other.yaml", base="../shared.yaml"))).optim.steps == 8


@pytest.mark.parametrize("first", ["b.yaml", "../x/b.yaml"], ids=["plain", "another spelling"])
def test_base_in_a_circle(write: Write, first: str) -> None:
    path = write("", "x/a.yaml", base=first)
    write("", "x/b.yaml", base="../x/a.yaml")
    assert "a.yaml: base: goes in a circle" in message(path)
    assert "own.yaml: base: goes in a circle" in message(write("", "own.yaml", base="own.yaml"))


def test_missing_base_names_who_asked(write: Write) -> None:
    path = write(base="bse.yaml")
    text = message(path)
    assert text.startswith(f"{path}: base: config bse.yaml not found")
    assert "did you mean base.yaml? (there: base.yaml," in text


def test_a_name_without_a_folder_is_looked_up_in_configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("base.yaml") == find_config("base") == CONFIG_FOLDER / "base.yaml"
    (tmp_path / "base.yaml").write_text("")
    assert find_config("base.yaml") == Path("base.yaml")  # one's own comes first


@pytest.mark.parametrize("name", ["bas.yml", "nowhere/base.yaml"])
def test_missing_config(name: str) -> None:
    text = message(name)
    assert f"config {name} not found" in text
    assert "did you mean base.yaml?" in text


@pytest.mark.parametrize("text", ["optim: [1", "\tx: 1", "a: b: c", "a: {{ path }}", "? [a, b]", "a: 2024-13-45"])
def test_not_yaml(write: Write, text: str) -> None:
    path = write(text)
    assert message(path).startswith(f"{path} is not YAML")


@pytest.mark.parametrize("text", ["optim: {lr: 1e-6}\nseed: 1\noptim: {steps: 3}", "optim: {lr: 1}\n\noptim:"])
def test_nothing_stands_twice(write: Write, text: str) -> None:
    path = write(text, base=None)
    assert message(path).startswith(f"{path} is not YAML: optim stands in line 1 and in line 3")


def test_not_keys_and_values(write: Write) -> None:
    path = write("- 1\n- 2", base=None)
    assert message(path) == f"{path} must hold keys and values, not a list"
    assert message(write("", "empty.yaml", base=None)).endswith("empty.yaml: data is required")


def test_a_section_may_be_empty(write: Write) -> None:
    assert load_config(str(write("optim:\nmask: {}"))).optim.steps == 500


# --- overrides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=2e-6", 2e-6),
        ("optim.lr=2E-6", 2e-6),
        ("optim.lr=.5", 0.5),
        ("optim.steps=1e3", 1000),
        ("optim.betas=[0.8, 1e-1]", (0.8, 0.1)),
        ("curriculum.start=[.5,.3,.2]", (0.5, 0.3, 0.2)),
        ("data.examples=[[q, a], [r, b]]", (("q", "a"), ("r", "b"))),
        ("mask.kappa_decay_steps=null", None),
        ("mask.kappa_decay_steps=", None),
        ("mask.kappa_decay_steps=12", 12),
        ("mi.sigma=median", "median"),
        ("mi.sigma=3", 3.0),
        ("mi.center=false", False),
        ("data.system=End with e", "End with e"),
        ("data.suffix=a=b", "a=b"),
        ("data.suffix='12'", "12"),
        ("seed=5", 5),
    ],
)
def test_override(write: Write, override: str, expected: Any) -> None:
    value: Any = load_config(str(write()), [override])
    for part in override.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_come_last_and_in_order(write: Write) -> None:
    path = str(write("optim: {lr: 1e-5}"))
    assert load_config(path, ["optim.lr=1e-4", "optim.lr=1e-3"]).optim.lr == 1e-3
    config = load_config(path, ["optim={steps: 9, lr: 1e-2}"])
    assert (config.optim.steps, config.optim.lr) == (9, 1e-2)


@pytest.mark.parametrize("override", ["optim.lr", "=3", ""])
def test_malformed_override(override: str) -> None:
    assert message("base", override) == f"override {override!r} must look like optim.lr=2e-6"


def test_override_of_a_section_or_with_a_comment_in_it() -> None:
    assert message("base", "curriculum=null").startswith("override curriculum=null: curriculum is a section: override")
    assert "it would be read as 'Answer': put the value in quotes" in message("base", "data.suffix=Answer #1")
    assert load_config("tiny.yaml", ["data.suffix='Answer #1'"]).data.suffix == "Answer #1"
    assert message("base", "data.weights={a: 1, a: 2}").startswith(
        "override data.weights={a: 1, a: 2}: the value is not"
    )


def test_a_condition_stands_on_another(tmp_path: Path) -> None:
    """Of a method's bases all come along but the config that they stand on."""
    (tmp_path / "first.yaml").write_text(
        "base: smollm2_135m.yaml\nmask: {rule: top_fraction, fraction: 0.1}\noptim: {lr: 3}\n"
    )
    (tmp_path / "twin.yaml").write_text("base: first.yaml\nmi: {gold_control: shuffled}\n")
    alone, made = load_config("tiny.yaml"), load_config("tiny.yaml", method=str(tmp_path / "twin.yaml"))
    assert (made.mask.rule, made.mask.fraction, made.optim.lr) == ("top_fraction", 0.1, 3)
    assert made.mi.gold_control == "shuffled"
    assert (made.model, made.data, made.rollout) == (alone.model, alone.data, alone.rollout)


@pytest.mark.parametrize("override", ["optim.betas=[0.9", "data.suffix=@end", "name=2024-13-45"])
def test_override_that_is_not_yaml(override: str) -> None:
    assert message("base", override).startswith(f"override {override}: the value is not YAML")


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.lrr", "optim.lr"),
        ("optm.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("mask.kapa_start", "mask.kappa_start"),
        ("kappa_start", "mask.kappa_start"),
        ("rollout.temprature", "rollout.temperature"),
        ("loss.kl_coef", "loss.kl_beta"),
        ("sede", "seed"),
    ],
)
def test_unknown_key_names_the_nearest_and_the_file(write: Write, key: str, nearest: str) -> None:
    expected = f"unknown key {key}; did you mean {nearest}?"
    assert message("base", f"{key}=1") == f"override {key}=1: {expected}"
    section, _, leaf = key.rpartition(".")
    path = write(f"{section}:\n  {leaf}: 1" if section in Config.model_fields else f"{key}: 1")
    assert message(path) == f"{path}: {expected}"


def test_unknown_key_names_the_base_that_holds_it(write: Write) -> None:
    culprit = write("mi: {num_feature: 64}", "a.yaml")
    assert (
        message(write("seed: 1", base="a.yaml"))
        == f"{culprit}: unknown key mi.num_feature; did you mean mi.num_features?"
    )


def test_key_unlike_any(write: Write) -> None:
    assert message("base", "qqq=1") == "override qqq=1: unknown key qqq; --help lists all keys"


@pytest.mark.parametrize("value", ["5", "[1]", "adam"])
def test_a_section_is_no_value(value: str) -> None:
    assert message("base", f"optim={value}").endswith("optim is a section: it takes keys such as optim.steps")


OUT_OF_RANGE = [
    ("optim.lr", "0"),
    ("optim.lr", "-1e-6"),
    ("optim.lr", ".nan"),
    ("optim.lr", ".inf"),
    ("optim.steps", "0"),
    ("optim.betas", "[0.9, 1.0]"),
    ("rollout.temperature", "0"),
    ("rollout.top_p", "1.1"),
    ("rollout.gpu_memory_utilization", "1"),
    ("loss.clip_low", "1.1"),
    ("loss.kl_beta", "-0.1"),
    ("mask.kappa_end", "-0.1"),
    ("mask.fraction", "0"),
    ("curriculum.t1", "1.2"),
    ("reward.correctness", "1.5"),
    ("sharding.zero_stage", "4"),
    ("seed", "-1"),
]
WRONG_TYPE = [
    ("optim.lr", "fast"),
    ("optim.lr", "[1]"),
    ("optim.lr", "{a: 1}"),
    ("optim.lr", "null"),
    ("optim.lr", "true"),
    ("optim.steps", "2.5"),
    ("rollout.top_k", "off"),  # YAML reads a boolean, which must not pass for 0
    ("optim.betas", "[0.9]"),
    ("optim.betas", "[0.9, 0.9, 0.9]"),
    ("data.examples", "[[question]]"),
    ("mi.center", "maybe"),
    ("mi.sigma", "mean"),
    ("mask.rule", "treshold"),
    ("model.path", "5"),
    ("seed", "x"),
]


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE + WRONG_TYPE)
def test_bad_value_names_key_and_source(write: Write, key: str, value: str) -> None:
    assert message("base", f"{key}={value}").startswith(f"override {key}={value}: {key}: ")
    section, _, leaf = key.rpartition(".")
    culprit = write(f"{section}: {{{leaf}: {value}}}" if section else f"{leaf}: {value}", "a.yaml")
    assert message(write(base="a.yaml")).startswith(f"{culprit}: {key}: ")


def test_bad_value_is_quoted_with_the_choices() -> None:
    text = message("base", "mask.rule=treshold")
    assert "'threshold'" in text
    assert text.endswith("got 'treshold'")


def test_every_bad_value_is_named() -> None:
    text = message("base", "optim.lr=0", "seed=-1")
    assert "override optim.lr=0: optim.lr: " in text
    assert "override seed=-1: seed: " in text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["mask.kappa_end=0.4"], "mask.kappa_end (0.4) must not exceed mask.kappa_start (0.3)"),
        (["curriculum.t1=0.8"], "curriculum.t1 (0.8) must not exceed curriculum.t2 (0.7)"),
        (["curriculum.start=[.5,.3,.1]"], "curriculum.start must sum to 1, got 0.9"),
        (["curriculum.end=[.5,.5,.1]"], "curriculum.end must sum to 1, got 1.1"),
        (["curriculum.cuts=[25,15]"], "curriculum.cuts must increase, got [25, 15]"),
        (["reward.function=a:b", "reward.signed=true"], "let it return -1 and 1"),
        (["reward.format=0.1"], "reward.correctness + reward.format + reward.length must be 1"),
        (["mi.features=quadrature", "mi.estimator=pointwise"], "mi.features: quadrature is for scalars"),
        (["mi.normalized=cca", "mi.estimator=pointwise"], "mi.normalized: cca is of the samples of one state"),
        (["curriculum.quantiles=[0.5,0.5]"], "curriculum.quantiles must increase, got [0.5, 0.5]"),
        (["mask.scope=causal", "mask.statistic=iqr"], "set mask.statistic: mean_std and another mask.rule"),
        (["mask.invert=true", "mask.rule=random"], "mask.rule: random ranks none"),
        (["rollout.samples_per_question=1"], "rollout.samples_per_question: 1 leaves nothing to compare with"),
        (["advantage.drop_constant_groups=reward", "loss.kl_in=reward"], "not advantage.drop_constant_groups: reward"),
        (["advantage.drop_constant_groups=correctness", "reward.rule=certainty"], "looks at right answers"),
        (["advantage.drop_constant_groups=reward", "advantage.baseline=batch"], "advantage.drop_constant_groups"),
        (["optim.warmup_steps=500"], "optim.warmup_steps must be below optim.steps"),
        (["optim.updates_per_batch=3"], "optim.updates_per_batch must divide rollout.questions_per_step"),
        (
            ["reward.correctness=0.9", "reward.length=0.1", "rollout.max_tokens=4096"],
            "reward.overlong_buffer must be below rollout.max_tokens",
        ),
        (["rollout.top_p=0.9"], "rollout.importance_correction: none"),
        (["optim.share_prompts=true", "optim.packing=true"], "optim.share_prompts needs"),
        (["optim.packing=true", "model.attention=eager"], "optim.packing needs model.attention"),
        (
            ["dynamic.enabled=true", "rollout.samples_per_question=1", "advantage.baseline=batch"],
            "dynamic.enabled keeps questions whose rollouts differ",
        ),
        (["dynamic.enabled=true", "reward.rule=certainty"], "dynamic.enabled compares rewards"),
        (["reward.rule=continuations"], "set mask.rule: prefix, or reward.rule: verifier"),
        (["reward.rule=certainty", "reward.signed=true"], "reward.signed and reward.overlong shape"),
        (["mask.rule=top_fraction", "mask.score=information", "advantage.stride=4"], "set advantage.stride: 1"),
        (["mask.rule=peaks_only", "mask.score=information", "advantage.stride=4"], "set advantage.stride: 1"),
        (["mask.scope=micro_batch", "mi.estimator=position"], "set mask.scope: batch, or mi.estimator: coordinate"),
        (
            ["dynamic.enabled=true", "dynamic.by=reward", "reward.rule=continuations", "mask.rule=prefix"],
            "dynamic.by: correct",
        ),
        (["curriculum.enabled=false", "curriculum.refresh_every=2"], "set it to null"),
        (["name=.."], "name: '..' names no folder below runs"),
        (["seed=4294967296"], "seed: input should be less than 2147483648"),
        (["reward.overlong_buffer=0"], "reward.overlong_buffer"),
        (["advantage.tokens=residual"], "set lora.rank (such as 16)"),
        (["advantage.tokens=entropy", "advantage.mi_blend=additive"], "set one to none"),
        (["advantage.tokens=information", "mask.rule=prefix"], "set mask.rule: all, or advantage.tokens: none"),
        (["advantage.tokens=information", "model.attention=eager"], "needs model.attention: sdpa"),
        (["advantage.tokens=entropy", "advantage.alpha=2"], "advantage.alpha must be below advantage.phi"),
        (["advantage.tokens=entropy", "loss.ratio=sequence"], "set loss.ratio: token"),
        (["loss.kl_priority=2", "loss.kl_beta=0"], "raise loss.kl_beta"),
        (["rollout.max_tokens=1"], "leaves mask.rule: threshold no token"),
        (["rollout.max_tokens=2", "mask.rule=peaks_only"], "leaves mask.rule: peaks_only no token"),
        (["rollout.max_tokens=2", "mask.rule=prefix"], "leaves mask.rule: prefix no token"),
        (["mask.rule=quadrant"], "set mask.score: entropy"),
        (["mask.prefix_start=0.5"], "mask.prefix_start (0.5) must not exceed mask.prefix_end (0.35)"),
        (["branch.enabled=true", "branch.base=8"], "leaves no branch among"),
        (["branch.enabled=true", "branch.total=6"], "branch.total must not be below"),
        (["branch.enabled=true", "branch.base=3", "branch.rounds=3"], "are more than the 2 branches of each"),
        (["branch.enabled=true", "branch.latent=norm_kv"], "needs rollout.engine: hf"),
        (["rollout.async_depth=1", "branch.enabled=true"], "branch.signal: entropy asks the policy"),
        (
            ["rollout.async_depth=1", "branch.enabled=true", "branch.signal=logprob", "branch.total=12"],
            "branch.total asks the policy",
        ),
        (["rollout.async_depth=1", "rollout.importance_correction=none"], "trains on rollouts of older weights"),
        (["loss.old_policy=engine"], "would count the difference twice"),
        (
            ["loss.old_policy=engine", "rollout.importance_correction=none", "rollout.top_k=20"],
            "another distribution than the policy's",
        ),
        (["mask.reweight=true"], "mask.rule: threshold draws none"),
        (["mask.reweight=true", "mask.rule=bernoulli", "loss.ratio=sequence"], "set another loss.ratio"),
        (
            ["advantage.tokens=baseline", "rollout.samples_per_question=1", "advantage.baseline=batch"],
            "raise rollout.samples_per_question",
        ),
        (["advantage.tail=reward", "advantage.normalize=std"], "or advantage.tail: zero"),
        (["advantage.normalize=mean", "reward.signed=true"], "must not be negative"),
    ],
)
def test_values_that_contradict_each_other(overrides: list[str], expected: str) -> None:
    text = message("base", *overrides)
    assert expected in text
    assert any(f"override {override}:" in text for override in overrides)  # who set it


def test_bounds_that_are_allowed() -> None:
    config = load_config("base", ["mask.kappa_end=0.3", "curriculum.t1=0.7", "curriculum.start=[0.1,0.2,0.7]"])
    assert config.mask.kappa_end == config.mask.kappa_start
    assert load_config("base", ["advantage.baseline=batch", "rollout.samples_per_question=1"])
    ahead = ["rollout.async_depth=1", "rollout.importance_correction=none", "loss.old_policy=engine"]
    assert load_config("base", ahead)


def test_a_method_goes_on_top_of_a_config() -> None:
    config = load_config("qwen3_8b", ["loss.clip_high=0.3"], method="dapo")
    assert config.name == "qwen3_8b-dapo"
    assert config.model.path == "Qwen/Qwen3-8B"  # the method's own base is left aside
    assert config.rollout.max_tokens == 10240
    assert (config.reward.signed, config.dynamic.enabled, config.loss.aggregation) == (True, True, "token")
    assert config.loss.clip_high == 0.3  # overrides come last
    assert load_config("qwen3_8b", ["name=mine"], method="dapo").name == "mine"
    control = load_config("qwen3_8b", method="random_mask")
    assert (control.model.path, control.mask.rule) == ("Qwen/Qwen3-8B", "random")
    assert control.loss == load_config("qwen3_8b", method="aipo").loss  # of the method that it is based on
    own = load_config("methods/dapo.yaml")
    assert own.name == "dapo"
    assert own.model.path == "embedded:smollm2-135m"


def test_a_method_of_ones_own_and_unknown_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mask: {rule: all}\n")
    config = load_config("base", method=str(file))
    assert (config.name, config.mask.rule) == ("base-mine", "all")
    with pytest.raises(UserError, match="--method dapoo is unknown: did you mean dapo"):
        load_config("base", method="dapoo")


def test_world_size_must_divide_the_batch() -> None:
    config = load_config("base", ["rollout.questions_per_step=12", "optim.updates_per_batch=2"])
    for world in (1, 2, 3, 6):
        config.check_world_size(world)
    for world in (4, 5, 12):
        with pytest.raises(UserError, match=rf"rollout\.questions_per_step \(12, 6 an update\).*{world} processes"):
            config.check_world_size(world)


# --- the tree itself ----------------------------------------------------------------------------------------------


def test_immutable() -> None:
    config = load_config("base")
    for target, name in ((config, "seed"), (config.optim, "steps")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, name, 1)
    hash(config)  # nothing in it is mutable


def test_dump_and_load_give_the_same(tmp_path: Path) -> None:
    config = load_config("base", ["optim.lr=3e-7", "data.examples=[[q, a]]", "mi.sigma=median", "name=x"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(str(path)) == config


def test_help_lists_each_key_once_with_type_default_and_meaning() -> None:
    lines = help_keys().splitlines()
    heads, meanings = lines[::2], lines[1::2]
    names = [head.split()[0] for head in heads]
    leaves = [
        f"{name}.{leaf}" if isinstance(value, dict) else name
        for name, value in load_config("base").model_dump().items()
        for leaf in (value if isinstance(value, dict) else [name])
    ]
    assert names == leaves == [name for name, _ in keys()]
    assert len(set(names)) == len(names)
    assert all(re.search(r"\(.+; (default .+|required)\)$", head) for head in heads)
    assert all(meaning.strip() not in ("", "None") for meaning in meanings)
    assert "  optim.lr  (float; default 1e-06)" in heads
    assert "  model.path  (str; required)" in heads
    assert "  mask.kappa_decay_steps  (int|null; default null)" in heads
    assert "  mi.sigma  (float|median; default 50.0)" in heads


def test_sources_are_read_and_kept(tmp_path: Path) -> None:
    text = """
base: base.yaml
data:
  train:
    - {path: a.jsonl, weight: 1e-1, suffix: "", reward: {function: my.pkg:grade}}
    - path: hub:openai/gsm8k
      name: gsm
      subset: main
      weight: 3
      kind: choice
      columns: {question: prompt.0.content, id: null}
  validation: {path: hub:x/y, split: test}
validation:
  watch: [b.jsonl, {path: c.jsonl, samples: 8, every: 100}]
"""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    config = load_config(str(path))
    hash(config)
    assert [source.weight for source in config.data.train] == [0.1, 3.0]  # type: ignore[union-attr]
    assert list(config.sources()) == ["a", "gsm", "validation", "watch/c"]
    assert config.weights() == {"a": 0.1, "gsm": 3.0}
    assert {origin: reward.function for origin, reward in config.rewards().items()} == {
        "": "verifier",
        "a": "my.pkg:grade",
        "gsm": "verifier",
        "validation": "verifier",
        "watch/c": "verifier",
    }
    path.write_text(dump_config(config))
    assert load_config(str(path)) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train=[]", "data.train: an empty list: name a source"),
        ("data.train=5", "data.train: input should be a valid tuple, got 5"),
        ("data.train=[{name: a}]", "data.train[0].path is required"),
        ("data.train=[{path: a}, {path: b, wieght: 1}]", "data.train[1].wieght is unknown; did you mean weight?"),
        ("data.train=[{path: a, weight: 0}]", "data.train[0].weight: input should be greater than 0, got 0"),
        (
            "data.train=[{path: a, columns: {answer: null}}]",
            "data.train[0].columns.answer: input should be a valid str",
        ),
        ("data.train=[{path: a, reward: {function: grade}}]", "data.train[0].reward.function: string should match"),
        ("data.train=[{path: a, reward: {format: 0.5}}]", "data.train: the reward of a: reward.correctness +"),
        ("data.train=[{path: a, weight: 1}, {path: b}]", "data.train: give each source a weight, or none"),
        ("data.train=[{path: x/a.jsonl}, {path: a}]", "data.train: two sources are called a: give them names"),
        ("data.validation={path: a, weight: 1}", "data.validation.weight is unknown"),
        ("validation.watch=[{path: a, every: 0}]", "validation.watch[0].every: input should be greater than 0"),
        ("validation.watch=[a/b.jsonl, {path: c, name: b}]", "validation.watch: metrics are named after the sets, and"),
        ("curriculum.buckets=within", "curriculum.buckets: within sorts each of several sources"),
        ("reward.function=os.system", "reward.function: string should match pattern"),
    ],
)
def test_what_can_be_wrong_with_sources(override: str, expected: str) -> None:
    text = message("base", override)
    assert f"override {override}: " in text
    assert expected in text
    assert "; override" not in text  # said once


def test_help_lists_the_keys_of_sources() -> None:
    lines = help_sources().splitlines()
    assert "  path  (str; required)" in lines
    assert '  columns.question  (str; default "question")' in lines
    assert "  weight  (float|null; default null)" in lines
    assert "  every  (int|null; default null)" in lines
    assert len(set(lines)) == len(lines)


SHIPPED = sorted(path for path in CONFIG_FOLDER.rglob("*.yaml") if "campaigns" not in path.parts)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    config = load_config(str(path))
    assert yaml.safe_load(dump_config(config))["name"] == config.name


def test_forking_tokens_at_the_scale_of_the_authors_script() -> None:
    """verl's keys of run_only_top20_high_entropy_tokens_dapo_qwen3_14b.sh and of its baseline on all tokens."""
    prompts, mini, response = 512, 32, 1024 * 20
    config = load_config("dapo_ft_14b")
    optim, rollout, dynamic = config.optim, config.rollout, config.dynamic
    assert (rollout.questions_per_step, rollout.samples_per_question, rollout.max_tokens) == (prompts, 16, response)
    assert optim.updates_per_batch == prompts // mini == 16
    assert (optim.lr, optim.warmup_steps, optim.weight_decay, optim.max_grad_norm) == (1e-6, 10, 0.1, 1.0)
    assert (optim.schedule, rollout.temperature, rollout.top_p, rollout.top_k) == ("constant", 1.0, 1.0, -1)
    assert (dynamic.enabled, dynamic.by, dynamic.factor, dynamic.max_tries) == (True, "correct", 3, 10)
    assert (config.reward.signed, config.reward.overlong, config.reward.overlong_buffer) == (True, 1.0, 4096)
    assert (config.loss.clip_low, config.loss.clip_high, config.loss.kl_beta) == (0.2, 0.28, 0.0)
    assert (config.loss.aggregation, config.loss.ratio, config.advantage.normalize) == ("token", "token", "std")
    assert (config.mask.rule, config.mask.score, config.mask.fraction) == ("top_fraction", "entropy", 0.2)
    config.check_world_size(32)
    baseline = load_config("dapo_14b")
    assert baseline.model_copy(update={"name": config.name, "mask": config.mask}) == config
    assert baseline.mask.rule == "all"


def test_a_home_that_is_not_there_is_named() -> None:
    config = load_config("tiny.yaml", ["runs=~nobody-of-that-name/x"])
    with pytest.raises(UserError, match=r"runs: ~nobody-of-that-name/x: no such home: set HOME, or give runs a path"):
        _ = config.folder


def test_a_name_that_is_too_long_is_no_file() -> None:
    assert message("a" * 300).startswith("config aaa")
