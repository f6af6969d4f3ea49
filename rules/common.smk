# What all rules share: the checked settings, the layout of artifacts/, and input functions.

import os
import re
import shlex
import sys
from pathlib import Path

import snakemake.benchmark
from snakemake.exceptions import WorkflowError

from gsm8k_core.cli import SNAKEMAKE_VARIABLE, this_process
from gsm8k_core.config import (
    config_error,
    doubts,
    dump,
    load_config,
    parse_config,
    read_yaml,
    with_defaults,
)
from gsm8k_core.errors import ConfigError
from gsm8k_core.extras import missing_for
from gsm8k_core.files import model_files
from gsm8k_core.layout import RUNS, Layout, deciding, one_of
from gsm8k_core.manifest import (
    CHECKOUT_VARIABLE,
    INVOCATION_VARIABLE,
    Invocation,
    code_digest,
    gpus as gpus_here,
    invocation_config,
)
from gsm8k_core.records import (
    SUMS,
    invocation_facts,
    note_unrecorded,
    record_study,
    write_provenance,
)
from gsm8k_core.rewards import missing_reward, reward_code
from gsm8k_core.tracking import TRACKING_VARIABLE

# A job on a cluster reads this file too, maybe days after it was submitted: it has the settings of its
# call, whatever the files say by then.
try:
    of_call = None if workflow.is_main_process else invocation_config()
    CONFIG = of_call or parse_config(config)
except ConfigError as error:
    raise WorkflowError(str(error)) from None

# Jobs run this very Python, whether or not its environment is activated; in a container (--sdm) they
# run its own. OpenMP threads sleep while they wait: spinning ones starve each other on shared cores.
BIN = shlex.quote(str(Path(sys.executable).parent))
shell.prefix(
    f'set -euo pipefail; [ -n "${{{{GSM8K_CONTAINER:-}}}}" ] || export PATH={BIN}:$PATH; '
    'export OMP_WAIT_POLICY=PASSIVE PYTHONPATH="$PWD${{PYTHONPATH:+:$PYTHONPATH}}"; '
)

# For `benchmark:` Snakemake reads the memory map of a job's processes twice a second at first, 40 ms of
# the processor each time: a twentieth of a study of short jobs.
snakemake.benchmark.BENCHMARK_INTERVAL_SHORT = 2.0

LAYOUT = Layout(CONFIG)
INVOCATION = Invocation(Path(RUNS))
DATA = LAYOUT.data("{dataset}")
TRACES = LAYOUT.data("{traces}")
RUN = LAYOUT.run("{model}", "{method}", "{seed}")
ROUND = f"{RUN}/round{{round}}"
RESULTS = LAYOUT.results

# Jobs on a cluster need not say it again.
if workflow.is_main_process:
    try:
        SHIPPED = load_config(Path(workflow.basedir, "config.yaml"))
        overlays = [*map(read_yaml, workflow.overwrite_configfiles)]
    except ConfigError as error:
        raise WorkflowError(str(error)) from None
    if doubt := doubts(CONFIG, SHIPPED, [*overlays, workflow.config_settings.config]):
        logger.warning(doubt)
    if workflow.overwrite_configfiles and CONFIG.study.name == SHIPPED.study.name:
        logger.warning(
            f"The study has the name that config.yaml gives, '{CONFIG.study.name}': its runs take the "
            f"place of those in {LAYOUT.experiments}. Set study.name for a study of its own."
        )

# An edit of the library reruns finished jobs only where the study asks for it.
CODE = code_digest() if CONFIG.study.rerun_on_code_change else "any"

# A reward of the user's own is looked for where a trainer does, and its edit is another run.
REWARD_FOLDERS = ["scripts", os.getcwd(), *sys.path]
CODE_WITH_REWARD = {
    name: " ".join([CODE, *reward.values()])
    for name, method in CONFIG.methods.items()
    if (reward := reward_code(method, REWARD_FOLDERS))
}

MISSING_REWARDS = [
    f"methods.{name}.reward.custom: {path!r}: {problem}"
    for name in sorted(CONFIG.stages())
    if CONFIG.methods[name].kind == "grpo"
    and (path := CONFIG.methods[name].reward.custom)
    and (problem := missing_reward(path, REWARD_FOLDERS))
]


def listed(heading, lines):
    return "\n".join([heading, *(f"  {line}" for line in lines)])


