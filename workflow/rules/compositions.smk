"""The composition study: perovskites from the formula alone, and the screening of new ones.

Input: the source named in the configuration (materials.source).
Output: compositions.parquet, splits/compositions.json, composition_runs/{model}/{seed}/, screening/, tables/, figures/,
report.html. Where the source has structures, crystals are split the same way for the models that read them.
"""


localrules:
    collect_compositions,
    aggregate_compositions,
    split_compositions,
    split_structures,
    validate_screening,
    tabulate_compositions,
    plot_compositions,
    render_composition_report,


# The same formulas are for testing in both kinds of models.
ruleorder: split_structures > split_materials


rule collect_compositions:
    """Read the ABX3 compounds of the source, polymorph by polymorph."""
    input:
        # A download is collect_materials' to make.
        meaning.source_files(config) or "results/{dataset}/materials/collected.parquet",
    output:
        compositions="results/{dataset}/compositions/polymorphs.parquet",
        manifest="results/{dataset}/compositions/manifest.json",
    log:
        "results/{dataset}/logs/collect_compositions.log",
    conda:
        "../../envs/data.yaml"
    params:
        settings=json.dumps(meaning.composition_source(config), sort_keys=True),
    shell:
        "python -m castbench collect_compositions --settings {params.settings:q} --output {output.compositions}"
        " --manifest {output.manifest} --log {log}"


rule aggregate_compositions:
    """One row a formula: its polymorph of lowest energy above hull."""
    input:
        "results/{dataset}/compositions/polymorphs.parquet",
    output:
        "results/{dataset}/compositions.parquet",
    log:
        "results/{dataset}/logs/aggregate_compositions.log",
    conda:
        "../../envs/data.yaml"
    shell:
        "python -m castbench aggregate_compositions --polymorphs {input} --output {output} --log {log}"


rule split_compositions:
    """Assign formulas to train, validation and test, stratified by stability."""
    input:
        polymorphs="results/{dataset}/compositions/polymorphs.parquet",
        compositions="results/{dataset}/compositions.parquet",
    output:
        "results/{dataset}/splits/compositions.json",
    log:
        "results/{dataset}/logs/split_compositions.log",
    conda:
        "../../envs/data.yaml"
    params:
        settings=settings(
            "materials.split.seed",
            "materials.split.fractions",
            "compositions.regression",
            "compositions.classification",
        ),
    shell:
        "python -m castbench split_compositions --settings {params.settings:q} --polymorphs {input.polymorphs}"
        " --compositions {input.compositions} --output {output} --log {log}"


rule split_structures:
    """Assign the crystals of these formulas to the same parts, for the models that read structures."""
    input:
        materials=ancient("results/{dataset}/materials.parquet"),
        funnel="results/{dataset}/funnel.json",
        compositions="results/{dataset}/compositions.parquet",
        split="results/{dataset}/splits/compositions.json",
    output:
        expand("results/{{dataset}}/splits/{target}.json", target=config["targets"]),
    log:
        "results/{dataset}/logs/split_structures.log",
    conda:
        "../../envs/data.yaml"
    params:
        settings=settings(
            "targets", "materials.split.seed", "materials.split.fractions"
        ),
    shell:
        "python -m castbench split_structures --settings {params.settings:q} --materials {input.materials}"
        " --compositions {input.compositions} --split {input.split}"
        " --output results/{wildcards.dataset}/splits --log {log}"


rule featurize_compositions:
    """Magpie's features of every formula, for the random forest."""
    input:
        "results/{dataset}/compositions.parquet",
    output:
        "results/{dataset}/compositions/magpie.parquet",
    log:
        "results/{dataset}/logs/featurize_compositions.log",
    conda:
        "../../envs/data.yaml"
    shell:
        "python -m castbench featurize_compositions --compositions {input} --output {output} --log {log}"


