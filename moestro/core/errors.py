"""What can go wrong on purpose. Every message names the setting, its value, the bound and the remedy, in one line.

* Error
  - ConfigError      a value in a recipe or spec is wrong
  - DataError        a corpus is missing, empty or not text
  - CheckpointError  a checkpoint is damaged, foreign, or cannot be written
  - FamilyError      another project's model cannot be read or written without loss
  - TrainingError    training cannot go on
    - RankLostError  because another rank was killed, hangs, or cannot be reached
"""


class Error(Exception):
    """Base of everything this package raises on purpose; the commands print these in one line."""


class ConfigError(Error):
    """A value in a recipe or spec is wrong."""


class DataError(Error):
    """A corpus is missing, empty or not text."""


class CheckpointError(Error):
    """A checkpoint is damaged, foreign, or cannot be written."""


class FamilyError(Error):
    """Another project's model cannot be read or written without loss."""


class TrainingError(Error):
    """Training cannot go on."""


class RankLostError(TrainingError):
    """Another rank was killed, hangs, or cannot be reached.

    ours   we are the first to say so, and should print it
    """

    def __init__(self, message: str, ours: bool) -> None:
        super().__init__(message)
        self.ours = ours
