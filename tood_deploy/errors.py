"""The errors a user can meet. Every message says what was found, what was expected and what to do."""


class ToodError(Exception):
    """Wrong use or bad input: the commands print it as one line and exit with code 2."""


class CheckpointError(ToodError):
    """A checkpoint that cannot be read, is refused, or does not fit the network."""


class ArtefactError(ToodError):
    """An exported artefact that is not ours, is damaged, or is of another version."""


class InputError(ToodError):
    """A picture, video, folder or stream that cannot be read."""


class OutputError(ToodError):
    """A place that results cannot be written to."""


class DeviceError(ToodError):
    """A device or runtime that was asked for and is not there."""


class DownloadError(ToodError):
    """Published weights that could not be fetched, or did not arrive intact."""


class CheckFailed(Exception):  # noqa: N818 - the outcome of a check, not wrong use
    """A check that was run and failed (parity, AP): the commands exit with code 1."""