# `--sdm`. Snakemake would look for an image of the Snakefile's making.
IN_CONTAINER = bool(workflow.deployment_settings.deployment_method)
if workflow.is_main_process and IN_CONTAINER and not os.environ.get("GSM8K_IMAGE"):
    raise WorkflowError(
        "`--sdm` runs jobs in an image, and none is the default: name yours in GSM8K_IMAGE "
        "(docs/cluster.md tells how to build one, or to take one that your repository has pushed)."
    )

# Jobs may run where a path is not: what it holds was copied here before. Unlocking needs none.
if workflow.is_main_process and "--unlock" not in sys.argv:
    if missing := LAYOUT.missing_paths() + MISSING_REWARDS:
        raise WorkflowError(str(config_error(missing)))
    if faults := LAYOUT.faults_in_own_data():
        raise WorkflowError(listed("These data cannot be used:", faults))
    for changed in LAYOUT.prepared_otherwise():
        logger.warning(
            f"Prepared before from other settings: {changed}. Where this call needs it, it is made "
            "again, and every run that uses it, of other studies too; a new name would keep both."
        )


# Jobs hear of these through the environment: how a run is followed, or which call it belongs to, is no
# setting of it, and changing it is no reason to do it again. The shell may have the first from scripts
# that were run by hand, so it is set even where the config says nothing.
os.environ[TRACKING_VARIABLE] = dump(CONFIG.tracking)
# The process that reads this starts the jobs' shells, on a cluster too. They end when it has gone.
os.environ[SNAKEMAKE_VARIABLE] = this_process()


def begin_invocation():
    check_gpus()
    check_jobs()
    os.environ[INVOCATION_VARIABLE] = INVOCATION.start(CONFIG)
    # For jobs in a container where git fails: it sees the clone alone, which is too little of a worktree.
    os.environ[CHECKOUT_VARIABLE] = INVOCATION.manifest["git"]["commit"] or ""


def check_jobs():
    """Before Snakemake removes what the first jobs are to make: can they run, and was it wanted?"""
    if workflow.touch:
        return
    jobs = list(workflow.dag.needrun_jobs())
    wildcards = ("model", "method", "suite", "dataset")
    missing = {
        missing_for(
            CONFIG,
            job.rule.name,
            *(getattr(job.wildcards, key, None) for key in wildcards),
        )
        for job in jobs
    } - {None}
    if missing and not IN_CONTAINER:  # which has its own
        raise WorkflowError(
            listed("Jobs of this call need packages that are missing:", sorted(missing))
        )
    prepared = [
        job.wildcards.dataset for job in jobs if job.rule.name == "prepare_data"
    ]
    if faults := [fault for name in prepared for fault in LAYOUT.faults_in_rows(name)]:
        raise WorkflowError(listed("These data cannot be used:", faults))
    again = [
        job.output.summary
        for job in jobs
        if job.rule.name.startswith("train_")
        and not workflow.dag.reason(job).forced
        and Path(job.output.summary).exists()
    ]
    if again:
        logger.warning(
            f"Trainings that had finished and are made again: {len(again)}. What there was of them is "
            f"removed first. The first is that of {min(again)}; `snakemake -n` says why."
        )


def check_gpus():
    """What Snakemake makes of `--resources gpu=…` (profiles/default says 1), it does not say."""
    limit = workflow.global_resources.get("gpu").value
    if not workflow.local_exec and limit == 1:
        raise WorkflowError(
            "`--resources gpu=1` would let one GPU of the whole cluster work at a time. It is set in "
            "profiles/default, which Snakemake reads beside `--profile`; name the cluster's profile with "
            "`--workflow-profile` instead."
        )
    if workflow.touch or not workflow.local_exec:
        return
    jobs = list(workflow.dag.needrun_jobs())
    asked = [
        model_gpus(job.wildcards) for job in jobs if job.rule.name.startswith("train_")
    ]
    asked += [
        generation_gpus(job.wildcards)
        for job in jobs
        if job.rule.name.startswith("generate")
    ]
    wanted = max(asked, default=0)
    if limit is not None and wanted > limit:
        logger.warning(
            f"A model's jobs ask for {wanted} GPUs and get {limit}: `--resources gpu={wanted}` gives all."
        )
    on_cpu = 0 if gpus_here() else sum(gpus_of_job(job.resources) > 0 for job in jobs)
    if on_cpu:
        logger.warning(
            f"Jobs that ask for a GPU (models.*.gpus): {on_cpu}. nvidia-smi shows none here, so they run "
            "on the CPU, which is slow for all but small models."
        )


