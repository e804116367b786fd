"""Is an answer right? Text rules first, then Math-Verify and sympy in worker processes that can be killed."""

from aipo.verify.answers import after_thinking, extract_answer, last_box
from aipo.verify.pool import FunctionError, Outcome, Verdict, Verifier, is_correct

__all__ = [
    "FunctionError",
    "Outcome",
    "Verdict",
    "Verifier",
    "after_thinking",
    "extract_answer",
    "is_correct",
    "last_box",
]
