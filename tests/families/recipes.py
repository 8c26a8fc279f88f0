"""Models of every family that people fine-tune, tiny: which class, with which config, given what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Values = dict[str, Any]

#: What is tried, in order. To attach with the experts is a step of its own: its refusal leaves the others to try.
STEPS = ("decompose", "experts", "attach", "train", "load", "merge")

#: Lists are numbers as they are; tuples are shapes, to be filled with random ones.
TEXT: Values = {"input_ids": [[3, 9, 11, 17, 23, 31, 40, 52], [3, 52, 8, 33, 33, 21, 10, 60]]}
TO_TEXT: Values = {**TEXT, "decoder_input_ids": [[0, 7, 9, 12], [0, 44, 13, 50]]}
PIXELS: Values = {"pixel_values": (2, 3, 16, 16)}
#: One picture that becomes four tokens, called 5, in the text.
SEEN: Values = {"input_ids": [[3, 5, 5, 5, 5, 11, 17, 23]], "pixel_values": (1, 3, 16, 16)}
SEEN_IN_PATCHES: Values = {
    "input_ids": [[3, 62, 5, 5, 5, 5, 63, 23]], "mm_token_type_ids": [[0, 0, 1, 1, 1, 1, 0, 0]],
    "image_grid_thw": [[1, 4, 4]], "pixel_values": (16, 96),
}  # fmt: skip

SPECIAL: Values = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER: Values = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
HEADS: Values = {**ENCODER, **SPECIAL}
LM: Values = {**HEADS, "num_key_value_heads": 2}
LM8: Values = {**LM, "head_dim": 8}
MOE: Values = {**LM8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2: Values = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **SPECIAL}
ROTARY: Values = {**GPT2, "rotary_dim": 4, "n_ctx": 64}
T5: Values = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SEQ2SEQ: Values = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2, **SPECIAL,
}  # fmt: skip
VIT: Values = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
FINE_VIT: Values = {**VIT, "patch_size": 4}
MAMBA: Values = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, **SPECIAL}
MAMBA_HEADS: Values = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4,
}  # fmt: skip
DELTA: Values = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
LATENT: Values = {
    **{key: value for key, value in MOE.items() if key != "head_dim"}, "num_key_value_heads": 4, "kv_lora_rank": 16,
    "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
DEBERTA: Values = {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
SIGHT: Values = {"image_token_id": 5, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
MROPE: Values = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN_SIGHT: Values = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "out_hidden_size": 32,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A tiny model, and how it is tried."""

    name: str
    model: str  #: transformers' class
    config: Values
    inputs: Values = field(default_factory=lambda: TEXT)
    experts: str = ""  #: a regular expression for the experts, which may be refused


EXPERTS = r".*\.experts\..*"
FUSED = r".*(experts|input_linear|output_linear).*"

