# Datasets as train.jsonl, val.jsonl and test.jsonl, the same form for all.


rule prepare_data:
    output:
        train="artifacts/{dataset}/train.jsonl",
        val="artifacts/{dataset}/val.jsonl",
        test="artifacts/{dataset}/test.jsonl",
        manifest="artifacts/{dataset}/manifest.json",
    log:
        "artifacts/logs/prepare_data/{dataset}.log",
    benchmark:
        "artifacts/benchmarks/prepare_data/{dataset}.tsv"
    params:
        settings=lambda wildcards: dump(CONFIG.datasets[wildcards.dataset]),
        code=CODE,
    shell:
        "python scripts/prepare_data.py --dataset {wildcards.dataset} "
        "--settings {params.settings:q} --output-dir $(dirname {output.train:q}) 2> {log:q}"
