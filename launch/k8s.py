"""`python -m launch k8s`: a JobSet (jobset.x-k8s.io/v1alpha2), one pod a node, one `launch.node` in each.

JobSet (0.10.1 or newer) makes the headless service by which pods find each other, and starts the whole set anew when one pod
fails, if its rules say so: after exit code 85 and evictions as often as they come, and after 87 and deaths by a signal. Any
other exit code fails the set. Before a restart the first node asks whether the start before got anywhere, so that
`restart.max_without_progress` holds here as elsewhere. Rendered and checked against the API's types; not run on a cluster.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

import yaml

from launch.folder import check_owner, prepare, submitted
from launch.request import Request
from launch.workers import environment, with_setup
from tubelet import files
from tubelet.errors import EXIT_LOST, EXIT_PREEMPTED, ConfigError, Problems, RunError
from tubelet.redact import secrets_in

LONGEST = 40
"""Characters of a job's name: names of pods are made of it, and may have 63."""
MOST_RESTARTS = 10_000
"""JobSet counts all restarts in a job's life; we count those in a row that got nowhere, which is the limit that holds."""
SIGNALS = (129, 130, 131, 132, 133, 134, 135, 136, 137, 138, 139, 140, 143, 152, 153, 159)
"""Exit codes of processes that a signal ended."""
RULES = {"preempted": "0|1", "failed": "2"}
"""JobSet's rule -> the rules of `podFailurePolicy` below, by their numbers, that lead to it."""


def check(request: Request) -> None:
    """Raises one `ConfigError` for all that cannot be."""
    settings, problems = request.settings, Problems(ConfigError)
    if not settings.k8s.image:
        problems.add("`k8s.image` is required: the container image that holds this project.",
                     "--image registry/name:tag, or k8s.image in the site's YAML")
    if settings.node_range[0] != settings.node_range[1]:
        problems.add(f"--nodes {settings.nodes}: a JobSet has a fixed number of pods.", f"--nodes {settings.node_range[0]}")
    for key in secrets_in(settings.environment):
        problems.add(f"environment.{key} looks like a secret, and everybody who may look at the job would see it.",
                     "a Secret of the cluster: --env-from='[{secretRef: {name: NAME}}]'")
    for key, problem, hint in unused(request):
        if request.sources.get(key) == "command line":
            problems.add(problem, hint)
    grace = request.training.preempt_grace_seconds if request.training else 0
    if grace >= settings.k8s.grace_seconds:
        problems.add(f"k8s.grace_seconds is {settings.k8s.grace_seconds}, and the program may take preempt_grace_seconds "
                     f"{grace:g} to save: it would be killed in the middle.",
                     f"--grace-seconds {int(grace) + 60}, or a smaller preempt_grace_seconds=")
    problems.raise_if_any()


def unused(request: Request) -> list[tuple[str, str, str]]:
    """What was asked for and is not done here, as (key, problem, next step): an error on the command line; a site's YAML is
    for other launchers too, and is told."""
    settings, found = request.settings, []
    if settings.container:
        found.append(("container", f"--container: a pod is a container already, of the image {settings.k8s.image}.",
                      "--image, and no --container"))
    if settings.restart.exclude_failed_node:
        found.append(("restart.exclude_failed_node",
                      "--restart.exclude-failed-node: JobSet may start on the failed node again.",
                      "`kubectl cordon NODE` for one that is broken, and no --restart.exclude-failed-node"))
    return found


def job_name(name: str) -> str:
    """A name that Kubernetes takes for jobs and services: lower case, digits and dashes, a letter first, short."""
    text = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "job"
    text = text if text[0].isalpha() else f"t-{text}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST - 9].rstrip('-')}-{zlib.crc32(name.encode()):08x}"


def jobset(request: Request) -> dict[str, Any]:
    """The document."""
    settings, name = request.settings, job_name(request.name)
    labels = {"app.kubernetes.io/name": "tubelet", "app.kubernetes.io/instance": name, **settings.k8s.labels}
    queue = {"kueue.x-k8s.io/queue-name": settings.k8s.queue} if settings.k8s.queue else {}
    metadata = {"name": name, "namespace": settings.k8s.namespace, "labels": {**labels, **queue}}
    nodes = settings.node_range[0]
    job = {"backoffLimit": 0, "completionMode": "Indexed", "completions": nodes, "parallelism": nodes,
           "activeDeadlineSeconds": settings.seconds, "podFailurePolicy": {"rules": _pod_rules()},
           "template": {"metadata": _given({"labels": labels, "annotations": settings.k8s.annotations}),
                        "spec": pod(request, name)}}
    restarts = MOST_RESTARTS if settings.restart.on_failure and settings.restart.max_without_progress else 0
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": _given(metadata),
            "spec": {"network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
                     "failurePolicy": {"maxRestarts": restarts, "rules": _set_rules(bool(restarts))},
                     "replicatedJobs": [{"name": "node", "replicas": 1,
                                         "template": {"metadata": {"labels": labels}, "spec": _given(job)}}]}}


