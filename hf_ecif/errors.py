"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in what was asked for. The message names what, where and the remedy.

    The command line prints the message without a stack trace and exits with status 2.
    """