rule fit_baseline:
    """Training mean and majority class, or a random forest, all seeds."""
    input:
        compositions="results/{dataset}/compositions.parquet",
        split="results/{dataset}/splits/compositions.json",
        features="results/{dataset}/compositions/magpie.parquet",
    output:
        expand(
            "results/{{dataset}}/composition_runs/{{baseline}}/{seed}/{file}",
            seed=SEEDS,
            file=RUN_FILES,
        ),
    log:
        "results/{dataset}/logs/fit_baseline/{baseline}.log",
    conda:
        "../../envs/train.yaml"
    params:
        settings=lambda wildcards: json.dumps(
            meaning.composition_settings(wildcards.baseline, config)
        ),
        seeds=SEEDS,
    shell:
        "python -m castbench fit_baseline --settings {params.settings:q} --model {wildcards.baseline}"
        " --seeds {params.seeds} --compositions {input.compositions} --split {input.split}"
        " --features {input.features} --threads {threads}"
        " --output results/{wildcards.dataset}/composition_runs/{wildcards.baseline} --log {log}"


rule train_compositions:
    """Train a model of compositions on all targets at once, all seeds one after another."""
    input:
        compositions="results/{dataset}/compositions.parquet",
        split="results/{dataset}/splits/compositions.json",
    output:
        expand(
            "results/{{dataset}}/composition_runs/{{network}}/{seed}/{file}",
            seed=SEEDS,
            file=RUN_FILES,
        ),
    log:
        "results/{dataset}/logs/train_compositions/{network}.log",
    retries: RETRIES
    conda:
        "../../envs/train.yaml"
    threads: THREADS * DEVICES
    resources:
        **SEVERAL_NODES,
        gpu=TRAINING_GPUS,
        nodes=NODES,
    params:
        launcher=LAUNCHER,
        settings=lambda wildcards: json.dumps(
            meaning.composition_settings(wildcards.network, config)
        ),
        seeds=SEEDS,
    shell:
        "{params.launcher}python -m castbench train_compositions --settings {params.settings:q} --model {wildcards.network}"
        " --seeds {params.seeds} --compositions {input.compositions} --split {input.split} --threads {threads}"
        " --output results/{wildcards.dataset}/composition_runs/{wildcards.network} --log {log}"


rule explain_compositions:
    """The element descriptor matrix of one formula, and the attention of every head on another."""
    input:
        expand(
            "results/{{dataset}}/composition_runs/edm_transformer/{seed}/model.safetensors",
            seed=SEEDS,
        ),
    output:
        "results/{dataset}/attention/compositions.json",
    log:
        "results/{dataset}/logs/explain_compositions.log",
    conda:
        "../../envs/train.yaml"
    params:
        settings=lambda wildcards: json.dumps(
            meaning.composition_settings("edm_transformer", config)
            | config["compositions"]["explain"]
        ),
        seeds=SEEDS,
    shell:
        "python -m castbench explain_compositions --settings {params.settings:q} --seeds {params.seeds}"
        " --runs results/{wildcards.dataset}/composition_runs/edm_transformer --output {output} --log {log}"


rule screen_compositions:
    """Enumerate ABX3, keep what chemistry allows, predict and rank it."""
    input:
        expand(
            "results/{{dataset}}/composition_runs/edm_transformer/{seed}/{file}",
            seed=SEEDS,
            file=["metrics.json", "model.safetensors"],
        ),
        compositions="results/{dataset}/compositions.parquet",
        split="results/{dataset}/splits/compositions.json",
    output:
        candidates="results/{dataset}/screening/candidates.parquet",
        ranked=report(
            "results/{dataset}/screening/ranked.csv",
            category="4 Screening",
            caption="../report/screening.rst",
            labels={"item": "Candidates by predicted stability"},
        ),
        summary="results/{dataset}/screening/summary.json",
    log:
        "results/{dataset}/logs/screen_compositions.log",
    conda:
        "../../envs/train.yaml"
    threads: THREADS
    resources:
        gpu=GPUS,
    params:
        settings=lambda wildcards: json.dumps(
            meaning.composition_settings("edm_transformer", config)
            | {"screening": config["compositions"]["screening"]}
        ),
        seeds=SEEDS,
    shell:
        "python -m castbench screen_compositions --settings {params.settings:q} --seeds {params.seeds}"
        " --runs results/{wildcards.dataset}/composition_runs/edm_transformer --compositions {input.compositions}"
        " --split {input.split} --output {output.candidates} --ranked {output.ranked} --summary {output.summary}"
        " --threads {threads} --log {log}"


