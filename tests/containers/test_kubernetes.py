"""What is applied to a cluster is what Kubernetes' schemas allow, and its parts fit one another and what
megalite does. There is no cluster here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite.cli import make_parser
from megalite.config_file import load_config
from megalite.runtime.exit_codes import Exit
from small_runs import make_config

FOLDER = Path(__file__).parents[2] / "containers" / "kubernetes"
SETS = ("train", "serve")


def resources(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What a kustomization lists, by kind and name, as written."""
    folder = FOLDER / name
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    found = [each for file in listed for each in yaml.safe_load_all((folder / file).read_text())]
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


WORKLOADS = {
    "train": resources("train")["Job", "megalite-train"],
    "serve": resources("serve")["Deployment", "megalite-serve"],
}


@pytest.mark.parametrize("name", SETS)
def test_the_schemas_allow_it(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    written = list(resources(name).values())
    if shutil.which("kubectl"):  # as it is applied
        built = subprocess.run(
            ["kubectl", "kustomize", FOLDER / name], capture_output=True, text=True
        )
        assert built.returncode == 0, built.stderr
        applied = list(yaml.safe_load_all(built.stdout))
        assert {each["metadata"]["namespace"] for each in applied} == {"megalite"}
        written += applied
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a kind that it does not know
        for each in written:
            validate.validate(each, validate.latest_version(), strict=True)
    wrong = json.loads(json.dumps(WORKLOADS[name]))
    pod_of(wrong)["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(validate.ValidationError, match="imagePullPolice"):
        validate.validate(wrong, validate.latest_version(), strict=True)


def test_every_file_is_listed() -> None:
    for name in SETS:
        kustomization = yaml.safe_load((FOLDER / name / "kustomization.yaml").read_text())
        generated = [
            file for each in kustomization.get("configMapGenerator", []) for file in each["files"]
        ]
        listed = {"kustomization.yaml", *kustomization["resources"], *generated}
        here = {path.name for path in (FOLDER / name).iterdir()}
        instead = "hpa-by-waiting.yaml" if name == "serve" else "jobset.yaml"
        assert here - listed == {instead}
        # No image without a tag, and none that moves.
        (image,) = kustomization["images"]
        assert image["newTag"] not in ("", "latest")
        assert pod_of(WORKLOADS[name])["containers"][0]["image"] == image["name"]


@pytest.mark.parametrize("name", SETS)
def test_a_pod_has_no_rights_it_does_not_need(name: str) -> None:
    pod = pod_of(WORKLOADS[name])
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == 10001  # that of the image
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {name for kind, name in resources(name) if kind == "PersistentVolumeClaim"}


def test_services_and_policies_find_the_pods() -> None:
    for name in SETS:
        labels = WORKLOADS[name]["spec"]["template"]["metadata"]["labels"]
        for (kind, _), each in resources(name).items():
            spec = each["spec"]
            if kind in ("Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment"):
                selector = spec.get("podSelector") or spec["selector"]
                assert selector.get("matchLabels", selector) == labels, kind
    ports = {port["name"] for port in pod_of(WORKLOADS["serve"])["containers"][0]["ports"]}
    serve = resources("serve")
    assert {serve["Service", "megalite-serve"]["spec"]["ports"][0]["targetPort"]} == ports
    policy = serve["NetworkPolicy", "megalite-serve"]["spec"]
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == ports
    probes = [key for key in pod_of(WORKLOADS["serve"])["containers"][0] if key.endswith("Probe")]
    assert len(probes) == 3
    for probe in probes:
        request = pod_of(WORKLOADS["serve"])["containers"][0][probe]["httpGet"]
        assert (request["path"], {request["port"]}) == ("/health", ports)


def test_what_restarts_is_what_the_launcher_restarts() -> None:
    """The same statuses as in slurm/pretrain.sh: 2 and 78 end a job, 75 goes on without being
    counted, all others are tried again, not for ever."""
    spec = WORKLOADS["train"]["spec"]

    def action(status: int) -> str:
        for rule in spec["podFailurePolicy"]["rules"]:
            if codes := rule.get("onExitCodes"):
                assert codes["containerName"] == "train"
                if (status in codes["values"]) == (codes["operator"] == "In"):
                    return str(rule["action"])
        return "Count"

    expected = {
        Exit.MISTAKE: "FailJob",
        Exit.BAD_NUMBERS: "FailJob",
        Exit.STOPPED: "Ignore",
        Exit.HUNG: "Count",
        Exit.FAILED: "Count",
        Exit.NOT_SAVED: "Count",
        Exit.UNFIT: "Count",
        Exit.CORRUPTED: "Count",
    }
    others = {Exit.DONE, Exit.ALARM}  # of which the last is no training's
    assert {status: action(status) for status in Exit if status not in others} == expected
    assert action(137) == "Count"
    assert pod_of(WORKLOADS["train"])["restartPolicy"] == "Never"  # or the policy is not asked


def command_of_training() -> tuple[list[str], dict[str, str]]:
    """What a pod runs in its shell, and the environment it is given."""
    (container,) = pod_of(WORKLOADS["train"])["containers"]
    assert container["command"] == ["tini", "--", "sh", "-c"]
    env = {each["name"]: each["value"] for each in container["env"]}
    return shlex.split(container["args"][0].replace('"', "'")), env


def test_the_pods_are_as_many_as_the_ranks_expect_and_meet_at_the_first() -> None:
    spec, (words, env) = WORKLOADS["train"]["spec"], command_of_training()
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(env["NODES"])
    assert spec["backoffLimit"] % spec["parallelism"] == 0
    gpus = pod_of(WORKLOADS["train"])["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == int(env["RANKS"])
    service = resources("train")["Service", pod_of(WORKLOADS["train"])["subdomain"]]["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"]
    assert f"--master-addr=megalite-train-0.{pod_of(WORKLOADS['train'])['subdomain']}" in words
    assert f"--master-port={service['ports'][0]['port']}" in words
    config = load_config(FOLDER / "train" / "train.yaml")
    mounts = {
        mount["mountPath"] for mount in pod_of(WORKLOADS["train"])["containers"][0]["volumeMounts"]
    }
    assert str(config.run.folder.parent) in mounts
    assert {f"/{Path(source.path).parts[1]}" for source in config.data.train} <= mounts


def test_the_jobset_runs_the_pods_of_the_job() -> None:
    """JobSet's own schema comes with its controller, and is not here: its keys are those below. What it
    makes is a Job, for which there is one."""
    validate = pytest.importorskip("kubernetes_validate")
    jobset = yaml.safe_load((FOLDER / "train" / "jobset.yaml").read_text())
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    spec = jobset["spec"]
    assert {*spec} == {"network", "failurePolicy", "replicatedJobs"}
    network, (jobs,) = spec["network"], spec["replicatedJobs"]
    assert {*jobs} == {"name", "replicas", "template"}
    assert {*network} == {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"}
    job = jobs["template"]["spec"]
    made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": jobset["metadata"], "spec": job}
    validate.validate(made, validate.latest_version(), strict=True)

    # The same pods, but for the name by which the first is found.
    words, env = command_of_training()
    template = json.loads(json.dumps(job["template"]))
    first = f"{jobset['metadata']['name']}-{jobs['name']}-0-0.{network['subdomain']}"
    (container,) = template["spec"]["containers"]
    assert f"--master-addr={first} " in container["args"][0]
    (master,) = (word for word in words if word.startswith("--master-addr="))
    container["args"][0] = container["args"][0].replace(f"--master-addr={first}", master)
    template["spec"]["subdomain"] = network["subdomain"]
    assert template == WORKLOADS["train"]["spec"]["template"]
    assert job["completions"] == job["parallelism"] == int(env["NODES"])


def test_a_jobset_ends_and_restarts_as_the_job_does() -> None:
    jobset = yaml.safe_load((FOLDER / "train" / "jobset.yaml").read_text())["spec"]
    (jobs,) = jobset["replicatedJobs"]
    job, policy = jobs["template"]["spec"], jobset["failurePolicy"]
    rules = WORKLOADS["train"]["spec"]["podFailurePolicy"]["rules"]
    # Kubernetes fills in a condition's status for a Job; a JobSet's schema wants it.
    filled = json.loads(json.dumps(rules[:-1]))
    filled[1]["onPodConditions"][0]["status"] = "True"
    assert job["podFailurePolicy"]["rules"] == filled
    assert (rules[-1]["action"], job["backoffLimit"]) == ("Count", 0)
    # What fails a job by the policy is met again; any other failure is counted and tried again.
    assert {*policy} == {"maxRestarts", "restartStrategy", "rules"}
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert policy["restartStrategy"] == "BlockingRecreate"


def test_serving_is_called_as_the_command_line_wants_it_and_ends_in_time() -> None:
    pod = pod_of(WORKLOADS["serve"])
    (container,) = pod["containers"]
    arguments = make_parser().parse_args(container["args"])
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > arguments.grace + pause
    paths = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(Path(path).parent) for path in (arguments.api_key_file, arguments.ratings)} <= paths


def test_the_autoscaler_goes_by_a_metric_that_there_is() -> None:
    pytest.importorskip("prometheus_client")
    source = (FOLDER.parents[1] / "megalite/infer/serving/metrics.py").read_text()
    patch = yaml.safe_load((FOLDER / "serve" / "hpa-by-waiting.yaml").read_text())
    base = resources("serve")["HorizontalPodAutoscaler", "megalite-serve"]
    assert patch["metadata"] == base["metadata"]
    (metric,) = (each["pods"]["metric"]["name"] for each in patch["spec"]["metrics"])
    assert re.search(rf'Gauge\(\s*"{metric}"', source)


def test_the_command_of_the_pods_trains(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """As two processes that are given the indices of two pods, on this machine's own network."""
    if not request.config.getoption("--whole"):
        pytest.skip("one of the cases of --whole; test_hosts.py starts the same launchers")
    config = make_config(tmp_path, "llama", "train.steps=8", "observe.eval_every=0")
    (tmp_path / "train.yaml").write_text(config.to_yaml())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (container,) = pod_of(WORKLOADS["train"])["containers"]
    words = container["args"][0].replace("megalite-train-0.megalite-train", "127.0.0.1")
    words = words.replace("29500", str(port)).replace("/config/", f"{tmp_path}/")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    pods = [
        subprocess.Popen(
            ["sh", "-c", words],
            env=os.environ
            | {"NODES": "2", "RANKS": "1", "JOB_COMPLETION_INDEX": str(index), "PATH": path},
        )
        for index in range(2)
    ]
    assert [pod.wait(120) for pod in pods] == [0, 0]
    assert (config.run.folder / "metrics.jsonl").read_text().count('"loss"') == 8
