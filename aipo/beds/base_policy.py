"""A small Llama over the words of a bed, and its pre-training on demonstrations to the base policy of the bed."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aipo.beds.worlds import Example, World
from aipo.errors import UserError
from aipo.layout import micro_batches
from aipo.mi import median_bandwidth
from aipo.policy import Policy

END, PAD, UNKNOWN = "<end>", "<pad>", "<unknown>"
# the words of the turns and nothing else: the question ends with the word that asks for the answer
CHAT_TEMPLATE = "{%- for message in messages -%}{{ message.content + ' ' }}{%- endfor -%}"


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word, words being what stands between blanks."""
    vocabulary = {word: i for i, word in enumerate([PAD, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, chat_template=CHAT_TEMPLATE
    )


def small_llama(vocabulary: int, *, width: int = 64, layers: int = 4, seed: int = 0) -> LlamaForCausalLM:
    """Made from its config, fp32; about 0.2M parameters at the default size."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.7 * width**-0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """AdamW with warm-up and a cosine on the completion tokens of fresh demonstrations, in place.

    The first two thirds are demonstrations without wrong results, from which the computation is learned sooner.
    """
    draw, number, knobs = random.Random(seed), tokenizer.get_vocab(), world.knobs
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(steps // 20, 1)
    model.train()
    for step in range(steps):
        rate = min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        shown = replace(knobs, noise=0.0) if step < steps * 2 // 3 else knobs
        examples = [world.draw(draw, shown) for _ in range(batch)]
        ids = torch.tensor([[number[w] for w in (*e.question, *e.demonstration, END)] for e in examples])  # (B, S)
        asked = len(examples[0].question)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, asked - 1 :]  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, asked:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % max(steps // 10, 1) == 0:
            say(f"pre-training, step {step + 1} of {steps}: loss {loss.item():.3f} nats a token")
    model.eval()


@torch.no_grad()
def accuracy(
    model: Any, tokenizer: PreTrainedTokenizerFast, world: World, *, questions: int = 500, seed: int = 1
) -> float:
    """Share of right answers of one sample of each question at temperature 1."""
    draw, number = random.Random(seed), tokenizer.get_vocab()
    examples = [world.draw(draw, world.knobs) for _ in range(questions)]
    prompts = torch.tensor([[number[word] for word in e.question] for e in examples])  # (B, P)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=len(examples[0].demonstration),
            pad_token_id=0,
        )  # (B, P + T)
    boxes = torch.tensor([number[rf"\boxed{{{e.answer}}}"] for e in examples])  # (B,)
    return float((drawn[:, prompts.shape[1] :] == boxes[:, None]).any(1).float().mean())


@torch.no_grad()
def states(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[list[str]], completions: Sequence[list[str]]
) -> list[torch.Tensor]:
    """What scores read where each word of a completion is predicted, of each row: (t, d).

    It is the residual stream before the final norm (:class:`aipo.policy.Policy`), behind which states are less wide.
    """
    number = tokenizer.get_vocab()
    asked, said = ([[number[word] for word in row] for row in rows] for rows in (prompts, completions))
    (micro,) = micro_batches(asked, said, budget=sys.maxsize, packing=False)
    parts = Policy(model, temperature=1.0)(micro)["states"].split(micro.lengths.tolist())
    return [part for _, part in sorted(zip(micro.rows.tolist(), parts), key=lambda pair: pair[0])]


def bandwidth(model: Any, tokenizer: PreTrainedTokenizerFast, world: World, *, questions: int = 64) -> float:
    """Median heuristic over the coordinates of :func:`states` at demonstrations: what a fixed ``mi.sigma`` is to be
    near."""
    draw = random.Random(1)
    examples = [world.draw(draw, world.knobs) for _ in range(questions)]
    found = states(model, tokenizer, [e.question for e in examples], [e.demonstration for e in examples])
    return float(median_bandwidth(torch.cat(found).reshape(-1, 1)))


def problems(world: World, count: int, *, seed: int, without: frozenset[str] = frozenset()) -> list[Example]:
    """Different questions, none of those in ``without``; UserError where the world has too few."""
    draw, found = random.Random(seed), dict[str, Example]()
    for _ in range(50 * count):
        example = world.draw(draw, world.knobs)
        text = " ".join(example.question)
        if text not in without:
            found.setdefault(text, example)
        if len(found) == count:
            return list(found.values())
    raise UserError(f"--steps: a world of {world.knobs.steps} has only {len(found)} of {count} questions: raise it")
