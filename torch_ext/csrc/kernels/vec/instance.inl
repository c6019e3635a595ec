// The table of one instance; the other files of this folder come before it.

#define TORCH_EXT_STORE(enumerator, name, f32, bf16) store_tile<Activation::enumerator>,
#define TORCH_EXT_GATE(enumerator, name, f32, bf16) gate_row<Activation::enumerator>,
static constexpr VecKernels kKernels = {
    .name = TORCH_EXT_VEC_NAME,
    .required_features = TORCH_EXT_VEC_FEATURES,
    .store_tile = {TORCH_EXT_ACTIVATIONS(TORCH_EXT_STORE)},
    .softmax_row = softmax_row<false>,
    .softmax_row_to_bf16 = softmax_row<true>,
    .scale_rows = scale_rows,
    .sum_layer_norm_row = sum_layer_norm_row,
    .sum_rms_norm_row = sum_rms_norm_row,
    .rotate_row = rotate_row,
    .gate_row = {TORCH_EXT_ACTIVATIONS(TORCH_EXT_GATE)},
    .add_row = add_row,
    .accumulate_row = fold_row<false>,
    .max_row = fold_row<true>,
    .sum_squares = sum_squares,
};
#undef TORCH_EXT_STORE
#undef TORCH_EXT_GATE
