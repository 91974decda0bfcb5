"""Figures and the report.

Input: tables/, attention/, run folders, the caches' manifests.
Output: figures/, report.html; on request archive.zip and predicted_cost.json.
"""


localrules:
    plot_dataset,
    plot_results,
    plot_attention,
    plot_evidence,
    archive_results,
    predict_cost,


rule plot_dataset:
    """Funnel, target histograms, token lengths."""
    input:
        splits=SPLITS,
        graphs="results/{dataset}/graphs/manifest.json",
        paper="workflow/resources/paper/table2.csv",
        materials=ancient("results/{dataset}/materials.parquet"),
        funnel="results/{dataset}/funnel.json",
        tokens="results/{dataset}/tokens/manifest.json",
    output:
        figures=[
            report(
                f"results/{{dataset}}/figures/{name}.svg",
                category="2 Data",
                caption=f"../report/{name}.rst",
                labels={"item": title},
            )
            for name, title in DATASET_FIGURES.items()
        ],
        pixels=expand("results/{{dataset}}/figures/{name}.png", name=DATASET_FIGURES),
    log:
        "results/{dataset}/logs/plot_dataset.log",
    conda:
        "../../envs/report.yaml"
    params:
        settings=settings("dataset", "materials.source", "targets"),
    shell:
        "python -m castbench plot_dataset --settings {params.settings:q} --results results/{wildcards.dataset}"
        " --output results/{wildcards.dataset}/figures --log {log}"


rule plot_results:
    """Seeds, learning curves, parity, errors by group, cost."""
    input:
        tables="results/{dataset}/tables/table1.csv",
        runs="results/{dataset}/tables/runs.csv",
        splits=SPLITS,
        graphs="results/{dataset}/graphs/manifest.json",
        tokens="results/{dataset}/tokens/manifest.json",
        materials=ancient("results/{dataset}/materials.parquet"),
    output:
        figures=[
            report(
                f"results/{{dataset}}/figures/{name}.svg",
                category="1 Results",
                caption=f"../report/{name}.rst",
                labels={"item": title},
            )
            for name, title in RESULT_FIGURES.items()
        ],
        pixels=expand("results/{{dataset}}/figures/{name}.png", name=RESULT_FIGURES),
    log:
        "results/{dataset}/logs/plot_results.log",
    conda:
        "../../envs/report.yaml"
    params:
        settings=settings(
            "dataset",
            "materials.source",
            "targets",
            "models",
            "structure_encoder",
            "training.seeds",
        ),
    shell:
        "python -m castbench plot_results --settings {params.settings:q} --results results/{wildcards.dataset}"
        " --output results/{wildcards.dataset}/figures --log {log}"


rule plot_attention:
    """The paper's Figures 2 and 3."""
    input:
        maps=multiext("results/{dataset}/attention/maps", ".json", ".safetensors"),
        similarity="results/{dataset}/attention/similarity.parquet",
    output:
        figures=[
            report(
                f"results/{{dataset}}/figures/{name}.svg",
                category="3 Attention",
                caption=f"../report/{name}.rst",
                labels={"item": title},
            )
            for name, title in ATTENTION_FIGURES.items()
        ],
        pixels=expand("results/{{dataset}}/figures/{name}.png", name=ATTENTION_FIGURES),
    log:
        "results/{dataset}/logs/plot_attention.log",
    conda:
        "../../envs/report.yaml"
    params:
        settings=settings("dataset", "materials.source"),
    shell:
        "python -m castbench plot_attention --settings {params.settings:q} --results results/{wildcards.dataset}"
        " --output results/{wildcards.dataset}/figures --log {log}"


rule plot_evidence:
    """The text encoder's attention, and what the models make of other texts."""
    input:
        text="results/{dataset}/attention/text.json",
        evidence="results/{dataset}/tables/evidence.csv",
    output:
        figures=[
            report(
                f"results/{{dataset}}/figures/{name}.svg",
                category="3 Attention",
                caption=f"../report/{name}.rst",
                labels={"item": title},
            )
            for name, title in TEXT_FIGURES.items()
        ],
        pixels=expand("results/{{dataset}}/figures/{name}.png", name=TEXT_FIGURES),
    log:
        "results/{dataset}/logs/plot_evidence.log",
    conda:
        "../../envs/report.yaml"
    params:
        settings=settings("dataset", "materials.source", "models", "structure_encoder"),
    shell:
        "python -m castbench plot_evidence --settings {params.settings:q} --results results/{wildcards.dataset}"
        " --output results/{wildcards.dataset}/figures --log {log}"


# The other studies have reports of their own.
if config["study"] == "cast":

    localrules:
        render_report,

    rule render_report:
        """One self-contained file with everything."""
        input:
            figures,
            shown_attention,
            expand("results/{{dataset}}/tables/{name}", name=TABLES),
            materials=ancient("results/{dataset}/materials.parquet"),
            manifest="results/{dataset}/materials/manifest.json",
            funnel="results/{dataset}/funnel.json",
            descriptions="results/{dataset}/descriptions.json",
            graphs="results/{dataset}/graphs/manifest.json",
            tokens="results/{dataset}/tokens/manifest.json",
            splits=SPLITS,
            deviations="workflow/resources/deviations.yaml",
        output:
            "results/{dataset}/report.html",
        log:
            "results/{dataset}/logs/render_report.log",
        conda:
            "../../envs/report.yaml"
        params:
            settings=json.dumps(config, sort_keys=True),
        shell:
            "python -m castbench render_report --settings {params.settings:q} --results results/{wildcards.dataset}"
            " --output {output} --log {log}"


rule archive_results:
    """One file from which the report rebuilds without training."""
    input:
        report="results/{dataset}/report.html",
    output:
        "results/{dataset}/archive.zip",
    log:
        "results/{dataset}/logs/archive_results.log",
    conda:
        "../../envs/report.yaml"
    params:
        settings=json.dumps(config, sort_keys=True),
    shell:
        "python -m castbench archive_results --settings {params.settings:q} --results results/{wildcards.dataset}"
        " --output {output} --log {log}"


rule predict_cost:
    """GPU-hours, disk and wall time of the paper's preset, from what this run took."""
    input:
        all_metrics,
        all_pretraining_metrics,
        materials=ancient("results/{dataset}/materials.parquet"),
        descriptions=ancient("results/{dataset}/descriptions.parquet"),
        graphs="results/{dataset}/graphs/manifest.json",
        tokens="results/{dataset}/tokens/manifest.json",
        splits=SPLITS,
        plan=["config.yaml", "workflow/presets/paper.yaml"],
    output:
        "results/{dataset}/predicted_cost.json",
    log:
        "results/{dataset}/logs/predict_cost.log",
    conda:
        "../../envs/report.yaml"
    shell:
        "python -m castbench predict_cost --plan {input.plan} --results results/{wildcards.dataset}"
        " --output {output} --log {log}"
