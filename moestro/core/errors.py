"""What can go wrong on purpose. Every message names the setting, its value, the bound and the remedy, in one line.

* Error
  - ConfigError      a value in a recipe or spec is wrong
  - DataError        a corpus is missing, empty or not text
  - CheckpointError  a checkpoint is damaged, foreign, or cannot be written
  - FamilyError      another project's model cannot be read or written without loss
  - TrainingError    training cannot go on
  - ClusterError     a machine park is described wrongly or incompletely
  - PlanError        a model cannot be cut, fitted or planned as asked
  - PlacementError   experts cannot be placed as asked
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


class ClusterError(Error):
    """A machine park is described wrongly or incompletely."""


class PlanError(Error):
    """A model cannot be cut, fitted or planned as asked."""


class PlacementError(Error):
    """Experts cannot be placed as asked."""
