"""One optimizer step by TRL's GRPOTrainer on the batch of bench/step.py, which starts this in TRL's environment."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from bench.batches import Batch, load, padded
from bench.measure import Clock, build_model, measured, synchronize


def tokenizer() -> PreTrainedTokenizerFast:
    """The batch is token ids already; the trainer only asks for the padding token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<pad>",
    )


class Step:
    """TRL's loss, its backward, clip and AdamW, on micro-batches of the rows that the other variants get.

    ``_compute_loss`` is called as its ``training_step`` does; only the sampling before it is left out.
    """

    def __init__(self, options: dict[str, Any], folder: str) -> None:
        self.cuda, self.options = torch.cuda.is_available(), options
        device = torch.device("cuda" if self.cuda else "cpu")
        model = build_model(
            options["model"], attention=options["attention"], checkpointing=options["checkpointing"], device=device
        )
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=not self.cuda,
                bf16=True,
                gradient_checkpointing=options["checkpointing"],
                gradient_checkpointing_kwargs={"use_reentrant": False} if options["checkpointing"] else None,
                per_device_train_batch_size=8,
                num_generations=8,
                max_completion_length=options["longest"],
                top_entropy_quantile=options["quantile"],
                epsilon=0.2,
                epsilon_high=0.28,
                beta=0.0,
                loss_type="grpo",
                learning_rate=1e-6,
                weight_decay=0.0,
                optim="adamw_torch_fused",
                report_to="none",
            ),
            train_dataset=Dataset.from_dict({"prompt": ["none"] * 8}),
            processing_class=tokenizer(),
        )
        trainer = self.trainer
        trainer.create_optimizer()
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        self.model.train()
        self.device = device

    def __call__(self, batch: Batch, clock: Clock) -> None:
        trainer, advantages = self.trainer, batch.advantages()
        groups = batch.micro_batches(self.options["micro_tokens"])
        trainer.current_gradient_accumulation_steps = len(groups)
        for rows in groups:
            with clock("forward"):
                prompts, prompt_mask = padded([batch.prompt_of[i] for i in rows], left=True)
                completions, completion_mask = padded([batch.completions[i] for i in rows])
                # its loss is the mean over micro-batches of their means; ours and the plain loop's over sequences
                weight = len(rows) * len(groups) / len(batch.completions)
                inputs = {
                    "prompt_ids": prompts,
                    "prompt_mask": prompt_mask,
                    "completion_ids": completions,
                    "completion_mask": completion_mask,
                    "advantages": weight * advantages[rows],
                }
                loss = trainer._compute_loss(self.model, {k: v.to(self.device) for k, v in inputs.items()})
            with clock("backward"):
                trainer.accelerator.backward(loss)
        with clock("optimizer"):
            self.norm = float(trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0))
            self.optimizer.step()
            self.optimizer.zero_grad()
            synchronize()


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    logging.disable(logging.WARNING)
    whole = load(**options["batch"])
    options["longest"] = max(map(len, whole.completions))
    with tempfile.TemporaryDirectory() as folder:
        step = Step(options, folder)
        result = measured(step, whole, warm_up=load(**options["warm_up"]), repeats=options["repeats"])
    print(json.dumps(result | {"norm": step.norm, "positions": whole.generated, "tokens": whole.tokens}))


if __name__ == "__main__":
    main()
