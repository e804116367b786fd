"""What a run does, by section: every key of the method with type, default and meaning, as ``--help`` prints them.

How it is trained and kept is in :mod:`aipo.config.training`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from aipo.config.base import (
    BucketBy,
    Estimator,
    Features,
    Fraction,
    KappaSchedule,
    Measured,
    NonNegative,
    Normalize,
    Positive,
    Section,
    Statistic,
)
from aipo.config.data import VERIFIER, Function, PathOrMix, PathOrSource, PathOrWatched


class DataConfig(Section):
    train: PathOrMix
    """JSONL or Parquet file, folder laid out as on the hub, hub:OWNER/NAME, embedded:chain_sum; or a list of sources"""
    validation: PathOrSource | None = None
    """held-out problems, a path or a source; null holds validation.holdout training questions out"""
    system: str | None = None
    """system prompt"""
    examples: tuple[tuple[str, str], ...] = ()
    """worked (user, assistant) turns before the question"""
    suffix: str | None = None
    """text appended to every question"""
    thinking: bool = False
    """thinking mode of the chat template, where it has one"""
    max_prompt_tokens: Positive = 2048
    """longer questions are dropped and counted"""


class RolloutConfig(Section):
    engine: Literal["vllm", "hf"] = "vllm"
    """what generates"""
    mode: Literal["colocate", "server"] = "colocate"
    """in each training process, on its own device, or on running vLLM servers with devices of their own"""
    server_url: str | Annotated[tuple[str, ...], Field(min_length=1)] = "http://127.0.0.1:8000"
    """of mode server: one, or a list of which rank r asks number r modulo its length"""
    server_timeout_s: Annotated[float, Field(gt=0, le=1700)] = 600.0
    """seconds after which servers that have not taken the new weights end the run; the other ranks wait for 1800"""
    questions_per_step: Positive = 128
    """over all ranks"""
    samples_per_question: Positive = 8
    """N, the group size"""
    max_tokens: Positive = 10240
    """longest completion"""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """of sampling; log-probabilities everywhere are after it"""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """nucleus mass"""
    top_k: Annotated[int, Field(ge=-1)] = -1
    """-1 is off"""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """share of a GPU's memory that the engine may take while it generates; handed back during the update"""
    kv_cache_gb: Annotated[float, Field(gt=0)] = 1.0
    """KV cache on a machine without a GPU, GiB"""
    importance_correction: Literal["none", "token_truncated", "token_mask", "sequence_mask"] = "token_truncated"
    """weight for what the engine's and our probabilities differ by: their ratio with a cap, or 0 outside bounds"""
    importance_cap: Annotated[float, Field(ge=1)] = 2.0
    """truncation of that weight, or its upper bound"""
    importance_floor: Annotated[float, Field(ge=0, le=1)] = 0.5
    """token_mask: lower bound of the ratio"""
    async_depth: Annotated[int, Field(ge=0, le=1)] = 0
    """1 draws the next batch during the update, with weights one update old; 0 is strictly on-policy"""
    check_sync: bool = True
    """at start-up, perturb and restore the engine's weights and compare log-probabilities with ours"""
    check_every: Positive | None = 50
    """steps between later comparisons, of 64 tokens a rank; a mismatch saves and stops the run; null never compares"""


class DynamicConfig(Section):
    enabled: bool = False
    """dynamic sampling: draw questions until the batch is full of groups that vary"""
    by: Literal["correct", "reward"] = "correct"
    """a group varies if 0 < right answers < all, or if its rewards differ"""
    factor: Annotated[int, Field(ge=1)] = 3
    """questions drawn at a time, in multiples of rollout.questions_per_step"""
    max_tries: Positive = 10
    """drawings of a step, at most"""
    on_exhausted: Literal["error", "continue"] = "error"
    """what happens after them if the batch is not full: stop with an error, or train on what there is"""


