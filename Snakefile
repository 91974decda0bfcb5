"""castbench: crystals in, the CAST paper's tables and figures out. See README.md."""

from os.path import exists

from snakemake.utils import min_version

min_version("9.0")


configfile: "config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/materials.smk"
include: "workflow/rules/text.smk"
include: "workflow/rules/graphs.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/report.smk"


if config["study"] == "compositions":

    include: "workflow/rules/compositions.smk"


if config["study"] == "matbench":

    include: "workflow/rules/matbench.smk"


rule all:
    default_target: True
    input:
        f"results/{config['dataset']}/report.html",


# One target a stage, to stop half-way: snakemake --cores 8 graphs
rule materials:
    input:
        expand(
            "results/{dataset}/splits/{target}.json",
            dataset=config["dataset"],
            target=TARGETS,
        ),


rule text:
    input:
        f"results/{config['dataset']}/tokens/manifest.json",


rule graphs:
    input:
        f"results/{config['dataset']}/graphs/manifest.json",


rule training:
    input:
        all_metrics,


rule evaluation:
    input:
        f"results/{config['dataset']}/tables/{'matbench' if config['study'] == 'matbench' else 'table1'}.csv",


# Not part of the report: everything in one file, to publish or to keep.
rule archive:
    input:
        f"results/{config['dataset']}/archive.zip",


onsuccess:
    if exists(f"results/{config['dataset']}/report.html"):
        print(f"report: results/{config['dataset']}/report.html")
