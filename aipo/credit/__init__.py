"""Which tokens of a completion change the chance of a right answer, measured; and how well each signal finds them."""