class BranchConfig(Section):
    enabled: bool = False
    """continue some rollouts anew from a token that the policy was unsure of (IIB-LPO)"""
    base: Positive = 4
    """rollouts of a question that are drawn whole; branches of them fill it up"""
    total: Positive | None = None
    """rollouts and branches drawn of a question, of which rollout.samples_per_question are kept; null: no more"""
    signal: Literal["entropy", "logprob"] = "entropy"
    """unsure is high entropy, which costs a forward pass, or a low probability of the drawn token, from the engine"""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.05
    """share of a rollout's tokens where it may branch, at least one"""
    pick: Literal["uniform", "argmax"] = "uniform"
    """one of them at random, or the most unsure"""
    cut: Literal["before", "after"] = "before"
    """the token where it branches is drawn anew too, or is the last that a branch keeps"""
    skip: NonNegative = 0
    """so many first tokens of what a rollout or branch drew itself are no branch points"""
    rounds: Positive = 1
    """drawings of branches: later ones branch from an earlier branch if the policy was less sure in it on average"""
    beta: Annotated[float, Field(ge=0)] = 0.1
    """of the filter: I(r; a) - beta I(q; r)"""
    latent: Literal["none", "norm_kv", "residual"] = "none"
    """how a latent changes the branches: not, by norms and key-value pairs, or added to hidden states (engine hf)"""
    latent_path: str | None = None
    """checkpoint of python -m aipo.branching.latent"""
    latent_scale: Annotated[float, Field(ge=0)] = 0.1
    """strength of the latent"""
    latent_half_life: Annotated[float, Field(gt=0)] | None = 64.0
    """tokens over which its strength halves; null keeps it"""


class RewardConfig(Section):
    rule: Literal["verifier", "certainty", "continuations"] = "verifier"
    """what is rewarded: the three parts below; the policy's self-certainty; right answers of continuations"""
    continuations: Positive = 8
    """completions of each rollout's prefix (mask.prefix_*) that reward.rule: continuations draws and counts"""
    signed: bool = False
    """correctness is -1 or 1 instead of 0 or 1"""
    overlong: Annotated[float, Field(ge=0)] = 0.0
    """weight of DAPO's soft overlong punishment, between -1 and 0, added to the reward"""
    function: Function = VERIFIER
    """what judges an answer: the verifier, or package.module:name of a function (problem, completion) -> number"""
    correctness: Fraction = 1.0
    """weight of a right answer, or of what reward.function returns"""
    format: Fraction = 0.0
    """weight of a well-formed answer"""
    length: Fraction = 0.0
    """weight of DAPO's soft overlong shaping, rescaled to 0..1"""
    overlong_buffer: Positive = 4096
    """tokens before rollout.max_tokens over which the length reward falls from 1 to 0"""
    workers: Positive = 2
    """verifier processes per rank"""
    timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """seconds of CPU time an answer may take before its worker is killed; such a rollout leaves its group"""
    memory_mb: Annotated[int, Field(ge=512)] = 2048
    """memory cap of a worker"""

    @model_validator(mode="after")
    def _weights(self) -> RewardConfig:
        if self.signed and self.function != VERIFIER:
            raise ValueError("reward.signed is of right and wrong: with a reward.function let it return -1 and 1")
        if abs(self.correctness + self.format + self.length - 1) > 1e-6:
            raise ValueError("reward.correctness + reward.format + reward.length must be 1")
        return self


class MIConfig(Section):
    estimator: Estimator = "coordinate"
    """what the n samples of one hidden state are (docs/mi.md)"""
    features: Features = "random"
    """frequencies of the Fourier features; quadrature is deterministic, for scalars (coordinate) only"""
    num_features: Positive = 256
    """D, random features (or nodes) of each state"""
    sigma: Annotated[float, Field(gt=0)] | Literal["median"] = 50.0
    """kernel bandwidth, or the median heuristic"""
    normalized: Literal["none", "cca"] = "none"
    """HSIC, or the normalised one of the peaks work's code, tr(R_x R_y) with R = K (K + epsilon n)^-1 (coordinate)"""
    epsilon: Annotated[float, Field(gt=0)] = 1e-5
    """of normalized: cca"""
    center: bool = True
    """subtract feature means; false is a diagnostic only"""
    layer: int = -1
    """decoder layer whose raw residual stream is read; -1 is the last"""
    normalize: Normalize = "none"
    """normalisation of the states before the kernel"""
    gold_text: Literal["answer", "boxed", "question_answer", "solution"] = "answer"
    """text whose state is h*; solution is the field of that name of a row of data.train"""
    gold_pool: Literal["last", "mean"] = "last"
    """which token's state of that text"""
    gold_refresh: Literal["step", "never"] = "step"
    """h* by the weights of the step, or by the initial ones for the whole run"""
    gold_control: Literal["none", "shuffled"] = "none"
    """shuffled takes another question's gold, of another answer: a control"""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """pointwise: decay of the running cross-covariance"""
    warmup_steps: NonNegative = 10
    """pointwise: steps over which the running estimate is their plain mean, before it forgets the older ones"""


