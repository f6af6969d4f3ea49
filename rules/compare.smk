# Tables and figures of the study.


rule compare:
    input:
        metrics=LAYOUT.evaluated("metrics/{suite}.json"),
        grades=LAYOUT.evaluated("grades/{suite}.parquet"),
        summaries=LAYOUT.trained("train/summary.json"),
    output:
        csv=f"{RESULTS}/comparison.csv",
        markdown=f"{RESULTS}/comparison.md",
        parquet=f"{RESULTS}/comparison.parquet",
    log:
        f"{RESULTS}/logs/compare.log",
    benchmark:
        f"{RESULTS}/benchmarks/compare.tsv"
    params:
        study=dump(CONFIG.comparison()),
        study_dir=study_dir,
        code=CODE,
    shell:
        "python scripts/compare.py --study {params.study:q} --study-dir {params.study_dir:q} "
        "--output-dir $(dirname {output.csv:q}) 2> {log:q}"


rule plot:
    input:
        comparison=f"{RESULTS}/comparison.parquet",
        grades=LAYOUT.evaluated("grades/{suite}.parquet"),
        metrics=LAYOUT.trained("train/metrics.jsonl"),
    output:
        accuracy_svg=f"{RESULTS}/figures/accuracy.svg",
        accuracy_png=f"{RESULTS}/figures/accuracy.png",
        reward_svg=f"{RESULTS}/figures/reward.svg",
        reward_png=f"{RESULTS}/figures/reward.png",
    log:
        f"{RESULTS}/logs/plot.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot.tsv"
    params:
        study=dump(CONFIG.comparison()),
        study_dir=study_dir,
        code=CODE,
    shell:
        "python scripts/plot.py --study {params.study:q} --study-dir {params.study_dir:q} "
        "--comparison {input.comparison:q} --output-dir $(dirname {output.accuracy_svg:q}) 2> {log:q}"
