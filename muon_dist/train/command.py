"""The command that continues a run."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

from muon_dist.train.environment import redact_arguments

LAUNCHED_BY = "MUON_DIST_COMMAND"
"""Environment variable with the command line of the launch script that started the run, quoted for a shell."""
_WITH_VALUE = ("--resume",)
_ALONE = ("--overwrite",)


def continuing(
    saved: bool, arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """The command line that continues this process's run, or starts it again if nothing was `saved`.

    It has the arguments of this process without secrets; --resume and --overwrite are replaced. Under
    launch/torchrun.sh and launch/slurm.sbatch it names that script; under another torchrun, torchrun's command for one
    node.
    """
    given = list(sys.argv if arguments is None else arguments)
    env = os.environ if environment is None else environment
    launched = env.get(LAUNCHED_BY)
    if given[1:2] != ["train"]:  # a program of the user's own
        return "train(config, resume='auto')" if saved else "train(config, overwrite=True)"
    if launched:
        words = shlex.split(launched)
    elif int(env.get("WORLD_SIZE") or 1) > 1:
        local = env.get("LOCAL_WORLD_SIZE") or env["WORLD_SIZE"]
        words = ["torchrun", "--nproc-per-node", local, "-m", "muon_dist.cli", *given[1:]]
    else:
        words = ["muon-dist", *given[1:]]
    kept, skip = [], False
    for word in words:
        if skip or word in _ALONE or word.partition("=")[0] in _WITH_VALUE:
            skip = not skip and word in _WITH_VALUE
            continue
        kept.append(word)
    return shlex.join([*redact_arguments(kept), *(["--resume", "auto"] if saved else ["--overwrite"])])
