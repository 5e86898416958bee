"""The one error that a user can cause."""


class InputError(ValueError):
    """A user's mistake: one sentence with the rule, what came, and where.

    The command line prints the sentence and exits with code 2; nothing is lost.
    """
