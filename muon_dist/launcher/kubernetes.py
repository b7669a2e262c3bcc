"""Kubernetes manifests: Kubeflow Trainer v2 (TrainingRuntime and TrainJob) and, for elastic jobs, PyTorchJob.

Sources: the resource definitions of Kubeflow Trainer v2 (`trainer.kubeflow.org/v1alpha1`; package
kubeflow-trainer-api) and of the Training Operator v1 (`kubeflow.org/v1`). Both give torchrun the rendezvous address in
its PET_ variables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from muon_dist.errors import ConfigError
from muon_dist.launcher.job import Job
from muon_dist.launcher.shell import header, script

_LABEL = re.compile(r"^[a-z]([a-z0-9-]{0,48}[a-z0-9])?$")  # RFC 1035, leaving room for the suffixes of pods
_QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")
_IMAGE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$")
_VOLUME = re.compile(r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?):(/[^:]*)$")
PORT = 29400  # PyTorchJob: the port of the c10d rendezvous


@dataclass(frozen=True)
class Kubernetes:
    """Options of the containers: image, namespace, volumes, resources.

    kind: "trainjob" (Kubeflow Trainer v2) or "pytorchjob" (Training Operator v1, which has elastic jobs). volumes:
    "claim:/path" of persistent volume claims that all pods mount. grace: seconds for saving after a pod is told to
    end.
    """

    image: str
    kind: Literal["trainjob", "pytorchjob"] = "trainjob"
    namespace: str | None = None
    volumes: tuple[str, ...] = ()
    cpu: str | None = None
    memory: str | None = None
    shared_memory: str = "8Gi"
    grace: int = 180

    def __post_init__(self) -> None:
        if not _IMAGE.match(self.image):
            raise ConfigError(f"--image: {self.image!r} is not a valid name of a container image")
        if self.namespace is not None and not _LABEL.match(self.namespace):
            raise ConfigError(f"--namespace: {self.namespace!r} is not a valid name of a namespace: a-z, 0-9 and -")
        for option, value in (("cpu", self.cpu), ("memory", self.memory), ("shm", self.shared_memory)):
            if value is not None and not _QUANTITY.match(value):
                raise ConfigError(f"--{option}: {value!r} is not a quantity of Kubernetes, such as 8 or 64Gi")
        for volume in self.volumes:
            if not _VOLUME.match(volume):
                raise ConfigError(f"--volume: {volume!r} is not CLAIM:/PATH, such as runs:/workspace/runs")


class _Dumper(yaml.SafeDumper):
    """Safe YAML that writes a text of several lines as a block."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def resource_name(name: str) -> str:
    """A name of Kubernetes (RFC 1035, at most 50 characters) from the name of a run.

    Raises ConfigError if no character of it is allowed.
    """
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    label = f"run-{label}" if label[:1].isdigit() else label
    label = label[:50].rstrip("-")
    if not _LABEL.match(label):
        raise ConfigError(f"--name: nothing of {name!r} can be a name in Kubernetes; give one of a-z, 0-9 and -")
    return label


