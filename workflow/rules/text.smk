"""Descriptions, tokens and the states of the frozen text encoder.

Input: materials.parquet; the text encoder, by id or folder.
Output: descriptions.parquet, tokens/, text_states/{remaining}/, results/encoders/{encoder}/.
"""


localrules:
    gather_descriptions,
    prefetch_encoder,


rule describe_shard:
    """Describe every n-th crystal with robocrystallographer."""
    input:
        materials=ancient("results/{dataset}/materials.parquet"),
        funnel="results/{dataset}/funnel.json",
    output:
        "results/{dataset}/descriptions/{shard}.parquet",
    log:
        "results/{dataset}/logs/describe_shard/{shard}.log",
    benchmark:
        "results/{dataset}/benchmarks/describe_shard/{shard}.tsv"
    conda:
        "../../envs/data.yaml"
    params:
        settings=settings("text.source", "text.time_limit", "text.shards"),
    shell:
        "python -m castbench describe_shard --settings {params.settings:q} --materials {input.materials}"
        " --shard {wildcards.shard} --output {output} --log {log}"


rule gather_descriptions:
    """Put the descriptions into one file and count what failed."""
    input:
        shards=expand("results/{{dataset}}/descriptions/{shard}.parquet", shard=SHARDS),
    output:
        descriptions="results/{dataset}/descriptions.parquet",
        statistics="results/{dataset}/descriptions.json",
    log:
        "results/{dataset}/logs/gather_descriptions.log",
    conda:
        "../../envs/data.yaml"
    shell:
        "python -m castbench gather_descriptions --shards {input.shards} --output {output.descriptions}"
        " --statistics {output.statistics} --log {log}"


rule prefetch_encoder:
    """Fetch the text encoder at its pinned revision: the one rule that needs a network."""
    input:
        meaning.encoder_files(config),
    output:
        f"{ENCODER}/manifest.json",
    log:
        f"{ENCODER}.log",
    conda:
        "../../envs/train.yaml"
    params:
        encoder=config["text_encoder"],
        folder=lambda wildcards, output: str(Path(output[0]).parent),
    shell:
        "python -m castbench prefetch_encoder --encoder {params.encoder:q} --output {params.folder:q} --log {log:q}"


rule tokenize_text:
    """Cut descriptions into the encoder's tokens."""
    input:
        descriptions=ancient("results/{dataset}/descriptions.parquet"),
        statistics="results/{dataset}/descriptions.json",
        encoder=f"{ENCODER}/manifest.json",
    output:
        "results/{dataset}/tokens/manifest.json",
    log:
        "results/{dataset}/logs/tokenize_text.log",
    conda:
        "../../envs/train.yaml"
    params:
        settings=settings("max_tokens"),
        encoder=lambda wildcards, input: str(Path(input.encoder).parent),
    shell:
        "python -m castbench tokenize_text --settings {params.settings:q} --descriptions {input.descriptions}"
        " --encoder {params.encoder:q} --output results/{wildcards.dataset}/tokens --log {log}"


rule embed_text:
    """Run the frozen layers of the text encoder once; `remaining` layers are left to the models."""
    input:
        tokens="results/{dataset}/tokens/manifest.json",
        encoder=f"{ENCODER}/manifest.json",
    output:
        "results/{dataset}/text_states/{remaining}/manifest.json",
    log:
        "results/{dataset}/logs/embed_text/{remaining}.log",
    conda:
        "../../envs/train.yaml"
    resources:
        gpu=GPUS,
    params:
        encoder=lambda wildcards, input: str(Path(input.encoder).parent),
        device=DEVICE,
    shell:
        "python -m castbench embed_text --tokens results/{wildcards.dataset}/tokens --encoder {params.encoder:q}"
        " --remaining {wildcards.remaining} --device {params.device}"
        " --output results/{wildcards.dataset}/text_states/{wildcards.remaining} --log {log}"
