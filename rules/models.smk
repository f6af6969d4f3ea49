# Pinned starting weights, prepared once and shared by all studies, where snakemake runs: on most
# clusters no other machine reaches the hub.


rule prepare_model:
    output:
        directory(LAYOUT.starting_weights("{model}")),
    log:
        LAYOUT.log("prepare_model", "{model}"),
    benchmark:
        LAYOUT.benchmark("prepare_model", "{model}")
    localrule: True
    resources:
        mem_mb=model_memory,
    params:
        settings=starting_weights_settings,
        code=CODE,
    shell:
        "python scripts/prepare_model.py --model-name {wildcards.model} "
        "--settings {params.settings:q} --output-dir {output:q} 2> {log:q}"