def literal(text: str) -> str:
    """`text` escaped, so that Kubernetes does not replace $(VARIABLE) in it."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def render_kubernetes(job: Job, kubernetes: Kubernetes, command: Sequence[str]) -> str:
    """The manifest as YAML. Raises ConfigError for an elastic TrainJob, which Kubeflow Trainer v2 does not support."""
    name = resource_name(job.name)
    if kubernetes.kind == "trainjob" and job.elastic:
        raise ConfigError(
            f"--nodes {job.node_range}: a TrainJob has a fixed number of machines (Kubeflow Trainer v2); give one "
            "number, or --kind pytorchjob"
        )
    documents = (
        _trainjob(name, job, kubernetes) if kubernetes.kind == "trainjob" else [_pytorchjob(name, job, kubernetes)]
    )
    text = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=119)
    return f"{header(command, 'kubectl apply -f FILE')}\n{text}"


def _container(name: str, job: Job, kubernetes: Kubernetes) -> dict[str, Any]:
    """The container with the training: bash, a fixed script, and the words of the command as its arguments."""
    text = script("container.sh", job=job, seconds=max(30, kubernetes.grace - 30)).rstrip("\n")
    container: dict[str, Any] = {
        "name": name,
        "image": kubernetes.image,
        "command": ["bash", "-c", literal(text), "muon-dist"],
        "args": [literal(word) for word in ("-m", "muon_dist.cli", *job.arguments)],
    }
    amounts: dict[str, Any] = {}
    if kubernetes.cpu is not None:
        amounts["cpu"] = kubernetes.cpu
    if kubernetes.memory is not None:
        amounts["memory"] = kubernetes.memory
    if job.gpus:
        amounts["nvidia.com/gpu"] = str(job.gpus)
    if amounts:
        container["resources"] = {"limits": amounts, "requests": dict(amounts)}
    claims = [(_VOLUME.match(volume), f"volume-{i}") for i, volume in enumerate(kubernetes.volumes)]
    container["volumeMounts"] = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        *({"name": volume, "mountPath": match[3]} for match, volume in claims if match is not None),
    ]
    return container


def _pod(name: str, job: Job, kubernetes: Kubernetes) -> dict[str, Any]:
    claims = [(volume.partition(":")[0], f"volume-{i}") for i, volume in enumerate(kubernetes.volumes)]
    return {
        # a container's default of 64 MiB is too small for NCCL and for a data loader's workers
        "volumes": [
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": kubernetes.shared_memory}},
            *({"name": volume, "persistentVolumeClaim": {"claimName": claim}} for claim, volume in claims),
        ],
        "containers": [_container(name, job, kubernetes)],
        "terminationGracePeriodSeconds": kubernetes.grace,
    }


def _metadata(name: str, kubernetes: Kubernetes) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name}
    if kubernetes.namespace is not None:
        found["namespace"] = kubernetes.namespace
    return found


def _trainjob(name: str, job: Job, kubernetes: Kubernetes) -> list[dict[str, Any]]:
    """A runtime that contains the whole pod, and the job: nothing depends on the runtimes of the cluster."""
    step = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    runtime = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": _metadata(name, kubernetes),
        "spec": {
            "mlPolicy": {"numNodes": job.nodes, "torch": {}},
            "template": {
                "spec": {
                    # if a pod was evicted or its machine failed, all pods start again, from the newest checkpoint
                    "failurePolicy": {"maxRestarts": 10},
                    "replicatedJobs": [
                        {
                            "name": "node",
                            "template": {
                                "metadata": {"labels": step},
                                "spec": {
                                    "template": {"spec": {**_pod("node", job, kubernetes), "restartPolicy": "Never"}}
                                },
                            },
                        }
                    ],
                }
            },
        },
    }
    train = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(name, kubernetes),
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name},
            "trainer": {"numNodes": job.nodes, "numProcPerNode": job.processes},
        },
    }
    return [runtime, train]


def _pytorchjob(name: str, job: Job, kubernetes: Kubernetes) -> dict[str, Any]:
    pod = _pod("pytorch", job, kubernetes)
    pod["containers"][0]["ports"] = [{"name": "pytorchjob-port", "containerPort": PORT, "protocol": "TCP"}]
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(name, kubernetes),
        "spec": {
            "elasticPolicy": {
                "rdzvBackend": "c10d",
                "rdzvId": name,
                "rdzvPort": PORT,
                "minReplicas": job.fewest_nodes,
                "maxReplicas": job.nodes,
                "maxRestarts": 10,
            },
            "nprocPerNode": str(job.processes),
            "runPolicy": {"cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": {
                "Worker": {"replicas": job.nodes, "restartPolicy": "OnFailure", "template": {"spec": pod}}
            },
        },
    }
