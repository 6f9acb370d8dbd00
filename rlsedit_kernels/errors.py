"""Errors of the recursion itself; wrong arguments are ValueError and TypeError."""


class BreakdownError(ArithmeticError):
    """The covariance is no longer positive semi-definite to working precision; nothing was written.

    The text names the cause and what to do: another form, float64, or `refactor` from kept batches.
    """


class LeverageError(BreakdownError):
    """A batch cannot be removed by a downdate because its leverage is too near 1; nothing was written.

    In such a direction the state knows little but this batch, so what is left after removal cannot be
    recovered from it: rebuild with `refactor` from the batches that stay.
    """


class UnderdeterminedError(ArithmeticError):
    """A state that started from nothing has not seen as many independent keys as there are unknowns.

    There is no unique weight, covariance or gain yet; the state itself is sound and takes further batches.
    """


class RankError(RuntimeError):
    """Another rank of a sharded state has failed, is gone or does not answer; the text has its message.

    Nothing was written by the call that raises it.
    """


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or incomplete, or holds files that are not its own; the text names the file.

    Nothing was changed by the call that raises it.
    """
