// Row kernels of vec_kernels.h on the vector type of simd.inl. Longer than other files, since it has a section for each
// kernel of that table.

// ---- epilogue ---------------------------------------------------------------------------------------------------

TORCH_EXT_INLINE vf identity(vf x) { return x; }
TORCH_EXT_INLINE vf relu(vf x) { return max_nan(splat(0.0f), x); }

// `Out` is what the result is rounded to.
template <Activation kAct, typename Out>
TORCH_EXT_INLINE vf activate(vf x) {
#define TORCH_EXT_CASE(enumerator, name, to_f32, to_bf16)       \
  if constexpr (kAct == Activation::enumerator) {               \
    if constexpr (std::is_same_v<Out, bf16>) return to_bf16(x); \
    return to_f32(x);                                           \
  }
  TORCH_EXT_ACTIVATIONS(TORCH_EXT_CASE)
#undef TORCH_EXT_CASE
}

// Vectors of a row of the widest tile of most families: as many are stored at a time.
constexpr size_t kTileVectors = kWidth == 4 ? 3 : 2;

// kTileVectors vectors of columns for all rows, without a residual, or with one that is the same for every row.
template <Activation kAct, bool kShifted, typename Out>
static void store_wide_columns(const float* tile, size_t ld_tile, size_t rows, const float* bias, const float* shift,
                               Out* out, size_t ld_out) {
  vf b[kTileVectors], s[kTileVectors];
#pragma GCC unroll 3
  for (size_t v = 0; v < kTileVectors; ++v) {
    b[v] = bias ? load(bias + v * kWidth) : splat(0.0f);
    s[v] = kShifted ? load(shift + v * kWidth) : splat(0.0f);
  }
#if defined(TORCH_EXT_VEC_AVX2)
  for (; rows >= 2; rows -= 2) {
    vf x[4];
#pragma GCC unroll 4
    for (size_t v = 0; v < 4; ++v) x[v] = load(tile + v / 2 * ld_tile + v % 2 * kWidth) + b[v % 2];
    if constexpr (kAct == Activation::kGelu && std::is_same_v<Out, bf16>) {
      gelu_to_bf16(x);
    } else {
#pragma GCC unroll 4
      for (size_t v = 0; v < 4; ++v) x[v] = activate<kAct, Out>(x[v]);
    }
    if constexpr (kShifted) {
#pragma GCC unroll 4
      for (size_t v = 0; v < 4; ++v) x[v] = x[v] + s[v % 2];
    }
    put_two(out, x[0], x[1]);
    put_two(out + ld_out, x[2], x[3]);
    tile += 2 * ld_tile;
    out += 2 * ld_out;
  }
#endif
  for (size_t i = 0; i < rows; ++i) {
    vf x[kTileVectors];
#pragma GCC unroll 3
    for (size_t v = 0; v < kTileVectors; ++v) {
      x[v] = activate<kAct, Out>(load(tile + v * kWidth) + b[v]);
      if constexpr (kShifted) x[v] = x[v] + s[v];
    }
    put_two(out, x[0], x[1]);
    if constexpr (kTileVectors == 3) Io<Out>::put(out + 2 * kWidth, x[2]);
    tile += ld_tile;
    out += ld_out;
  }
}

// One vector of columns for all rows: bias and the constants of the activation stay in registers. `Residual` is void
// where there is none.
template <Activation kAct, typename Out, typename Residual>
static void store_columns(const float* tile, size_t ld_tile, size_t rows, vf bias, const Residual* residual,
                          size_t ld_residual, Out* out, size_t ld_out) {
  for (size_t i = 0; i < rows; ++i) {
    vf v = activate<kAct, Out>(load(tile) + bias);
    if constexpr (!std::is_void_v<Residual>) {
      v = v + Io<Residual>::get(residual);
      residual += ld_residual;
    }
    Io<Out>::put(out, v);
    tile += ld_tile;
    out += ld_out;
  }
}

