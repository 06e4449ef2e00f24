"""The batch scripts, run with an `srun`, an `sbatch` and a `kvq` that are not the real ones."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[2] / "scripts" / "slurm"

SRUN = """#!/usr/bin/env bash
# Runs its command in this process, as one task.
[[ $1 == --ntasks=1 ]] || exit 99
shift
exec "$@"
"""

SBATCH = """#!/usr/bin/env bash
# Runs the job at once: each array task in turn, and a dependent job whatever became of the array.
printf '%s\\n' "$*" >>"$FAKE/sbatch.log"
array= dependency=
while [[ $1 == --* ]]; do
  case $1 in
    --array=*) array=${1#--array=} ;;
    --dependency=*) dependency=${1#--dependency=} ;;
  esac
  shift
done
id=$((100 + $(wc -l <"$FAKE/sbatch.log")))
cp "$1" "$FAKE/slurm_script"; shift # the real one runs a copy, far from where the script lies
if [[ -n $array ]]; then
  array=${array%%%*}
  for ((task = ${array%-*}; task <= ${array#*-}; task++)); do
    SLURM_JOB_ID=$id SLURM_ARRAY_TASK_ID=$task bash "$FAKE/slurm_script" "$@" >>"$FAKE/job.log" 2>&1
    echo "$task $?" >>"$FAKE/tasks.log"
  done
else
  SLURM_JOB_ID=$id bash "$FAKE/slurm_script" "$@" >>"$FAKE/job.log" 2>&1
  echo "report $?" >>"$FAKE/tasks.log"
fi
echo "$id;cluster"
"""

KVQ = """#!{python}
import json, os, signal, sys
from pathlib import Path

args = sys.argv[1:]
fake = Path(os.environ["FAKE"])
with open(fake / "kvq.log", "a") as log:
    print(*args, file=log)
if args[0] == "compare":
    from kvq_cli.app import main
    main(args)
policy, concurrency, output = (args[args.index("--" + x) + 1] for x in ("policy", "concurrency", "output"))
plan = json.loads((fake / "plan.json").read_text())
for rule in plan:
    if rule["policy"] == policy and rule["times"] > 0:
        rule["times"] -= 1
        (fake / "plan.json").write_text(json.dumps(plan))
        if rule["how"] == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(rule["how"])
record = json.loads((fake / "record.json").read_text())
record["label"] = policy
record["policy"] = {{"name": policy, "key": policy, "value": policy, "sink": 0, "recent": 0}}
record["workload"]["concurrency"] = int(concurrency)
Path(output).write_text(json.dumps(record, indent=2))
"""


@pytest.fixture
def cluster(tmp_path, bench):
    """Runs a script; the fake programs' logs lie in `tmp_path`."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, "sbatch": SBATCH, "kvq": KVQ.format(python=sys.executable)}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "record.json").write_text(json.dumps(bench.record().to_dict()))
    (tmp_path / "plan.json").write_text("[]")

    def run(script: str, *args: str, plan: tuple = (), **env: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        path = os.pathsep.join([str(tools), os.environ["PATH"]])
        settings = {"FAKE": str(tmp_path), "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            ["bash", str(SLURM / script), *args],
            env={**os.environ, **settings, **env},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def test_a_single_job(cluster, tmp_path):
    done = cluster("profile.sbatch", "--num-prompts", "7", SLURM_JOB_ID="12", SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    file = tmp_path / "kvq-12" / "42_c64.json"
    assert lines(tmp_path / "kvq.log") == [
        f"profile-throughput --policy 42 --concurrency 64 --output {file} --num-prompts 7"
    ]
    assert json.loads(file.read_text())["label"] == "42"


def test_a_job_on_several_machines(cluster, tmp_path):
    fakes = {
        "srun": '[[ $1 == --ntasks-per-node=1 ]] || exit 99; shift; exec "$@"',
        "scontrol": "printf 'node7\\nnode8\\n'",
        "torchrun": 'echo "$MARK $*" >"$FAKE/torchrun.log"',
    }
    for name, line in fakes.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "12", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    setup = "export MARK=ready"
    done = cluster("parallel.sbatch", "--model", "a b", KVQ_GPUS="4", KVQ_OUT="out", KVQ_SETUP=setup, **slurm)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "torchrun.log") == [
        "ready --nnodes 2 --nproc-per-node 4 --rdzv-id 12 --rdzv-backend c10d --rdzv-endpoint node7:29500"
        " -m kvq_cli.app profile-throughput --tp 8 --policy 42 --concurrency 64 --output out/42_c64.json"
        " --model a b"
    ]


def test_a_single_job_by_environment(cluster, tmp_path):
    setup = "export MARK=ready; echo $MARK >mark"
    done = cluster(
        "profile.sbatch", KVQ_POLICY="int8:lm4", KVQ_CONCURRENCY="8", KVQ_OUT="runs here", KVQ_SETUP=setup
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs here" / "int8-lm4_c8.json").exists()
    assert (tmp_path / "mark").read_text() == "ready\n"


def test_a_single_job_that_fails_says_so(cluster):
    assert cluster("profile.sbatch", plan=({"policy": "42", "how": 1, "times": 1},)).returncode == 1


def test_policies_by_concurrencies_end_in_one_comparison(cluster, tmp_path):
    layered = "42@0,1,-2,-1=8"
    grid = {
        "KVQ_POLICIES": f"0,{layered},int8:lm4",
        "KVQ_CONCURRENCIES": "16,64",
        "KVQ_OUT": str(tmp_path / "out"),
    }
    sbatch = {"KVQ_SBATCH": "--partition=gpu --account=me", "KVQ_MAX_JOBS": "2"}
    done = cluster("submit_compare", "--model", "demo", **grid, **sbatch)
    assert done.returncode == 0, done.stderr
    assert "submitted 6 cells as job 101, the comparison as job 102" in done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    calls = lines(tmp_path / "kvq.log")
    cells = [(p, c) for c in ("16", "64") for p in ("0", layered, "int8:lm4")]
    assert [tuple(call.split()[2:5:2]) for call in calls[:-1]] == cells
    assert all(call.endswith("--model demo") for call in calls[:-1])
    assert calls[-1].startswith("compare ") and calls[-1].count(".json") == 7
    assert lines(tmp_path / "tasks.log") == [f"{i} 0" for i in range(6)] + ["report 0"]
    array, report = lines(tmp_path / "sbatch.log")
    assert "--array=0-5%2" in array and "--gpus=1" in array and "--partition=gpu --account=me" in array
    assert "--dependency=afterany:101" in report and "--gpus" not in report
    records = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [record["vs_baseline"]["baseline"] for record in records] == ["0 c16"] * 3 + ["0 c64"] * 3
    assert (tmp_path / "out" / "compare.md").read_text().count("\n| ") == 7


@pytest.mark.parametrize("how", ["signal", 1, 139])
def test_a_cell_that_dies_is_tried_once_more(cluster, tmp_path, how):
    plan = ({"policy": "8", "how": how, "times": 1},)
    done = cluster("submit_compare", plan=plan, KVQ_OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    policies = [call.split()[2] for call in lines(tmp_path / "kvq.log")[:-1]]
    assert policies == ["0", "8", "8", "4", "42"]
    assert lines(tmp_path / "tasks.log") == ["0 0", "1 0", "2 0", "3 0", "report 0"]
    status = 137 if how == "signal" else how
    assert f"policy 8 at 64: attempt 1 ended with exit code {status}" in (tmp_path / "job.log").read_text()


def test_a_cell_that_dies_twice_is_given_up_and_missed(cluster, tmp_path):
    plan = ({"policy": "8", "how": "signal", "times": 5},)
    cluster("submit_compare", plan=plan, KVQ_OUT=str(tmp_path / "out"))
    policies = [call.split()[2] for call in lines(tmp_path / "kvq.log")[:-1]]
    assert policies == ["0", "8", "8", "4", "42"]
    assert lines(tmp_path / "tasks.log") == ["0 0", "1 137", "2 0", "3 0", "report 1"]
    assert "missing: policy 8 at 64" in (tmp_path / "job.log").read_text()
    assert len(json.loads((tmp_path / "out" / "compare.json").read_text())) == 3


@pytest.mark.parametrize("how", [2, 130])
def test_a_bad_flag_and_an_interrupt_are_not_tried_again(cluster, tmp_path, how):
    cluster("submit_compare", plan=({"policy": "0", "how": how, "times": 5},), KVQ_OUT=str(tmp_path / "out"))
    policies = [call.split()[2] for call in lines(tmp_path / "kvq.log")[:-1]]
    assert policies == ["0", "8", "4", "42"]
    assert lines(tmp_path / "tasks.log")[0] == f"0 {how}"
    assert "--baseline" not in lines(tmp_path / "kvq.log")[-1]  # it is the baseline that is missing


def test_a_second_submission_measures_only_what_is_missing(cluster, tmp_path):
    out = str(tmp_path / "out")
    cluster("submit_compare", plan=({"policy": "4", "how": "signal", "times": 2},), KVQ_OUT=out)
    incomplete = tmp_path / "out" / "8_c64.json"
    incomplete.write_text(incomplete.read_text().replace('"complete": true', '"complete": false'))
    (tmp_path / "kvq.log").unlink()
    done = cluster("submit_compare", KVQ_OUT=out)
    assert done.returncode == 0, done.stderr
    assert [call.split()[2] for call in lines(tmp_path / "kvq.log")[:-1]] == ["8", "4"]
    assert len(json.loads((tmp_path / "out" / "compare.json").read_text())) == 4


def test_nothing_measured_is_an_error(cluster, tmp_path):
    plan = ({"policy": "42", "how": 1, "times": 5},)
    cluster("submit_compare", plan=plan, KVQ_POLICIES="42", KVQ_OUT=str(tmp_path / "out"))
    assert lines(tmp_path / "tasks.log") == ["0 1", "report 1"]
    assert "no cell was measured" in (tmp_path / "job.log").read_text()


@pytest.mark.parametrize("script", sorted(path.name for path in SLURM.iterdir()))
def test_scripts_are_sound(script):
    path = SLURM / script
    assert (
        path.read_text().startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in path.read_text()
    )
    subprocess.run(["bash", "-n", str(path)], check=True)
    if not script.endswith(".sbatch"):
        assert path.stat().st_mode & stat.S_IXUSR
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(path)], check=True)
