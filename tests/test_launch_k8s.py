"""`launch k8s`: the document is what the API takes, by the models of the official client and by JobSet's own fields, and
says what the job needs. (Rendered, not run: there is no cluster here.)"""

import re
import sys
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from golden_files import FOLDER, is_golden
from kubernetes import client
from programs import recipe

from launch.__main__ import main
from launch.k8s import RULES, SIGNALS, job_name
from tubelet.errors import EXIT_INTERRUPTED, EXIT_LOST, EXIT_PREEMPTED, EXIT_SUPERSEDED

GOLDEN = FOLDER / "k8s"
ROOT = Path(__file__).parent.parent
PRETRAIN = ["--", "pretrain", "configs/pretrain/vit_b16_i21k.yaml", "optimizer.lr=1e-3"]
CASES = {
    "simple": ["--image", "registry/tubelet:1", "--nodes", "2", *PRETRAIN],
    "site": ["--site", str(ROOT / "configs/site.example.yaml"), *PRETRAIN],
    "everything": [
        "--image", "registry/tubelet:1", "--name", "Big_Run.1", "--nodes", "4", "--gpus-per-node", "4",
        "--cpus-per-task", "12", "--memory", "512G", "--time", "1-00:00:00", "--namespace", "vision",
        "--service-account", "trainer", "--image-pull-policy", "Always",
        "--image-pull-secrets", "[registry]", "--gpu-resource", "amd.com/gpu",
        "--node-selector", "{gpu: mi300}", "--tolerations", "[{key: gpu, operator: Exists, effect: NoSchedule}]",
        "--volumes", "[{name: data, persistentVolumeClaim: {claimName: data}}]",
        "--volume-mounts", "[{name: data, mountPath: /data, readOnly: true}]", "--env-from", "[{secretRef: {name: wandb}}]",
        "--shm", "64Gi", "--grace-seconds", "900", "--port", "2222", "--queue", "team", "--priority-class", "high",
        "--labels", "{team: vision}", "--annotations", "{note: hi}", "--k8s.workdir", "/src", "--setup",
        "echo $(hostname)\nulimit -n 65536", "--environment.NCCL_DEBUG=INFO", "--python", "/opt/bin/python",
        "--restart.max-without-progress", "5", *PRETRAIN],
    "no_restarts": ["--image", "registry/tubelet:1", "--gpus-per-node", "0", "--processes-per-node", "2",
                    "--restart.on-failure", "false", *PRETRAIN],
    "doctor": ["--image", "registry/tubelet:1", "--nodes", "2", "--", "doctor", "--quick"],
}
JOBSET = {  # JobSet's own types (kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go, 0.11): field -> its type
    "JobSet": {"apiVersion": str, "kind": str, "metadata": client.V1ObjectMeta, "spec": "JobSetSpec"},
    "JobSetSpec": {"replicatedJobs": ["ReplicatedJob"], "network": "Network", "successPolicy": "SuccessPolicy",
                   "failurePolicy": "FailurePolicy", "suspend": bool, "coordinator": "Coordinator", "managedBy": str,
                   "ttlSecondsAfterFinished": int},
    "Network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "FailurePolicy": {"maxRestarts": int, "restartStrategy": str, "rules": ["FailurePolicyRule"]},
    "FailurePolicyRule": {"name": str, "action": str, "onJobFailureReasons": [str], "onJobFailureMessagePatterns": [str],
                          "targetReplicatedJobs": [str]},
    "ReplicatedJob": {"name": str, "groupName": str, "template": client.V1JobTemplateSpec, "replicas": int},
}


def checked(value, kind, where=""):
    """Every key of `value` must be a field of `kind`, and every value of that field's type, all the way down."""
    if isinstance(kind, list):
        assert isinstance(value, list), where
        for number, item in enumerate(value):
            checked(item, kind[0], f"{where}[{number}]")
    elif isinstance(kind, str) and kind in JOBSET:
        for key, item in value.items():
            assert key in JOBSET[kind], f"{where}.{key} is no field of {kind}"
            checked(item, JOBSET[kind][key], f"{where}.{key}")
    elif isinstance(kind, str):  # as the client writes types
        if found := re.fullmatch(r"list\[(.+)\]", kind):
            checked(value, [found[1]], where)
        elif found := re.fullmatch(r"dict\(str, (.+)\)", kind):
            assert isinstance(value, dict) and all(isinstance(key, str) for key in value), where
            for key, item in value.items():
                checked(item, found[1], f"{where}.{key}")
        else:
            plain = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object, "datetime": datetime}
            checked(value, plain.get(kind) or getattr(client, kind), where)
    elif hasattr(kind, "openapi_types"):
        assert isinstance(value, dict), where
        fields = {name: kind.openapi_types[own] for own, name in kind.attribute_map.items()}
        for key, item in value.items():
            assert key in fields, f"{where}.{key} is no field of {kind.__name__}"
            checked(item, fields[key], f"{where}.{key}")
        required = {kind.attribute_map[own]: value.get(kind.attribute_map[own]) for own in kind.attribute_map}
        snake = {own: required[name] for own, name in kind.attribute_map.items()}
        kind(**{own: item for own, item in snake.items() if item is not None})  # raises for a required field that is missing
    else:
        assert isinstance(value, kind) and not (kind is int and isinstance(value, bool)), f"{where} is {value!r}"


