"""`pretrain` of megatron-core 0.17 and 0.18, which take a function that builds the model.

From 0.19 on a model is described by a configuration; pretrain_gpt.py does that itself. What is
built here is the same dense decoder.
"""

from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.training import argument_utils, arguments, get_args
from megatron.training import pretrain as megatron_pretrain


def model_provider(pre_process=True, post_process=True, config=None, **options):
    """The part of the model that this pipeline stage holds."""
    args = get_args()
    if args.num_experts:
        raise SystemExit("--num-experts needs megatron-core 0.19 here: this model is dense")
    config = config or arguments.core_transformer_config_from_args(args)
    if args.transformer_impl == "local":
        spec = gpt_layer_specs.get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, normalization=config.normalization
        )
    else:
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm
        )
    return GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        **options,
    )


def pretrain(datasets_provider, forward_step, embedding_ranks):
    """Run the training loop; 0.17 parses the command line itself, 0.18 wants it parsed."""
    parsed = {}
    if hasattr(argument_utils, "pretrain_cfg_container_from_args"):
        args = arguments.parse_and_validate_args()
        parsed["cfg_container"] = argument_utils.pretrain_cfg_container_from_args(args)
    megatron_pretrain(
        **parsed,
        train_valid_test_dataset_provider=datasets_provider,
        model_provider=model_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        get_embedding_ranks=embedding_ranks,
    )