def end_invocation(state):
    """Write the call's manifest, provenance and, where the study is or was finished, its hashes."""
    results = [*rules.compare.output, *rules.plot.output, *rules.report.output]
    is_whole = all(Path(result).exists() for result in results)
    is_finished = (state == "succeeded" and is_whole) or Path(RESULTS, SUMS).exists()
    if is_finished:
        logger.info(f"Hashing what this call has made, for {RESULTS}/{SUMS}.")
        note_unrecorded(LAYOUT, INVOCATION.since_ns)
    INVOCATION.finish(state, **invocation_facts(LAYOUT, INVOCATION.name))
    if is_finished:
        record_study(
            LAYOUT,
            INVOCATION.since_ns,
            has_failed=state != "succeeded",
            num_threads=workflow.cores if workflow.local_exec else 2,  # on a login node
        )
    elif state == "succeeded":  # a call for a part of it
        write_provenance(LAYOUT)


def state_of_error():
    """How a call ended that Snakemake calls an error, which it also does after Ctrl-C and SIGTERM.

    SIGTERM lets running jobs end, and with the last of a call all is made that it was to make.
    """
    scheduler = workflow.scheduler
    if scheduler.failed or getattr(scheduler, "_executor_error", None):
        return "failed"
    # Of rule `all`, which makes nothing, there is always something left.
    left = any(job.output for job in scheduler.remaining_jobs)
    return "interrupted" if scheduler.running or left else "succeeded"


wildcard_constraints:
    dataset=one_of(CONFIG.datasets),
    model=one_of(CONFIG.models),
    method=one_of(CONFIG.methods),
    suite=one_of(CONFIG.suites),
    seed=r"0|[1-9]\d*",
    round=r"[1-9]\d*",


def methods_of_kind(*kinds):
    return one_of(
        name for name, method in CONFIG.methods.items() if method.kind in kinds
    )


def model_threads(wildcards):
    return CONFIG.models[wildcards.model].threads


def model_gpus(wildcards):
    return CONFIG.models[wildcards.model].gpus


def generation_gpus(wildcards):
    return CONFIG.models[wildcards.model].gpus_generating


# These functions of params take a job's `resources`, so Snakemake does not compare what they give: more
# GPUs are not another run.


def gpus_of_job(resources):
    """GPUs of a job; where a cluster knows no --gpus, those of its `gres` (`gpu:4`, `gpu:a100:4`)."""
    gres = re.search(r"\bgpu(?::[^,:]+)?:(\d+)", str(resources.get("gres", "")))
    return resources.get("gpu") or (int(gres[1]) if gres else 0)


def on_gpus(command, resources):
    """The command, on GPUs that no job beside it has."""
    gpus = gpus_of_job(resources)
    return f"python scripts/with_gpus.py {gpus} {command}" if gpus else command


def generation_python(wildcards, resources):
    """What runs the script that generates."""
    return on_gpus("python", resources)


def training_python(wildcards, resources, threads):
    """What runs a training script: torchrun where it has several GPUs, one process for each."""
    gpus = gpus_of_job(resources)
    if gpus <= 1:
        return on_gpus("python", resources)
    torchrun = on_gpus(
        f"python -m torch.distributed.run --standalone --max-restarts 0 --nproc-per-node {gpus}",
        resources,
    )
    # Snakemake's number is that of the whole job, and every process would start as many threads.
    return f"OMP_NUM_THREADS={max(1, threads // gpus)} {torchrun}"


def training_script(wildcards, resources, input):
    """What trains a method; a round of expert iteration is an SFT. DPO is told what its pairs cost."""
    del resources
    kind = CONFIG.methods[wildcards.method].kind
    script = f"scripts/train_{'sft' if kind == 'expert_iteration' else kind}.py"
    if kind != "dpo":
        return script
    return f"{script} --sampling-stats {shlex.quote(input.stats)}"


def selection_script(wildcards, resources):
    """What chooses among a round's completions: pairs for DPO, else what is right."""
    del resources
    chosen = (
        "pairs" if CONFIG.methods[wildcards.method].kind == "dpo" else "completions"
    )
    return f"scripts/select_{chosen}.py"


def _flags(resources):
    return " ".join(
        f"--{name.replace('_', '-')} {str(value).lower()}"
        for name, value in resources.items()
    )


def training_flags(wildcards, resources):
    """Flags for what decides memory, speed and what a stop costs; out of what Snakemake compares too."""
    del resources
    return _flags(CONFIG.resources(wildcards.model, wildcards.method))


