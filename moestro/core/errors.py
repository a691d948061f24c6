"""What can go wrong on purpose. Every message names the setting, its value, the bound and the remedy, in one line.

* Error
  - ConfigError          a value in a recipe or spec is wrong
  - DataError            a corpus is missing, empty or not text
  - StorageError         the disk is full or refuses
  - CheckpointError      a checkpoint is damaged or foreign
  - FamilyError          another project's model cannot be read or written without loss
  - TrainingError        training cannot go on
    - RankLostError      because another rank was killed, hangs, or cannot be reached
  - PackageError         a package cannot be trusted or used
    - FormatError        bytes break a rule of the format
    - LimitExceeded      a size, count or depth is above a limit of the format
    - UnsupportedVersion written by a newer version, or needs an option this machine lacks
    - IntegrityError     bytes are not those the digest promises
    - SignatureError     no valid signature by a trusted key
    - RollbackError      older than what is installed, or expired
    - DecryptionError    wrong key, or the encrypted bytes were changed
    - BaseMismatch       an update for another base
    - UnsafePath         a path that leaves its folder or means different files on different machines
    - ConversionError    a model cannot be packed or unpacked without loss
  - ShipError            a package cannot be moved
    - AccessError        token missing, expired, foreign or without the right
    - RefusalError       the store says no: unknown, exists already, too large, too often
    - TransferError      the network or the other side fails, after all retries
  - ClusterError         a machine park is described wrongly or incompletely
  - PlanError            a model cannot be cut, fitted or planned as asked
  - PlacementError       experts cannot be placed as asked
"""

STOPPED = 130
"""Exit status of what was asked to stop before its end, as shells have it."""


class Error(Exception):
    """Base of everything this package raises on purpose; the commands print these in one line."""


class ConfigError(Error):
    """A value in a recipe or spec is wrong."""


class DataError(Error):
    """A corpus is missing, empty or not text."""


class StorageError(Error):
    """The disk is full or refuses."""


class CheckpointError(Error):
    """A checkpoint is damaged or foreign."""


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


class PackageError(Error):
    """A package cannot be trusted or used."""


class FormatError(PackageError):
    """Bytes break a rule of the format."""

    def __init__(self, rule: str, offset: int | None = None, where: str = "") -> None:
        """`rule` is the broken rule in words, `offset` the place in bytes, `where` the file or part."""
        self.rule, self.offset, self.where = rule, offset, where
        place = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{where or 'package'}{place}: {rule}")


class LimitExceeded(PackageError):
    """A size, count or depth is above a limit of the format."""


class UnsupportedVersion(PackageError):
    """Written by a newer version, or needs an option this machine lacks."""


class IntegrityError(PackageError):
    """Bytes are not those the digest promises."""

    def __init__(self, path: str, what: str, chunk: int | None = None) -> None:
        """`path` is the file or tensor, `what` differs, `chunk` the first bad piece of 1 MiB."""
        self.path, self.chunk = path, chunk
        place = "" if chunk is None else f", chunk {chunk}"
        super().__init__(f"{path}{place}: {what}; fetch it again")


class SignatureError(PackageError):
    """No valid signature by a trusted key."""


class RollbackError(PackageError):
    """Older than what is installed, or expired."""


class DecryptionError(PackageError):
    """Wrong key, or the encrypted bytes were changed; deliberately does not say which."""


class BaseMismatch(PackageError):
    """An update for another base."""


class UnsafePath(PackageError):
    """A path that leaves its folder or means different files on different machines."""


class ConversionError(PackageError):
    """A model cannot be packed or unpacked without loss."""


class ShipError(Error):
    """A package cannot be moved."""


class AccessError(ShipError):
    """Token missing, expired, foreign or without the right."""


class RefusalError(ShipError):
    """The store says no: unknown, exists already, too large, too often."""

    def __init__(self, message: str, status: int = 409) -> None:
        """`status` is the HTTP status that says the same."""
        self.status = status
        super().__init__(message)


class TransferError(ShipError):
    """The network or the other side fails, after all retries."""


class ClusterError(Error):
    """A machine park is described wrongly or incompletely."""


class PlanError(Error):
    """A model cannot be cut, fitted or planned as asked."""


class PlacementError(Error):
    """Experts cannot be placed as asked."""
