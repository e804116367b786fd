"""The one kind of error that is the user's to repair."""


class UserError(Exception):
    """One line that says what is wrong, where, and what to do; the launcher prints it and exits with code 2."""


class TrainingError(Exception):
    """Training cannot go on; says why and what to try. Nothing that was saved is lost. Exit code 1."""
