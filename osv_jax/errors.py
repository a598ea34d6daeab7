"""The one exception type that means "the person running this can fix it"."""


class UserError(Exception):
    """A mistake in the input, told in one sentence: what was wrong, what was expected, what to do.

    The programs print it without a traceback and exit with status 2. Everything else that is raised is a bug in
    `osv_jax` and keeps its traceback.
    """
