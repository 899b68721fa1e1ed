"""The errors a user can act on. Each message names the part, the value and the limit."""


class InputError(ValueError):
    """A request that cannot be served: unreadable media, an unknown part, a prompt longer than the context."""


class TooLongError(InputError):
    """A request with more tokens than there is room for."""


class WrongCodecError(InputError):
    """Codes of speech that another codec made than the one they are for."""


class WrongReferenceError(InputError):
    """Log-probabilities of another model than the one that a run is measured against."""


class UnknownVoiceError(InputError):
    """Speech in a voice that a run was not told of."""


class ConfigError(ValueError):
    """A configuration that the model cannot be built from: an unknown key, sizes that do not divide."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written completely: missing, unexpected or mis-shaped tensors."""


class JudgeError(Exception):
    """What judges results has failed, so that there is no figure. It ends the run: a score of zero would be a lie."""


class TrainingError(Exception):
    """A run went wrong in a way that more steps would not mend, such as a loss of NaN."""
