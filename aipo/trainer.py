"""The training loop: a plain PyTorch loop in which each stage of the method is one line.

curriculum.sample -> collect (vLLM) -> judge (verifier) -> advantage -> forward { hidden states -> FastHSIC -> mask ->
log-probabilities } -> loss -> backward -> step (ZeRO-3) -> sync. Rules and settings come from the config; no line here
knows the name of a method.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aipo import distributed
from aipo.advantage import blend, constant_groups, group_advantages
from aipo.branching.latent import Latents
from aipo.config import Config
from aipo.curriculum import Curriculum, peak_label
from aipo.errors import TrainingError
from aipo.evaluation.scoring import validate
from aipo.generation import Generation
from aipo.loss import importance_weights, kl_priority, loss_terms
from aipo.mask import prefix_share
from aipo.metrics import Accuracy
from aipo.problems.datasets import Problem
from aipo.record.checkpoints import CheckpointStore, rng_state, set_rng_state
from aipo.record.clock import Clock
from aipo.record.progress import Progress
from aipo.record.reporting import dump_batch, reduce_metrics, rollout_rows
from aipo.record.tracker import Tracker
from aipo.rollout.check import TOLERANCE
from aipo.rollout.collect import Collector
from aipo.rollouts import MicroBatch, Rollouts, balanced, filler, micro_batches, pad, shared_prompt_batches, unpad
from aipo.selection import TokenSelector
from aipo.sharding import Sharded, learning_rate
from aipo.tokens.early_exit import postfix_ids
from aipo.tokens.signals import Signals, diagnostics, shape, token_signals


class Trainer:
    """Everything that a run consists of; :meth:`train` is the loop, the rest are its stages.

    Args:
        problems, held_out: all ranks hold all of them.
        reference: (micro-batch, mask (N,)) -> log-probabilities (K,) of the initial model; None without a KL term.
        engine_gap: nats between the engine's log-probabilities and the policy's
            (:func:`~aipo.rollout.check.engine_gap`); a collective.
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
        sharded: Sharded,
        reference: Callable[[MicroBatch, Tensor], Tensor] | None,
        selector: TokenSelector,
        curriculum: Curriculum,
        store: CheckpointStore,
        tracker: Tracker,
        progress: Progress,
        device: torch.device,
        identity: dict[str, Any],
        engine_gap: Callable[[], float],
        latents: Latents | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.device = config, device
        self.problems, self.held_out = {p.id: p for p in problems}, held_out
        self.collector, self.sharded, self.reference = collector, sharded, reference
        self.selector, self.curriculum = selector, curriculum
        self.store, self.tracker, self.progress = store, tracker, progress
        self.identity, self.engine_gap, self.stop_requested = identity, engine_gap, stop_requested
        postfix = postfix_ids(collector.prompter.tokenizer, thinking=config.data.thinking)
        self.generation = Generation(
            collector, config, entropies=self.entropies, log_probs=self.log_probs, postfix=postfix, latents=latents
        )
        self.signals = Signals(config, sharded, device, postfix=postfix)
        self.step = 0
        self.bad_steps = 0
        self.generated = 0  # tokens in training so far, over all ranks
        self.before: Accuracy | None = None
        self.accuracy: Accuracy | None = None  # of the last validation
        self.newest_peaks: dict[str, float] = {}  # question -> N_peak, since the last relabelling

    # -- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> bool:
        """Run to the last step. Returns False if it was asked to stop before; a checkpoint is written either way."""
        config = self.config
        if self.before is None:
            self.before = self.validate()
            self.tracker.log(0, self._validation)
        stop = False
        while not self.finished and not stop:
            step, clock = self.step, Clock()
            kappa, prefix = self.curriculum.kappa(step), self.prefix_share()

            with clock("sync"):
                self.check_engine()
            rollouts, metrics = self.generation.rollouts(step, self.sample_questions, clock, prefix=prefix)
            metrics |= self.set_advantages(rollouts, clock)
            with clock("rollout"):
                rollouts = self.balance(rollouts)
            metrics |= self.update(rollouts, kappa, step, clock, prefix)
            with clock("rollout"):
                self.generation.wait()
            with clock("sync"):
                self.collector.engine.sync(self.sharded.full_parameters())

            self.step += 1
            metrics = reduce_metrics(rollouts, metrics, clock.seconds) | self.curriculum.metrics()
            metrics |= {"mask/kappa": kappa, "mask/prefix": prefix, "policy/lr": learning_rate(step, config)}
            best = False
            self.generated += round(metrics["rollout/tokens"])
            if self.step % config.validation.every == 0 or self.finished:
                accuracy = self.validate().value
                best = self.curriculum.best is None or accuracy > self.curriculum.best
                self.curriculum.observe_validation(accuracy)
                metrics |= self._validation
            self.refresh_labels(rollouts, kappa)
            self.tracker.log(self.step, metrics)
            tokenizer, count = self.collector.prompter.tokenizer, config.tracking.rollouts_per_step
            self.tracker.log_rollouts(self.step, rollout_rows(rollouts, self.selector, tokenizer, count))
            self.progress.update(self.step, metrics)
            stop = not distributed.all_true(not self.stop_requested())
            if self.step % config.checkpoint.every == 0 or self.finished or best or stop:
                self.save()
        return self.finished

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or as many tokens are generated as the run may."""
        optim = self.config.optim
        return self.step >= optim.steps or self.generated >= (optim.generated_tokens or math.inf)

    def update(
        self, rollouts: Rollouts, kappa: float, step: int, clock: Clock, prefix: float = 1.0
    ) -> dict[str, float]:
        """One optimizer step on each part of the batch (one part by default). Returns sums for the log."""
        config, sharded, selector = self.config, self.sharded, self.selector
        sums: defaultdict[str, float] = defaultdict(float)
        selector.seconds = 0.0
        with clock("forward"):
            gold = self.gold_states(rollouts) if selector.scored else None
            parts = self.lay_out(rollouts)
            every = [micro for part in parts for micro in part]
            signals = {name: self.signals.measure(name, every, rollouts) for name in token_signals(config)}  # (B, T)
            ranking, shaped = shape(rollouts, signals, config)
            rollouts.token_advantages = shaped  # (B, T) or None
            sums |= diagnostics(rollouts, signals) | {"exit_tokens": float(self.signals.exit_tokens)}
            selector.begin(rollouts, gold, kappa=kappa, prefix=prefix, step=step, ranking=ranking)
            selector.probe(every, self.states)
            old = self.old_log_probs(every, rollouts) if len(parts) > 1 else None  # (B, T)
            if selector.decided:
                parts = self.lay_out(rollouts, selector.ends)
        engine = rollouts.logp_engine  # (B, T)
        for part in parts:
            denominator = selected = 0.0
            for micro in part:
                with clock("forward"):
                    out = sharded.forward(micro, lambda states, micro=micro: selector(micro, states))
                    mask, logp = out["mask"], out["logp"]  # (N,), (K,)
                    logp_ref = None if self.reference is None else self.reference(micro, mask)  # (K,)
                    logp_old = logp.detach() if old is None else self.of(micro, old)[mask]  # (K,)
                    weight, mismatch = importance_weights(
                        self.grid(micro, mask, logp_old),
                        self.grid(micro, mask, self.of(micro, engine)[mask]),
                        pad(mask, micro.lengths, False),
                        rule=config.rollout.importance_correction,
                        cap=config.rollout.importance_cap,
                    )
                    terms = loss_terms(
                        self.grid(micro, mask, logp),
                        self.grid(micro, mask, logp_old),
                        self.token_advantages(micro, rollouts),
                        pad(mask, micro.lengths, False),
                        logp_ref=None if logp_ref is None else self.grid(micro, mask, logp_ref),
                        clip_low=config.loss.clip_low,
                        clip_high=config.loss.clip_high,
                        kl_beta=config.loss.kl_beta,
                        aggregation=config.loss.aggregation,
                        ratio=config.loss.ratio,
                        max_length=config.rollout.max_tokens,
                        importance_weight=weight,
                        lengths=rollouts.lengths[micro.rows.cpu()],
                        kl_weight=self.kl_weight(micro, signals),
                        entropy=self.grid(micro, mask, out["entropy"]) if config.loss.entropy_weight else None,
                        entropy_weight=config.loss.entropy_weight,
                    )
                with clock("backward"):
                    sharded.backward(terms.total)
                if self.reference is None:
                    del terms.sums["kl"]  # not measured, which is not zero
                denominator += float(terms.denominator)
                selected += float(terms.sums["selected"])
                sums["loss"] += float(terms.total.detach())
                sums["entropy"] += float(out["entropy"].detach().sum())
                sums["weight_max"] = max(sums["weight_max"], float(mismatch.pop("weight_max")))
                for name, value in [*terms.sums.items(), *((f"mismatch_{k}", v) for k, v in mismatch.items())]:
                    sums[name] += float(value)
            with clock("optimizer"):
                self.optimizer_step(part, denominator, selected, rollouts, sums)
        clock.seconds["mi"] += selector.seconds
        clock.seconds["forward"] -= selector.seconds
        return dict(sums) | selector.sums()

    # -- stages --------------------------------------------------------------------------------------------------

    def sample_questions(self, step: int, count: int) -> list[Problem]:
        """This rank's share of the ``count`` questions that the curriculum draws for all ranks together."""
        drawn = self.curriculum.sample(step, count)
        return [self.problems[i] for i in drawn[distributed.rank() :: distributed.world_size()]]

    def prefix_share(self) -> float:
        mask = self.config.mask
        return prefix_share(self.curriculum.stalls, start=mask.prefix_start, step=mask.prefix_step, end=mask.prefix_end)

    def certainty(self, rollouts: Rollouts) -> Tensor:
        """Mean self-certainty of each rollout, which INTUITOR rewards. (B,)"""
        return self.signals.measure("certainty", self.batches_of(rollouts), rollouts).nanmean(1)

    def entropies(self, rollouts: Rollouts) -> Tensor:
        """Entropy of the policy at each token. (B, T)"""
        return self.signals.measure("entropy", self.batches_of(rollouts), rollouts)

    @torch.no_grad()
    def log_probs(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities of given completions under the policy. (B, T)"""
        values = torch.zeros(len(completions), max([len(c) for c in completions] + [1]))  # (B, T)
        for micro in self.batches(prompts, completions):
            out = self.sharded.forward(micro, lambda states: torch.ones_like(states[:, 0], dtype=torch.bool))
            padded = pad(out["logp"], micro.lengths).cpu()  # (b, t)
            if len(micro.rows):
                values[micro.rows.cpu(), : padded.shape[1]] = padded
        return values

    def set_advantages(self, rollouts: Rollouts, clock: Clock) -> dict[str, float]:
        """Advantages (B,) and which rollouts take part in the update (B,). Returns the sum of rewards for the log."""
        advantage, n = self.config.advantage, rollouts.group_size
        if self.config.reward.rule == "certainty":
            with clock("forward"):
                rollouts.rewards = self.certainty(rollouts)
        rewards = rollouts.rewards
        if advantage.baseline == "batch":  # the mean over all ranks
            parts = distributed.gather_objects(rewards)  # dynamic sampling leaves ranks with unequal shares
            everywhere = group_advantages(
                torch.cat(parts), n, baseline=advantage.baseline, normalize=advantage.normalize
            )
            rollouts.advantages = everywhere.split([len(part) for part in parts])[distributed.rank()]
        else:
            rollouts.advantages = group_advantages(
                rewards, n, baseline=advantage.baseline, normalize=advantage.normalize
            )
        rollouts.used = torch.ones(len(rewards), dtype=torch.bool)
        if advantage.drop_constant_groups:
            rollouts.used = ~constant_groups(rewards.reshape(-1, n)).repeat_interleave(n)
        return {"trained_reward": float(rewards.sum())}

    def balance(self, rollouts: Rollouts) -> Rollouts:
        """As much to read on every rank. Several updates a batch take the questions as they were drawn."""
        optim = self.config.optim
        return rollouts if optim.updates_per_batch > 1 else balanced(rollouts, share_prompts=optim.share_prompts)

    def lay_out(self, rollouts: Rollouts, ends: Tensor | None = None) -> list[list[MicroBatch]]:
        """Micro-batches of each optimizer step, equally many on every rank.

        Args:
            ends: (B,) tokens of each rollout that are laid out; None is all. What lies behind the last selected token
                reaches neither loss nor gradient. A rollout that ends at 0 keeps its row, since averages count it.
        """
        questions, updates, n = len(rollouts.problems), self.config.optim.updates_per_batch, rollouts.group_size
        ends = rollouts.lengths if ends is None else ends
        parts = []
        for part_number in range(updates):
            start, end = (n * (bound * questions // updates) for bound in (part_number, part_number + 1))
            used = torch.arange(start, end)[rollouts.used[start:end]]
            rows, empty = used[ends[used] > 0], used[ends[used] == 0]
            prompts = [rollouts.prompts[row // n] for row in rows.tolist()]
            completions = [rollouts.completions[row].token_ids[: ends[row]] for row in rows.tolist()]
            part = self.batches(prompts, completions)
            for micro in part:
                micro.rows = rows.to(micro.rows.device)[micro.rows]
            part[0] = part[0].with_empty(empty)
            parts.append(part)
        return parts

    def batches(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[MicroBatch]:
        """Micro-batches of sequences, equally many on every rank (ZeRO-3 counts forward passes)."""
        optim = self.config.optim
        if optim.share_prompts:
            made = shared_prompt_batches(prompts, completions, budget=optim.micro_tokens)
        else:
            made = micro_batches(prompts, completions, budget=optim.micro_tokens, packing=optim.packing)
        return self.agree(made)

    def batches_of(self, rollouts: Rollouts) -> list[MicroBatch]:
        """Micro-batches of all rollouts, whether they take part in the update or not."""
        prompts = [rollouts.prompts[i // rollouts.group_size] for i in range(len(rollouts.completions))]
        return self.batches(prompts, [completion.token_ids for completion in rollouts.completions])

    def agree(self, made: list[MicroBatch]) -> list[MicroBatch]:
        """On the device, with fillers up to the number that the rank with most has."""
        made = made + [filler()] * (max(distributed.agree_max(len(made)), 1) - len(made))
        return [micro.to(self.device) for micro in made]

    @torch.no_grad()
    def states(self, micro: MicroBatch) -> Tensor:
        """Hidden states that predict the completion tokens. (N, d)"""
        return self.sharded.forward(micro)["states"]

    def gold_states(self, rollouts: Rollouts) -> Tensor:
        """State of each question's gold answer, from the weights that score it. (Q, d)"""
        mi, prompter = self.config.mi, self.collector.prompter
        golds = [prompter.encode_gold(problem, mi.gold_text) for problem in rollouts.problems]
        # the state at a token is the one that predicts the next: shift by one to get every token's own
        batches = self.batches([gold[:1] for gold in golds], [[*gold[1:], gold[-1]] for gold in golds])
        pooled: dict[int, Tensor] = {}
        for micro in batches:
            flat = self.states(micro)  # (N, d)
            for row, own in zip(micro.rows.tolist(), flat.split(micro.lengths.tolist())):
                pooled[row] = own[-1] if mi.gold_pool == "last" else own.float().mean(0).to(own.dtype)
        return torch.stack([pooled[q] for q in range(len(golds))]) if golds else flat[:0]

    @torch.no_grad()
    def old_log_probs(self, batches: Sequence[MicroBatch], rollouts: Rollouts) -> Tensor:
        """Log-probabilities before the first update, at the tokens that will be trained on. (B, T)"""
        old = torch.zeros_like(rollouts.logp_engine)  # (B, T)
        for micro in batches:
            out = self.sharded.forward(micro, lambda states, micro=micro: self.selector(micro, states))
            values = self.grid(micro, out["mask"], out["logp"]).cpu()  # (b, t)
            if len(micro.rows):
                old[micro.rows.cpu(), : values.shape[1]] = values
        self.selector.decided = True  # later forwards, of changed weights, keep these masks
        return old

    def token_advantages(self, micro: MicroBatch, rollouts: Rollouts) -> Tensor:
        """(b,), or (b, t) where they differ by token."""
        rows, advantage = micro.rows.cpu(), self.config.advantage
        if rollouts.token_advantages is not None:
            shaped = rollouts.token_advantages[rows]  # (b, T)
        else:
            scores, lengths = self.selector.scores[rows].nan_to_num(0.0), rollouts.lengths[rows]  # (b, T), (b,)
            shaped = blend(
                rollouts.advantages[rows], scores, lengths, how=advantage.mi_blend, weight=advantage.mi_weight
            )  # (b,) or (b, T)
        width = max(int(micro.lengths.max()), 1) if len(rows) else 1
        return (shaped if shaped.dim() == 1 else shaped[:, :width]).to(self.device)

    def kl_weight(self, micro: MicroBatch, signals: dict[str, Tensor]) -> Tensor | None:
        """(b, t) weight of each token's KL; None where all weigh the same."""
        power = self.config.loss.kl_priority
        if power == 0 or self.reference is None:
            return None
        vocabulary = self.sharded.policy.model.config.vocab_size  # type: ignore[union-attr]
        weights = kl_priority(self.of(micro, signals["entropy"]), vocabulary, power)  # type: ignore[arg-type]
        return pad(weights, micro.lengths)

    def of(self, micro: MicroBatch, padded: Tensor) -> Tensor:
        """The ragged (N,) values of a micro-batch's rows, from (B, T)."""
        return unpad(padded[micro.rows.cpu()], micro.lengths.cpu()).to(self.device)

    def grid(self, micro: MicroBatch, mask: Tensor, values: Tensor) -> Tensor:
        """Values at the selected tokens (K,) -> (b, t), 0 elsewhere; keeps the gradient."""
        ragged = values.new_zeros(len(mask)).masked_scatter(mask, values)  # (N,)
        return pad(ragged, micro.lengths)

    def optimizer_step(
        self, part: list[MicroBatch], denominator: float, selected: float, rollouts: Rollouts, sums: dict[str, float]
    ) -> None:
        """Normalise over the whole step and all ranks, update; skip together what is not finite."""
        counts = torch.tensor([denominator, selected], dtype=torch.float64)
        total, trained_on = distributed.all_reduce(counts).tolist()
        sums["denominator"] = sums.get("denominator", 0.0) + denominator
        if trained_on == 0:  # nothing was selected anywhere: AdamW would still move by its momentum
            return
        norm = self.sharded.step(total, learning_rate(self.step, self.config))
        if norm == norm and norm != float("inf"):
            sums["grad_norm"], self.bad_steps = norm, 0
            return
        self.bad_steps += 1
        sums["skipped"] = sums.get("skipped", 0.0) + 1
        dump_batch(self.tracker.folder / "bad_steps", self.step + 1, part, rollouts, self.selector)
        if self.bad_steps >= self.config.guards.max_bad_steps:
            raise TrainingError(
                f"loss or gradient was not finite in {self.bad_steps} steps in a row (the last is {self.step + 1}); "
                f"each was skipped and its batch is in {self.tracker.folder / 'bad_steps'}. Try a lower optim.lr, "
                "model.dtype=float32, or rollout.importance_correction=token_truncated"
            )

    # -- around the loop -----------------------------------------------------------------------------------------

    def label(self, problems: Sequence[Problem]) -> dict[str, float]:
        """N_peak of some questions under the present policy at kappa_start; a collective.

        Completions are cut where no peak is counted any more, and running statistics stay as they were: a run that
        labels trains exactly as one that finds its labels made.
        """
        config, clean = self.config, self.selector.state_dict()
        self.wake()
        sampling = replace(
            self.generation.sampling, max_tokens=min(config.rollout.max_tokens, config.curriculum.probe_tokens)
        )
        rollouts = self.collector.collect(problems, sampling, samples=1, stream="label")
        self.collector.engine.sleep()
        self.collector.judge(rollouts)
        prompts, completions = rollouts.prompts, [c.token_ids for c in rollouts.completions]
        self.selector.begin(rollouts, self.gold_states(rollouts), kappa=config.mask.kappa_start, step=0)
        self.selector.score_all(self.batches(prompts, completions), self.states)
        self.selector.load_state_dict(clean)
        return self.peaks(rollouts, config.mask.kappa_start)

    def peaks(self, rollouts: Rollouts, kappa: float) -> dict[str, float]:
        """Mean N_peak of each question's rollouts, from the selector's scores."""
        curriculum = self.config.curriculum
        found = defaultdict(list)
        for i, length in enumerate(rollouts.lengths.tolist()):
            scores = self.selector.scores[i, :length]
            if scores.isfinite().all():
                label = peak_label(scores, kappa, curriculum.bucket_by, curriculum.probe_tokens)
                found[rollouts.problems[i // rollouts.group_size].id].append(label)
        return {question: sum(labels) / len(labels) for question, labels in found.items()}

    def refresh_labels(self, rollouts: Rollouts, kappa: float) -> None:
        """Every ``curriculum.refresh_every`` steps, relabel the questions seen since from their newest rollouts."""
        every = self.config.curriculum.refresh_every
        if every is None:
            return
        for part in distributed.gather_objects(self.peaks(rollouts, kappa)):
            self.newest_peaks |= part
        if self.step % every == 0:
            self.curriculum.relabel(self.newest_peaks)
            self.newest_peaks = {}

    def wake(self) -> None:
        """Give the engine the present weights if it sleeps: in a step it does not before its rollouts are drawn."""
        if self.collector.engine.asleep:
            self.collector.engine.sync(self.sharded.full_parameters())

    def check_engine(self) -> None:
        """Every ``rollout.check_every`` steps: save and stop if the engine has other weights than the policy."""
        every = self.config.rollout.check_every
        if every is None or self.step == 0 or self.step % every:
            return
        gap = self.engine_gap()
        if not gap <= TOLERANCE:  # so written that NaN fails
            saved = self.save()
            raise TrainingError(
                f"after step {self.step} the rollout engine's log-probabilities differ by {gap:.2f} nats on average "
                f"from the policy's (at most {TOLERANCE} expected): it no longer has the trained weights, and up to "
                f"{every} steps were trained on what it drew. The policy is saved in {saved}: go on from there with "
                "--resume auto, or from an earlier checkpoint with --resume PATH"
            )
        self.wake()

    def validate(self) -> Accuracy:
        self.wake()
        samples, world = self.config.validation.samples, distributed.world_size()
        with self.progress.task("validation", len(self.held_out) * samples) as task:
            self.accuracy, self._validation = validate(
                self.collector,
                self.held_out,
                self.config.validation,
                max_tokens=self.config.rollout.max_tokens,
                on_done=lambda: task.advance(world),
            )
        return self.accuracy

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

        return self.store.save(self.step, write, accuracy=accuracy)

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
        self.before = Accuracy(**state["before"]) if state["before"] else None
        self.accuracy = Accuracy(**state["accuracy"]) if state["accuracy"] else None
        self.newest_peaks = state["newest_peaks"]
        self.generation.load_state_dict(state["generation"], self.problems)
        self.curriculum.load_state_dict(state["curriculum"])
        self.selector.load_state_dict(state["selector"])
        self.tracker.load_state_dict(state["tracker"])
        set_rng_state(state["rng"])