class MaskConfig(Section):
    rule: Literal[
        "threshold", "top_fraction", "peaks_only", "random", "bernoulli", "random_prefix", "all", "prefix", "quadrant"
    ] = "threshold"
    """which completion tokens are trained on; all is every token"""
    score: Literal["mi"] | Measured = "mi"
    """what the rules threshold, top_fraction, peaks_only look at; quadrant wants entropy"""
    scope: Literal["sequence", "causal", "group", "micro_batch", "batch", "running"] = "sequence"
    """over which tokens the statistics are taken; causal: those so far; batch is over all ranks and micro-batches"""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """of scope running, over steps; 1 weighs all tokens of the run so far alike (Welford)"""
    statistic: Statistic = "mean_std"
    """threshold mu + kappa * sigma, Q3 + tau * IQR, or mu + kappa * IQR; peaks are counted by it too"""
    tau: Annotated[float, Field(gt=0)] = 1.5
    """of the iqr statistic"""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """of the rules top_fraction and random; of bernoulli the chance of each token"""
    shortest: Positive = 1
    """random_prefix: completions are cut after a uniform number of tokens from this on"""
    reweight: bool = False
    """divide a drawn token's loss by the chance of drawing it, which makes it unbiased (rules that draw)"""
    invert: bool = False
    """take the lowest scores of each completion instead, equally many: a control"""
    prefix_start: Fraction = 0.15
    """share of a completion that rule prefix trains on at first"""
    prefix_step: Fraction = 0.05
    """added at every stall of the validation accuracy (curriculum.stall_patience)"""
    prefix_end: Annotated[float, Field(gt=0, lt=1)] = 0.35
    """largest share"""
    quadrant: Annotated[int, Field(ge=0, le=3)] = 0
    """of rule quadrant: advantage positive (0, 1) or negative (2, 3), entropy high (0, 2) or low (1, 3)"""
    kappa_start: Annotated[float, Field(ge=0)] = 0.3
    """kappa at the first step, and for labelling"""
    kappa_end: Annotated[float, Field(ge=0)] = 0.1
    """lowest kappa"""
    kappa_schedule: KappaSchedule = "combined"
    """falls with the step, with stalls of the validation accuracy, with both, or not; literal: with the clock"""
    kappa_decay_steps: Positive | None = None
    """T_dec; null is optim.steps"""

    @property
    def draws(self) -> bool:
        """Whether the rule selects by chance alone."""
        return self.rule in ("random", "bernoulli", "random_prefix")

    @property
    def ranks(self) -> bool:
        """Whether the rule compares the scores of tokens."""
        return self.rule in ("threshold", "top_fraction", "peaks_only")

    @model_validator(mode="after")
    def _kappa(self) -> MaskConfig:
        if self.kappa_end > self.kappa_start:
            raise ValueError(f"mask.kappa_end ({self.kappa_end}) must not exceed mask.kappa_start ({self.kappa_start})")
        moments = self.rule != "top_fraction" and self.statistic == "mean_std"
        if self.scope == "causal" and not moments:
            raise ValueError(
                "mask.scope: causal knows the mean and deviation so far: set mask.statistic: mean_std and another "
                "mask.rule than top_fraction, or mask.scope: sequence"
            )
        if self.scope == "running" and self.decay == 1 and not moments:
            raise ValueError(
                "mask.decay: 1 merges means and variances, which quantiles are not: set mask.statistic: mean_std and "
                "another mask.rule than top_fraction, or a decay below 1"
            )
        if self.invert and self.rule not in ("threshold", "top_fraction", "peaks_only"):
            raise ValueError(
                f"mask.invert takes the lowest scores, and mask.rule: {self.rule} ranks none: set mask.rule: "
                "threshold, top_fraction or peaks_only"
            )
        if self.reweight and not self.draws:
            raise ValueError(
                f"mask.reweight divides by the chance of drawing a token, and mask.rule: {self.rule} draws none: set "
                "mask.rule: random, bernoulli or random_prefix"
            )
        if self.prefix_start > self.prefix_end:
            raise ValueError(
                f"mask.prefix_start ({self.prefix_start}) must not exceed mask.prefix_end ({self.prefix_end})"
            )
        return self