// The same for the last n < kWidth columns.
template <Activation kAct, typename Out, typename Residual>
static void store_last_columns(const float* tile, size_t ld_tile, size_t rows, vf bias, const Residual* residual,
                               size_t ld_residual, Out* out, size_t ld_out, size_t n) {
  for (size_t i = 0; i < rows; ++i) {
    vf v = activate<kAct, Out>(get_n(tile, n) + bias);
    if constexpr (!std::is_void_v<Residual>) {
      v = v + get_n(residual, n);
      residual += ld_residual;
    }
    put_n(out, v, n);
    tile += ld_tile;
    out += ld_out;
  }
}

template <Activation kAct, typename Out, typename Residual>
static void store_tile_as(const float* tile, size_t ld_tile, size_t rows, size_t cols, const Epilogue& ep, size_t row0,
                          size_t col0) {
  const float* const bias = ep.bias ? ep.bias + col0 : nullptr;
  Out* const out = static_cast<Out*>(ep.out) + row0 * ep.ld_out + col0;
  const Residual* residual = nullptr;
  if constexpr (!std::is_void_v<Residual>) {
    residual = static_cast<const Residual*>(ep.residual) + row0 * ep.ld_residual + col0;
  }
  const auto residual_at = [&](size_t j) -> const Residual* {
    if constexpr (std::is_void_v<Residual>)
      return nullptr;
    else
      return residual + j;
  };
  size_t j = 0;
  const auto store_wide = [&]<bool kShifted>(const float* shift) {
    for (; j + kTileVectors * kWidth <= cols; j += kTileVectors * kWidth) {
      store_wide_columns<kAct, kShifted>(tile + j, ld_tile, rows, bias ? bias + j : nullptr,
                                         kShifted ? shift + j : nullptr, out + j, ep.ld_out);
    }
  };
  if constexpr (std::is_void_v<Residual>) {
    store_wide.template operator()<false>(nullptr);
  } else if constexpr (std::is_same_v<Residual, float>) {
    if (ep.ld_residual == 0) store_wide.template operator()<true>(residual);
  }
  for (; j + kWidth <= cols; j += kWidth) {
    store_columns<kAct>(tile + j, ld_tile, rows, bias ? load(bias + j) : splat(0.0f), residual_at(j), ep.ld_residual,
                        out + j, ep.ld_out);
  }
  if (j < cols) {
    const size_t n = cols - j;
    store_last_columns<kAct>(tile + j, ld_tile, rows, bias ? get_n(bias + j, n) : splat(0.0f), residual_at(j),
                             ep.ld_residual, out + j, ep.ld_out, n);
  }
}

template <Activation kAct, typename Out>
static void store_tile_to(const float* tile, size_t ld_tile, size_t rows, size_t cols, const Epilogue& ep, size_t row0,
                          size_t col0) {
  if (!ep.residual) {
    store_tile_as<kAct, Out, void>(tile, ld_tile, rows, cols, ep, row0, col0);
  } else if (ep.residual_type == DType::kF32) {
    store_tile_as<kAct, Out, float>(tile, ld_tile, rows, cols, ep, row0, col0);
  } else {
    store_tile_as<kAct, Out, bf16>(tile, ld_tile, rows, cols, ep, row0, col0);
  }
}

template <Activation kAct>
static void store_tile(const float* tile, size_t ld_tile, size_t rows, size_t cols, const Epilogue& ep, size_t row0,
                       size_t col0) {
  if (ep.out_type == DType::kF32) {
    store_tile_to<kAct, float>(tile, ld_tile, rows, cols, ep, row0, col0);
  } else {
    store_tile_to<kAct, bf16>(tile, ld_tile, rows, cols, ep, row0, col0);
  }
}

// ---- softmax ----------------------------------------------------------------------------------------------------

// `largest` is scaled already, unless results are for bf16: the base is 2 there, by a factor that does not leave the largest
// score as it was.
template <bool kToBf16>
TORCH_EXT_INLINE vf softmax_numerator(vf s, float scale, vf largest) {
  return kToBf16 ? exp2_to_bf16((s - largest) * scale) : exp_approx(s * scale - largest);
}

