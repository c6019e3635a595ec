// Every schema and every implementation of torch.ops.torch_ext.*.
#include "ops/ops.h"

STABLE_TORCH_LIBRARY(torch_ext, m) {
  m.def("pack_linear_weight(Tensor weight, bool transposed=False) -> Tensor");
  m.def("unpack_linear_weight(Tensor packed) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, Tensor? bias=None, str activation='none', ScalarType? out_dtype=None, "
      "Tensor? residual=None) -> Tensor");
  m.def("matmul(Tensor a, Tensor b, ScalarType? out_dtype=None) -> Tensor");
  m.def("bmm(Tensor a, Tensor b) -> Tensor");
  m.def("addmm(Tensor bias, Tensor a, Tensor b, float beta=1, float alpha=1) -> Tensor");
  m.def("varlen_attention(Tensor qkv, Tensor cu_seqlens, int num_heads, float? scale=None) -> Tensor");
  m.def("add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def(
      "embed_layer_norm(Tensor input_ids, Tensor cu_seqlens, Tensor? token_type_ids, Tensor word, Tensor position, "
      "Tensor? token_type, Tensor weight, Tensor bias, float eps, int position_offset) -> Tensor");
  m.def("pool(Tensor hidden, Tensor cu_seqlens, str mode, bool normalize) -> Tensor");
  m.def("_weight_fingerprint(Tensor weight) -> int");
  m.def("_isa_report() -> str");
  m.def("_preferred_rows(int rows) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(torch_ext, CPU, m) {
  m.impl("pack_linear_weight", TORCH_BOX(&torch_ext::pack_linear_weight));
  m.impl("unpack_linear_weight", TORCH_BOX(&torch_ext::unpack_linear_weight));
  m.impl("linear", TORCH_BOX(&torch_ext::linear));
  m.impl("matmul", TORCH_BOX(&torch_ext::matmul));
  m.impl("bmm", TORCH_BOX(&torch_ext::bmm));
  m.impl("addmm", TORCH_BOX(&torch_ext::addmm));
  m.impl("_weight_fingerprint", TORCH_BOX(&torch_ext::weight_fingerprint));
  m.impl("varlen_attention", TORCH_BOX(&torch_ext::varlen_attention));
  m.impl("add_layer_norm", TORCH_BOX(&torch_ext::add_layer_norm));
  m.impl("embed_layer_norm", TORCH_BOX(&torch_ext::embed_layer_norm));
  m.impl("pool", TORCH_BOX(&torch_ext::pool));
}

STABLE_TORCH_LIBRARY_IMPL(torch_ext, CompositeExplicitAutograd, m) {
  m.impl("_isa_report", TORCH_BOX(&torch_ext::isa_report));
  m.impl("_preferred_rows", TORCH_BOX(&torch_ext::preferred_rows));
}
