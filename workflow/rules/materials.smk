"""Crystals and their labels.

Input: the source named in the configuration (materials.source): a file (materials.path), the Materials Project,
a snapshot of it (materials.snapshot), or Matbench's files (matbench.smk).
Output: materials.parquet, funnel.json, splits/{target}.json. A download leaves materials/snapshot.jsonl.zst, not
declared, like its pages: Snakemake removes what a failed job declares, and the next start goes on from these.
"""


localrules:
    collect_materials,
    filter_materials,
    split_materials,


rule collect_materials:
    """Read or download the crystals of the source, and validate them."""
    input:
        meaning.source_files(config),
    output:
        materials="results/{dataset}/materials/collected.parquet",
        manifest="results/{dataset}/materials/manifest.json",
    log:
        "results/{dataset}/logs/collect_materials.log",
    conda:
        "../../envs/data.yaml"
    params:
        settings=json.dumps(meaning.source_settings(config), sort_keys=True),
    shell:
        "python -m castbench collect_materials --settings {params.settings:q} --output {output.materials}"
        " --manifest {output.manifest} --log {log}"


rule filter_materials:
    """Apply the paper's filters and count what each removes."""
    input:
        materials=ancient("results/{dataset}/materials/collected.parquet"),
        manifest="results/{dataset}/materials/manifest.json",
    output:
        materials="results/{dataset}/materials.parquet",
        funnel="results/{dataset}/funnel.json",
    log:
        "results/{dataset}/logs/filter_materials.log",
    conda:
        "../../envs/data.yaml"
    params:
        settings=settings(
            "materials.filters", "materials.sample", "materials.split.seed", "targets"
        ),
    shell:
        "python -m castbench filter_materials --settings {params.settings:q} --materials {input.materials}"
        " --manifest {input.manifest} --output {output.materials} --funnel {output.funnel} --log {log}"


rule split_materials:
    """Assign crystals to train, validation and test."""
    input:
        materials=ancient("results/{dataset}/materials.parquet"),
        funnel="results/{dataset}/funnel.json",
    output:
        expand("results/{{dataset}}/splits/{target}.json", target=config["targets"]),
    log:
        "results/{dataset}/logs/split_materials.log",
    conda:
        "../../envs/data.yaml"
    params:
        settings=settings(
            "targets",
            "materials.split.seed",
            "materials.split.fractions",
            "materials.split.group_by",
        ),
    shell:
        "python -m castbench split_materials --settings {params.settings:q} --materials {input.materials}"
        " --output results/{wildcards.dataset}/splits --log {log}"