class CurriculumConfig(Section):
    enabled: bool = True
    """false draws questions uniformly and labels nothing"""
    t1: Fraction = 0.3
    """share of the steps before which the start mixture holds"""
    t2: Fraction = 0.7
    """share of the steps from which the end mixture holds"""
    start: tuple[Fraction, Fraction, Fraction] = (0.70, 0.25, 0.05)
    """probabilities of easy, medium, hard at first"""
    end: tuple[Fraction, Fraction, Fraction] = (0.25, 0.35, 0.40)
    """probabilities of easy, medium, hard from t2 on"""
    buckets: Literal["across", "within"] = "across"
    """of several sources: sorted together, or each source by itself (bucket_by: quantile)"""
    bucket_by: BucketBy = "quantile"
    """buckets by N_peak or by peaks per 512 tokens (at curriculum.cuts), or by their quantiles over the questions"""
    cuts: tuple[NonNegative, NonNegative] = (15, 25)
    """of count and rate: largest N_peak of easy and of medium"""
    quantiles: tuple[Fraction, Fraction] = (1 / 3, 2 / 3)
    """of quantile: share of the questions that are easy, and that are easy or medium"""
    probe_tokens: Positive = 512
    """peaks are counted in the first so many tokens"""
    refresh_every: Positive | None = None
    """steps between relabellings of the questions seen since, from their newest rollouts; null never does"""
    stall_patience: Positive = 3
    """P_val: validations without improvement that make a stall"""

    @model_validator(mode="after")
    def _order(self) -> CurriculumConfig:
        if self.t1 > self.t2:
            raise ValueError(f"curriculum.t1 ({self.t1}) must not exceed curriculum.t2 ({self.t2})")
        if self.cuts[0] >= self.cuts[1]:
            raise ValueError(f"curriculum.cuts must increase, got {list(self.cuts)}")
        if self.refresh_every is not None and not self.enabled:
            raise ValueError(
                "curriculum.refresh_every relabels questions for the curriculum that curriculum.enabled: false leaves "
                "out: set it to null"
            )
        if self.quantiles[0] >= self.quantiles[1]:
            raise ValueError(f"curriculum.quantiles must increase, got {list(self.quantiles)}")
        for name in ("start", "end"):
            if abs(sum(getattr(self, name)) - 1) > 1e-6:
                raise ValueError(f"curriculum.{name} must sum to 1, got {sum(getattr(self, name)):g}")
        return self


class AdvantageConfig(Section):
    baseline: Literal["group", "batch", "leave_one_out"] = "group"
    """what is subtracted from a reward"""
    normalize: Literal["none", "std", "mean"] = "none"
    """divide by the sample standard deviation, or by the mean, of the group's rewards"""
    mi_blend: Literal["none", "additive", "multiplicative"] = "none"
    """A + w z(MI) or A (1 + w z(MI)), z within the sequence"""
    mi_weight: Annotated[float, Field(ge=0)] = 0.1
    """w of mi_blend"""
    tokens: Literal["none", "entropy", "information", "residual", "attention", "baseline"] = "none"
    """by token: reallocated by entropy, plus information, weighted by adapter or attention, less an optimal baseline"""
    alpha: Annotated[float, Field(ge=0)] = 0.2
    """entropy (HAPO): share of |A| moved"""
    information_weight: Annotated[float, Field(ge=0)] = 0.01
    """information (IAPO): weight of the gain, the alpha of its paper"""
    beta: Annotated[float, Field(ge=0)] = 0.01
    """information: weight of the signed confidence"""
    information: Literal["difference", "smoothed", "next_token"] = "difference"
    """gain: H before a token - H after, (H before + H one earlier) / 2 - H after, or that of the policy's entropies"""
    signed: Literal["probability", "entropy"] = "probability"
    """information: confidence is the drawn token's probability or minus the policy's entropy, times -1 if wrong"""
    token_norm: Literal["zscore", "l2"] = "zscore"
    """information: how gain and confidence are scaled within a completion"""
    phi: Annotated[float, Field(gt=0)] = 2.0
    """entropy: the clip of the normalised entropy is |A| / phi"""
    stride: Positive = 1
    """information: every so many tokens is scored; saves from 3 on, smoothed from 4 on"""
    layers: Annotated[tuple[int, ...], Field(min_length=1)] = (-1,)
    """attention: layers whose rows are averaged"""
    strength: Annotated[float, Field(ge=0)] = 1.0
    """attention: 0 weights all tokens alike"""
    favour: Literal["anchors", "explorers"] = "anchors"
    """attention: which tokens weigh more, those of low or of high entropy"""
    tail: Literal["zero", "reward"] = "zero"
    """baseline: advantage of tokens that no other rollout of the group is long enough to be compared with"""
    drop_constant_groups: Literal["correctness", "reward", "none"] = "none"
    """which groups are left out of the update: all right or all wrong; of rewards that do not vary; none"""


