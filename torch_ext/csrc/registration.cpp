// Every schema and every implementation of torch.ops.torch_ext.*.
#include "ops/ops.h"

STABLE_TORCH_LIBRARY(torch_ext, m) {
  m.def("pack_linear_weight(Tensor weight, bool transposed=False) -> Tensor");
  m.def("unpack_linear_weight(Tensor packed) -> Tensor");
  m.def("pack_linear_weight_int8(Tensor weight, Tensor? scale=None) -> Tensor");
  m.def("unpack_linear_weight_int8(Tensor packed) -> (Tensor, Tensor)");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? bias=None, str activation='none', ScalarType? out_dtype=None, "
      "Tensor? residual=None) -> Tensor");
  m.def("matmul(Tensor a, Tensor b, ScalarType? out_dtype=None) -> Tensor");
  m.def("bmm(Tensor a, Tensor b) -> Tensor");
  m.def("addmm(Tensor bias, Tensor a, Tensor b, float beta=1, float alpha=1) -> Tensor");
  m.def(
      "varlen_attention(Tensor qkv, Tensor cu_seqlens, int num_heads, float? scale=None, int? window=None, "
      "Tensor? relative_bias=None, Tensor? position_keys=None, Tensor? position_queries=None, int position_reach=0, "
      "bool causal=False, Tensor? attended=None) -> Tensor");
  m.def(
      "add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, Tensor? residual_scale=None) "
      "-> "
      "Tensor");
  m.def("add_rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> Tensor");
  m.def("rotary_embedding(Tensor qkv, Tensor cu_seqlens, int num_heads, Tensor cos_sin) -> Tensor");
  m.def("gate(Tensor x, str activation) -> Tensor");
  m.def(
      "embed_layer_norm(Tensor input_ids, Tensor cu_seqlens, Tensor? token_type_ids, Tensor word, Tensor? position, "
      "Tensor? token_type, Tensor weight, Tensor bias, float eps, int position_offset, "
      "int padding_id=-1) -> Tensor");
  m.def("pool(Tensor hidden, Tensor cu_seqlens, str mode, bool normalize) -> Tensor");
  m.def(
      "_pack_encoder(Tensor(a!)[] weights, *, int hidden_size, int num_layers, int num_heads, int intermediate_size, "
      "str activation, float layer_norm_eps, int max_positions, int position_offset, int padding_id, int window, "
      "int global_every, bool norm_first, bool gated_ffn, int position_span, int position_reach, "
      "int num_kv_heads, int head_size, int global_first, float attention_scale, float embedding_scale, bool causal, "
      "bool rms_norm, bool embedding_norm, int dropped_id=-1) -> Tensor");
  m.def("_rotary_table(Tensor like, int positions, int head_size, float theta, float factor=1) -> Tensor");
  m.def("_relative_bias_table(Tensor bias, int reach) -> Tensor");
  m.def("_encoder_sections(Tensor packed) -> Tensor");
  m.def(
      "encoder_forward(Tensor input_ids, Tensor cu_seqlens, Tensor? token_type_ids, Tensor packed, bool fp32=False, "
      "Tensor? attended=None) -> Tensor");
  m.def("_pack_linear_weight_fp32(Tensor weight) -> Tensor");
  m.def("_unpack_linear_weight_fp32(Tensor packed) -> Tensor");
  m.def("_weight_fingerprint(Tensor weight) -> int");
  m.def("_isa_report() -> str");
  m.def("_preferred_rows(int rows) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("pack_linear_weight", TORCH_BOX(&torch_ext::pack_linear_weight));
  m.impl("unpack_linear_weight", TORCH_BOX(&torch_ext::unpack_linear_weight));
  m.impl("pack_linear_weight_int8", TORCH_BOX(&torch_ext::pack_linear_weight_int8));
  m.impl("unpack_linear_weight_int8", TORCH_BOX(&torch_ext::unpack_linear_weight_int8));
  m.impl("_pack_linear_weight_fp32", TORCH_BOX(&torch_ext::pack_linear_weight_fp32));
  m.impl("_unpack_linear_weight_fp32", TORCH_BOX(&torch_ext::unpack_linear_weight_fp32));
  m.impl("linear", TORCH_BOX(&torch_ext::linear));
  m.impl("matmul", TORCH_BOX(&torch_ext::matmul));
  m.impl("bmm", TORCH_BOX(&torch_ext::bmm));
  m.impl("addmm", TORCH_BOX(&torch_ext::addmm));
  m.impl("_weight_fingerprint", TORCH_BOX(&torch_ext::weight_fingerprint));
  m.impl("varlen_attention", TORCH_BOX(&torch_ext::varlen_attention));
  m.impl("add_layer_norm", TORCH_BOX(&torch_ext::add_layer_norm));
  m.impl("add_rms_norm", TORCH_BOX(&torch_ext::add_rms_norm));
  m.impl("rotary_embedding", TORCH_BOX(&torch_ext::rotary_embedding));
  m.impl("gate", TORCH_BOX(&torch_ext::gate));
  m.impl("embed_layer_norm", TORCH_BOX(&torch_ext::embed_layer_norm));
  m.impl("pool", TORCH_BOX(&torch_ext::pool));
  m.impl("_rotary_table", TORCH_BOX(&torch_ext::rotary_table));
  m.impl("_relative_bias_table", TORCH_BOX(&torch_ext::relative_bias_table));
  m.impl("_pack_encoder", TORCH_BOX(&torch_ext::pack_encoder));
  m.impl("_encoder_sections", TORCH_BOX(&torch_ext::encoder_sections));
  m.impl("encoder_forward", TORCH_BOX(&torch_ext::encoder_forward));
}

STABLE_TORCH_LIBRARY_IMPL(torch_ext, CompositeExplicitAutograd, m) {
  m.impl("_isa_report", TORCH_BOX(&torch_ext::isa_report));
  m.impl("_preferred_rows", TORCH_BOX(&torch_ext::preferred_rows));
}
