"""Typed errors. Each carries the exit code with which the command line ends; messages name the key, file, parameter
or rank at fault and what to do about it."""

from __future__ import annotations


class MuonDistError(Exception):
    """Base of every error that this package raises for a user.

    Attributes:
        exit_code: with which the command line ends.
        reported_elsewhere: another rank prints the message, so that it appears once.
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
    """A layout does not cover its matrices exactly, or the parameters are not those that were planned for."""

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
    """A framework (DeepSpeed, Trainer, accelerate, FSDP2) has settings with which the training cannot be exact."""

    exit_code = 9


class PeerError(MuonDistError, RuntimeError):
    """Another rank does not answer, or a message between ranks failed."""

    exit_code = 10


class ReplicaError(MuonDistError, RuntimeError):
    """Copies of a parameter that must be equal are not."""

    exit_code = 11


class InexactError(MuonDistError):
    """A step differs from that of one process: a case of `muon-dist fuzz` is wrong."""

    exit_code = 12


class AuditError(MuonDistError, RuntimeError):
    """An audited step differs from what was asked for."""

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
    """The file system refuses: a full disk, a missing permission, a file where a folder is needed.

    74 is EX_IOERR of sysexits.h.
    """

    exit_code = 74


class Stopped(MuonDistError):
    """A signal stopped the run after it committed a checkpoint: start it again.

    75 is EX_TEMPFAIL of sysexits.h: a failure that goes away when the command is repeated.
    """

    exit_code = 75
