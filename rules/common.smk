# What all rules share: the checked settings, the layout of artifacts/, and input functions.

import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from gsm8k_core.config import dump, parse_config
from gsm8k_core.errors import ConfigError
from gsm8k_core.layout import Layout, one_of
from gsm8k_core.manifest import Invocation, code_digest

try:
    CONFIG = parse_config(config)
except ConfigError as error:
    raise WorkflowError(str(error)) from None

# Jobs run this very Python, whether or not its environment is activated. OpenMP threads sleep while
# they wait: spinning ones starve each other where jobs share cores.
BIN = shlex.quote(str(Path(sys.executable).parent))
shell.prefix(f"set -euo pipefail; export PATH={BIN}:$PATH OMP_WAIT_POLICY=PASSIVE; ")

LAYOUT = Layout(CONFIG)
INVOCATION = Invocation(Path("artifacts/runs"))
RUN = LAYOUT.run("{model}", "{method}", "{seed}")
ROUND = f"{RUN}/round{{round}}"
RESULTS = LAYOUT.results
# An edit of the library reruns finished jobs only where the study asks for it.
CODE = code_digest() if CONFIG.study.rerun_on_code_change else "any"


wildcard_constraints:
    dataset=one_of(CONFIG.datasets),
    model=one_of(CONFIG.models),
    method=one_of(CONFIG.methods),
    suite=one_of(CONFIG.suites),
    seed=r"\d+",
    round=r"[1-9]\d*",


def methods_of_kind(kind):
    return one_of(
        name for name, method in CONFIG.methods.items() if method.kind == kind
    )


def model_threads(wildcards):
    return CONFIG.models[wildcards.model].threads


def model_gpus(wildcards):
    return CONFIG.models[wildcards.model].gpus


def model_memory(wildcards):
    return CONFIG.models[wildcards.model].mem_mb


def trained_model(wildcards):
    return LAYOUT.trained_model(wildcards.model, wildcards.method, wildcards.seed)


def parent_model(wildcards):
    return LAYOUT.parent_model(wildcards.model, wildcards.method, wildcards.seed)


def round_start(wildcards):
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


def last_round(name):
    """An input function: `name` of the last round."""
    return lambda wildcards: every_round(name)(wildcards)[-1]


def study_dir(wildcards):
    return LAYOUT.experiments


def suite_problems(wildcards):
    suite = CONFIG.suites[wildcards.suite]
    return LAYOUT.problems(suite.dataset, suite.split)


# Settings travel as canonical JSON: Snakemake compares texts, and the order of keys is no change.


def starting_weights_settings(wildcards):
    return CONFIG.starting_weights_settings(wildcards.model)


def run_settings(wildcards):
    return dump(
        CONFIG.run_settings(
            wildcards.model,
            wildcards.method,
            int(wildcards.seed),
            int(getattr(wildcards, "round", 0)),
        )
    )


def round_generation_settings(wildcards):
    return dump(
        CONFIG.round_generation_settings(
            wildcards.model, wildcards.method, int(wildcards.seed), int(wildcards.round)
        )
    )


def evaluation_settings(wildcards):
    return dump(
        CONFIG.evaluation_settings(
            wildcards.model, wildcards.method, int(wildcards.seed), wildcards.suite
        )
    )


def grading_settings(wildcards):
    return dump(CONFIG.grading_settings(wildcards.model, wildcards.suite))