template <bool kToBf16>
static float softmax_row(float* s, size_t n, float scale) {
  if constexpr (kToBf16) scale *= 1.44269504f;  // 1 / ln 2
  scale = scale > 1.2e-38f ? scale : 1.2e-38f;  // zero times infinity would be NaN
  const size_t last = (n - 1) / kWidth * kWidth;
  const vf rest = mask_lanes(load(s + last), n - last);
  vf m = rest;
  for (size_t j = 0; j < last; j += kWidth) m = max_nan(m, load(s + j));
  const vf largest = splat(kToBf16 ? max_lanes(m) : max_lanes(m) * scale);
  vf sum = splat(0.0f);
  for (size_t j = 0; j < last; j += kWidth) {
    const vf e = softmax_numerator<kToBf16>(load(s + j), scale, largest);
    store(s + j, e);
    sum = sum + e;
  }
  // Lanes past n give exp(-87), which vanishes beside the largest, exp(0).
  const vf e = softmax_numerator<kToBf16>(rest, scale, largest);
  store(s + last, e);
  return sum_lanes(sum + e);
}

template <typename Out>
static void scale_rows_as(size_t rows, size_t n, const float* s, size_t ld, const float* factors, Out* out,
                          size_t ld_out) {
  for (size_t i = 0; i < rows; ++i, s += ld, out += ld_out) {
    const float factor = factors[i];
    size_t j = 0;
    for (; j + kWidth <= n; j += kWidth) Io<Out>::put(out + j, load(s + j) * factor);
    if (j < n) put_n(out + j, get_n(s + j, n - j) * factor, n - j);
  }
}

static void scale_rows(size_t rows, size_t n, const float* s, size_t ld, const float* factors, void* out, size_t ld_out,
                       DType out_type) {
  if (out_type == DType::kF32) {
    scale_rows_as(rows, n, s, ld, factors, static_cast<float*>(out), ld_out);
  } else {
    scale_rows_as(rows, n, s, ld, factors, static_cast<bf16*>(out), ld_out);
  }
}

// ---- normalization ----------------------------------------------------------------------------------------------

// kSources rows added up; with kScaled the second one is multiplied by `scale` first.
template <typename T, int kSources, bool kScaled = false>
struct SumOfRows {
  const T *a, *b, *c;
  const float* scale;
  inline __attribute__((always_inline)) vf get(size_t j) const {
    vf v = Io<T>::get(a + j);
    if (kSources > 1) v = kScaled ? Io<T>::get(b + j) * load(scale + j) + v : v + Io<T>::get(b + j);
    if (kSources > 2) v = v + Io<T>::get(c + j);
    return v;
  }
  inline __attribute__((always_inline)) vf get_last(size_t j, size_t n) const {
    vf v = get_n(a + j, n);
    if (kSources > 1) v = kScaled ? get_n(b + j, n) * get_n(scale + j, n) + v : v + get_n(b + j, n);
    if (kSources > 2) v = v + get_n(c + j, n);
    return v;
  }
};

// Longest row whose sum is held in fp32 between the passes, on the stack; of longer ones it is formed anew in each.
constexpr size_t kHeldRow = 2048;

// Without kCenter it is an RMS norm: no mean, no bias.
template <bool kCenter, bool kHold, typename T, int kSources, bool kScaled>
static void sum_norm_passes(size_t n, SumOfRows<T, kSources, kScaled> source, const float* weight, const float* bias,
                            float eps, T* out) {
  const size_t whole = n - n % kWidth;
  const size_t rest = n - whole;
  alignas(64) float held[kHold ? kHeldRow : 1];
  const auto get = [&](size_t j) __attribute__((always_inline)) {
    if constexpr (kHold) {
      return load(held + j);
    } else {
      return source.get(j);
    }
  };
  float mean = 0.0f;
  if constexpr (kCenter || kHold) {
    vf sum = splat(0.0f);
#pragma GCC unroll 4
    for (size_t j = 0; j < whole; j += kWidth) {
      const vf v = source.get(j);
      if constexpr (kHold) store(held + j, v);
      sum = sum + v;
    }
    if (rest) sum = sum + source.get_last(whole, rest);
    if constexpr (kCenter) mean = sum_lanes(sum) / static_cast<float>(n);
  }

  vf squares = splat(0.0f);
#pragma GCC unroll 4
  for (size_t j = 0; j < whole; j += kWidth) {
    const vf d = get(j) - mean;
    squares = squares + d * d;
  }
  float variance = sum_lanes(squares);
  if (rest) {
    float lanes[kWidth];
    store(lanes, source.get_last(whole, rest));
    for (size_t i = 0; i < rest; ++i) variance += (lanes[i] - mean) * (lanes[i] - mean);
  }
  variance /= static_cast<float>(n);
  const float scale = 1.0f / __builtin_sqrtf(variance + eps);

#pragma GCC unroll 4
  for (size_t j = 0; j < whole; j += kWidth) {
    vf v = (get(j) - mean) * scale * load(weight + j);
    if constexpr (kCenter) v = v + load(bias + j);
    Io<T>::put(out + j, v);
  }
  if (rest) {
    vf v = (source.get_last(whole, rest) - mean) * scale * get_n(weight + whole, rest);
    if constexpr (kCenter) v = v + get_n(bias + whole, rest);
    put_n(out + whole, v, rest);
  }
}

