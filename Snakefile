# model × method × seed on GSM8K: data → weights → training → completions → grades → comparison.
#
#   snakemake --cores 2 --resources gpu=1                                    the default study
#   snakemake --cores 2 --resources gpu=1 --configfile studies/NAME.yaml     another study
#   snakemake PATH/OF/A/FILE --cores 1 --resources gpu=1                     one file

import os


configfile: "config.yaml"


# For `--sdm apptainer`: an image that was built from the Dockerfile, by hand or by the workflow build.yml of
# one's own repository (docs/cluster.md). None is the default, so $GSM8K_IMAGE has to name one. Without --sdm
# the environment that runs snakemake is used.
container: os.environ.get("GSM8K_IMAGE", "docker://localhost/name-one-in-GSM8K_IMAGE")


include: "rules/common.smk"
include: "rules/data.smk"
include: "rules/traces.smk"
include: "rules/models.smk"
include: "rules/evaluate.smk"
include: "rules/train.smk"
include: "rules/compare.smk"


onstart:
    begin_invocation()


onsuccess:
    end_invocation("succeeded")


onerror:
    end_invocation(state_of_error())


rule all:
    default_target: True
    input:
        rules.compare.output,
        rules.plot.output,
        rules.report.output,
        # What these are made of: a cell that somebody deletes is made again.
        rules.report.input,
        [] if CONFIG.study.keep_models == "none" else LAYOUT.trained("model"),
