"""AIPO: reinforcement learning with verifiable rewards on the tokens that carry information about the answer.

The map: what the paper (Chen et al., ACL 2026) numbers, and the name that implements it. A test resolves every name.

    eq. 1            aipo.scorer.TokenScorer.score, through aipo.mi.factor_scores; one at a time
                     aipo.mi.coordinate_scores, as printed aipo.mi.fast_hsic, in O(n^2) aipo.mi.exact_hsic
                     aipo.scorer.batch_scores: other readings of its samples
                     aipo.mi_normalized.normalized_scores: the normalised form of the work it builds on
                     aipo.passes.Passes.gold_states: h*
    eq. 2            aipo.loss.loss_terms, unnormalised, as a step sums it up; aipo.loss.policy_loss, as printed
    eq. 3            aipo.loss.loss_terms: log_rho
    eq. 4            aipo.advantage.group_advantages
    eq. 5            aipo.tokens.early_exit.information_gain measures it; eq. 1 is its proxy in training
    eq. 6            aipo.mask.threshold_mask
    eq. 7            aipo.tokens.early_exit.cumulative_information; logged as information/cumulative
    eq. 8, 9         aipo.metrics.error_bounds

    Algorithm 1
    lines 1-15       aipo.labelling.label_questions, aipo.curriculum.peak_label (aipo.mask.count_peaks as printed),
                     aipo.curriculum.bucket_of
    lines 17-43      aipo.trainer.Trainer.train
    lines 18-26      aipo.curriculum.mixture
    line 28          aipo.curriculum.Curriculum.sample
    line 32          aipo.generation.Generation.rollouts, aipo.selection.Selection
                     (DAPO's dynamic sampling: aipo.generation.varying_groups)
    line 33          aipo.mask.MaskRule.select, aipo.verify.is_correct
    line 34          aipo.advantage.assign, aipo.advantage.blend
    lines 35-38      aipo.trainer.Trainer.update
    lines 39-42      aipo.curriculum.Curriculum.observe_validation, aipo.curriculum.kappa_at;
                     mask.kappa_schedule: literal is line 42 as printed

    table 1          aipo.metrics.avg_at_k, aipo.evaluation.benchmarking.run
    table 2          aipo.metrics.training_efficiency, aipo.evaluation.results.gains
    table 3          configs/methods/aipo_wo_curriculum.yaml
    table 4          configs/ablations/bucket_easy.yaml, configs/ablations/bucket_medium.yaml,
                     configs/ablations/bucket_hard.yaml
    figure 2         configs/ablations/kappa_0.1.yaml to kappa_0.4.yaml
    figure 3         aipo.rollout.interventions.intervene
    figure 4         configs/ablations/n_peak.yaml, configs/ablations/cuts_15_25.yaml: aipo.curriculum.bucket_of
    each by name     python sweep.py paper/table1.yaml, and so on: aipo.campaign.report.write_report
"""

__version__ = "0.1.0"
