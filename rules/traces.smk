# Reasoning traces: questions to a chat API → answers → a dataset that SFT learns from.
#
# Answers are paid for. They lie in collected/, undeclared: Snakemake removes what a failed or changed
# job declared, and a rerun asks for nothing that is there. The job needs the network and the key,
# and computes nothing: it runs where snakemake runs.


rule collect_traces:
    input:
        data=lambda wildcards: LAYOUT.problems(
            CONFIG.traces[wildcards.traces].dataset, "train"
        ),
    output:
        summary=f"{TRACES}/collected.json",
    log:
        LAYOUT.log("collect_traces", "{traces}"),
    benchmark:
        LAYOUT.benchmark("collect_traces", "{traces}")
    wildcard_constraints:
        traces=one_of(CONFIG.traces),
    localrule: True
    params:
        settings=collection_settings,
        decides=lambda wildcards: dump(
            CONFIG.collection_settings(wildcards.traces).without_resources()
        ),
        collected=f"{TRACES}/collected",
        code=CODE,
    shell:
        "python scripts/collect_traces.py --settings {params.settings:q} --data {input.data:q} "
        "--output-dir {params.collected:q} --summary {output.summary:q} 2> {log:q}"


rule select_traces:
    input:
        summary=f"{TRACES}/collected.json",
        data=lambda wildcards: LAYOUT.problems(
            CONFIG.traces[wildcards.traces].dataset, "train"
        ),
    output:
        train=f"{TRACES}/train.jsonl",
        manifest=f"{TRACES}/manifest.json",
    log:
        LAYOUT.log("select_traces", "{traces}"),
    benchmark:
        LAYOUT.benchmark("select_traces", "{traces}")
    wildcard_constraints:
        traces=one_of(CONFIG.traces),
    localrule: True
    params:
        settings=lambda wildcards: dump(CONFIG.trace_dataset_settings(wildcards.traces)),
        answers=f"{TRACES}/collected/answers.jsonl",
        code=CODE,
    shell:
        "python scripts/select_traces.py --settings {params.settings:q} --data {input.data:q} "
        "--answers {params.answers:q} --output-dir $(dirname {output.train:q}) 2> {log:q}"