class LossConfig(Section):
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """epsilon_low; 1 is no lower bound; with optim.updates_per_batch: 1 the ratio is 1 and no clip does anything"""
    clip_high: Annotated[float, Field(ge=0)] = 0.28
    """epsilon_high: a ratio above 1 + clip_high is clipped"""
    kl_beta: Annotated[float, Field(ge=0)] = 0.001
    """weight of the KL to the initial model; 0 loads no reference model"""
    kl_in: Literal["loss", "reward"] = "loss"
    """k3 on selected tokens, or log pi / pi_ref summed over a completion and taken off its reward (two passes more)"""
    truncated: Literal["train", "mask"] = "train"
    """mask leaves completions that rollout.max_tokens cut out of the update; their rewards count in their groups"""
    aggregation: Literal["sequence", "token", "constant", "all_tokens"] = "sequence"
    """mean in each sequence then over sequences (eq. 2), over all selected tokens, over max_tokens, over all tokens"""
    ratio: Literal["token", "sequence", "clipped_weight", "soft_gate", "tv_mask", "kl_mask"] = "token"
    """importance ratio: by token, by sequence, clipped as a weight, gated by a sigmoid, masked by divergence"""
    old_policy: Literal["trainer", "engine"] = "trainer"
    """whose log-probabilities the ratio compares with: ours from before the update, or those the engine drew with"""
    gate_positive: Annotated[float, Field(gt=0)] = 1.0
    """soft_gate: tau where the advantage is positive"""
    gate_negative: Annotated[float, Field(gt=0)] = 1.05
    """soft_gate: tau elsewhere; larger fades faster as the ratio leaves 1"""
    divergence: Annotated[float, Field(gt=0)] = 0.15
    """tv_mask, kl_mask: largest total variation, or KL in nats, of a token from the old policy"""
    kl_priority: Annotated[float, Field(ge=0)] = 0.0
    """power of the initial model's certainty by which a token's KL is weighted, so that unsure ones may move"""
    kl_certainty: Literal["entropy", "largest"] = "entropy"
    """that certainty: 1 - H / log V, or 1 + log p / log V of the likeliest token"""
    entropy_weight: Annotated[float, Field(ge=0)] = 0.0
    """weight of the self-reward A H, which raises the entropy of tokens with positive advantage"""


class ValidationConfig(Section):
    every: Positive = 10
    """steps between validations; there is always one before and one after training"""
    holdout: Positive = 256
    """training questions that are held out where data.validation is null; near-duplicates of them are not trained on"""
    holdout_seed: NonNegative = 0
    """of their choice; apart from seed, so that runs of several seeds are measured on the same questions"""
    questions: Positive | None = None
    """only the first so many; null is all"""
    samples: Positive = 4
    """a question, for avg@k"""
    temperature: Annotated[float, Field(ge=0)] = 0.6
    """0 is greedy"""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """nucleus mass"""
    top_k: Annotated[int, Field(ge=-1)] = 20
    """-1 is off"""
    watch: tuple[PathOrWatched, ...] = ()
    """sets, such as benchmarks, that are measured beside it, each a path or a source; they steer nothing"""
    watch_every: Positive = 50
    """steps between such measurements of a set that does not say; there is always one before and one after training"""
    watch_samples: Positive = 4
    """a question, of a set that does not say"""
