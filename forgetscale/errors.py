"""Exceptions shown to users.

Each message is one sentence: what is wrong, where (path, parameter, rank), what was found and
expected, and what to do. ``exit_code`` is the process exit status the command line uses.
"""


class ForgetScaleError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1
    said_elsewhere = False
    """True on a rank whose error another rank prints."""


class ConfigError(ForgetScaleError):
    """A recipe, override or command line asks for something impossible."""

    exit_code = 2


class DataError(ForgetScaleError):
    """Input data or an artefact on disk is missing, damaged or of the wrong kind."""

    exit_code = 2


class ShardError(ForgetScaleError):
    """A rank's slice of a parameter or gradient is not what it must be."""


class CheckpointError(ForgetScaleError):
    """A checkpoint cannot be written, verified or loaded."""


class AuditError(ForgetScaleError):
    """An element that a freeze plan protects has changed."""


class NonFiniteError(ForgetScaleError):
    """A loss or gradient is not finite, or far too large; the weights were not touched."""


class RetentionError(ForgetScaleError):
    """The run lost more of the source model's abilities than its recipe allows."""


class StoppedEarly(ForgetScaleError):
    """The run was asked to stop, wrote a checkpoint, and can be started again."""

    exit_code = 75
