"""The structure of the package, read from its source: which layer imports which, and the sizes of modules and
functions."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "muon_dist"
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60

# One row per layer; an import goes to a lower layer, or stays inside its own unit.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "arguments",
        "defaults",
        "errors",
        "failures",
        "json_files",
        "numerics",
        "project",
        "ranks",
        "streams",
        "version",
        "waiting",
    ),
    ("routing", "layout", "pretrained"),
    ("ownership", "optim.rules"),
    ("config", "exchange", "checkpoint"),
    ("guards",),
    ("optim", "audit"),
    ("adapters", "data", "model"),
    ("planner", "bench", "experiments", "report", "launcher", "fuzz"),
    ("train", "doctor", "cli"),
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
# Neighbours on one floor do not import each other, but for these: everybody raises typed errors, the command line is a
# thin face of train/, `muon-dist spectra report` writes a page, and `bench host` places a model as a plan does. An
# audit reads the optimizer that it is an option of. The Trainer logs MFU, for which `model` knows the peak. Building a
# kernel takes long, which is said aloud.
SIDEWAYS = {
    ("arguments", "errors"),
    ("numerics", "errors"),
    ("numerics", "waiting"),
    ("project", "errors"),
    ("failures", "errors"),
    ("ranks", "errors"),
    ("ranks", "failures"),
    ("cli", "train"),
    ("cli", "doctor"),
    ("doctor", "train"),
    ("experiments", "report"),
    ("bench", "planner"),
    ("audit", "optim"),
    ("optim", "audit"),
    ("adapters", "model"),
}

# A framework is imported only in its own adapter. The longest matching prefix decides.
HOMES: dict[str, tuple[str, ...]] = {
    "deepspeed": (
        "adapters.deepspeed",
        "audit.follow_deepspeed",
        "audit.followed",
        "bench.peers_deepspeed",
        "fuzz.engines",
    ),
    "accelerate": ("adapters.hf.parallel", "adapters.deepspeed"),
    "transformers": (
        "adapters",
        "audit.follow_trainer",
        "model",
        "data.tokenizer",
        "pretrained",
        "routing",
        "config",
    ),
    "transformers.Trainer": ("adapters.hf.private",),
    "transformers.TrainingArguments": (
        "adapters.hf.trainer",
        "adapters.hf.checkpoint",
        "adapters.hf.private",
        "config",
    ),
    "transformers.trainer": ("adapters.hf.trainer", "adapters.hf.checkpoint", "adapters.hf.private"),
    "transformers.training_args": ("adapters.hf.trainer", "config"),
    "datasets": ("data",),
    "sentencepiece": ("data",),
    "torch.distributed.fsdp": ("adapters.fsdp2", "bench.peers_fsdp2", "fuzz.meshes"),
    "torch.nn.parallel": ("adapters.ddp", "bench.peers_ddp", "fuzz.holders"),
    # other Muons, for comparison
    "torch.optim._muon": ("bench.peers_torch",),
    "muon": ("bench.peers_keller",),
    "muon_fsdp2": ("bench.peers_muon_fsdp2",),
    "dtensor_muon": ("bench.peers_dtensor_muon",),
    "pydantic": ("config",),
    "quack": ("numerics.products",),
    "typer": (
        "arguments",
        "cli",
        "planner.cli",
        "experiments.cli",
        "bench.cli",
        "launcher.cli",
        "doctor.cli",
        "fuzz.cli",
        "audit.cli",
        "train.checkpoint_cli",
    ),
}
# import name -> name of the package, where they differ
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "sklearn": "scikit-learn",
    "quack": "quack-kernels",
    "muon": "muon-optimizer",
    "muon_fsdp2": "muon-fsdp2",
    "dtensor_muon": "dtensor-muon",
    "lm_eval": "lm-eval",
}
# in an extra, imported where it is used
OPTIONAL = {"dtensor-muon", "lm-eval", "muon-fsdp2", "muon-optimizer", "quack-kernels", "scikit-learn"}
# needed and not imported by name: the Trainer's engine, sentencepiece's model file, the format of saved models
THROUGH_OTHERS = {"accelerate", "protobuf", "safetensors"}


def modules() -> dict[str, Path]:
    """Dotted name under muon_dist ("optim.muon"; "" is the package itself) -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[tuple[str, int]]:
    """(absolute dotted target, line) of every import statement in the module, also inside functions and for types."""
    path = MODULES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["muon_dist", *name.split(".")] if name else ["muon_dist"]
                keep = len(package) - node.level + (path.name == "__init__.py")
                base = ".".join([*package[:keep], *([base] if base else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def own_module(target: str) -> str | None:
    """The muon_dist module of an import target; None if the target belongs to another package."""
    if target != "muon_dist" and not target.startswith("muon_dist."):
        return None
    name = target.removeprefix("muon_dist").lstrip(".")
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def unit(name: str) -> str:
    """The unit that belongs to one layer: a module or package of muon_dist, or the update rules."""
    return "optim.rules" if name.startswith("optim.rules") else name.partition(".")[0]


def starts(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_go_downward(name: str) -> None:
    assert unit(name) in FLOOR, f"muon_dist/{unit(name)} stands on no floor: add it to FLOORS"
    for target, line in imports(name):
        other = own_module(target)
        if other is None or unit(other) == unit(name):
            continue
        where = f"{MODULES[name]}:{line}: {unit(name)} (floor {FLOOR[unit(name)]}) imports {target}"
        assert other, f"{where}: the package's top re-exports from above; import the module itself"
        downward = FLOOR[unit(other)] < FLOOR[unit(name)] or (unit(name), unit(other)) in SIDEWAYS
        assert downward, f"{where} (floor {FLOOR[unit(other)]})"


def test_no_circle() -> None:
    """Typing imports included."""
    edges = {
        name: {other for target, _ in imports(name) if (other := own_module(target)) is not None} - {name}
        for name in MODULES
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "circle: " + " -> ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for other in sorted(edges[name]):
            visit(other, (*path, name))
        done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("name", [name for name in MODULES if unit(name) == "numerics"])
def test_numerics_is_free_of_distributed(name: str) -> None:
    targets = [target for target, _ in imports(name) if starts(target, "torch.distributed")]
    uses = "torch.distributed" in MODULES[name].read_text(encoding="utf-8")
    assert not targets and not uses, f"{name} uses torch.distributed"


@pytest.mark.parametrize("name", list(MODULES))
def test_each_framework_in_its_adapter_alone(name: str) -> None:
    for target, line in imports(name):
        matching = [framework for framework in HOMES if starts(target, framework)]
        if not matching:
            continue
        framework = max(matching, key=len)
        allowed = any(starts(name, home) for home in HOMES[framework])
        assert allowed, f"{MODULES[name]}:{line} imports {target}; only {', '.join(HOMES[framework])} may"


def test_what_is_imported_is_declared() -> None:
    """Every third-party package is a dependency of our own, not one that happens to come with another."""
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    declared = {name.lower() for name in re.findall(r'^    "([A-Za-z0-9_.-]+)', block[1], re.MULTILINE)}
    roots = {target.partition(".")[0] for name in MODULES for target, _ in imports(name)}
    third_party = roots - set(sys.stdlib_module_names) - {"muon_dist"}
    distributions = {DISTRIBUTIONS.get(root, root) for root in third_party}
    assert (distributions - OPTIONAL) | THROUGH_OTHERS == declared


@pytest.mark.parametrize("name", list(MODULES))
def test_sizes(name: str) -> None:
    source = MODULES[name].read_text(encoding="utf-8")
    lines = len(source.splitlines())
    assert lines <= MAX_MODULE_LINES, f"{MODULES[name]} has {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{MODULES[name]}:{node.lineno} {node.name} has {length} lines"


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if path.name == "__init__.py" and name])
def test_packages_only_re_export(name: str) -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.Expr, ast.Assign, ast.AnnAssign)
    for node in ast.parse(MODULES[name].read_text(encoding="utf-8")).body:
        assert isinstance(node, allowed), f"{MODULES[name]}:{node.lineno} does more than re-export"