def _pod_rules() -> list[dict[str, Any]]:
    """What ends the job at once, each with a message of its own: an eviction, a save on request, an error. What is not here
    (87, signals) ends it as well, since `backoffLimit` is 0, with another reason."""
    codes = {"containerName": "main", "operator": "In", "values": [EXIT_PREEMPTED]}
    final = {"containerName": "main", "operator": "NotIn", "values": sorted({EXIT_PREEMPTED, EXIT_LOST, *SIGNALS} - {130})}
    return [{"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "FailJob", "onExitCodes": codes}, {"action": "FailJob", "onExitCodes": final}]


def _set_rules(restarts: bool) -> list[dict[str, Any]]:
    actions = {"preempted": "RestartJobSetAndIgnoreMaxRestarts", "failed": "FailJobSet"}
    rules = [{"name": name, "action": actions[name], "onJobFailureReasons": ["PodFailurePolicy"],
              "onJobFailureMessagePatterns": [f"rule at index ({RULES[name]})$"]} for name in actions]
    return rules if restarts else [*rules, {"name": "lost", "action": "FailJobSet"}]


def pod(request: Request, name: str) -> dict[str, Any]:
    """The pod of one node."""
    settings, k8s = request.settings, request.settings.k8s
    gpus = settings.gpus_per_node if settings.gpus_per_node is not None else settings.tasks_per_node
    amounts = {"cpu": settings.cpus_per_task and str(settings.cpus_per_task * settings.tasks_per_node),
               "memory": settings.memory and _memory(settings.memory), k8s.gpu_resource: str(gpus) if gpus else None}
    resources = _given({"requests": _given(amounts), "limits": _given({**amounts, "cpu": None})})
    container = {"name": "main", "image": k8s.image, "imagePullPolicy": k8s.image_pull_policy,
                 "command": [word.replace("$(", "$$(") for word in command(request, name)],  # $(X) is theirs to fill in
                 "workingDir": k8s.workdir or settings.workdir, "env": _variables(request, name), "envFrom": k8s.env_from,
                 "resources": resources,
                 "ports": [{"name": "meeting", "containerPort": k8s.port}],
                 "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *k8s.volume_mounts]}
    return _given({
        "restartPolicy": "Never", "terminationGracePeriodSeconds": k8s.grace_seconds,
        "serviceAccountName": k8s.service_account, "priorityClassName": k8s.priority_class,
        "imagePullSecrets": [{"name": secret} for secret in k8s.image_pull_secrets], "nodeSelector": k8s.node_selector,
        "tolerations": k8s.tolerations, "containers": [_given(container)],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": k8s.shm}}, *k8s.volumes]})


def command(request: Request, name: str) -> list[str]:
    """What a pod runs; it is the number of its pod that tells a node which it is."""
    settings = request.settings
    words = [settings.python or "python", "-m", "launch.node", "--rank", "JOB_COMPLETION_INDEX",
             "--nodes", settings.nodes, "--processes", str(settings.tasks_per_node),
             "--endpoint", f"{name}-node-0-0.{name}:{settings.k8s.port}", "--id", name]
    if settings.cpus_per_task:
        words += ["--cpus-per-task", str(settings.cpus_per_task)]
    if settings.seconds is not None:
        words += ["--seconds", str(settings.seconds)]
    if request.training is not None:
        run = request.training.run
        words += ["--run", str(Path(run.dir, run.name)),
                  "--max-without-progress", str(settings.restart.max_without_progress)]
    return with_setup(settings.setup, [*words, "--", request.program, *request.words])


def _variables(request: Request, name: str) -> list[dict[str, Any]]:
    """The job's name is its JobSet's, so that each start may follow the one before it."""
    attempt = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"}}
    own = {"TUBELET_JOB": _job(request, name), **environment(request, {})}
    return [*({"name": key, "value": value} for key, value in own.items()),
            {"name": "TUBELET_RESTARTS", "valueFrom": attempt}]


def _job(request: Request, name: str) -> str:
    return f"k8s-{request.settings.k8s.namespace or 'default'}-{name}"


def _memory(text: str) -> str:
    """SLURM's 512G is Kubernetes' 512Gi; a number without a unit is MiB."""
    return f"{text}i" if text[-1].isalpha() else f"{text}Mi"


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is empty."""
    return {key: value for key, value in values.items() if value not in (None, "", [], {})}


class _Dumper(yaml.SafeDumper):
    """Without anchors, which nobody writes by hand."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def render(request: Request) -> str:
    """The YAML that is given to kubectl."""
    check(request)
    text = yaml.dump(jobset(request), Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=10_000)
    told = "".join(f"# {request.sources.get(key, key)}: {problem} Try: {hint}\n" for key, problem, hint in unused(request))
    told += f"# {request.settings.nodes} pods of {request.settings.tasks_per_node} processes, for `kubectl create -f`\n"
    return told + text


def run(request: Request) -> int:
    """Write the YAML into the launch folder and hand it to kubectl; returns 0 once it is accepted."""
    text = render(request)
    if shutil.which("kubectl") is None:
        raise ConfigError("There is no `kubectl` here to submit the job with.",
                          "install it, or --dry-run > job.yaml and `kubectl create -f job.yaml` where it is")
    check_owner(request)
    prepare(request.launch_folder)
    name, path = job_name(request.name), request.launch_folder / f"{job_name(request.name)}.yaml"
    files.write_atomic(path, text + "\n")
    done = subprocess.run(["kubectl", "create", "-f", str(path)], capture_output=True, text=True)
    space = ["-n", request.settings.k8s.namespace] if request.settings.k8s.namespace else []
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        hint = f"kubectl {' '.join([*space, 'delete jobset', name])} first, or --name of another job"
        if "already exists" not in said.lower():
            hint = "`kubectl get crd jobsets.jobset.x-k8s.io` and the context; https://jobset.sigs.k8s.io/docs/installation"
        raise RunError(f"kubectl did not take {path}: {said[:1000]}", hint)
    submitted(request.launch_folder, _job(request, name), "k8s")
    print("".join(f"note: {problem} Try: {hint}\n" for _, problem, hint in unused(request)), end="")
    where = " ".join(["kubectl", *space])
    print(f"{done.stdout.strip()}\n{path}\nfollow:  {where} logs -f job/{name}-node-0\nstate:   {where} get jobset {name}\n"
          f"end:     {where} delete jobset {name}   (saves first)", flush=True)
    return 0
