// The table of one instance; the other files of this folder come before it.

static constexpr VecKernels kKernels = {
    TORCH_EXT_VEC_NAME,
    TORCH_EXT_VEC_FEATURES,
    {store_tile<Activation::kNone>, store_tile<Activation::kGelu>, store_tile<Activation::kGeluTanh>,
     store_tile<Activation::kRelu>, store_tile<Activation::kTanh>, store_tile<Activation::kSilu>},
    softmax_row,
    scale_rows,
    sum_layer_norm_row,
    sum_rms_norm_row,
    rotate_row,
    {gate_row<Activation::kNone>, gate_row<Activation::kGelu>, gate_row<Activation::kGeluTanh>,
     gate_row<Activation::kRelu>, gate_row<Activation::kTanh>, gate_row<Activation::kSilu>},
    add_row,
    fold_row<false>,
    fold_row<true>,
    sum_squares,
    &kGemmF32,
    &kGemmBf16,
    &kGemmS8,
    TORCH_EXT_VEC_ATTENTION,
};
