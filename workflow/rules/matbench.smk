"""Matbench's tasks in their own folds, and results in its own format.

Input: the published files of the tasks, downloaded where materials.path does not name a folder with them.
Output: materials/{task}.json.gz, splits/{task}.fold_{k}.json, matbench/{task}.parquet (all records, with fold and
value), matbench/{model}/{seed}/results.json.gz, tables/, report.html.
"""

SUBMISSIONS = expand(
    "results/{{dataset}}/matbench/{model}/{seed}/results.json.gz",
    model=config["models"],
    seed=SEEDS,
)


localrules:
    fetch_matbench,
    split_matbench,
    aggregate_matbench,
    render_matbench_report,


rule fetch_matbench:
    """Download the published file of a task, and verify it."""
    output:
        "results/{dataset}/materials/{task}.json.gz",
    log:
        "results/{dataset}/logs/fetch_matbench/{task}.log",
    conda:
        "../../envs/data.yaml"
    shell:
        "python -m castbench fetch_matbench --task {wildcards.task} --output {output} --log {log}"


rule split_matbench:
    """Write Matbench's five folds of every task."""
    input:
        files=meaning.source_files(config),
        materials=ancient("results/{dataset}/materials.parquet"),
        funnel="results/{dataset}/funnel.json",
    output:
        expand("results/{{dataset}}/splits/{target}.json", target=TARGETS),
        expand("results/{{dataset}}/matbench/{task}.parquet", task=config["targets"]),
    log:
        "results/{dataset}/logs/split_matbench.log",
    conda:
        "../../envs/data.yaml"
    params:
        settings=json.dumps(
            meaning.source_settings(config)
            | config["matbench"]
            | {"seed": config["materials"]["split"]["seed"]},
            sort_keys=True,
        ),
    shell:
        "python -m castbench split_matbench --settings {params.settings:q} --materials {input.materials}"
        " --output results/{wildcards.dataset}/splits --tasks results/{wildcards.dataset}/matbench --log {log}"


rule aggregate_matbench:
    """Score the folds as Matbench does, beside the published scores, and write results that it accepts."""
    input:
        all_metrics,
        tasks=expand(
            "results/{{dataset}}/matbench/{task}.parquet", task=config["targets"]
        ),
        manifest="results/{dataset}/materials/manifest.json",
        published="workflow/resources/paper/matbench.csv",
    output:
        SUBMISSIONS,
        report(
            "results/{dataset}/tables/matbench.csv",
            category="1 Results",
            caption="../report/matbench.rst",
            labels={"item": "Matbench: scores of every task"},
        ),
        report(
            "results/{dataset}/tables/matbench_folds.csv",
            category="1 Results",
            caption="../report/matbench_folds.rst",
            labels={"item": "Matbench: every fold"},
        ),
    log:
        "results/{dataset}/logs/aggregate_matbench.log",
    conda:
        "../../envs/train.yaml"
    params:
        settings=settings(
            "dataset", "targets", "models", "structure_encoder", "training.seeds"
        ),
    shell:
        "python -m castbench aggregate_matbench --settings {params.settings:q} --results results/{wildcards.dataset}"
        " --log {log}"


rule render_matbench_report:
    """One self-contained file with everything."""
    input:
        SUBMISSIONS,
        expand(
            "results/{{dataset}}/tables/{name}.csv",
            name=["matbench", "matbench_folds"],
        ),
        manifest="results/{dataset}/materials/manifest.json",
        graphs="results/{dataset}/graphs/manifest.json",
        deviations="workflow/resources/deviations.yaml",
    output:
        "results/{dataset}/report.html",
    log:
        "results/{dataset}/logs/render_matbench_report.log",
    conda:
        "../../envs/report.yaml"
    params:
        settings=json.dumps(config, sort_keys=True),
    shell:
        "python -m castbench render_matbench_report --settings {params.settings:q} --results results/{wildcards.dataset}"
        " --output {output} --log {log}"