template <bool kCenter, typename T, int kSources, bool kScaled>
static void sum_norm_sources(size_t n, SumOfRows<T, kSources, kScaled> source, const float* weight, const float* bias,
                             float eps, T* out) {
  // One row of fp32 needs no sum.
  if (n <= kHeldRow && !(kSources == 1 && sizeof(T) == sizeof(float))) {
    sum_norm_passes<kCenter, true>(n, source, weight, bias, eps, out);
  } else {
    sum_norm_passes<kCenter, false>(n, source, weight, bias, eps, out);
  }
}

template <bool kCenter, typename T>
static void sum_norm_typed(size_t n, const T* a, const T* b, const T* c, const float* b_scale, const float* weight,
                           const float* bias, float eps, T* out) {
  if constexpr (kCenter) {
    if (b_scale) {
      return sum_norm_sources<kCenter>(n, SumOfRows<T, 2, true>{a, b, nullptr, b_scale}, weight, bias, eps, out);
    }
  }
  if (c && b) {
    sum_norm_sources<kCenter>(n, SumOfRows<T, 3>{a, b, c, nullptr}, weight, bias, eps, out);
  } else if (b || c) {
    sum_norm_sources<kCenter>(n, SumOfRows<T, 2>{a, b ? b : c, nullptr, nullptr}, weight, bias, eps, out);
  } else {
    sum_norm_sources<kCenter>(n, SumOfRows<T, 1>{a, nullptr, nullptr, nullptr}, weight, bias, eps, out);
  }
}

template <bool kCenter>
static void sum_norm_row(size_t n, const void* a, const void* b, const void* c, const float* b_scale,
                         const float* weight, const float* bias, float eps, void* out, DType t) {
  if (t == DType::kF32) {
    sum_norm_typed<kCenter>(n, static_cast<const float*>(a), static_cast<const float*>(b), static_cast<const float*>(c),
                            b_scale, weight, bias, eps, static_cast<float*>(out));
  } else {
    sum_norm_typed<kCenter>(n, static_cast<const bf16*>(a), static_cast<const bf16*>(b), static_cast<const bf16*>(c),
                            b_scale, weight, bias, eps, static_cast<bf16*>(out));
  }
}

static void sum_layer_norm_row(size_t n, const void* a, const void* b, const void* c, const float* b_scale,
                               const float* weight, const float* bias, float eps, void* out, DType t) {
  sum_norm_row<true>(n, a, b, c, b_scale, weight, bias, eps, out, t);
}

static void sum_rms_norm_row(size_t n, const void* a, const void* b, const void* c, const float* weight, float eps,
                             void* out, DType t) {
  sum_norm_row<false>(n, a, b, c, nullptr, weight, nullptr, eps, out, t);
}

// ---- rotary positions -------------------------------------------------------------------------------------------

