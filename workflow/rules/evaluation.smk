"""Tables and attention.

Input: run folders, splits, graphs/, tokens/, text_states/.
Output: tables/, attention/.
"""


localrules:
    aggregate_runs,


rule extract_attention:
    """Cross-attention maps of one crystal, and how alike the maps of a crystal's nodes are."""
    input:
        unpack(attention_inputs),
        materials=ancient("results/{dataset}/materials.parquet"),
        split=f"results/{{dataset}}/splits/{config['attention']['target']}.json",
    output:
        maps="results/{dataset}/attention/maps.json",
        similarity="results/{dataset}/attention/similarity.parquet",
    log:
        "results/{dataset}/logs/extract_attention.log",
    conda:
        "../../envs/train.yaml"
    resources:
        gpu=GPUS,
    params:
        settings=settings("attention.target", "attention.material"),
        states=lambda wildcards: states_option("cast", wildcards),
        seed=config["training"]["seeds"][0],
        encoder=ENCODER,
    shell:
        "python -m castbench extract_attention --settings {params.settings:q} --runs results/{wildcards.dataset}/runs"
        " --seed {params.seed} --materials {input.materials} --split {input.split}"
        " --graphs results/{wildcards.dataset}/graphs --tokens results/{wildcards.dataset}/tokens {params.states}"
        " --encoder {params.encoder:q} --output results/{wildcards.dataset}/attention --log {log}"


rule aggregate_runs:
    """Make the tables from the records of all runs."""
    input:
        all_metrics,
        all_pretraining_metrics,
        materials=ancient("results/{dataset}/materials.parquet"),
        splits=SPLITS,
        funnel="results/{dataset}/funnel.json",
        graphs="results/{dataset}/graphs/manifest.json",
        tokens="results/{dataset}/tokens/manifest.json",
        paper=multiext("workflow/resources/paper/table", "1.csv", "2.csv"),
    output:
        report(
            "results/{dataset}/tables/table1.csv",
            category="1 Results",
            caption="../report/table1.rst",
            labels={"item": "Table 1: MAE of every model"},
        ),
        report(
            "results/{dataset}/tables/table2.csv",
            category="2 Data",
            caption="../report/table2.rst",
            labels={"item": "Table 2: data statistics"},
        ),
        expand(
            "results/{{dataset}}/tables/{name}",
            name=[t for t in TABLES if t not in ("table1.csv", "table2.csv")],
        ),
    log:
        "results/{dataset}/logs/aggregate_runs.log",
    conda:
        "../../envs/report.yaml"
    params:
        settings=settings(
            "dataset",
            "materials.source",
            "targets",
            "models",
            "training.seeds",
            "text_encoder",
        ),
    shell:
        "python -m castbench aggregate_runs --settings {params.settings:q} --results results/{wildcards.dataset}"
        " --output results/{wildcards.dataset}/tables --log {log}"
