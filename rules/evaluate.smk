# Completions (GPU) and their grades (no GPU, free to redo when grading changes).


rule generate:
    input:
        model=trained_model,
        data=suite_problems,
    output:
        completions=f"{RUN}/completions/{{suite}}.jsonl",
        stats=f"{RUN}/completions/{{suite}}.stats.json",
    log:
        f"{RUN}/logs/generate_{{suite}}.log",
    benchmark:
        f"{RUN}/benchmarks/generate_{{suite}}.tsv"
    threads: model_threads
    resources:
        gpu=generation_gpus,
        mem_mb=model_memory,
        runtime=generation_minutes,
    params:
        settings=evaluation_settings,
        python=generation_python,
        flags=generation_flags,
        code=CODE,
    shell:
        "{params.python} scripts/generate.py {params.flags} --settings {params.settings:q} --model {input.model:q} "
        "--data {input.data:q} --output {output.completions:q} --stats {output.stats:q} 2> {log:q}"


rule grade:
    input:
        completions=f"{RUN}/completions/{{suite}}.jsonl",
        stats=f"{RUN}/completions/{{suite}}.stats.json",
    output:
        metrics=f"{RUN}/metrics/{{suite}}.json",
        grades=f"{RUN}/grades/{{suite}}.parquet",
        manifest=f"{RUN}/grades/{{suite}}.manifest.json",
    log:
        f"{RUN}/logs/grade_{{suite}}.log",
    benchmark:
        f"{RUN}/benchmarks/grade_{{suite}}.tsv"
    group:
        "grades"
    params:
        settings=grading_settings,
        code=CODE,
    shell:
        "python scripts/grade.py --settings {params.settings:q} "
        "--completions {input.completions:q} --stats {input.stats:q} "
        "--output {output.metrics:q} --grades {output.grades:q} 2> {log:q}"
