# What the extension of any model has: the base model, its texts, and what becomes of the extended one. Included by the
# Snakefiles of ../progressive and ../llama3_8b, which name before it:
#
# HF: the base model's folder; TUNED: the window of the fine-tuned checkpoint; FINAL: the extended model's factor file;
# EXTENDED_MODEL: flags of both for evaluations; TEXTS: a length for each set of whole documents; KINDS of evaluations.
TASK_FILES = f"--include-path '{given(config['task_folder'])}'" if config["task_folder"] else ""
PLACEMENT = words(config["placement"])


localrules: report


# The base model as a Megatron checkpoint; logits are compared with transformers' before it is in place.
rule base:
    input: model_files(HF, WEIGHTS)
    output: "checkpoints/base.done"
    log: "logs/base.log"
    shell:
        """
        log_to {log}
        begin checkpoints/base {input:q}
        [[ -d checkpoints/base ]] || longrope convert from-hf --hf {HF:q} --output checkpoints/base
        stamp {output}
        """


# Whole documents for the searches and the evaluation, without special tokens.
rule documents:
    input:
        text=lambda wildcards: given(config[f"{wildcards.texts}_text"]),
        tokenizer=model_files(HF, TOKENIZER),
    output: multiext("data/{texts}", ".bin", ".idx", ".json")
    wildcard_constraints: texts="|".join(TEXTS)
    params:
        length=lambda wildcards: TEXTS[wildcards.texts],
    threads: config["workers"]
    log: "logs/documents_{texts}.log"
    shell:
        """
        log_to {log}
        longrope data prepare --input {input.text:q} --tokenizer {HF:q} --output data/{wildcards.texts} \
            --whole-documents --min-length {params.length} --workers {threads} --overwrite
        """


# Perplexity up to the tuned window.
rule perplexity:
    input: f"checkpoints/{TUNED}.done", FINAL, "data/heldout.bin"
    output: "results/perplexity.done"
    params:
        lengths=config["lengths"],
        documents=config["eval_documents"],
    resources: **GPUS
    threads: config["cpus"]
    log: "logs/perplexity.log"
    shell:
        """
        log_to {log}
        begin results/perplexity {input:q} {params:q}
        on_gpus {resources.gpus_per_node} longrope eval ppl {EXTENDED_MODEL} --data data/heldout --lengths {params.lengths} \
            --num-documents {params.documents} --dtype {config[dtype]} --output results/perplexity --yes
        stamp {output}
        """


# What is left of the short tasks, under the original window's factors.
rule short_benchmarks:
    input: f"checkpoints/{TUNED}.done", FINAL, tokenizer=model_files(HF, TOKENIZER)
    output: "results/short.done"
    params:
        tasks=config["tasks"],
    resources: **GPUS
    threads: config["cpus"]
    log: "logs/short_benchmarks.log"
    shell:
        """
        log_to {log}
        begin results/short {input:q} {params:q}
        on_gpus {resources.gpus_per_node} longrope eval short {EXTENDED_MODEL} --tokenizer {HF:q} \
            --tasks {params.tasks} {TASK_FILES} --dtype {config[dtype]} --output results/short --yes
        stamp {output}
        """


# To Hugging Face format; logits are compared before it is in place.
rule convert:
    input: f"checkpoints/{TUNED}.done", factors=FINAL, tokenizer=model_files(HF, TOKENIZER)
    output: "hf/config.json"
    log: "logs/convert.log"
    shell:
        """
        log_to {log}
        longrope convert to-hf --load checkpoints/{TUNED} --longrope-config {input.factors} \
            --tokenizer {HF:q} --output hf --overwrite
        """


# One page with every number and figure.
rule report:
    input: expand("results/{kind}.done", kind=KINDS)
    output: "results/report.html"
    shell: "longrope report results"