def rendered(capsys, *words):
    assert main(["k8s", "--dry-run", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", CASES)
def test_the_yaml_is_the_golden_one_and_has_no_field_that_the_api_does_not_know(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = rendered(capsys, *CASES[name])
    is_golden(text, f"k8s/{name}.yaml")
    (document,) = yaml.safe_load_all(text)
    checked(document, "JobSet")


@pytest.mark.parametrize("at, value", [
    (("spec", "replicas"), 1), (("spec", "failurePolicy", "maxRestart"), 1), (("spec", "network", "subdomain"), 1),
    (("spec", "replicatedJobs", 0, "template", "spec", "backofLimit"), 0),
    (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "volumes"), []),
    (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "env", 0, "value"), 1),
    (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "name"), None)])
def test_the_check_finds_unknown_fields_wrong_types_and_missing_ones(at, value):
    document = yaml.safe_load((GOLDEN / "everything.yaml").read_text())
    inner = document
    for key in at[:-1]:
        inner = inner[key]
    if value is None:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    with pytest.raises((AssertionError, ValueError)):
        checked(document, "JobSet")


def parts(name):
    """(JobSet's spec, the job's spec, the pod's spec, its container) of a golden file."""
    spec = yaml.safe_load((GOLDEN / f"{name}.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    return spec, job, job["template"]["spec"], job["template"]["spec"]["containers"][0]


def test_every_pod_is_a_node_that_finds_the_first_one_by_its_name():
    spec, job, pod, main = parts("everything")
    name = "big-run-1"
    assert (job["completions"], job["parallelism"], job["completionMode"], job["backoffLimit"]) == (4, 4, "Indexed", 0)
    assert spec["network"] == {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True}
    # pods of a JobSet are <jobset>-<replicated job>-<job's number>-<pod's number>.<subdomain>
    assert f"{name}-node-0-0.{name}:2222" == main["command"][main["command"].index("--endpoint") + 1]
    assert "JOB_COMPLETION_INDEX" == main["command"][main["command"].index("--rank") + 1]
    assert main["command"][:2] == ["bash", "-c"] and "$$(hostname)" in main["command"][2]  # $( is Kubernetes' own
    assert main["command"][-3:] == ["pretrain", "configs/pretrain/vit_b16_i21k.yaml", "optimizer.lr=1e-3"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 900
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in main["volumeMounts"]
    assert main["resources"] == {"requests": {"cpu": "48", "memory": "512Gi", "amd.com/gpu": "4"},
                                 "limits": {"memory": "512Gi", "amd.com/gpu": "4"}}
    assert job["activeDeadlineSeconds"] == 86400 and "--seconds" in main["command"]
    assert "resources" not in parts("no_restarts")[3]  # no GPUs, and nobody said how much else


def outcome(name, code=0, evicted=False):
    """What the controllers do when the container ends with `code`: the job by `podFailurePolicy` (first rule that fits),
    else by its backoff limit; the set by the first of its rules that fits, else a restart."""
    spec, job, *_ = parts(name)
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for number, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes")
        fits = evicted if codes is None else code and (code in codes["values"]) == (codes["operator"] == "In")
        if fits:
            what = f"failed with exit code {code}" if codes else f"has condition {rule['onPodConditions'][0]['type']}"
            reason = "PodFailurePolicy"
            message = f"Container main for pod vision/x-node-0-0 {what} matching {rule['action']} rule at index {number}"
            break
    for rule in spec["failurePolicy"]["rules"]:
        if (reason in rule.get("onJobFailureReasons", [reason])
                and any(re.search(one, message) for one in rule.get("onJobFailureMessagePatterns", [""]))):
            return rule["action"]
    return "RestartJobSet"


def test_which_ends_start_the_set_anew():
    for code in (EXIT_LOST, 137, 143, 139, 134):
        assert outcome("simple", code) == "RestartJobSet" and outcome("no_restarts", code) == "FailJobSet"
    for name in ("simple", "no_restarts"):  # asked to leave: saved, and goes on as often as that happens
        assert outcome(name, EXIT_PREEMPTED) == outcome(name, 137, evicted=True) == "RestartJobSetAndIgnoreMaxRestarts"
        for code in (1, 2, EXIT_SUPERSEDED, EXIT_INTERRUPTED, 3, 127):
            assert outcome(name, code) == "FailJobSet"
    assert set(RULES) == {"preempted", "failed"} and all(128 < code < 160 for code in SIGNALS)
    most = parts("simple")[0]["failurePolicy"]["maxRestarts"]
    assert most > 1000 and parts("no_restarts")[0]["failurePolicy"]["maxRestarts"] == 0
    assert parts("everything")[3]["command"][parts("everything")[3]["command"].index("--max-without-progress") + 1] == "5"


@pytest.mark.parametrize("name, expected", [("vit_b16", "vit-b16"), ("7.B+", "t-7-b"), ("__", "job"), ("x" * 63, None)])
def test_names_are_what_kubernetes_takes_and_long_ones_stay_apart(name, expected):
    text = job_name(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", text) and len(f"{text}-node-0-9999-abcde") <= 63
    assert text == expected if expected else text != job_name(name + "y")


def test_bad_input_is_refused_all_at_once(tmp_path, capsys):
    config, _ = recipe(tmp_path)
    assert main(["k8s", "--nodes", "1-2", "--environment.WANDB_API_KEY=abc", "--grace-seconds", "60", "--gpus-per-node", "1",
                 "--", "pretrain", str(config)]) == 1
    said = capsys.readouterr().err
    for part in ("`k8s.image` is required", "1-2", "fixed number of pods", "environment.WANDB_API_KEY looks like a secret",
                 "secretRef", "preempt_grace_seconds 240", "--grace-seconds 300"):
        assert part in said, (part, said)


def test_what_a_jobset_cannot_do_is_refused_and_told_where_it_stands_in_a_sites_yaml(tmp_path, capsys, monkeypatch):
    config, _ = recipe(tmp_path)
    program = ["--", "pretrain", str(config)]
    own = ["k8s", "--image", "registry/tubelet:1", "--gpus-per-node", "1"]
    assert main([*own, "--container", "apptainer exec x.sif", "--restart.exclude-failed-node", "true", *program]) == 1
    said = capsys.readouterr().err
    for part in ("2 problems", "--container: a pod is a container already, of the image registry/tubelet:1",
                 "JobSet may start on the failed node again", "kubectl cordon NODE"):
        assert part in said, (part, said)
    site = tmp_path / "site.yaml"
    site.write_text("container: apptainer exec x.sif\nrestart: {exclude_failed_node: true}\n")
    told = rendered(capsys, "--site", str(site), *own[1:], *program)
    assert f"# {site}: --container: a pod" in told and f"# {site}: --restart.exclude-failed-node" in told
    checked(yaml.safe_load(told), "JobSet")
    kubectl(tmp_path, 0, "created")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([own[0], "--site", str(site), *own[1:], *program]) == 0
    assert capsys.readouterr().out.count("note: --") == 2


def kubectl(folder, code, said):
    """A kubectl that keeps what it is given."""
    path = folder / "kubectl"
    path.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\n/bin/cat "$3" > {folder}/given\n'
                    f'echo "{said}" >&2\nexit {code}\n')
    path.chmod(0o755)


def test_the_file_is_handed_to_kubectl_and_its_refusal_is_explained(tmp_path, capsys, monkeypatch):
    config, folder = recipe(tmp_path)
    words = ["k8s", "--image", "i", "--gpus-per-node", "1", "--namespace", "vision", "--", "pretrain", str(config)]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(words) == 1 and "no `kubectl` here" in capsys.readouterr().err and not folder.exists()
    kubectl(tmp_path, 0, "created")
    assert main(words) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "asked").read_text() == f"create -f {folder}/launch/r.yaml\n"
    assert "kubectl -n vision delete jobset r" in said
    checked(yaml.safe_load((tmp_path / "given").read_text()), "JobSet")
    assert yaml.safe_load((folder / "launch" / "submitted.json").read_text())["job"] == "k8s-vision-r"
    for message, hint in (("jobsets.jobset.x-k8s.io r already exists", "kubectl -n vision delete jobset r first"),
                          ("no matches for kind JobSet", "jobset.sigs.k8s.io/docs/installation")):
        kubectl(tmp_path, 1, message)
        assert main(words) == 1
        said = capsys.readouterr().err
        assert message in said and hint in said, said


def test_no_torch_is_imported(monkeypatch):
    import subprocess

    code = ("import sys; from launch.__main__ import main; main(sys.argv[1:]); "
            "sys.exit(sorted({'torch', 'numpy', 'kubernetes'} & set(sys.modules)) != [])")
    for words in (["k8s", "--image", "i", "--dry-run", *PRETRAIN], ["local", "--nproc", "2", "--dry-run", *PRETRAIN]):
        assert subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
