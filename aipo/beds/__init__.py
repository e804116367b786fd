"""Small worlds in which it is known which tokens of a completion decide its answer: makers of problems, a model."""
