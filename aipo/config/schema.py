"""The whole of a config, and which keys of its sections go together.

Reading YAML into this tree is :mod:`aipo.config.reading`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator, model_validator

from aipo.config.base import Section
from aipo.config.data import Source
from aipo.config.sections import (
    AdvantageConfig,
    BranchConfig,
    CurriculumConfig,
    DataConfig,
    DynamicConfig,
    LossConfig,
    MaskConfig,
    MIConfig,
    RewardConfig,
    RolloutConfig,
    ValidationConfig,
)
from aipo.config.training import (
    CheckpointConfig,
    GuardsConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ShardingConfig,
    TrackingConfig,
)
from aipo.errors import UserError, expanded


class Config(Section):
    name: str
    """of the run; its folder is runs/<name>"""
    runs: str = "runs"
    """where run folders are"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """a run is a function of its config and this"""
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    dynamic: DynamicConfig = DynamicConfig()
    branch: BranchConfig = BranchConfig()
    reward: RewardConfig = RewardConfig()
    mi: MIConfig = MIConfig()
    mask: MaskConfig = MaskConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    sharding: ShardingConfig = ShardingConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardsConfig = GuardsConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("name")
    @classmethod
    def _below_runs(cls, name: str) -> str:
        if Path(name).is_absolute() or not Path(name).parts or ".." in Path(name).parts:
            raise ValueError(f"name: {name!r} names no folder below runs: give the run a name of its own")
        return name

    @model_validator(mode="after")
    def _scores_and_mask(self) -> Config:
        if self.mi.features == "quadrature" and self.mi.estimator != "coordinate":
            raise ValueError(
                "mi.features: quadrature is for scalars: use mi.estimator: coordinate, or features: random"
            )
        if self.mi.normalized == "cca" and self.mi.estimator != "coordinate":
            raise ValueError(
                "mi.normalized: cca is of the samples of one state: use mi.estimator: coordinate, or normalized: none"
            )
        longest, mask = self.rollout.max_tokens, self.mask
        above_none = mask.rule == "threshold" and mask.scope == "sequence"
        no_peak = mask.rule == "peaks_only" and longest < 3  # which has a neighbour on each side
        if no_peak or (longest == 1 and above_none) or (mask.rule == "prefix" and int(mask.prefix_end * longest) == 0):
            raise ValueError(
                f"rollout.max_tokens: {longest} leaves mask.rule: {mask.rule} no token to train on: raise it, or set "
                "mask.rule: all"
            )
        if mask.scope == "micro_batch" and mask.score == "mi" and mask.ranks and self.mi.estimator != "coordinate":
            raise ValueError(
                f"mask.scope: micro_batch decides inside the forward pass, before mi.estimator: {self.mi.estimator} "
                "has seen the batch: set mask.scope: batch, or mi.estimator: coordinate"
            )
        if mask.rule == "quadrant" and mask.score != "entropy":
            raise ValueError("mask.rule: quadrant divides tokens by their entropy: set mask.score: entropy")
        if mask.score == "residual" and self.lora.rank == 0:
            raise ValueError("mask.score: residual is what the adapters change: set lora.rank (such as 16)")
        return self

    @model_validator(mode="after")
    def _early_exits(self) -> Config:
        if self.advantage.information == "next_token":  # which asks no early answer
            return self
        for key, value in (("mask.score", self.mask.score), ("advantage.tokens", self.advantage.tokens)):
            if value == "information" and self.model.attention != "sdpa":
                raise ValueError(f"{key}: information lays early exits out as trees, which needs model.attention: sdpa")
        ranked = self.mask.score == "information" and self.mask.rule in ("top_fraction", "peaks_only")
        if ranked and self.advantage.stride > 1:
            raise ValueError(
                f"mask.rule: {self.mask.rule} compares all tokens of a completion, and advantage.stride scores only "
                "some: set advantage.stride: 1"
            )
        return self

    @model_validator(mode="after")
    def _rollouts(self) -> Config:
        truncated = self.rollout.top_p < 1 or self.rollout.top_k > 0
        if truncated and self.rollout.importance_correction != "none":
            raise ValueError(
                "rollout.top_p below 1 or rollout.top_k above 0 samples from another distribution than the policy's: "
                "set them to 1 and -1, or rollout.importance_correction: none"
            )
        by_engine = self.loss.old_policy == "engine"
        if by_engine and (truncated or self.rollout.importance_correction != "none"):
            raise ValueError(
                "loss.old_policy: engine has the engine's probabilities in the ratio: set "
                "rollout.importance_correction: none, which would count the difference twice, and rollout.top_p: 1 and "
                "rollout.top_k: -1, or it would compare with another distribution than the policy's"
            )
        if self.rollout.async_depth:
            filtered = self.branch.total not in (None, self.rollout.samples_per_question)
            if self.branch.enabled and (self.branch.signal == "entropy" or filtered):
                key = "branch.signal: entropy" if self.branch.signal == "entropy" else "branch.total"
                raise ValueError(
                    f"rollout.async_depth: 1 draws a batch while the policy is in its update, and {key} asks the "
                    "policy, whose weights are changing: set branch.signal: logprob and branch.total: null, or "
                    "rollout.async_depth: 0"
                )
            if self.rollout.importance_correction == "none" and not by_engine:
                raise ValueError(
                    "rollout.async_depth: 1 trains on rollouts of older weights: set rollout.importance_correction: "
                    "token_truncated, token_mask or sequence_mask, or loss.old_policy: engine"
                )
        if self.rollout.mode == "server" and self.rollout.engine != "vllm":
            raise ValueError(
                "rollout.mode: server asks vLLM servers: set rollout.engine: vllm, or rollout.mode: colocate"
            )
        return self

    @model_validator(mode="after")
    def _dynamic_sampling(self) -> Config:
        if self.rollout.samples_per_question == 1 and self.dynamic.enabled:
            raise ValueError(
                "dynamic.enabled keeps questions whose rollouts differ; with rollout.samples_per_question: 1 none do: "
                "raise it, or set dynamic.enabled: false"
            )
        if self.dynamic.enabled and self.reward.rule == "certainty":
            raise ValueError(
                "dynamic.enabled compares rewards that are there after generation, and reward.rule: certainty is "
                "not: set dynamic.enabled: false"
            )
        if self.dynamic.enabled and self.dynamic.by == "reward" and self.reward.rule == "continuations":
            raise ValueError(
                "dynamic.by: reward compares rewards before reward.rule: continuations has counted: set dynamic.by: "
                "correct"
            )
        return self

    @model_validator(mode="after")
    def _branches(self) -> Config:
        branch, samples = self.branch, self.rollout.samples_per_question
        if branch.enabled and not branch.base < (branch.total or samples):
            raise ValueError(
                f"branch.base ({branch.base}) leaves no branch among branch.total or rollout.samples_per_question "
                f"({branch.total or samples}) rollouts: lower it"
            )
        turns = -(-((branch.total or samples) - branch.base) // branch.base)
        if branch.enabled and branch.rounds > turns:
            raise ValueError(
                f"branch.rounds ({branch.rounds}) are more than the {turns} branches of each of branch.base "
                f"({branch.base}) rollouts: lower either, or raise branch.total"
            )
        if branch.enabled and branch.total is not None and branch.total < samples:
            raise ValueError("branch.total must not be below rollout.samples_per_question, which the filter keeps")
        if branch.enabled and branch.latent != "none" and (self.rollout.engine != "hf" or branch.latent_path is None):
            raise ValueError(
                f"branch.latent: {branch.latent} needs rollout.engine: hf, since vLLM takes no latents, and "
                "branch.latent_path, a file that python -m aipo.branching.latent makes; or set branch.latent: none"
            )
        return self

    @model_validator(mode="after")
    def _reward(self) -> Config:
        if self.reward.rule == "continuations" and self.mask.rule != "prefix":
            raise ValueError(
                "reward.rule: continuations counts right continuations of the prefix that mask.rule: prefix trains on: "
                "set mask.rule: prefix, or reward.rule: verifier"
            )
        if self.reward.rule != "verifier" and (self.reward.signed or self.reward.overlong > 0):
            raise ValueError(
                "reward.signed and reward.overlong shape what the verifier says: set reward.rule: verifier, or leave "
                "them out"
            )
        by_length = any(reward.length > 0 or reward.overlong > 0 for reward in self.rewards().values())
        if by_length and self.reward.overlong_buffer >= self.rollout.max_tokens:
            raise ValueError("reward.overlong_buffer must be below rollout.max_tokens")
        return self

    @model_validator(mode="after")
    def _advantage(self) -> Config:
        if self.rollout.samples_per_question == 1 and self.advantage.baseline != "batch":
            raise ValueError(
                "rollout.samples_per_question: 1 leaves nothing to compare with: use advantage.baseline: batch"
            )
        drop = self.advantage.drop_constant_groups
        if drop != "none" and self.advantage.baseline == "batch":
            raise ValueError("advantage.drop_constant_groups needs a baseline inside the group: group or leave_one_out")
        if drop == "correctness" and self.reward.rule != "verifier":
            raise ValueError(
                f"advantage.drop_constant_groups: correctness looks at right answers, and reward.rule: "
                f"{self.reward.rule} rewards something else: set advantage.drop_constant_groups: reward, or none"
            )
        if self.advantage.tokens == "residual" and self.lora.rank == 0:
            raise ValueError(
                "advantage.tokens: residual weighs what the adapters change: set lora.rank (such as 16), or take "
                "another rule"
            )
        if self.advantage.tokens != "none" and self.advantage.mi_blend != "none":
            raise ValueError(
                "advantage.tokens and advantage.mi_blend both give each token its own advantage: set one to none"
            )
        if self.advantage.tokens != "none" and self.mask.rule == "prefix":
            raise ValueError(
                f"advantage.tokens: {self.advantage.tokens} weighs all tokens of a completion against each other, and "
                "mask.rule: prefix leaves most of them out: set mask.rule: all, or advantage.tokens: none"
            )
        if self.advantage.tokens == "baseline" and self.rollout.samples_per_question == 1:
            raise ValueError(
                "advantage.tokens: baseline compares the rollouts of a question: raise rollout.samples_per_question, "
                "or set advantage.tokens: none"
            )
        if self.advantage.tail == "reward" and self.advantage.normalize != "none":
            raise ValueError(
                "advantage.tail: reward leaves rewards beside advantages that advantage.normalize divides: set it to "
                "none, or advantage.tail: zero"
            )
        below_zero = self.reward.signed or self.reward.overlong > 0 or self.loss.kl_in == "reward"
        if self.advantage.normalize == "mean" and below_zero:
            raise ValueError(
                "advantage.normalize: mean divides by a mean reward that must not be negative: leave reward.signed, "
                "reward.overlong and loss.kl_in: reward out, or set advantage.normalize: std or none"
            )
        if self.advantage.tokens == "entropy" and self.advantage.alpha >= self.advantage.phi:
            raise ValueError("advantage.alpha must be below advantage.phi, or advantages could change their sign")
        return self

    @model_validator(mode="after")
    def _loss(self) -> Config:
        by_token = self.advantage.tokens != "none" or self.advantage.mi_blend != "none"
        if self.loss.ratio == "sequence" and self.mask.reweight:
            raise ValueError(
                "mask.reweight makes sums over tokens unbiased, and loss.ratio: sequence has one ratio for a whole "
                "completion: set another loss.ratio, or mask.reweight: false"
            )
        if self.loss.ratio == "sequence" and by_token:
            raise ValueError(
                "loss.ratio: sequence has one ratio for all tokens of a completion, through which advantages by token "
                "(advantage.tokens, advantage.mi_blend) cannot tell them apart: set loss.ratio: token"
            )
        constant = self.advantage.drop_constant_groups == "reward"
        if self.loss.kl_in == "reward" and (self.loss.kl_beta == 0 or self.loss.kl_priority > 0 or constant):
            raise ValueError(
                "loss.kl_in: reward takes the KL of a whole completion off its reward, so that any group varies: it "
                "needs loss.kl_beta above 0, loss.kl_priority: 0, and not advantage.drop_constant_groups: reward"
            )
        if self.loss.kl_priority > 0 and self.loss.kl_beta == 0:
            raise ValueError("loss.kl_priority weighs the KL, which loss.kl_beta: 0 leaves out: raise loss.kl_beta")
        return self

    @model_validator(mode="after")
    def _optimizer_and_layout(self) -> Config:
        if self.optim.warmup_steps >= self.optim.steps:
            raise ValueError("optim.warmup_steps must be below optim.steps")
        if self.rollout.questions_per_step % self.optim.updates_per_batch:
            raise ValueError("optim.updates_per_batch must divide rollout.questions_per_step")
        if self.optim.share_prompts and (self.optim.packing or self.model.attention != "sdpa"):
            raise ValueError("optim.share_prompts needs model.attention: sdpa and optim.packing: false")
        if self.optim.packing and self.model.attention == "eager":
            raise ValueError("optim.packing needs model.attention: flash_attention_2 or sdpa")
        return self

    @model_validator(mode="after")
    def _sources(self) -> Config:
        train, watch = self.data.train, self.validation.watch
        if not isinstance(train, str):
            if not train:
                raise ValueError("data.train: an empty list: name a source")
            weighted = [source.weight is not None for source in train]
            if any(weighted) and not all(weighted):
                raise ValueError("data.train: give each source a weight, or none")
            names = [source.called for source in train]
            if repeated := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"data.train: two sources are called {repeated}: give them names")
            if taken := next((name for name in names if name == "validation" or name.startswith("watch/")), None):
                raise ValueError(f"data.train: {taken} is what held-out sets are called: give the source another name")
        if (
            self.curriculum.buckets == "within"
            and self.curriculum.enabled
            and (isinstance(train, str) or self.curriculum.bucket_by != "quantile")
        ):
            raise ValueError(
                "curriculum.buckets: within sorts each of several sources by its own quantiles: give data.train as a "
                "list, with curriculum.bucket_by: quantile"
            )
        watched = [each.called if isinstance(each, Source) else Source(path=each).called for each in watch]
        if repeated := next((name for name in watched if watched.count(name) > 1), None):
            raise ValueError(
                f"validation.watch: metrics are named after the sets, and two are {repeated}: give them names"
            )
        self.rewards()
        return self

    def sources(self) -> dict[str, Source]:
        """All sources that are more than a path, by the origin that their problems carry."""
        data = self.data
        found: dict[str, Source] = {}
        if not isinstance(data.train, str):
            found |= {source.called: source for source in data.train}
        if isinstance(data.validation, Source):
            found["validation"] = data.validation
        return found | {f"watch/{each.called}": each for each in self.validation.watch if isinstance(each, Source)}

    def weights(self) -> dict[str, float]:
        """Shares of the draw by origin; none where questions are drawn whatever their source."""
        train = self.data.train
        if isinstance(train, str):
            return {}
        return {source.called: source.weight for source in train if source.weight is not None}

    def rewards(self) -> dict[str, RewardConfig]:
        """The section reward as it is for the problems of each origin; ``""`` is that of all others."""
        found = {"": self.reward}
        for origin, source in self.sources().items():
            own = {key: value for key, value in source.reward.model_dump().items() if value is not None}
            try:
                found[origin] = RewardConfig.model_validate(self.reward.model_dump() | own) if own else self.reward
            except ValidationError as error:
                key = {"validation": "data.validation", "watch": "validation.watch"}.get(origin.partition("/")[0])
                said = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"{key or 'data.train'}: the reward of {origin}: {said}") from None
        return found

    @property
    def folder(self) -> Path:
        return expanded(self.runs, "runs") / self.name

    def check_world_size(self, world: int) -> None:
        per_update = self.rollout.questions_per_step // self.optim.updates_per_batch
        if per_update % world:
            raise UserError(
                f"rollout.questions_per_step ({self.rollout.questions_per_step}, {per_update} an update) is not "
                f"divisible by the {world} processes: change it or start another number of processes"
            )