rule validate_screening:
    """How the screening ranks known stable compounds that training has not seen."""
    input:
        candidates="results/{dataset}/screening/candidates.parquet",
        compositions="results/{dataset}/compositions.parquet",
        split="results/{dataset}/splits/compositions.json",
    output:
        "results/{dataset}/screening/validation.json",
    log:
        "results/{dataset}/logs/validate_screening.log",
    conda:
        "../../envs/train.yaml"
    params:
        settings=settings("training.seeds", "compositions.classification"),
    shell:
        "python -m castbench validate_screening --settings {params.settings:q} --candidates {input.candidates}"
        " --compositions {input.compositions} --split {input.split} --output {output} --log {log}"


rule tabulate_compositions:
    """Make the tables from the records of all runs."""
    input:
        composition_metrics,
        structure_metrics,
        compositions="results/{dataset}/compositions.parquet",
        split="results/{dataset}/splits/compositions.json",
        screening="results/{dataset}/screening/validation.json",
        paper="workflow/resources/paper/edm_report.csv",
    output:
        [
            report(
                f"results/{{dataset}}/tables/{name}.csv",
                category="1 Results",
                caption=f"../report/{name}.rst",
                labels={"item": title},
            )
            for name, title in COMPOSITION_TABLES.items()
        ],
    log:
        "results/{dataset}/logs/tabulate_compositions.log",
    conda:
        "../../envs/train.yaml"
    params:
        settings=lambda wildcards: json.dumps(meaning.composition_summary(config)),
    shell:
        "python -m castbench tabulate_compositions --settings {params.settings:q}"
        " --results results/{wildcards.dataset} --output results/{wildcards.dataset}/tables --log {log}"


rule plot_compositions:
    """The EDM report's figures, calibration and screening."""
    input:
        expand("results/{{dataset}}/tables/{name}.csv", name=COMPOSITION_TABLES),
        composition_metrics,
        attention="results/{dataset}/attention/compositions.json",
        screening="results/{dataset}/screening/validation.json",
    output:
        figures=[
            report(
                f"results/{{dataset}}/figures/{name}.svg",
                category="2 Figures",
                caption=f"../report/{name}.rst",
                labels={"item": title},
            )
            for name, title in COMPOSITION_FIGURES.items()
        ],
        pixels=expand(
            "results/{{dataset}}/figures/{name}.png", name=COMPOSITION_FIGURES
        ),
    log:
        "results/{dataset}/logs/plot_compositions.log",
    conda:
        "../../envs/report.yaml"
    params:
        settings=lambda wildcards: json.dumps(meaning.composition_summary(config)),
    shell:
        "python -m castbench plot_compositions --settings {params.settings:q} --results results/{wildcards.dataset}"
        " --output results/{wildcards.dataset}/figures --log {log}"


rule render_composition_report:
    """One self-contained file with everything, the screening's plot interactive."""
    input:
        expand("results/{{dataset}}/figures/{name}.svg", name=COMPOSITION_FIGURES),
        expand("results/{{dataset}}/tables/{name}.csv", name=COMPOSITION_TABLES),
        manifest="results/{dataset}/compositions/manifest.json",
        candidates="results/{dataset}/screening/candidates.parquet",
        ranked="results/{dataset}/screening/ranked.csv",
        deviations="workflow/resources/deviations.yaml",
    output:
        "results/{dataset}/report.html",
    log:
        "results/{dataset}/logs/render_composition_report.log",
    conda:
        "../../envs/report.yaml"
    params:
        settings=json.dumps(config, sort_keys=True),
    shell:
        "python -m castbench render_composition_report --settings {params.settings:q}"
        " --results results/{wildcards.dataset} --output {output} --log {log}"
