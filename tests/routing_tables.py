"""What each weight of transformers' models is, written by hand from their published code (5.23), before ours was run.

A case lists every parameter with two axes or more: role -> patterns of names, without `.weight`. `#` stands for a
number, `{a,b}` for one of several words. `tied` are other names of a table. `doubtful` must carry a doubt.
`transposed` are stored (in, out). `undecayed` are tables of position biases, which AdamW must not decay; nor is any
"state".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MUON_ROLES = {"matrix", "experts", "router"}


@dataclass(frozen=True)
class Case:
    """One architecture: class, model type, settings, and the expected role of each weight."""

    cls: str
    kind: str
    settings: dict[str, Any]
    roles: dict[str, str]
    tied: str = ""
    doubtful: str = ""
    transposed: str = ""
    undecayed: str = ""


TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHORT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8, "num_labels": 3,
}  # fmt: skip
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "vocab_size": 96, "max_position_embeddings": 40, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
GPT = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SSM = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}

ATTENTION = "model.layers.#.self_attn.{q,k,v,o}_proj"
DENSE = f"{ATTENTION} model.layers.#.mlp.{{gate,up,down}}_proj"
FUSED = "model.layers.#.mlp.experts.{gate_up,down}_proj"
TOKENS = "model.embed_tokens"
LLAMA = {"matrix": DENSE, "table": TOKENS, "head": "lm_head"}
TIED_LLAMA = {"matrix": DENSE, "table": TOKENS}
GPT2 = {"matrix": "transformer.h.#.attn.{c_attn,c_proj} transformer.h.#.mlp.{c_fc,c_proj}",
        "table": "transformer.{wte,wpe}"}  # fmt: skip
MAMBA = {
    "matrix": "backbone.layers.#.mixer.{in,x,dt,out}_proj",
    "table": "backbone.embeddings",
    "state": "backbone.layers.#.mixer.A_log",
    "convolution": "backbone.layers.#.mixer.conv1d",
}
BERT_LAYERS = (
    "bert.encoder.layer.#.attention.self.{query,key,value} bert.encoder.layer.#.attention.output.dense "
    "bert.encoder.layer.#.{intermediate,output}.dense"
)
BERT_TABLES = "bert.embeddings.{word,position,token_type}_embeddings"
BART = (
    "model.{encoder,decoder}.layers.#.self_attn.{k,v,q,out}_proj model.decoder.layers.#.encoder_attn.{k,v,q,out}_proj "
    "model.{encoder,decoder}.layers.#.fc#"
)


def tower(prefix: str) -> str:
    """The matrices of a CLIP-like encoder."""
    return f"{prefix}encoder.layers.#.self_attn.{{k,v,q,out}}_proj {prefix}encoder.layers.#.mlp.fc#"


def prefixed(text: str, old: str, new: str) -> str:
    return " ".join(new + word.removeprefix(old) for word in text.split())


CASES = [
    # decoders
    Case("LlamaForCausalLM", "llama", TEXT, LLAMA),
    Case("LlamaForSequenceClassification", "llama", {**TEXT, "num_labels": 3}, {**LLAMA, "head": "score"}),
    Case("MistralForTokenClassification", "mistral", {**TEXT, "num_labels": 5}, {**LLAMA, "head": "score"}),
    Case("Qwen2ForCausalLM", "qwen2", TEXT, LLAMA),
    Case("Gemma2ForCausalLM", "gemma2", TEXT, TIED_LLAMA, tied="lm_head"),
    Case("Gemma3ForCausalLM", "gemma3_text", TEXT, TIED_LLAMA, tied="lm_head"),
    Case(
        "Phi3ForCausalLM", "phi3", TEXT,
        {**LLAMA, "matrix": "model.layers.#.self_attn.{o,qkv}_proj model.layers.#.mlp.{gate_up,down}_proj"},
    ),
    Case(
        "PhiForCausalLM", "phi", TEXT,
        {**LLAMA, "matrix": "model.layers.#.self_attn.{q_proj,k_proj,v_proj,dense} model.layers.#.mlp.fc#"},
    ),
    # Conv1D keeps (in, out); wte and wpe are nn.Embedding
    Case("GPT2LMHeadModel", "gpt2", GPT, GPT2, tied="lm_head", transposed=GPT2["matrix"]),
    # mc_logits come from multiple_choice_head.summary, a Linear with one output
    Case(
        "GPT2DoubleHeadsModel", "gpt2", GPT, {**GPT2, "head": "multiple_choice_head.summary"},
        tied="lm_head", transposed=GPT2["matrix"],
    ),
    Case(
        "GPTNeoXForCausalLM", "gpt_neox", TEXT,
        {
            "matrix": "gpt_neox.layers.#.attention.{query_key_value,dense} "
            "gpt_neox.layers.#.mlp.dense_{h_to_4h,4h_to_h}",
            "table": "gpt_neox.embed_in",
            "head": "lm_head",
        },
    ),
    Case(
        "GPTJForCausalLM", "gptj", {**GPT, "rotary_dim": 8},
        {
            "matrix": "transformer.h.#.attn.{q,k,v,out}_proj transformer.h.#.mlp.{fc_in,fc_out}",
            "table": "transformer.wte",
            "head": "lm_head",
        },
    ),
    # word_embed_proj_dim: projections stand between the tables and the layers, they multiply activations
    Case(
        "OPTForCausalLM", "opt",
        {**SHORT, "ffn_dim": 48, "word_embed_proj_dim": 16},
        {
            "matrix": "model.decoder.project_{in,out} model.decoder.layers.#.self_attn.{k,v,q,out}_proj "
            "model.decoder.layers.#.fc#",
            "table": "model.decoder.embed_{tokens,positions}",
        },
        tied="lm_head",
    ),
    Case(
        "BloomForCausalLM", "bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        {
            "matrix": "transformer.h.#.self_attention.{query_key_value,dense} "
            "transformer.h.#.mlp.dense_{h_to_4h,4h_to_h}",
            "table": "transformer.word_embeddings",
        },
        tied="lm_head",
    ),
    # FalconLinear is an nn.Linear with its own forward
    Case(
        "FalconForCausalLM", "falcon",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        {
            "matrix": "transformer.h.#.self_attention.{query_key_value,dense} "
            "transformer.h.#.mlp.dense_{h_to_4h,4h_to_h}",
            "table": "transformer.word_embeddings",
        },
        tied="lm_head",
    ),
    Case(
        "MptForCausalLM", "mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 96},
        {
            "matrix": "transformer.blocks.#.attn.{Wqkv,out_proj} transformer.blocks.#.ffn.{up,down}_proj",
            "table": "transformer.wte",
        },
        tied="lm_head",
    ),
    Case(
        "Gemma3nForCausalLM", "gemma3n_text",
        {
            **TEXT, "intermediate_size": [48, 48], "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8,
            "laurel_rank": 4, "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": None, "altup_num_inputs": 2,
        },
        {
            "matrix": f"{DENSE} model.layers.#.altup.{{correction_coefs,prediction_coefs,modality_router}} "
            "model.layers.#.laurel.linear_{left,right} model.layers.#.per_layer_{input_gate,projection} "
            "model.per_layer_model_projection model.altup_projections.# model.altup_unembed_projections.#",
            "table": f"{TOKENS} model.embed_tokens_per_layer",
        },
        tied="lm_head",
    ),
    # state-space and recurrent models
    Case("MambaForCausalLM", "mamba", {**SSM, "time_step_rank": 4}, MAMBA, tied="lm_head"),
    Case("FalconMambaForCausalLM", "falcon_mamba", {**SSM, "time_step_rank": 4}, MAMBA, tied="lm_head"),
    Case(
        "Mamba2ForCausalLM", "mamba2", {**SSM, "num_heads": 8, "head_dim": 8, "n_groups": 2},
        {
            "matrix": "backbone.layers.#.mixer.{in,out}_proj",
            "table": "backbone.embeddings",
            "convolution": "backbone.layers.#.mixer.conv1d",
            "head": "lm_head",
        },
    ),
    Case(
        "JambaForCausalLM", "jamba",
        {
            **TEXT, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
            "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4,
        },
        {
            "matrix": f"{ATTENTION} model.layers.#.mamba.{{in,x,dt,out}}_proj "
            "model.layers.#.feed_forward.{gate,up,down}_proj",
            "state": "model.layers.#.mamba.A_log",
            "convolution": "model.layers.#.mamba.conv1d",
            "router": "model.layers.#.feed_forward.router",
            "experts": "model.layers.#.feed_forward.experts.{gate_up,down}_proj",
            "table": TOKENS,
            "head": "lm_head",
        },
    ),
    # time_mix_* are (1, 1, d) and multiply element by element
    Case(
        "RwkvForCausalLM", "rwkv",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
         "intermediate_size": 64},
        {
            "matrix": "rwkv.blocks.#.attention.{key,value,receptance,output} "
            "rwkv.blocks.#.feed_forward.{key,receptance,value}",
            "state": "rwkv.blocks.#.attention.time_mix_{key,value,receptance} "
            "rwkv.blocks.#.feed_forward.time_mix_{key,receptance}",
            "table": "rwkv.embeddings",
            "head": "head",
        },
    ),
    Case(
        "xLSTMForCausalLM", "xlstm", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4},
        {
            "matrix": "backbone.blocks.#.mlstm_layer.{q,k,v,ogate_preact,igate_preact,fgate_preact,out_proj} "
            "backbone.blocks.#.ffn.proj_{up_gate,up,down}",
            "table": "backbone.embeddings",
            "head": "lm_head",
        },
    ),
    # gates of the RG-LRU are block-diagonal: (heads, w, w) after the activation in baddbmm, so (E, in, out)
    Case(
        "RecurrentGemmaForCausalLM", "recurrent_gemma",
        {**TEXT, "num_hidden_layers": 3, "lru_width": 32, "num_key_value_heads": 1},
        {
            "matrix": "model.layers.#.temporal_block.linear_{y,x,out} model.layers.#.temporal_block.{q,k,v,o}_proj "
            "model.layers.#.mlp_block.{gate,up,down}_proj",
            "experts": "model.layers.#.temporal_block.rg_lru.{input,recurrent}_gate_weight",
            "vector": "model.layers.#.temporal_block.rg_lru.{input,recurrent}_gate_bias",
            "convolution": "model.layers.#.temporal_block.conv_1d",
            "table": TOKENS,
        },
        tied="lm_head",
        transposed="model.layers.#.temporal_block.rg_lru.{input,recurrent}_gate_weight",
    ),
    # mixtures of experts
    Case(
        "MixtralForCausalLM", "mixtral", {**TEXT, "num_local_experts": 4},
        {**LLAMA, "matrix": ATTENTION, "router": "model.layers.#.mlp.gate", "experts": FUSED},
    ),
    Case(
        "Qwen3MoeForCausalLM", "qwen3_moe", {**TEXT, **EXPERTS, "num_experts": 4},
        {**LLAMA, "matrix": ATTENTION, "router": "model.layers.#.mlp.gate", "experts": FUSED},
    ),
    # shared_expert_gate is Linear(d, 1)
    Case(
        "Qwen2MoeForCausalLM", "qwen2_moe",
        {**TEXT, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24},
        {
            **LLAMA, "matrix": f"{ATTENTION} model.layers.#.mlp.shared_expert.{{gate,up,down}}_proj",
            "router": "model.layers.#.mlp.gate", "experts": FUSED, "vector": "model.layers.#.mlp.shared_expert_gate",
        },
    ),
    Case(
        "Qwen3NextForCausalLM", "qwen3_next",
        {
            **TEXT, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
        {
            **LLAMA,
            "matrix": f"{ATTENTION} model.layers.#.linear_attn.{{in_proj_qkvz,in_proj_ba,out_proj}} "
            "model.layers.#.mlp.shared_expert.{gate,up,down}_proj",
            "convolution": "model.layers.#.linear_attn.conv1d",
            "router": "model.layers.#.mlp.gate", "experts": FUSED, "vector": "model.layers.#.mlp.shared_expert_gate",
        },
    ),
    Case(
        "DeepseekV3ForCausalLM", "deepseek_v3",
        {
            "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8,
            "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 12, "kv_lora_rank": 10,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
        },
        {
            **LLAMA,
            "matrix": "model.layers.#.self_attn.{q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj,o_proj} "
            "model.layers.#.mlp.{gate,up,down}_proj model.layers.#.mlp.shared_experts.{gate,up,down}_proj",
            "router": "model.layers.#.mlp.gate", "experts": FUSED,
        },
    ),
    # Llama4's experts are multiplied by torch.bmm(x, W), so they are (E, in, out); the router is a subclass of Linear
    Case(
        "Llama4ForCausalLM", "llama4_text",
        {**TEXT, "intermediate_size_mlp": 40, "num_local_experts": 4, "moe_layers": [1]},
        {
            **LLAMA,
            "matrix": f"{ATTENTION} model.layers.#.feed_forward.{{gate,up,down}}_proj "
            "model.layers.#.feed_forward.shared_expert.{gate,up,down}_proj",
            "router": "model.layers.#.feed_forward.router",
            "experts": "model.layers.#.feed_forward.experts.{gate_up,down}_proj",
        },
        transposed="model.layers.#.feed_forward.experts.{gate_up,down}_proj",
    ),
    # x @ W[e]: (E, in, out); one bias vector for each expert
    Case(
        "GptOssForCausalLM", "gpt_oss", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
        {
            **LLAMA, "matrix": ATTENTION, "router": "model.layers.#.mlp.router", "experts": FUSED,
            "vector": "model.layers.#.mlp.experts.{gate_up,down}_proj_bias",
        },
        transposed=FUSED,
    ),
    # encoders and decoders
    # relative_attention_bias is an nn.Embedding in the first layer of each stack
    Case(
        "T5ForConditionalGeneration", "t5",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        {
            "matrix": "{encoder,decoder}.block.#.layer.#.SelfAttention.{q,k,v,o} "
            "decoder.block.#.layer.#.EncDecAttention.{q,k,v,o} "
            "{encoder,decoder}.block.#.layer.#.DenseReluDense.{wi,wo}",
            "table": "shared {encoder,decoder}.block.#.layer.#.SelfAttention.relative_attention_bias",
        },
        tied="lm_head encoder.embed_tokens decoder.embed_tokens",
    ),
    Case(
        "BartForConditionalGeneration", "bart", SEQ2SEQ,
        {"matrix": BART, "table": "model.shared model.{encoder,decoder}.embed_positions"},
        tied="lm_head model.encoder.embed_tokens model.decoder.embed_tokens",
    ),
    Case(
        "BartForSequenceClassification", "bart", {**SEQ2SEQ, "num_labels": 3},
        {
            "matrix": f"{BART} classification_head.dense", "head": "classification_head.out_proj",
            "table": "model.shared model.{encoder,decoder}.embed_positions",
        },
        tied="model.encoder.embed_tokens model.decoder.embed_tokens",
    ),
    Case(
        "WhisperForConditionalGeneration", "whisper",
        {**SEQ2SEQ, "max_source_positions": 30, "max_target_positions": 20, "num_mel_bins": 8},
        {
            "matrix": BART, "convolution": "model.encoder.conv#",
            "table": "model.decoder.embed_tokens model.{encoder,decoder}.embed_positions",
        },
        tied="proj_out",
    ),
    # encoders
    Case(
        "BertForMaskedLM", "bert", SHORT,
        {"matrix": f"{BERT_LAYERS} cls.predictions.transform.dense", "table": BERT_TABLES},
        tied="cls.predictions.decoder",
    ),
    Case(
        "BertForPreTraining", "bert", SHORT,
        {
            "matrix": f"{BERT_LAYERS} bert.pooler.dense cls.predictions.transform.dense", "table": BERT_TABLES,
            "head": "cls.seq_relationship",
        },
        tied="cls.predictions.decoder",
    ),
    Case(
        "BertForSequenceClassification", "bert", {**SHORT, "num_labels": 3},
        {"matrix": f"{BERT_LAYERS} bert.pooler.dense", "table": BERT_TABLES, "head": "classifier"},
    ),
    Case(
        "BertForQuestionAnswering", "bert", SHORT,
        {"matrix": BERT_LAYERS, "table": BERT_TABLES, "head": "qa_outputs"},
    ),
    # alone, the pooler is the last projection, and its field is pooler_output: no head, but worth a word
    Case(
        "BertModel", "bert", SHORT,
        {
            "matrix": prefixed(BERT_LAYERS, "bert.", "") + " pooler.dense",
            "table": prefixed(BERT_TABLES, "bert.", ""),
        },
        doubtful="pooler.dense",
    ),
    Case(
        "RobertaForSequenceClassification", "roberta", {**SHORT, "num_labels": 3},
        {
            "matrix": prefixed(BERT_LAYERS, "bert.", "roberta.") + " classifier.dense",
            "table": prefixed(BERT_TABLES, "bert.", "roberta."),
            "head": "classifier.out_proj",
        },
    ),
    Case(
        "DistilBertForMaskedLM", "distilbert",
        {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32},
        {
            "matrix": "distilbert.transformer.layer.#.attention.{q,k,v,out}_lin "
            "distilbert.transformer.layer.#.ffn.lin# vocab_transform",
            "table": "distilbert.embeddings.{word,position}_embeddings",
        },
        tied="vocab_projector",
    ),
    Case(
        "AlbertForMaskedLM", "albert", {**SHORT, "embedding_size": 16},
        {
            "matrix": "albert.encoder.embedding_hidden_mapping_in "
            "albert.encoder.albert_layer_groups.#.albert_layers.#.attention.{query,key,value,dense} "
            "albert.encoder.albert_layer_groups.#.albert_layers.#.{ffn,ffn_output} predictions.dense",
            "table": "albert.embeddings.{word,position,token_type}_embeddings",
        },
        tied="predictions.decoder",
    ),
    # dense_prediction is Linear(d, 1), squeezed into logits
    Case(
        "ElectraForPreTraining", "electra", {**SHORT, "embedding_size": 16},
        {
            "matrix": prefixed(BERT_LAYERS, "bert.", "electra.")
            + " electra.embeddings_project discriminator_predictions.dense",
            "table": prefixed(BERT_TABLES, "bert.", "electra."),
            "head": "discriminator_predictions.dense_prediction",
        },
    ),
    # rel_embeddings are rows that enter pos_key_proj and pos_query_proj
    Case(
        "DebertaV2ForMaskedLM", "deberta-v2",
        {**SHORT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        {
            "matrix": "deberta.encoder.layer.#.attention.self.{query,key,value,pos_key,pos_query}_proj "
            "deberta.encoder.layer.#.attention.output.dense deberta.encoder.layer.#.{intermediate,output}.dense "
            "cls.predictions.transform.dense",
            "table": "deberta.embeddings.{word,position}_embeddings deberta.encoder.rel_embeddings",
        },
        tied="cls.predictions.decoder",
    ),
    Case(
        "ModernBertForMaskedLM", "modernbert",
        {**SHORT, "cls_token_id": 1, "sep_token_id": 2},
        {
            "matrix": "model.layers.#.attn.{Wqkv,Wo} model.layers.#.mlp.{Wi,Wo} head.dense",
            "table": "model.embeddings.tok_embeddings",
        },
        tied="decoder",
    ),
    # q, k, v, o, r are (d, heads, d_head) in einsums over d: one matrix with three axes, no batch of d matrices
    Case(
        "XLNetLMHeadModel", "xlnet", {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        {
            "matrix": "transformer.layer.#.ff.layer_#",
            "state": "transformer.mask_emb transformer.layer.#.rel_attn.{q,k,v,o,r,seg_embed} "
            "transformer.layer.#.rel_attn.r_{r,s,w}_bias",
            "table": "transformer.word_embedding",
        },
        tied="lm_loss",
    ),
    # images, sound, time series
    Case(
        "ViTForImageClassification", "vit", IMAGE,
        {
            "matrix": "vit.layers.#.attention.{q,k,v,o}_proj vit.layers.#.mlp.fc#",
            "convolution": "vit.embeddings.patch_embeddings.projection",
            "state": "vit.embeddings.{cls_token,position_embeddings}",
            "head": "classifier",
        },
    ),
    # a bare table that a fixed index reads
    Case(
        "SwinForImageClassification", "swin",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4,
         "num_labels": 3},
        {
            "matrix": "swin.encoder.layers.#.blocks.#.attention.{q,k,v,o}_proj swin.encoder.layers.#.blocks.#.mlp.fc# "
            "swin.encoder.layers.#.downsample.reduction",
            "table": "swin.encoder.layers.#.blocks.#.attention.relative_position_bias.relative_position_bias_table",
            "convolution": "swin.embeddings.patch_embeddings.projection",
            "head": "classifier",
        },
        undecayed="swin.encoder.layers.#.blocks.#.attention.relative_position_bias.relative_position_bias_table",
    ),
    Case(
        "BeitForImageClassification", "beit", {**IMAGE, "use_relative_position_bias": True},
        {
            "matrix": "beit.layers.#.attention.{q,k,v,o}_proj beit.layers.#.mlp.fc#",
            "table": "beit.layers.#.relative_position_bias.relative_position_bias_table",
            "convolution": "beit.embeddings.patch_embeddings.projection",
            "state": "beit.embeddings.cls_token",
            "head": "classifier",
        },
        undecayed="beit.layers.#.relative_position_bias.relative_position_bias_table",
    ),
    # a backbone ends in a LayerNorm: it has no final projection
    Case(
        "Dinov2Model", "dinov2",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14},
        {
            "matrix": "encoder.layer.#.attention.{q,k,v,o}_proj encoder.layer.#.mlp.fc#",
            "convolution": "embeddings.patch_embeddings.projection",
            "state": "embeddings.{cls_token,position_embeddings}",
            "vector": "embeddings.mask_token",
        },
    ),
    Case(
        "ConvNextForImageClassification", "convnext",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 3},
        {
            "matrix": "convnext.encoder.stages.#.layers.#.pwconv#",
            "convolution": "convnext.embeddings.patch_embeddings convnext.encoder.stages.#.layers.#.dwconv "
            "convnext.encoder.stages.#.downsampling_layer.#",
            "head": "classifier",
        },
    ),
    # pos_conv_embed is a convolution under weight_norm: a parametrization
    Case(
        "Wav2Vec2ForCTC", "wav2vec2",
        {
            **SHORT, "conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
        },
        {
            "matrix": "wav2vec2.feature_projection.projection wav2vec2.encoder.layers.#.attention.{k,v,q,out}_proj "
            "wav2vec2.encoder.layers.#.feed_forward.{intermediate,output}_dense",
            "convolution": "wav2vec2.feature_extractor.conv_layers.#.conv "
            "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original#",
            "head": "lm_head",
        },
    ),
    # text_embeds and image_embeds are features: the projections are the last ones, and no heads
    Case(
        "CLIPModel", "clip", {"text_config": SHORT, "vision_config": IMAGE, "projection_dim": 24},
        {
            "matrix": f"{tower('text_model.')} {tower('vision_model.')} visual_projection text_projection",
            "convolution": "vision_model.embeddings.patch_embedding",
            "table": "text_model.embeddings.{token,position}_embedding vision_model.embeddings.position_embedding",
        },
        doubtful="visual_projection text_projection",
    ),
    # the vision tower pools with nn.MultiheadAttention; its output is a residual sum
    Case(
        "SiglipModel", "siglip", {"text_config": SHORT, "vision_config": IMAGE},
        {
            "matrix": f"{tower('text_model.')} {tower('vision_model.')} text_model.head "
            "vision_model.head.attention.{in_proj_weight,out_proj} vision_model.head.mlp.fc#",
            "convolution": "vision_model.embeddings.patch_embedding",
            "state": "vision_model.head.probe",
            "table": "text_model.embeddings.{token,position}_embedding vision_model.embeddings.position_embedding",
        },
        doubtful="text_model.head",
    ),
    # the patch embedding is a Linear over pixels, what get_input_embeddings() of the vision tower returns
    Case(
        "Siglip2Model", "siglip2",
        {
            "text_config": SHORT,
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
                "num_patches": 16, "patch_size": 4,
            },
        },
        {
            "matrix": f"{tower('text_model.')} {tower('vision_model.')} text_model.head "
            "vision_model.head.attention.{in_proj_weight,out_proj} vision_model.head.mlp.fc#",
            "input": "vision_model.embeddings.patch_embedding",
            "state": "vision_model.head.probe",
            "table": "text_model.embeddings.{token,position}_embedding vision_model.embeddings.position_embedding",
        },
        doubtful="text_model.head",
    ),
    Case(
        "LlavaForConditionalGeneration", "llava",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **IMAGE},
        },
        {
            "matrix": f"{prefixed(DENSE, 'model.', 'model.language_model.')} {tower('model.vision_tower.')} "
            "model.multi_modal_projector.linear_#",
            "convolution": "model.vision_tower.embeddings.patch_embedding",
            "table": "model.language_model.embed_tokens model.vision_tower.embeddings.position_embedding",
            "head": "lm_head",
        },
    ),
    # latents and output queries are learned inputs; logits are products with the token table
    Case(
        "PerceiverForMaskedLM", "perceiver",
        {
            "num_latents": 6, "d_latents": 32, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 1,
            "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "vocab_size": 96,
            "max_position_embeddings": 12,
        },
        {
            "matrix": "perceiver.encoder.cross_attention.attention.self.{query,key,value} "
            "perceiver.encoder.cross_attention.attention.output.dense perceiver.encoder.cross_attention.mlp.dense# "
            "perceiver.encoder.self_attends.#.attention.self.{query,key,value} "
            "perceiver.encoder.self_attends.#.attention.output.dense perceiver.encoder.self_attends.#.mlp.dense# "
            "perceiver.decoder.decoding_cross_attention.attention.self.{query,key,value} "
            "perceiver.decoder.decoding_cross_attention.attention.output.dense "
            "perceiver.decoder.decoding_cross_attention.mlp.dense#",
            "state": "perceiver.embeddings.latents perceiver.decoder.output_position_encodings.position_embeddings",
            "table": "perceiver.input_preprocessor.{embeddings,position_embeddings}",
        },
    ),
    # predictions are projected, then scaled back to the series' units
    Case(
        "PatchTSTForPrediction", "patchtst",
        {
            "num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 32,
            "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 48, "prediction_length": 4, "loss": "mse",
        },
        {
            "matrix": "model.encoder.embedder.input_embedding model.encoder.layers.#.self_attn.{k,v,q,out}_proj "
            "model.encoder.layers.#.ff.#",
            "state": "model.encoder.positional_encoder.position_enc",
            "head": "head.projection",
        },
    ),
]  # fmt: skip
