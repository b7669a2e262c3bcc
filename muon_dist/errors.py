"""Typed errors, each with an exit code for the command line. Messages name the wrong key, file, parameter or rank, and
say what to do."""

from __future__ import annotations


class MuonDistError(Exception):
    """Base class of all errors that this package raises for a user.

    Attributes:
        exit_code: exit code of the command line.
        reported_elsewhere: True if another rank prints the message, so that it appears only once.
    """

    exit_code = 1
    reported_elsewhere = False


class ConfigError(MuonDistError, ValueError):
    """A configuration file, an override or an argument is wrong."""

    exit_code = 2


class DataError(MuonDistError, ValueError):
    """A corpus, tokenizer or token shard is missing, malformed or damaged."""

    exit_code = 3


class RoutingError(MuonDistError, ValueError):
    """A parameter cannot be trained by the chosen algorithm, or Muon gets no parameter."""

    exit_code = 4


class LayoutError(MuonDistError, ValueError):
    """A layout does not cover its matrices exactly, or the parameters differ from those of the plan."""

    exit_code = 5


class PlanMismatchError(MuonDistError, RuntimeError):
    """The ranks do not hold the same plan."""

    exit_code = 6


class CheckpointError(MuonDistError, RuntimeError):
    """A checkpoint is missing, damaged or does not belong to this run."""

    exit_code = 7


class NonFiniteError(MuonDistError, RuntimeError):
    """Gradients or updates are NaN or infinite."""

    exit_code = 8


class FrameworkError(MuonDistError, RuntimeError):
    """A framework (DeepSpeed, Trainer, accelerate, FSDP2) has settings with which training cannot be exact."""

    exit_code = 9


class PeerError(MuonDistError, RuntimeError):
    """Another rank does not answer, or a message between ranks failed."""

    exit_code = 10


class ReplicaError(MuonDistError, RuntimeError):
    """Copies of a parameter that must be equal are not."""

    exit_code = 11


class InexactError(MuonDistError):
    """A step differs from its reference: a wrong case of `muon-dist fuzz`, or a fault found by the witness."""

    exit_code = 12


class AuditError(MuonDistError, RuntimeError):
    """An audited step differs from the expected step."""

    exit_code = 13


class UnexpectedError(MuonDistError):
    """An unexpected error: a bug, here or in a library. The message names the file with its traceback.

    70 is EX_SOFTWARE of sysexits.h.
    """

    exit_code = 70


class ResourceError(MuonDistError, RuntimeError):
    """The machine has too little memory. 71 is EX_OSERR of sysexits.h."""

    exit_code = 71


class FileError(MuonDistError):
    """The file system reports an error: a full disk, a missing permission, a file where a folder is needed.

    74 is EX_IOERR of sysexits.h.
    """

    exit_code = 74


class Stopped(MuonDistError):
    """A signal stopped the run after it committed a checkpoint: start it again.

    75 is EX_TEMPFAIL of sysexits.h: a failure that goes away when the command is repeated.
    """

    exit_code = 75
