"""Is an answer right? Text rules first, then Math-Verify and sympy in worker processes that can be killed."""

from aipo.verify.pool import Verdict, Verifier, after_thinking, extract_answer, is_correct, last_box

__all__ = ["Verdict", "Verifier", "after_thinking", "extract_answer", "is_correct", "last_box"]