template <typename T>
static void rotate_row_as(size_t heads, size_t head_size, const float* cos, const float* sin, const T* x, T* out) {
  const size_t half = head_size / 2;
  const size_t whole = half - half % kWidth;
  const size_t rest = half - whole;
  for (size_t h = 0; h < heads; ++h, x += head_size, out += head_size) {
    for (size_t j = 0; j < whole; j += kWidth) {
      const vf a = Io<T>::get(x + j), b = Io<T>::get(x + half + j), c = load(cos + j), s = load(sin + j);
      Io<T>::put(out + j, a * c - b * s);
      Io<T>::put(out + half + j, b * c + a * s);
    }
    if (rest) {
      const vf a = get_n(x + whole, rest), b = get_n(x + half + whole, rest);
      const vf c = get_n(cos + whole, rest), s = get_n(sin + whole, rest);
      put_n(out + whole, a * c - b * s, rest);
      put_n(out + half + whole, b * c + a * s, rest);
    }
  }
}

static void rotate_row(size_t heads, size_t head_size, const float* cos, const float* sin, const void* x, void* out,
                       DType t) {
  if (t == DType::kF32) {
    rotate_row_as(heads, head_size, cos, sin, static_cast<const float*>(x), static_cast<float*>(out));
  } else {
    rotate_row_as(heads, head_size, cos, sin, static_cast<const bf16*>(x), static_cast<bf16*>(out));
  }
}

// ---- gated linear units -----------------------------------------------------------------------------------------

template <Activation kAct, typename T>
static void gate_row_as(size_t n, const T* x, const T* gate, T* out) {
  size_t j = 0;
  for (; j + kWidth <= n; j += kWidth) Io<T>::put(out + j, activate<kAct, T>(Io<T>::get(x + j)) * Io<T>::get(gate + j));
  if (j < n) put_n(out + j, activate<kAct, T>(get_n(x + j, n - j)) * get_n(gate + j, n - j), n - j);
}

template <Activation kAct>
static void gate_row(size_t n, const void* x, const void* gate, void* out, DType t) {
  if (t == DType::kF32) {
    gate_row_as<kAct>(n, static_cast<const float*>(x), static_cast<const float*>(gate), static_cast<float*>(out));
  } else {
    gate_row_as<kAct>(n, static_cast<const bf16*>(x), static_cast<const bf16*>(gate), static_cast<bf16*>(out));
  }
}

template <typename T>
static void add_row_as(size_t n, const T* a, const T* b, T* out) {
  size_t j = 0;
  for (; j + kWidth <= n; j += kWidth) Io<T>::put(out + j, Io<T>::get(a + j) + Io<T>::get(b + j));
  if (j < n) put_n(out + j, get_n(a + j, n - j) + get_n(b + j, n - j), n - j);
}

static void add_row(size_t n, const void* a, const void* b, void* out, DType t) {
  if (t == DType::kF32) {
    add_row_as(n, static_cast<const float*>(a), static_cast<const float*>(b), static_cast<float*>(out));
  } else {
    add_row_as(n, static_cast<const bf16*>(a), static_cast<const bf16*>(b), static_cast<bf16*>(out));
  }
}

// ---- pooling ----------------------------------------------------------------------------------------------------

template <bool kMax, typename T>
static void fold_row_as(size_t n, const T* x, float* acc) {
  size_t j = 0;
  for (; j + kWidth <= n; j += kWidth) {
    const vf v = Io<T>::get(x + j), a = load(acc + j);
    store(acc + j, kMax ? max_or_nan(a, v) : a + v);
  }
  if (j < n) {
    const vf v = get_n(x + j, n - j), a = get_n(acc + j, n - j);
    put_n(acc + j, kMax ? max_or_nan(a, v) : a + v, n - j);
  }
}

template <bool kMax>
static void fold_row(size_t n, const void* x, DType t, float* acc) {
  if (t == DType::kF32) {
    fold_row_as<kMax>(n, static_cast<const float*>(x), acc);
  } else {
    fold_row_as<kMax>(n, static_cast<const bf16*>(x), acc);
  }
}

static float sum_squares(size_t n, const float* x) {
  vf s = splat(0.0f);
  size_t j = 0;
  for (; j + kWidth <= n; j += kWidth) s = s + load(x + j) * load(x + j);
  float total = sum_lanes(s);
  for (; j < n; ++j) total += x[j] * x[j];
  return total;
}