def generation_flags(wildcards, resources):
    """The same for a job that generates, on no more GPUs than it has."""
    flags = CONFIG.resources(wildcards.model)
    gpus = gpus_of_job(resources)
    if gpus and "vllm_tensor_parallel" in flags:
        flags["vllm_tensor_parallel"] = min(gpus, flags["vllm_tensor_parallel"])
    return _flags(flags)


def collection_settings(wildcards, resources):
    """Address, patience and prices included, for which Snakemake is to collect nothing again."""
    del resources
    return dump(CONFIG.collection_settings(wildcards.traces))


# A retry asks for more memory, up to three times as much: a run of many jobs, each stopped by its time,
# would else ask for more than any node has. It needs no more time: it goes on where it was stopped.


def model_memory(wildcards, attempt):
    return CONFIG.models[wildcards.model].mem_mb * min(attempt, 3)


def training_minutes(wildcards):
    return CONFIG.models[wildcards.model].training_minutes


def generation_minutes(wildcards):
    return CONFIG.models[wildcards.model].generation_minutes


def trained_model(wildcards):
    return LAYOUT.trained_model(wildcards.model, wildcards.method, wildcards.seed)


def parent_model(wildcards):
    return LAYOUT.parent_model(wildcards.model, wildcards.method, wildcards.seed)


def round_start(wildcards):
    rounds = CONFIG.methods[wildcards.method].sampling_rounds
    if int(wildcards.round) > rounds:
        raise WorkflowError(
            f"{wildcards.method} has no round {wildcards.round}, but {rounds}"
        )
    return LAYOUT.round_start(
        wildcards.model, wildcards.method, wildcards.seed, int(wildcards.round)
    )


def round_parent(wildcards):
    return LAYOUT.round_parent(
        wildcards.model, wildcards.method, wildcards.seed, int(wildcards.round)
    )


def every_round(name):
    """An input function: `name` of every round of a run of expert iteration."""
    return lambda wildcards: [
        f"{LAYOUT.run(wildcards.model, wildcards.method, wildcards.seed)}/round{number}/{name}"
        for number in range(1, CONFIG.methods[wildcards.method].rounds + 1)
    ]


def number_of_rounds(wildcards, resources):
    """Out of what Snakemake compares: it sees by the inputs when there are more or fewer."""
    del resources
    return CONFIG.methods[wildcards.method].rounds


def last_round(name):
    """An input function: `name` of the last round."""
    return lambda wildcards: every_round(name)(wildcards)[-1]


def weights(path, kept_by):
    """A folder of trained weights: Snakemake removes it after its last use unless the study keeps it."""
    folder = directory(path)
    return folder if CONFIG.study.keep_models in kept_by else temp(folder)


def study_dir(wildcards):
    """A function, for `snakemake --lint` has no folder as a plain parameter."""
    return LAYOUT.experiments


# Weights on this machine are inputs, so that what changes there is prepared again.


def local_model(wildcards):
    model = CONFIG.models[wildcards.model]
    if model.source != "path":
        return []
    folder = Path(model.path).expanduser()
    return sorted(
        {str(path) for path in [folder / "config.json", *model_files(folder)]}
    )


def suite_problems(wildcards):
    suite = CONFIG.suites[wildcards.suite]
    return LAYOUT.problems(suite.dataset, suite.split)


# Settings travel as canonical JSON: Snakemake compares texts, and the order of keys is no change.


def dataset_settings(wildcards, resources):
    """With where its rows are had from, for which Snakemake is to prepare nothing again."""
    del resources
    return dump(CONFIG.datasets[wildcards.dataset])


def what_decides_a_dataset(wildcards):
    return dump(deciding(CONFIG.datasets[wildcards.dataset]))


def starting_weights_settings(wildcards):
    return dump(CONFIG.models[wildcards.model].starting_weights())


def code_of_run(wildcards):
    return CODE_WITH_REWARD.get(wildcards.method, CODE)


def run_settings(wildcards):
    return dump(
        CONFIG.run_settings(
            wildcards.model,
            wildcards.method,
            int(wildcards.seed),
            int(getattr(wildcards, "round", 0)),
        ).without_resources()
    )


def round_generation_settings(wildcards):
    return dump(
        CONFIG.round_generation_settings(
            wildcards.model, wildcards.method, int(wildcards.seed), int(wildcards.round)
        ).without_resources()
    )


def evaluation_settings(wildcards):
    return dump(
        CONFIG.evaluation_settings(
            wildcards.model, wildcards.method, int(wildcards.seed), wildcards.suite
        ).without_resources()
    )


def grading_settings(wildcards):
    return dump(CONFIG.grading_settings(wildcards.model, wildcards.suite))
