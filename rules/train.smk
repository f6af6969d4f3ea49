# One rule per way of training; one that `use`s another takes from it what it does not say itself, and
# its script is that of its method's kind. State for resuming lies in {RUN}/state, undeclared: Snakemake
# removes what a failed job declared, and a rerun goes on from that state.


rule train_sft:
    input:
        starting_model=parent_model,
        data=lambda wildcards: LAYOUT.train_data(wildcards.method),
        val=LAYOUT.train_problems("val"),
    output:
        model=weights(f"{RUN}/model", ("all", "final")),
        metrics=f"{RUN}/train/metrics.jsonl",
        summary=f"{RUN}/train/summary.json",
        settings=f"{RUN}/settings.json",
    log:
        f"{RUN}/logs/train_sft.log",
    benchmark:
        f"{RUN}/benchmarks/train_sft.tsv"
    wildcard_constraints:
        method=methods_of_kind("sft"),
    threads: model_threads
    resources:
        gpu=model_gpus,
        mem_mb=model_memory,
        runtime=training_minutes,
    params:
        settings=run_settings,
        python=training_python,
        script=training_script,
        flags=training_flags,
        code=code_of_run,
    shell:
        "{params.python} {params.script} {params.flags} --settings {params.settings:q} "
        "--starting-model {input.starting_model:q} --data {input.data:q} --val-data {input.val:q} "
        "--output-dir $(dirname {output.model:q}) 2> {log:q}"


use rule train_sft as train_grpo with:
    log:
        f"{RUN}/logs/train_grpo.log",
    benchmark:
        f"{RUN}/benchmarks/train_grpo.tsv"
    wildcard_constraints:
        method=methods_of_kind("grpo"),


# Expert iteration: rounds of generate on train → keep the correct → SFT. One round is RFT.
# DPO has one round as well: generate on train → pair correct with incorrect → DPO.
# `generate` is in evaluate.smk.


use rule generate as generate_round with:
    input:
        model=round_start,
        data=LAYOUT.train_problems(),
    output:
        completions=f"{ROUND}/completions.jsonl",
        stats=f"{ROUND}/completions.stats.json",
    log:
        f"{ROUND}/logs/generate.log",
    benchmark:
        f"{ROUND}/benchmarks/generate.tsv"
    wildcard_constraints:
        method=methods_of_kind("expert_iteration", "dpo"),
    params:
        settings=round_generation_settings,


rule select_completions:
    input:
        completions=f"{ROUND}/completions.jsonl",
        data=LAYOUT.train_problems(),
    output:
        demonstrations=f"{ROUND}/demonstrations.jsonl",
    log:
        f"{ROUND}/logs/select_completions.log",
    benchmark:
        f"{ROUND}/benchmarks/select_completions.tsv"
    wildcard_constraints:
        method=methods_of_kind("expert_iteration"),
    localrule: True
    params:
        settings=run_settings,
        script=selection_script,
        code=CODE,
    shell:
        "python {params.script} --settings {params.settings:q} --completions {input.completions:q} "
        "--data {input.data:q} --output {output:q} 2> {log:q}"


use rule train_sft as train_round with:
    input:
        starting_model=round_parent,
        data=f"{ROUND}/demonstrations.jsonl",
        val=LAYOUT.train_problems("val"),
    output:
        model=weights(f"{ROUND}/model", ("all",)),
        metrics=f"{ROUND}/train/metrics.jsonl",
        summary=f"{ROUND}/train/summary.json",
        settings=f"{ROUND}/settings.json",
    log:
        f"{ROUND}/logs/train_sft.log",
    benchmark:
        f"{ROUND}/benchmarks/train_sft.tsv"
    wildcard_constraints:
        method=methods_of_kind("expert_iteration"),


rule finish_rounds:
    input:
        model=last_round("model"),
        summaries=every_round("train/summary.json"),
        metrics=every_round("train/metrics.jsonl"),
        stats=every_round("completions.stats.json"),
        settings=last_round("settings.json"),
    output:
        model=weights(f"{RUN}/model", ("all", "final")),
        metrics=f"{RUN}/train/metrics.jsonl",
        summary=f"{RUN}/train/summary.json",
        settings=f"{RUN}/settings.json",
    log:
        f"{RUN}/logs/finish_rounds.log",
    benchmark:
        f"{RUN}/benchmarks/finish_rounds.tsv"
    wildcard_constraints:
        method=methods_of_kind("expert_iteration"),
    localrule: True
    params:
        rounds=number_of_rounds,
        code=CODE,
    shell:
        "python scripts/finish_rounds.py --run-dir $(dirname {output.model:q}) "
        "--rounds {params.rounds} 2> {log:q}"


use rule select_completions as select_pairs with:
    output:
        pairs=f"{ROUND}/pairs.jsonl",
    log:
        f"{ROUND}/logs/select_pairs.log",
    benchmark:
        f"{ROUND}/benchmarks/select_pairs.tsv"
    wildcard_constraints:
        method=methods_of_kind("dpo"),


use rule train_sft as train_dpo with:
    input:
        starting_model=parent_model,
        data=f"{RUN}/round1/pairs.jsonl",
        stats=f"{RUN}/round1/completions.stats.json",
        val=LAYOUT.train_problems("val"),
    log:
        f"{RUN}/logs/train_dpo.log",
    benchmark:
        f"{RUN}/benchmarks/train_dpo.tsv"
    wildcard_constraints:
        method=methods_of_kind("dpo"),
