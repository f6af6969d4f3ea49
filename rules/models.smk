# Pinned starting weights, prepared once and shared by all studies.


rule prepare_model:
    output:
        directory(LAYOUT.starting_weights("{model}")),
    params:
        settings=starting_weights_settings,
        code=CODE,
    log:
        "artifacts/logs/prepare_model/{model}.log",
    benchmark:
        "artifacts/benchmarks/prepare_model/{model}.tsv"
    resources:
        mem_mb=model_memory,
    shell:
        "{PYTHON} scripts/prepare_model.py --model-name {wildcards.model} "
        "--settings {params.settings:q} --output-dir {output:q} 2> {log:q}"
