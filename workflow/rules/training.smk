"""Pretraining and training: one job trains all seeds of a model on a target.

Input: splits, graphs/, tokens/, text_states/.
Output: pretrain/{objective}/{seed}/, runs/{target}/{model}/{seed}/; the state to resume from stands in the
undeclared folders checkpoints/ beside them.
"""


rule pretrain_model:
    """Pretrain on the training crystals of all targets."""
    input:
        unpack(lambda wildcards: text_inputs(wildcards.objective, wildcards)),
        graphs="results/{dataset}/graphs/manifest.json",
        splits=SPLITS,
    output:
        expand(
            "results/{{dataset}}/pretrain/{{objective}}/{{seed}}/{file}",
            file=PRETRAINING_FILES,
        ),
    log:
        "results/{dataset}/logs/pretrain_model/{objective}.{seed}.log",
    # First what others wait for.
    priority: 1
    retries: RETRIES
    conda:
        "../../envs/train.yaml"
    threads: THREADS * DEVICES
    resources:
        **SEVERAL_NODES,
        gpu=TRAINING_GPUS,
        nodes=NODES,
        stage=0,
    params:
        launcher=LAUNCHER,
        settings=lambda wildcards: json.dumps(
            meaning.pretraining_settings(wildcards.objective, config)
        ),
        states=lambda wildcards: states_option(wildcards.objective, wildcards),
        encoder=ENCODER,
    shell:
        "{params.launcher}python -m castbench pretrain_model --settings {params.settings:q} --objective {wildcards.objective}"
        " --seed {wildcards.seed} --graphs results/{wildcards.dataset}/graphs --tokens results/{wildcards.dataset}/tokens"
        " {params.states} --encoder {params.encoder:q} --splits {input.splits} --threads {threads}"
        " --stage {resources.stage}"
        " --output results/{wildcards.dataset}/pretrain/{wildcards.objective}/{wildcards.seed} --log {log}"


rule train_model:
    """Train a model on a target, all seeds in one job: one after another, or side by side."""
    input:
        unpack(model_inputs),
        materials=ancient("results/{dataset}/materials.parquet"),
        split="results/{dataset}/splits/{target}.json",
    output:
        expand(
            "results/{{dataset}}/runs/{{target}}/{{model}}/{seed}/{file}",
            seed=SEEDS,
            file=RUN_FILES,
        ),
    log:
        "results/{dataset}/logs/train_model/{target}.{model}.log",
    benchmark:
        "results/{dataset}/benchmarks/train_model/{target}.{model}.tsv"
    retries: RETRIES
    conda:
        "../../envs/train.yaml"
    threads: THREADS * DEVICES
    resources:
        **SEVERAL_NODES,
        gpu=TRAINING_GPUS,
        nodes=NODES,
        stage=0,
    params:
        launcher=LAUNCHER,
        settings=lambda wildcards: json.dumps(
            meaning.training_settings(wildcards.model, config)
        ),
        states=lambda wildcards: states_option(wildcards.model, wildcards),
        pretrained=pretrained_option,
        seeds=SEEDS,
        encoder=ENCODER,
    shell:
        "{params.launcher}python -m castbench train_model --settings {params.settings:q} --model {wildcards.model}"
        " --target {wildcards.target} --seeds {params.seeds} --materials {input.materials} --split {input.split}"
        " --graphs results/{wildcards.dataset}/graphs --tokens results/{wildcards.dataset}/tokens {params.states}"
        " --encoder {params.encoder:q} {params.pretrained} --threads {threads}"
        " --stage {resources.stage}"
        " --output results/{wildcards.dataset}/runs/{wildcards.target}/{wildcards.model} --log {log}"
