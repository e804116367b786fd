"""The command line of evaluate.py."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

EXAMPLES = """
MODEL is a hub id, a Hugging Face folder, a run folder of train.py or one of its checkpoints. Without MODEL and CONFIG
the embedded model is scored. With CONFIG, or a run, prompt, thinking and length are those of training; so are those of
the embedded model on the embedded problems.

  python evaluate.py --avg32 --model Qwen/Qwen3-8B --gpus 8          the five benchmarks of the paper
  python evaluate.py --avg32 --model runs/qwen3_8b --baseline evaluations/Qwen3-8B-1a2b3c4d/results.json
  python evaluate.py --avg4 --benchmarks embedded                    on a laptop
  python evaluate.py --avg8 --benchmarks mine.jsonl --limit 100      questions and answers of your own
  python evaluate.py --compare A/results.json B/results.json         is B better than A?
  python evaluate.py --avg8 --intervene both                         without and with forced high-MI tokens

The same command goes on where a killed one stopped; a finished one shows its table.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="Score a model.", epilog=EXAMPLES, formatter_class=formatter
    )
    what = parser.add_argument_group("what")
    what.add_argument("--model", help="hub id, Hugging Face folder, run folder or checkpoint of ours")
    what.add_argument("--config", help="training config whose model (unless --model), prompt and length are used")
    what.add_argument("--benchmarks", default="", help="names, 'embedded' or JSONL files, by comma (default: all five)")
    what.add_argument("--avg", dest="samples", type=int, default=32, metavar="K", help="samples a problem; also --avgK")
    what.add_argument("--limit", type=int, help="only the first so many problems of each benchmark")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, help="thinking mode (default: on, or CONFIG's)"
    )
    how.add_argument("--temperature", type=float, help="default: Qwen3's, 0.6 thinking, 0.7 not; 0 is greedy")
    how.add_argument("--top-p", type=float, help="default: 0.95 thinking, 0.8 not")
    how.add_argument("--top-k", type=int, default=20, help="default: 20; -1 is off")
    how.add_argument("--min-p", type=float, default=0.0, help="default: 0")
    how.add_argument("--max-tokens", type=int, help="longest completion (default: CONFIG's, or 32768 if they fit)")
    how.add_argument("--seed", type=int, default=0, help="of sampling and of the order of options")
    how.add_argument("--lenient", action="store_true", help="without a box, the last expression is the answer")
    how.add_argument(
        "--engine", choices=("vllm", "hf"), default="vllm", help="vllm, or hf: Hugging Face generation, far slower"
    )
    dtypes = ("auto", "bfloat16", "float16", "float32")
    how.add_argument("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 where fast, else float32")
    how.add_argument("--gpus", type=int, help="spread the problems over so many GPUs of this machine")
    how.add_argument("--gpu-memory", type=float, default=0.9, help="share of a GPU for the engine (default: 0.9)")
    how.add_argument("--kv-cache-gb", type=float, default=2.0, help="KV cache on a machine without GPU (default: 2)")
    how.add_argument("--out", type=Path, help="folder of the results (default: evaluations/MODEL-SETTINGS)")
    against = parser.add_argument_group("against what")
    against.add_argument("--baseline", type=Path, help="results.json of the frozen backbone: adds MAG, OTF and TES")
    against.add_argument(
        "--otf", type=float, help="share of the updates' tokens trained on in percent (default: the run's own)"
    )
    against.add_argument("--compare", nargs=2, type=Path, metavar="JSON", help="compare two results.json, and end")
    tokens = parser.add_argument_group("interventions on high-MI tokens")
    tokens.add_argument("--intervene", choices=("drop", "force", "both"), help="both: baseline, drop and force in turn")
    tokens.add_argument("--tokens", help="words by comma (default: the eight that the paper names, So, Let, Hmm, ...)")
    tokens.add_argument(
        "--case",
        choices=("written", "any"),
        default="written",
        help="any: also in lower case, capitalised, in capitals",
    )
    tokens.add_argument("--tokens-from", type=Path, metavar="RUN", help="instead: those of highest mean MI in a run")
    tokens.add_argument(
        "--force-rule",
        choices=("nucleus", "rank", "probability"),
        default="nucleus",
        help="a token is forced where it is in the top p of the mass, of the n most probable, or has probability p",
    )
    tokens.add_argument("--force-threshold", type=float, help="that p or n (default: 0.2, and 10 of rank)")
    argv = [re.sub(r"^--avg(\d+)$", r"--avg=\1", a) for a in (sys.argv[1:] if arguments is None else arguments)]
    options = parser.parse_args(argv)
    for name, low in {"samples": 1, "limit": 1, "max_tokens": 1, "gpus": 1, "top_k": -1}.items():
        value = getattr(options, name)
        if value is not None and value < low:
            shown = "avg" if name == "samples" else name.replace("_", "-")
            parser.error(f"--{shown} must be at least {low}, not {value}")
    ranges = {"temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "gpu_memory": (0, 1), "otf": (0, 100)}
    ranges["seed"] = (0, 2**32 - 1)  # numpy's, which vLLM seeds too
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} must lie between {low} and {high}, not {value}")
    for name in ("top_p", "gpu_memory", "otf", "kv_cache_gb"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if options.tokens and options.tokens_from:
        parser.error("--tokens and --tokens-from exclude each other")
    if not options.intervene and (options.tokens or options.tokens_from or options.force_threshold is not None):
        parser.error("--tokens, --tokens-from and --force-threshold go with --intervene")
    return options
