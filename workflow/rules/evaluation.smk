"""Tables, attention, and what the models make of other texts.

Input: run folders, splits, descriptions.parquet, graphs/, tokens/, text_states/.
Output: tables/, attention/.
"""


localrules:
    describe_crystal,
    tabulate_evidence,
    aggregate_runs,


rule extract_attention:
    """Cross-attention maps of a dozen crystals, and how alike the maps of a crystal's nodes are."""
    input:
        unpack(attention_inputs),
        descriptions=ancient("results/{dataset}/descriptions.parquet"),
        materials=ancient("results/{dataset}/materials.parquet"),
        split=f"results/{{dataset}}/splits/{config['attention']['target']}.json",
    output:
        "results/{dataset}/attention/maps.json",
        "results/{dataset}/attention/maps.safetensors",
        "results/{dataset}/attention/similarity.parquet",
        "results/{dataset}/attention/by_material.parquet",
    log:
        "results/{dataset}/logs/extract_attention.log",
    conda:
        "../../envs/train.yaml"
    resources:
        gpu=GPUS,
    params:
        settings=settings("attention.target", "attention.material", "structure_encoder"),
        states=lambda wildcards: states_option("cast", wildcards),
        seeds=SEEDS,
        encoder=ENCODER,
        device=DEVICE,
    shell:
        "python -m castbench extract_attention --settings {params.settings:q} --runs results/{wildcards.dataset}/runs"
        " --seeds {params.seeds} --materials {input.materials} --split {input.split}"
        " --descriptions {input.descriptions} --graphs results/{wildcards.dataset}/graphs"
        " --tokens results/{wildcards.dataset}/tokens {params.states}"
        " --encoder {params.encoder:q} --device {params.device}"
        " --output results/{wildcards.dataset}/attention --log {log}"


rule describe_crystal:
    """Describe the crystal whose text the text encoder's attention is shown on."""
    input:
        TEXT_FILE or [],
    output:
        "results/{dataset}/attention/description.parquet",
    log:
        "results/{dataset}/logs/describe_crystal.log",
    conda:
        "../../envs/data.yaml"
    shell:
        "python -m castbench describe_crystal --crystal {input:q} --output {output} --log {log}"


rule extract_text_attention:
    """Attention of [CLS] to the words of a description, in the text encoder."""
    input:
        descriptions=(
            "results/{dataset}/attention/description.parquet"
            if TEXT_FILE
            else ancient("results/{dataset}/descriptions.parquet")
        ),
        tokens="results/{dataset}/tokens/manifest.json",
        encoder=f"{ENCODER}/manifest.json",
    output:
        "results/{dataset}/attention/text.json",
    log:
        "results/{dataset}/logs/extract_text_attention.log",
    conda:
        "../../envs/train.yaml"
    params:
        material=(
            ""
            if TEXT_FILE
            else f"--material {shlex.quote(config['attention']['text'])}"
        ),
        encoder=lambda wildcards, input: str(Path(input.encoder).parent),
    shell:
        "python -m castbench extract_text_attention --descriptions {input.descriptions} {params.material}"
        " --tokens results/{wildcards.dataset}/tokens --encoder {params.encoder:q} --output {output} --log {log}"


rule probe_text:
    """What a model, trained with each seed, makes of test crystals when their texts change."""
    input:
        lambda wildcards: expand(
            f"{probed_runs(wildcards)}/{{seed}}/model.safetensors",
            seed=SEEDS,
        ),
        materials=ancient("results/{dataset}/materials.parquet"),
        descriptions=ancient("results/{dataset}/descriptions.parquet"),
        split=f"results/{{dataset}}/splits/{config['attention']['target']}.json",
        graphs="results/{dataset}/graphs/manifest.json",
        tokens="results/{dataset}/tokens/manifest.json",
        encoder=f"{ENCODER}/manifest.json",
    output:
        "results/{dataset}/attention/probes/{probed}.parquet",
    log:
        "results/{dataset}/logs/probe_text/{probed}.log",
    conda:
        "../../envs/train.yaml"
    resources:
        gpu=GPUS,
    params:
        settings=settings("attention.probes"),
        runs=probed_runs,
        seeds=SEEDS,
        encoder=lambda wildcards, input: str(Path(input.encoder).parent),
        device=DEVICE,
    shell:
        "python -m castbench probe_text --settings {params.settings:q} --runs {params.runs} --seeds {params.seeds}"
        " --materials {input.materials} --split {input.split} --descriptions {input.descriptions} --graphs results/{wildcards.dataset}/graphs"
        " --tokens results/{wildcards.dataset}/tokens --encoder {params.encoder:q} --device {params.device}"
        " --output {output} --log {log}"


rule tabulate_evidence:
    """Attention and probes in numbers, each with its crystals and interval."""
    input:
        unpack(evidence_inputs),
    output:
        "results/{dataset}/tables/evidence.csv",
    log:
        "results/{dataset}/logs/tabulate_evidence.log",
    conda:
        "../../envs/report.yaml"
    params:
        settings=json.dumps(
            {
                "target": config["attention"]["target"],
                "probed": PROBED,
                "compared": CAST_COMPARED,
            }
        ),
    shell:
        "python -m castbench tabulate_evidence --settings {params.settings:q}"
        " --attention results/{wildcards.dataset}/attention --output {output} --log {log}"


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
        preset="workflow/presets/paper.yaml",
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
        settings=json.dumps(meaning.table_settings(config), sort_keys=True),
    shell:
        "python -m castbench aggregate_runs --settings {params.settings:q} --results results/{wildcards.dataset}"
        " --output results/{wildcards.dataset}/tables --log {log}"
