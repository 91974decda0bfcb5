"""Crystal graphs.

Input: materials.parquet.
Output: graphs/, packed arrays and their manifest.
"""


rule build_graphs:
    """Build the asymmetric-unit graphs that the structure encoder reads."""
    input:
        materials=ancient("results/{dataset}/materials.parquet"),
        funnel="results/{dataset}/funnel.json",
    output:
        "results/{dataset}/graphs/manifest.json",
    log:
        "results/{dataset}/logs/build_graphs.log",
    conda:
        "../../envs/data.yaml"
    threads: workflow.cores
    params:
        settings=json.dumps(meaning.graph_settings(config), sort_keys=True),
    shell:
        "python -m castbench build_graphs --settings {params.settings:q} --materials {input.materials}"
        " --threads {threads} --output results/{wildcards.dataset}/graphs --log {log}"
