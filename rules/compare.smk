# Tables and figures of the study. In no group: for each finished job Snakemake counts all inputs of a
# group anew, and of these there are thousands in a large study.

# Only the report is made again for its size.
TABLES = dump(with_defaults(CONFIG.comparison(), ["report_megabytes"]))


rule compare:
    input:
        metrics=LAYOUT.evaluated("metrics/{suite}.json"),
        grades=LAYOUT.evaluated("grades/{suite}.parquet"),
        stats=LAYOUT.evaluated("completions/{suite}.stats.json"),
        summaries=LAYOUT.trained("train/summary.json"),
        settings=LAYOUT.trained("settings.json"),
    output:
        csv=f"{RESULTS}/comparison.csv",
        markdown=f"{RESULTS}/comparison.md",
        html=report(
            f"{RESULTS}/comparison.html",
            caption="captions/comparison.rst",
            category="Tables",
        ),
        parquet=f"{RESULTS}/comparison.parquet",
        pass_at_k=f"{RESULTS}/pass_at_k.csv",
        pairs=f"{RESULTS}/pairs.csv",
        manifest=f"{RESULTS}/manifests/compare.json",
    log:
        f"{RESULTS}/logs/compare.log",
    benchmark:
        f"{RESULTS}/benchmarks/compare.tsv"
    params:
        study=TABLES,
        study_dir=study_dir,
        code=CODE,
    shell:
        "python scripts/compare.py --study {params.study:q} --study-dir {params.study_dir:q} "
        "--output-dir $(dirname {output.csv:q}) --manifest {output.manifest:q} 2> {log:q}"


rule plot:
    input:
        comparison=f"{RESULTS}/comparison.parquet",
        metrics=LAYOUT.evaluated("metrics/{suite}.json"),
        training=LAYOUT.trained("train/metrics.jsonl"),
    output:
        accuracy_svg=report(
            f"{RESULTS}/figures/accuracy.svg",
            caption="captions/accuracy.rst",
            category="Figures",
        ),
        accuracy_png=f"{RESULTS}/figures/accuracy.png",
        cost_svg=report(
            f"{RESULTS}/figures/cost.svg",
            caption="captions/cost.rst",
            category="Figures",
        ),
        cost_png=f"{RESULTS}/figures/cost.png",
        reward_svg=report(
            f"{RESULTS}/figures/reward.svg",
            caption="captions/reward.rst",
            category="Figures",
        ),
        reward_png=f"{RESULTS}/figures/reward.png",
        manifest=f"{RESULTS}/manifests/plot.json",
    log:
        f"{RESULTS}/logs/plot.log",
    benchmark:
        f"{RESULTS}/benchmarks/plot.tsv"
    params:
        study=TABLES,
        study_dir=study_dir,
        code=CODE,
    shell:
        "python scripts/plot.py --study {params.study:q} --study-dir {params.study_dir:q} "
        "--comparison {input.comparison:q} --output-dir $(dirname {output.accuracy_svg:q}) "
        "--manifest {output.manifest:q} 2> {log:q}"


rule report:
    input:
        comparison=f"{RESULTS}/comparison.parquet",
        pass_at_k=f"{RESULTS}/pass_at_k.csv",
        pairs=f"{RESULTS}/pairs.csv",
        metrics=LAYOUT.evaluated("metrics/{suite}.json"),
        grades=LAYOUT.evaluated("grades/{suite}.parquet"),
        completions=LAYOUT.evaluated("completions/{suite}.jsonl"),
        stats=LAYOUT.evaluated("completions/{suite}.stats.json"),
        training=LAYOUT.trained("train/metrics.jsonl"),
        summaries=LAYOUT.trained("train/summary.json"),
        settings=LAYOUT.trained("settings.json"),
        problems=LAYOUT.suite_files(),
    output:
        html=report(
            f"{RESULTS}/report.html",
            caption="captions/report.rst",
            category="Report",
        ),
        manifest=f"{RESULTS}/manifests/report.json",
    log:
        f"{RESULTS}/logs/report.log",
    benchmark:
        f"{RESULTS}/benchmarks/report.tsv"
    params:
        study=dump(CONFIG.comparison()),
        study_dir=study_dir,
        problems=LAYOUT.problems_of_suites(),
        code=CODE,
    shell:
        "python scripts/report.py --study {params.study:q} --study-dir {params.study_dir:q} "
        "--comparison {input.comparison:q} --problems {params.problems:q} "
        "--runs-dir artifacts/runs --output {output.html:q} --manifest {output.manifest:q} "
        "2> {log:q}"
