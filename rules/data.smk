# Datasets as train.jsonl, val.jsonl and test.jsonl, the same form for all. They may come from the
# network, so they are prepared where snakemake runs, also on a cluster.


rule prepare_data:
    output:
        train=f"{DATA}/train.jsonl",
        val=f"{DATA}/val.jsonl",
        test=f"{DATA}/test.jsonl",
        manifest=f"{DATA}/manifest.json",
    log:
        LAYOUT.log("prepare_data", "{dataset}"),
    benchmark:
        LAYOUT.benchmark("prepare_data", "{dataset}")
    localrule: True
    params:
        settings=dataset_settings,
        decides=what_decides_a_dataset,
        code=CODE,
    shell:
        "python scripts/prepare_data.py --dataset {wildcards.dataset} "
        "--settings {params.settings:q} --output-dir $(dirname {output.train:q}) 2> {log:q}"


# Which test problems stand in the training data. No part of the default target:
#   snakemake artifacts/results/STUDY/overlap.md --cores 1 --configfile studies/STUDY.yaml
rule check_overlap:
    input:
        train=LAYOUT.training_files(),
        test=LAYOUT.suite_files(),
    output:
        json=f"{RESULTS}/overlap.json",
        markdown=f"{RESULTS}/overlap.md",
        manifest=f"{RESULTS}/manifests/check_overlap.json",
    log:
        f"{RESULTS}/logs/check_overlap.log",
    benchmark:
        f"{RESULTS}/benchmarks/check_overlap.tsv"
    params:
        code=CODE,
    shell:
        "python scripts/check_overlap.py --train {input.train:q} --test {input.test:q} "
        "--output {output.json:q} --markdown {output.markdown:q} "
        "--manifest {output.manifest:q} 2> {log:q}"
