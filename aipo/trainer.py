"""The training loop: a plain PyTorch loop in which each stage of the method is one line.

curriculum.sample -> collect (vLLM) -> judge (verifier) -> advantage -> forward { hidden states -> FastHSIC -> mask ->
log-probabilities } -> loss -> backward -> step (ZeRO-3) -> sync. Rules and settings come from the config; no line here
knows the name of a method.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aipo import distributed
from aipo.advantage import assign, blend
from aipo.branching.cvae import Latents
from aipo.config import Config
from aipo.curriculum import Curriculum
from aipo.errors import TrainingError
from aipo.evaluation.scoring import Validator, Watched
from aipo.generation import Generation
from aipo.labelling import peaks
from aipo.layout import MicroBatch
from aipo.loss import LossInputs, kl_priority, loss_terms
from aipo.metrics import Accuracy
from aipo.passes import Passes
from aipo.problems.datasets import Problem
from aipo.record.batches import BAD, REPLAY, forget_batches, write_batch
from aipo.record.checkpoints import CheckpointStore, rng_state, set_rng_state
from aipo.record.clock import Clock
from aipo.record.progress import Progress
from aipo.record.reporting import add_up, reduce_metrics
from aipo.record.tokens import TokenRecorder
from aipo.record.tracker import Tracker
from aipo.rollout.check import TOLERANCE, GapGuard, lost_weights
from aipo.rollout.collect import Collector
from aipo.rollouts import Rollouts, balanced
from aipo.selection import Selection, TokenSelector
from aipo.sharding import Reference, learning_rate
from aipo.tokens.table import mask_ranking, measure, needed, token_advantages


class Trainer:
    """Everything that a run consists of; :meth:`train` is the loop, the rest are its stages.

    Args:
        problems, held_out: all ranks hold all of them.
        reference: log-probabilities of the initial model; None without a KL term.
        engine_gap: nats between the engine's log-probabilities and the policy's
            (:func:`~aipo.rollout.check.engine_gap`); a collective.
        watched: sets that are measured and steer nothing, by name.
        latents: what branches are drawn with; None without ``branch.latent``.
        identity: what a run that resumes this one must share with it; kept beside each checkpoint.
        stop_requested: asked after every step; true on any rank ends the run after a checkpoint.
    """

    def __init__(
        self,
        config: Config,
        *,
        problems: Sequence[Problem],
        held_out: Sequence[Problem],
        collector: Collector,
        passes: Passes,
        reference: Reference | None,
        selector: TokenSelector,
        curriculum: Curriculum,
        store: CheckpointStore,
        tracker: Tracker,
        progress: Progress,
        identity: dict[str, Any],
        engine_gap: Callable[[], float],
        watched: Mapping[str, Watched] | None = None,
        latents: Latents | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.passes = config, passes
        self.problems = {p.id: p for p in problems}
        self.sharded, self.device = passes.sharded, passes.device
        self.collector, self.reference = collector, reference
        self.selector, self.curriculum = selector, curriculum
        self.store, self.tracker, self.progress = store, tracker, progress
        self.recorder = TokenRecorder(config, collector.prompter, curriculum)
        self.gap_guard = GapGuard(config.guards, apart=config.branch.latent != "none")
        self.identity, self.engine_gap, self.stop_requested = identity, engine_gap, stop_requested
        self.generation = Generation(collector, config, passes, latents=latents)
        self.validator = Validator(collector, passes, progress, config, held_out, watched or {})
        self.step = self.bad_steps = 0
        self.generated = 0  # tokens in training so far, over all ranks
        self.before: Accuracy | None = None
        self.accuracy: Accuracy | None = None  # of the last validation
        self.newest_peaks: dict[str, float] = {}  # question -> N_peak, since the last relabelling

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Run to the last step. Returns False if it was asked to stop before; a checkpoint is written either way."""
        config = self.config
        if self.before is None:
            self.tracker.log(0, (metrics := self.validate()) | self.validator.watch(0, last=False))
            self.before = self.accuracy
            self.curriculum.observe_validation(metrics["validation/accuracy"])  # the first best
        stop = False
        while not self.finished and not stop:
            step, clock = self.step, Clock()
            kappa, prefix = self.curriculum.kappa(step), self.curriculum.prefix
            with clock("sync"):
                self.check_engine()
            rollouts, metrics = self.generation.rollouts(step, self.sample_questions, clock, prefix=prefix)
            metrics |= self.set_advantages(rollouts, clock)
            with clock("rollout"):
                rollouts = self.balance(rollouts)
            selection, sums = self.update(rollouts, kappa, clock)
            if config.tracking.replay:
                write_batch(config.folder / REPLAY, step + 1, rollouts, selection)
            with clock("rollout"):
                self.generation.wait()
            with clock("sync"):
                self.collector.engine.sync(self.sharded.full_parameters())

            self.step += 1
            metrics = reduce_metrics(rollouts, metrics | sums, clock.seconds) | self.curriculum.metrics(step)
            metrics |= {"mask/kappa": kappa, "mask/prefix": rollouts.prefix, "policy/lr": learning_rate(step, config)}
            best = False
            self.generated += round(metrics["rollout/tokens"])
            if self.step % config.validation.every == 0 or self.finished:
                metrics |= self.validate()
                best = self.curriculum.observe_validation(metrics["validation/accuracy"])
            metrics |= self.validator.watch(self.step, last=self.finished)
            self.refresh_labels(rollouts, selection)
            self.tracker.log(self.step, metrics)
            self.recorder.write(self.tracker, self.step, selection)
            self.progress.update(self.step, metrics, self.generated)
            stop = not distributed.all_true(not self.stop_requested())
            if self.gap_guard.ends(self.step, metrics["mismatch/gap"], self.progress.say):  # counted before any save
                raise TrainingError(self.gap_guard.why(self.save()))
            if self.step % config.checkpoint.every == 0 or self.finished or best or stop:
                self.save()
        return self.finished

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or as many tokens are generated as the run may."""
        optim = self.config.optim
        return self.step >= optim.steps or self.generated >= (optim.generated_tokens or math.inf)

    def update(self, rollouts: Rollouts, kappa: float, clock: Clock) -> tuple[Selection, dict[str, float]]:
        """One optimizer step on each part of the batch (one part by default); what was selected, and sums to log."""
        config, rollout, passes, selector = self.config, self.config.rollout, self.passes, self.selector
        correction = rollout.importance_correction, rollout.importance_cap, rollout.importance_floor
        with clock("forward"):
            gold = passes.gold_states(rollouts.problems) if selector.scored else None  # (Q, d)
            parts = passes.update_batches(rollouts)
            every = [micro for part in parts for micro in part]
            signals, measured = measure(needed(config), passes, every, rollouts)  # (B, T) each
            ranking = mask_ranking(rollouts, signals, config)  # (B, T) or None
            rollouts.token_advantages = token_advantages(rollouts, signals, config)  # (B, T) or None
            self.recorder.start(rollouts, signals)
            selection = Selection(selector, rollouts, gold, kappa=kappa, step=self.step, ranking=ranking)
            selection.probe(every, passes.states)
            old = passes.selected_log_probs(every, rollouts, selection) if len(parts) > 1 else None  # (B, T)
            selection.decided |= old is not None  # later forwards, of changed weights, keep these masks
            if selection.decided:
                parts = passes.update_batches(rollouts, selection.ends)
        sums = defaultdict(float, measured)
        for part in parts:
            counts = torch.zeros(2, dtype=torch.float64)  # denominator, selected tokens
            for micro in part:
                with clock("forward"):
                    out = self.sharded.forward(micro, partial(selection, micro))  # mask (N,), logp and entropy (K,)
                    inputs = self.loss_inputs(micro, out, old, selection, rollouts)  # (b, t) each
                    terms = loss_terms(inputs, config.loss, max_length=rollout.max_tokens, correction=correction)
                with clock("backward"):
                    self.sharded.backward(terms.total)
                self.recorder.see(micro, inputs, out["entropy"], out["mask"])
                counts += torch.tensor([float(terms.denominator), float(terms.sums["selected"])])
                add_up(sums, terms, out["entropy"])
            with clock("optimizer"):
                self.optimizer_step(counts, selection, rollouts, sums)
        clock.seconds["mi"] += selection.seconds
        clock.seconds["forward"] -= selection.seconds
        return selection, dict(sums) | selection.sums()

    # -- stages --------------------------------------------------------------------------------------------------

    def sample_questions(self, step: int, count: int) -> list[Problem]:
        """This rank's share of the ``count`` questions that the curriculum draws for all ranks together."""
        drawn = self.curriculum.sample(step, count)
        return [self.problems[i] for i in drawn[distributed.rank() :: distributed.world_size()]]

    def set_advantages(self, rollouts: Rollouts, clock: Clock) -> dict[str, float]:
        """Advantages (B,) and which rollouts take part in the update (B,). Returns the sum of rewards for the log."""
        with clock("forward"):
            sums = self.generation.policy_rewards(rollouts, self.reference)
        assign(rollouts, self.config.advantage, truncated=self.config.loss.truncated)
        return sums | {"trained_reward": float(rollouts.rewards.nansum())}

    def balance(self, rollouts: Rollouts) -> Rollouts:
        """As much to read on every rank. Several updates a batch take the questions as they were drawn."""
        optim = self.config.optim
        return rollouts if optim.updates_per_batch > 1 else balanced(rollouts, share_prompts=optim.share_prompts)

    def loss_inputs(
        self, micro: MicroBatch, out: dict[str, Tensor], old: Tensor | None, selection: Selection, rollouts: Rollouts
    ) -> LossInputs:
        """A micro-batch's forward pass beside what is known of its rollouts from before, (b, t) each."""
        mask, rows = out["mask"], micro.rows.cpu()  # (N,), (b,)
        logp = micro.grid(out["logp"], mask)  # (b, t)
        logp_ref, kl_weight = None, None
        if self.reference is not None and self.config.loss.kl_in == "loss":
            logp_ref, unsure = (micro.grid(each, mask) for each in self.reference(micro, mask))  # (b, t) each
            if (power := self.config.loss.kl_priority) > 0:
                vocabulary = self.sharded.policy.model.config.vocab_size  # type: ignore[union-attr]
                kl_weight = kl_priority(unsure, vocabulary, power)  # type: ignore[arg-type]
        if rollouts.token_advantages is None:
            scores, lengths = selection.scores[rows].nan_to_num(0.0), rollouts.lengths[rows]  # (b, T), (b,)
            how, weight = self.config.advantage.mi_blend, self.config.advantage.mi_weight
            advantages = blend(rollouts.advantages[rows], scores, lengths, how=how, weight=weight)  # (b,) or (b, T)
        else:
            advantages = rollouts.token_advantages[rows]  # (b, T)
        return LossInputs(
            logp=logp,
            logp_old=logp.detach() if old is None else micro.rows_of(old),
            logp_engine=micro.rows_of(rollouts.logp_engine),
            logp_ref=logp_ref,
            advantages=(advantages if advantages.dim() == 1 else advantages[:, : logp.shape[1]]).to(self.device),
            mask=micro.grid(mask),
            lengths=selection.trained[rows],
            kl_weight=kl_weight,
            inclusion=selection.inclusion(micro),
            entropy=micro.grid(out["entropy"], mask) if self.config.loss.entropy_weight else None,
        )

    def optimizer_step(self, counts: Tensor, selection: Selection, rollouts: Rollouts, sums: dict[str, float]) -> None:
        """Normalise over the whole step and all ranks, update; skip together what is not finite.

        Args:
            counts: (2,) this rank's denominator and number of selected tokens.
        """
        sums["denominator"] += float(counts[0])
        total, trained_on = distributed.all_reduce(counts).tolist()
        if trained_on == 0:  # nothing was selected anywhere: AdamW would still move by its momentum
            return
        norm = self.sharded.step(total, learning_rate(self.step, self.config))
        if math.isfinite(norm):
            sums["grad_norm"], self.bad_steps = norm, 0
            return
        self.bad_steps += 1
        sums["skipped"] += 1
        write_batch(self.tracker.folder / BAD, self.step + 1, rollouts, selection)
        if self.bad_steps >= self.config.guards.max_bad_steps:
            raise TrainingError(
                f"loss or gradient was not finite in {self.bad_steps} steps in a row, each skipped. See what stays "
                f"of it with: python -m aipo.replay {self.tracker.folder} --step {self.step + 1} --dtype float32; "
                "or another run with lower optim.lr, model.dtype=float32, rollout.importance_correction=token_truncated"
            )

    # -- around the loop -----------------------------------------------------------------------------------------

    def refresh_labels(self, rollouts: Rollouts, selection: Selection) -> None:
        """Every ``curriculum.refresh_every`` steps, relabel the questions seen since from their newest rollouts."""
        curriculum = self.config.curriculum
        if curriculum.refresh_every is None:
            return
        for part in distributed.gather_objects(peaks(rollouts, selection.scores, curriculum, self.config.mask)):
            self.newest_peaks |= part
        if self.step % curriculum.refresh_every == 0:
            self.curriculum.relabel(self.newest_peaks)
            self.newest_peaks = {}

    def check_engine(self) -> None:
        """Every ``rollout.check_every`` steps: save and stop if the engine has other weights than the policy."""
        every = self.config.rollout.check_every
        if every is None or self.step == 0 or self.step % every:
            return
        gap = self.engine_gap()
        if not gap <= TOLERANCE:  # so written that NaN fails
            raise TrainingError(lost_weights(gap, self.step, every, self.save()))
        self.passes.wake(self.collector.engine)

    def validate(self) -> dict[str, float]:
        """Accuracy on the held-out questions, for the log; it stays as :attr:`accuracy`."""
        self.accuracy, metrics = self.validator.validate()
        self.tracker.log_answers(self.step, self.validator.answers)
        return metrics

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint that a killed run goes on from as if nothing had happened."""
        validated_now = self.step % self.config.validation.every == 0 or self.finished
        accuracy = self.accuracy.value if self.accuracy and validated_now else None
        state = self.state_dict()

        def write(folder: Path) -> None:
            self.sharded.save(folder)  # first, as it is a collective: no rank may fail before it
            torch.save(state, folder / f"rank-{distributed.rank()}.pt")
            if distributed.rank() == 0:
                (folder / "identity.json").write_text(json.dumps(self.identity, indent=1))

        saved = self.store.save(self.step, write, accuracy=accuracy)
        forget_batches(self.config.folder / REPLAY, range(self.store.oldest_kept() + 1, self.step + 1))
        return saved

    def load(self, folder: Path) -> None:
        self.load_state_dict(
            torch.load(folder / f"rank-{distributed.rank()}.pt", map_location="cpu", weights_only=True)
        )
        self.sharded.load(folder)
        self.collector.engine.sleep()  # its KV cache leaves no room for a sync
        self.collector.engine.sync(self.sharded.full_parameters())

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "bad_steps": self.bad_steps,
            "gap_beyond": self.gap_guard.beyond,
            "generated": self.generated,
            "before": vars(self.before) if self.before else None,
            "accuracy": vars(self.accuracy) if self.accuracy else None,
            "newest_peaks": self.newest_peaks,
            "generation": self.generation.state_dict(),
            "curriculum": self.curriculum.state_dict(),
            "selector": self.selector.state_dict(),
            "tracker": self.tracker.state_dict(),
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.bad_steps, self.generated = state["step"], state["bad_steps"], state["generated"]
        self.before, self.accuracy = (Accuracy(**state[key]) if state[key] else None for key in ("before", "accuracy"))
        self.gap_guard.beyond = state["gap_beyond"]
        self.newest_peaks = state["newest_peaks"]
        self.generation.load_state_dict(state["generation"], self.problems)
        self.curriculum.load_state_dict(state["curriculum"])
        self.selector.load_state_dict(state["selector"])
        self.tracker.load_state_dict(state["tracker"])
        set_rng_state(state["rng"])