# fmt: off
FAMILIES: tuple[Family, ...] = (
    # decoders
    Family("llama", "LlamaForCausalLM", LM8),
    Family("mistral", "MistralForCausalLM", LM8),
    Family("qwen2", "Qwen2ForCausalLM", LM),
    Family("qwen3", "Qwen3ForCausalLM", LM8),
    Family("qwen3_5_text", "Qwen3_5ForCausalLM", {**LM8, **DELTA}),
    Family("gemma", "GemmaForCausalLM", LM8),
    Family("gemma2", "Gemma2ForCausalLM", {**LM8, "query_pre_attn_scalar": 8}),
    Family("gemma3_text", "Gemma3ForCausalLM", {**LM8, "query_pre_attn_scalar": 8}),
    Family(
        "gemma4_text",
        "Gemma4ForCausalLM",
        {**LM8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "global_head_dim": 8,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    Family("phi", "PhiForCausalLM", LM),
    Family("phi3", "Phi3ForCausalLM", LM),
    Family("smollm3", "SmolLM3ForCausalLM", LM),
    Family("olmo2", "Olmo2ForCausalLM", LM),
    Family("granite", "GraniteForCausalLM", LM),
    Family("cohere", "CohereForCausalLM", LM),
    Family("stablelm", "StableLmForCausalLM", LM),
    Family("starcoder2", "Starcoder2ForCausalLM", LM),
    Family("molmo2_text", "Molmo2TextModel", {**LM8, "additional_vocab_size": 8}),
    Family("gpt2", "GPT2LMHeadModel", GPT2),
    Family("gpt_neox", "GPTNeoXForCausalLM", HEADS),
    Family("gptj", "GPTJForCausalLM", ROTARY),
    Family(
        "gpt_neo",
        "GPTNeoForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64,
         "attention_types": [[["global", "local"], 1]], **SPECIAL},
    ),
    Family("gpt_bigcode", "GPTBigCodeForCausalLM", GPT2),
    Family("codegen", "CodeGenForCausalLM", ROTARY),
    Family(
        "opt",
        "OPTForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "word_embed_proj_dim": 32, **SPECIAL},
    ),
    Family("bloom", "BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL}),
    Family("falcon", "FalconForCausalLM", HEADS),
    Family("mpt", "MptForCausalLM", {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    # experts
    Family("mixtral", "MixtralForCausalLM", {**MOE, "num_local_experts": 4}, experts=EXPERTS),
    Family("phimoe", "PhimoeForCausalLM", {**LM, "num_local_experts": 4}, experts=EXPERTS),
    Family("olmoe", "OlmoeForCausalLM", {**LM, "num_experts": 4, "num_experts_per_tok": 2}, experts=EXPERTS),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 40},
        experts=EXPERTS,
    ),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", {**MOE, "num_experts": 4}, experts=EXPERTS),
    Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {**MOE, **DELTA, "num_experts": 4, "shared_expert_intermediate_size": 40},
        experts=EXPERTS,
    ),
    Family("deepseek_v2", "DeepseekV2ForCausalLM", LATENT, experts=EXPERTS),
    Family("deepseek_v3", "DeepseekV3ForCausalLM", {**LATENT, "n_group": 2, "topk_group": 1}, experts=EXPERTS),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {**MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
        experts=EXPERTS,
    ),
    Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        {**LM8, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
        experts=EXPERTS,
    ),
    Family("gpt_oss", "GptOssForCausalLM", {**LM8, "num_local_experts": 4, "num_experts_per_tok": 2}, experts=FUSED),
    Family(
        "llama4_text",
        "Llama4ForCausalLM",
        {**LM8, "num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 40},
        experts=FUSED,
    ),
    Family("granitemoe", "GraniteMoeForCausalLM", {**LM, "num_local_experts": 4}, experts=FUSED),
    Family(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        {**LM, "num_local_experts": 4, "shared_intermediate_size": 40},
        experts=r".*block_sparse_moe.*",
    ),
    Family(
        "jetmoe",
        "JetMoeForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8,
         "intermediate_size": 48, "max_position_embeddings": 64, "num_local_experts": 4, **SPECIAL},
        experts=FUSED,
    ),
    Family(
        "inkling2_text",
        "Inkling2ForCausalLM",
        {**MOE, "unpadded_vocab_size": 60, "n_routed_experts": 4, "swa_num_attention_heads": 4,
         "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4, "rel_extent": 16,
         "layer_types": ["sliding_attention", "full_attention"], "n_layers_per_attn_res_block": 1},
        experts=FUSED,
    ),
    # state spaces, and hybrids of them with attention
    Family("mamba", "MambaForCausalLM", MAMBA),
    Family("falcon_mamba", "FalconMambaForCausalLM", MAMBA),
    Family(
        "mamba2", "Mamba2ForCausalLM", {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
    ),
    Family("rwkv", "RwkvForCausalLM", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, **SPECIAL}),
    Family(
        "jamba",
        "JambaForCausalLM",
        {**LM, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4,
         "mamba_dt_rank": 4, "use_mamba_kernels": False},
        experts=EXPERTS,
    ),
    Family("bamba", "BambaForCausalLM", {**LM, **MAMBA_HEADS, "attn_layer_indices": [1]}),
    Family("falcon_h1", "FalconH1ForCausalLM", {**LM8, **MAMBA_HEADS, "mamba_d_ssm": 64}),
    Family(
        "zamba2",
        "Zamba2ForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "n_mamba_heads": 4,
         "mamba_d_state": 4, "chunk_size": 4, "layers_block_type": ["mamba", "hybrid"], "intermediate_size": 48,
         "use_mamba_kernels": False, "max_position_embeddings": 64, "adapter_rank": 4, **SPECIAL},
    ),
    Family(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        {**LM, "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
    Family("lfm2", "Lfm2ForCausalLM", {**LM, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    Family(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        {**MOE, "layer_types": ["conv", "full_attention"], "num_experts": 4, "num_dense_layers": 1},
        experts=EXPERTS,
    ),
    Family("olmo_hybrid", "OlmoHybridForCausalLM", {**LM, **DELTA}),
    Family(
        "kimi_linear",
        "KimiLinearForCausalLM",
        {**{key: value for key, value in LATENT.items() if key not in ("first_k_dense_replace", "n_routed_experts")},
         "q_lora_rank": None, "num_local_experts": 4, "linear_head_dim": 8, "linear_num_heads": 4,
         "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"]},
        experts=EXPERTS,
    ),
    Family(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {**LM, **MAMBA_HEADS, "num_local_experts": 4, "shared_intermediate_size": 40,
         "layer_types": ["mamba", "attention"]},
        experts=r".*block_sparse_moe.*",
    ),
    Family(
        "nemotron_h",
        "NemotronHForCausalLM",
        {**{key: value for key, value in LM8.items() if key != "num_hidden_layers"}, "ssm_state_size": 4,
         "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 4, "use_mamba_kernels": False,
         "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"], "n_routed_experts": 4,
         "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40},
        experts=EXPERTS,
    ),
    # encoders
    Family("bert", "BertForMaskedLM", ENCODER),
    Family("roberta", "RobertaForSequenceClassification", HEADS),
    Family("xlm-roberta", "XLMRobertaForMaskedLM", HEADS),
    Family("electra", "ElectraForTokenClassification", {**ENCODER, "embedding_size": 16}),
    Family("albert", "AlbertForMaskedLM", {**ENCODER, "embedding_size": 16}),
    Family(
        "distilbert",
        "DistilBertForMaskedLM",
        {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    Family("layoutlm", "LayoutLMForTokenClassification", ENCODER),
    Family("nomic_bert", "NomicBertForMaskedLM", HEADS),
    Family("gte", "GteForMaskedLM", HEADS),
    Family("deberta", "DebertaForMaskedLM", DEBERTA),
    Family("deberta-v2", "DebertaV2ForMaskedLM", DEBERTA),
    Family("modernbert", "ModernBertForMaskedLM", {**ENCODER, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2}),
    Family("xlnet", "XLNetLMHeadModel", {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    # from one sequence to another
    Family("t5", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}, TO_TEXT),
    Family("mt5", "MT5ForConditionalGeneration", T5, TO_TEXT),
    Family("bart", "BartForConditionalGeneration", SEQ2SEQ, TO_TEXT),
    Family("marian", "MarianMTModel", SEQ2SEQ, TO_TEXT),
    Family(
        "whisper",
        "WhisperForConditionalGeneration",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        {"input_features": (2, 8, 32), "decoder_input_ids": TO_TEXT["decoder_input_ids"]},
    ),
    # sound and pictures
    Family(
        "wav2vec2",
        "Wav2Vec2ForCTC",
        {**ENCODER, "conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 4],
         "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False},
        {"input_values": (2, 400)},
    ),
    Family("vit", "ViTForImageClassification", VIT, PIXELS),
    Family("deit", "DeiTForImageClassification", VIT, PIXELS),
    Family("beit", "BeitForImageClassification", VIT, PIXELS),
    Family(
        "vit_mae",
        "ViTMAEForPreTraining",
        {**FINE_VIT, "decoder_num_attention_heads": 4, "decoder_hidden_size": 24, "decoder_num_hidden_layers": 2,
         "decoder_intermediate_size": 40},
        {"pixel_values": (2, 3, 16, 16), "noise": (2, 16)},
    ),
    Family("dinov2", "Dinov2ForImageClassification", {**VIT, "mlp_ratio": 2}, PIXELS),
    Family("dinov2, SwiGLU", "Dinov2Model", {**VIT, "mlp_ratio": 2, "use_swiglu_ffn": True}, PIXELS),
    Family("dinov2_with_registers", "Dinov2WithRegistersForImageClassification", {**VIT, "mlp_ratio": 2}, PIXELS),
    Family("dinov3_vit", "DINOv3ViTModel", VIT, PIXELS),
    Family(
        "swin",
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
        {"pixel_values": (2, 3, 32, 32)},
    ),
    Family(
        "segformer",
        "SegformerForImageClassification",
        {"num_encoder_blocks": 2, "depths": [2, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
         "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
         "decoder_hidden_size": 16},
        {"pixel_values": (2, 3, 32, 32)},
    ),
    Family(
        "convnext",
        "ConvNextForImageClassification",
        {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [2, 2], "image_size": 32},
        {"pixel_values": (2, 3, 32, 32)},
    ),
    Family("siglip vision", "SiglipVisionModel", VIT, PIXELS),
    # pictures and text
    Family(
        "clip",
        "CLIPModel",
        {"text_config": HEADS, "vision_config": {**VIT, "hidden_size": 48}, "projection_dim": 24},
        {**TEXT, **PIXELS},
    ),
    Family(
        "siglip",
        "SiglipModel",
        {"text_config": {**HEADS, "projection_size": 32}, "vision_config": VIT},
        {**TEXT, **PIXELS},
    ),
    Family(
        "llava",
        "LlavaForConditionalGeneration",
        {"text_config": {**LM8, "model_type": "llama"}, "vision_config": {**VIT, "model_type": "clip_vision_model"},
         "image_token_index": 5},
        SEEN,
    ),
    Family(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        {"text_config": {**LM8, "model_type": "gemma"}, "vision_config": {**VIT, "model_type": "siglip_vision_model"},
         "image_token_index": 5, "projection_dim": 32, "hidden_size": 32},
        SEEN,
    ),
    Family(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {"text_config": {**LM8, "query_pre_attn_scalar": 8},
         "vision_config": {**FINE_VIT, "model_type": "siglip_vision_model"}, "image_token_index": 5,
         "mm_tokens_per_image": 4, "boi_token_index": 62, "eoi_token_index": 63},
        SEEN,
    ),
    Family(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        {"text_config": {**LM8, "model_type": "llama"}, "vision_config": FINE_VIT, "image_token_id": 5},
        {**SEEN, "pixel_values": (1, 1, 3, 16, 16)},
    ),
    Family(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        {"text_config": {**LM8, "model_type": "llama"}, "vision_config": FINE_VIT, "image_token_id": 5},
        {**SEEN, "pixel_values": (1, 1, 3, 16, 16)},
    ),
    Family(
        "internvl",
        "InternVLForConditionalGeneration",
        {"text_config": {**LM, "model_type": "qwen2"}, "vision_config": {**FINE_VIT, "image_size": [16, 16],
         "patch_size": [4, 4]}, "image_token_id": 5},
        SEEN,
    ),
    Family(
        "mllama",
        "MllamaForConditionalGeneration",
        {"text_config": {**LM, "vocab_size": 64, "cross_attention_layers": [1],
                         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
         "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 2,
                           "attention_heads": 4, "image_size": 16, "patch_size": 8, "max_num_tiles": 1,
                           "intermediate_layers_indices": [0], "vision_output_dim": 64,
                           "supported_aspect_ratios": [[1, 1]]},
         "image_token_index": 5},
        {"input_ids": [[3, 5, 11, 17]], "pixel_values": (1, 1, 1, 3, 16, 16), "aspect_ratio_ids": [[1]],
         "aspect_ratio_mask": [[[1]]], "cross_attention_mask": [[[[1]], [[1]], [[1]], [[1]]]]},
    ),
    Family(
        "blip-2",
        "Blip2ForConditionalGeneration",
        {"vision_config": VIT, "num_query_tokens": 4, "image_token_index": 5,
         "qformer_config": {**ENCODER, "encoder_hidden_size": 32},
         "text_config": {"model_type": "opt", "vocab_size": 64, "hidden_size": 32, "ffn_dim": 48,
                         "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
                         "word_embed_proj_dim": 32, **SPECIAL}},
        SEEN,
    ),
    Family(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        {"text_config": {**LM, "rope_parameters": MROPE}, **SIGHT,
         "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4,
                           "mlp_ratio": 2}},
        SEEN_IN_PATCHES,
    ),
    Family(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": {**LM, "rope_parameters": MROPE}, **SIGHT,
         "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4,
                           "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}},
        SEEN_IN_PATCHES,
    ),
    Family(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**LM8, "rope_parameters": MROPE}, "vision_config": QWEN_SIGHT, **SIGHT},
        SEEN_IN_PATCHES,
    ),
    Family(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        {"text_config": {**MOE, "num_experts": 4, "rope_parameters": MROPE}, "vision_config": QWEN_SIGHT, **SIGHT},
        SEEN_IN_PATCHES,
        experts=FUSED,
    ),
    Family(
        "llama4",
        "Llama4ForConditionalGeneration",
        {"text_config": {**LM8, "num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 40},
         "vision_config": {**FINE_VIT, "intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32,
                           "projector_output_dim": 32},
         "image_token_index": 5, "boi_token_index": 62, "eoi_token_index": 63},
        SEEN,
        experts=r".*language_model.*experts.*",
    ),
    Family(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {"text_config": {**LM8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
                         "global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
         "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
                           "num_attention_heads": 4, "num_key_value_heads": 4, "patch_size": 4,
                           "position_embedding_size": 16, "pooling_kernel_size": 2},
         "image_token_id": 5, "video_token_id": 61},
        {"input_ids": [[3, 5, 5, 5, 5, 11, 17, 23]], "mm_token_type_ids": [[0, 1, 1, 1, 1, 0, 0, 0]],
         "pixel_values": (1, 16, 48),
         "image_position_ids": [[[x, y] for y in range(4) for x in range(4)]]},
    ),
)
# fmt: on
