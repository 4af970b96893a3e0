"""The exception for mistakes that a user can correct."""


class UserError(Exception):
    """A mistake in the input or the options; the message says what, where and how to correct it.

    The command line prints the message without a stack trace and exits with status 2.

    Examples:
        >>> import hf_ecif
        >>> try:
        ...     hf_ecif.InfluenceConfig(batch_size=1)
        ... except hf_ecif.UserError as error:
        ...     print(error)
        `batch_size=1`: must be at least 2.
    """
