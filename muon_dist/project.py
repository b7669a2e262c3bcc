"""``muon-dist init``: writes a project folder with the configurations and launch files of the package."""

from __future__ import annotations

import shutil
from pathlib import Path

from muon_dist.errors import FileError

# In a wheel these files are inside the package; in a checkout (also an editable install) at the top level.
_PACKAGE = Path(__file__).resolve().parent
_LAUNCH = ("_env.sh", "torchrun.sh", "slurm.sbatch")

_README = """\
# A pretraining project with muon_dist

```bash
muon-dist train configs/quickstart.yaml                                        # one process
bash launch/torchrun.sh --nproc-per-node 2 train configs/quickstart.yaml name=two    # two processes
muon-dist train configs/quickstart.yaml data.path=FOLDER data.dir=data/mine name=mine    # your own text
muon-dist report runs/quickstart                                               # one HTML page of the run
```

- `configs/`: models from 1.6M parameters (`quickstart.yaml`, minutes on a CPU) to 1T. Copy one and change it;
  `muon-dist schema` prints every key, and `muon-dist plan CONFIG` says what a run will cost.
- `launch/torchrun.sh`: several processes or machines. `launch/slurm.sbatch`: the same under SLURM.
  `muon-dist launch --help`: files for Kubernetes and others.
- `runs/` and `data/`: written by runs; `.gitignore` excludes them.
"""
_GITIGNORE = "runs/\ndata/\nresults/\n"


def packaged(name: str) -> Path:
    """Installed path of `configs`, `launch`, or a file inside, such as `packaged("configs/quickstart.yaml")`."""
    inside = _PACKAGE / "project" / name
    return inside if inside.exists() else _PACKAGE.parent / name


def init(folder: Path) -> list[Path]:
    """Write a project into `folder`, which need not exist, and return the files, sorted by name.

    Raises FileError, before it writes, if one of the files exists already.
    """
    configs = packaged("configs")
    sources = {
        path.relative_to(configs.parent): path for path in configs.rglob("*") if path.suffix in (".yaml", ".json")
    }
    sources |= {Path("launch") / name: packaged(f"launch/{name}") for name in _LAUNCH}
    texts = {Path("README.md"): _README, Path(".gitignore"): _GITIGNORE}
    there = sorted(str(folder / name) for name in (*sources, *texts) if (folder / name).exists())
    if there:
        raise FileError(f"{there[0]} exists already: name another folder, or move the file away")
    written = []
    for name in sorted((*sources, *texts)):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in sources:
            shutil.copyfile(sources[name], target)
        else:
            target.write_text(texts[name], encoding="utf-8")
        written.append(target)
    return written
