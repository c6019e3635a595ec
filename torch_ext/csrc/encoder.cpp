// Longer than other files, since it is one forward pass in the order of its steps.
#include "encoder.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "attention.h"
#include "cpu_features.h"
#include "gemm.h"
#include "positions.h"
#include "rows.h"

namespace torch_ext {
namespace {

// Activations of one part of a layer, per thread, that a group of sequences may take: they are to stay in the caches
// that the next part reads them from, while a larger group reads the weights less often.
size_t group_bytes() { return 4 * second_level_cache_bytes(); }

// Tokens that are worth reading the weights for: at 128, a weight that comes from beyond the second-level cache costs a few
// percent of the products that it is used for.
constexpr size_t kMinShareTokens = 128;

// Tasks that a part of a layer is cut into for each thread, where there are several: threads take them one after the other,
// so that one on a slow core does fewer, and the others do not wait for it.
constexpr size_t kTasksPerThread = 4;

// Elements of a row-wise step between two products that are worth a task: about 5 us of one core (AMD EPYC 7001), while the
// threads that were at the product before are still awake and begin within one.
constexpr size_t kStepGrain = 3 * 1024;

// Workspace that a thread keeps for its next call.
constexpr size_t kKeptWorkspaceBytes = size_t{256} << 20;

// Elements per row of the part of the workspace that attention and the feed-forward part use one after the other.
size_t shared_width(const EncoderHeader& h) {
  const size_t wide = h.gated_ffn ? 3 * size_t{h.intermediate_size} : h.intermediate_size;
  const size_t attention = 2 * (size_t{h.num_heads} + h.num_kv_heads) * h.head_size;
  return std::max({attention, wide, size_t{h.embedding_size}});
}

// Elements per row of what groups of sequences need at a time; T is the type of activations.
template <typename T>
size_t workspace_width(const EncoderHeader& h) {
  const size_t stream = h.embedding_norm ? 0 : size_t{h.hidden_size} * (sizeof(float) / sizeof(T));
  return 3 * size_t{h.hidden_size} + shared_width(h) + stream;
}

/// One group of sequences through all layers; T is the type of activations and tables.
template <typename T>
class Run {
  // What is done to rows [begin, end) of a product when they are complete.
  struct RowStep {
    const T* residual = nullptr;
    T* sum = nullptr;     // product + residual, where later layers add to it; else null
    Norm post_norm = {};  // of the product, before it is added to the stream
    Norm norm = {};       // of the sum
    T* normed = nullptr;
  };

 public:
  Run(const EncoderModel& model, const EncoderBatch& batch, const Dispatch& dispatch, EncoderHost& host, T* workspace,
      T* out)
      : model_(model),
        batch_(batch),
        dispatch_(dispatch),
        host_(host),
        vec_(*dispatch.vec),
        h_(model.header),
        width_(h_.hidden_size),
        tokens_(batch.tokens),
        rows_(host.preferred_rows(batch.tokens)),
        out_(out) {
    hidden_ = workspace;
    normed_ = hidden_ + rows_ * width_;
    product_ = normed_ + rows_ * width_;
    shared_ = product_ + rows_ * width_;
    if (!h_.embedding_norm) {
      // First, where the workspace is aligned for floats.
      stream_ = reinterpret_cast<float*>(workspace);
      hidden_ = nullptr;
      normed_ = workspace + rows_ * width_ * (sizeof(float) / sizeof(T));
      product_ = normed_ + rows_ * width_;
      shared_ = product_ + rows_ * width_;
    }
    // Rows past the texts, if any, are computed on but never read: only they must not hold what is slow.
    for (T* const part : {hidden_, normed_}) {
      if (part) clear_tail(part, width_);
    }
    attention_.type = kType;
    attention_.cu_seqlens = batch.cu_seqlens;
    attention_.attended = batch.attended;
    attention_.sequences = batch.sequences;
    attention_.heads = h_.num_heads;
    attention_.kv_heads = h_.num_kv_heads;
    attention_.head_size = h_.head_size;
    attention_.causal = h_.causal;
    attention_.scale =
        h_.attention_scale > 0.0f ? h_.attention_scale : 1.0f / std::sqrt(static_cast<float>(attention_.head_size));
    if (h_.position_span) take_positions();
    attention_.relative_bias = model.relative_bias;
    attention_.bias_reach = h_.bias_reach;
    global_heads_ = balance_heads(attention_, parts());
    if (h_.window) {
      attention_.window = h_.window;
      local_heads_ = balance_heads(attention_, parts());
    }
  }

  void operator()() {
    if (stream_) return run_stream();
    const std::vector<EncoderLayer>& layers = model_.layers;
    embed();
    const T* x = hidden_;
    if (h_.norm_first && layers[0].attention_norm.weight) {
      norm_rows({.norm = layers[0].attention_norm, .normed = normed_}, hidden_);
      x = normed_;
    }
    for (size_t i = 0; i < layers.size(); ++i) {
      const EncoderLayer& layer = layers[i];
      const bool last = i + 1 == layers.size();
      RowStep after_attention = {.residual = hidden_, .norm = layer.attention_norm, .normed = hidden_};
      RowStep after_ffn = {.residual = hidden_, .norm = layer.ffn_norm, .normed = last ? out_ : hidden_};
      if (h_.norm_first) {
        after_attention = {.residual = hidden_, .sum = hidden_, .norm = layer.ffn_norm, .normed = normed_};
        after_ffn = {.residual = hidden_,
                     .sum = hidden_,
                     .norm = last ? model_.final_norm : layers[i + 1].attention_norm,
                     .normed = last ? out_ : normed_};
      }
      attend(layer, x, after_attention);
      x = after_attention.normed;
      feed_forward(layer, x, after_ffn);
      x = after_ffn.normed;
    }
  }

 private:
  static constexpr DType kType = dtype_of<T>;

  // Norms come first, and what layers add is summed in fp32: without a norm of the words sums grow until steps of bf16 are
  // large.
  void run_stream() {
    const std::vector<EncoderLayer>& layers = model_.layers;
    embed_stream();
    for (size_t i = 0; i < layers.size(); ++i) {
      const EncoderLayer& layer = layers[i];
      const bool last = i + 1 == layers.size();
      if (i == 0) finish_stream({.norm = layer.attention_norm, .normed = normed_}, nullptr);
      attend(layer, normed_, {.post_norm = layer.attention_post_norm, .norm = layer.ffn_norm, .normed = normed_});
      feed_forward(layer, normed_,
                   {.post_norm = layer.ffn_post_norm,
                    .norm = last ? model_.final_norm : layers[i + 1].attention_norm,
                    .normed = last ? out_ : normed_});
    }
  }

  // By token, what its word is multiplied with, where some words are dropped: in each sequence the others make up for them.
  std::vector<float> word_scales() const {
    std::vector<float> scales(h_.dropped_word ? tokens_ : 0);
    for (size_t s = 0; h_.dropped_word && s < batch_.sequences; ++s) {
      const auto begin = static_cast<size_t>(batch_.cu_seqlens[s]), end = static_cast<size_t>(batch_.cu_seqlens[s + 1]);
      const auto kept = [&](size_t t) { return batch_.ids[t] + 1 != int64_t{h_.dropped_word}; };
      size_t count = 0;
      for (size_t t = begin; t < end; ++t) count += kept(t);
      const float scale = h_.embedding_scale * static_cast<float>(end - begin) / static_cast<float>(count);
      for (size_t t = begin; t < end; ++t) scales[t] = kept(t) ? scale : 0.0f;
    }
    return scales;
  }

  void embed_stream() {
    const T* const types = static_cast<const T*>(model_.token_type);
    const std::vector<float> scales = word_scales();
    parallel_rows(width_, [&](size_t begin, size_t end) {
      const auto embed_token = [&](size_t t, size_t position) {
        const size_t type = types && batch_.type_ids ? static_cast<size_t>(batch_.type_ids[t]) : 0;
        float* const to = stream_ + t * width_;
        const T* const word = row_of(model_.word, static_cast<size_t>(batch_.ids[t]), width_);
        const float scale = scales.empty() ? h_.embedding_scale : scales[t];
        for (size_t j = 0; j < width_; ++j) to[j] = scale * widened(word[j]);
        for (const T* const more : {row_of(model_.position, position, width_), row_of(types, type, width_)}) {
          for (size_t j = 0; more && j < width_; ++j) to[j] += widened(more[j]);
        }
      };
      for_each_position_row(batch_.cu_seqlens, batch_.sequences, begin, end, h_.position_offset, batch_.ids,
                            h_.padding_id, embed_token);
    });
  }

  void stream_norm(DType type, const void* x, const Norm& norm, void* out) {
    if (h_.rms_norm) {
      vec_.sum_rms_norm_row(width_, x, nullptr, nullptr, norm.weight, h_.layer_norm_eps, out, type);
    } else {
      vec_.sum_layer_norm_row(width_, x, nullptr, nullptr, nullptr, norm.weight, norm.bias, h_.layer_norm_eps, out,
                              type);
    }
  }

  // Adds rows of a product, if they are not in the stream yet, and writes the norm of the sum.
  void finish_stream(const RowStep& step, const T* product) {
    parallel_rows(width_, [&](size_t begin, size_t end) {
      std::vector<float> row(round_up(width_, kMaxVecWidth));
      std::vector<T> added(width_);
      for (size_t t = begin; t < end; ++t) {
        float* const sum = stream_ + t * width_;
        if (product) {
          const T* more = product + t * width_;
          if (step.post_norm.weight) {
            stream_norm(kType, more, step.post_norm, added.data());
            more = added.data();
          }
          for (size_t j = 0; j < width_; ++j) sum[j] += widened(more[j]);
        }
        if constexpr (kType == DType::kF32) {
          stream_norm(DType::kF32, sum, step.norm, step.normed + t * width_);
        } else {
          stream_norm(DType::kF32, sum, step.norm, row.data());
          constexpr float kOne = 1.0f;
          vec_.scale_rows(1, width_, row.data(), width_, &kOne, step.normed + t * width_, width_, kType);
        }
      }
    });
  }

  // Scores by relative position. They and those by content have an equal part of the scale.
  void take_positions() {
    const EncoderLayer& layer = model_.layers[0];
    const size_t kinds = 1 + (layer.position_keys != nullptr) + (layer.position_queries != nullptr);
    attention_.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(attention_.head_size * kinds)));
    size_t longest = 1;
    for (size_t s = 0; s < batch_.sequences; ++s) {
      longest = std::max(longest, static_cast<size_t>(batch_.cu_seqlens[s + 1] - batch_.cu_seqlens[s]));
    }
    position_rows_.resize(2 * longest - 1);
    fill_position_rows(longest, h_.position_span, h_.position_reach, position_rows_.data());
    attention_.positions = {layer.position_keys, layer.position_queries, position_rows_.data(), longest};
  }

  void clear_tail(T* part, size_t width) const {
    if (rows_ > tokens_) std::memset(part + tokens_ * width, 0, (rows_ - tokens_) * width * sizeof(T));
  }

  // Most tasks of a part of a layer.
  size_t parts() const { return host_.threads() == 1 ? 1 : kTasksPerThread * host_.threads(); }

  template <typename F>
  void parallel(size_t tasks, const F& fn) {
    run_tasks(host_, tasks, fn);
  }

  // fn(begin, end) for parts of the tokens, each worth a thread.
  template <typename F>
  void parallel_rows(size_t width, const F& fn) {
    const size_t tasks = std::clamp<size_t>(tokens_ * width / kStepGrain, 1, parts());
    parallel(tasks, [&](size_t i) { fn(tokens_ * i / tasks, tokens_ * (i + 1) / tasks); });
  }

  void layer_norm(size_t n, const T* a, const T* b, const T* c, const Norm& norm, T* out) {
    vec_.sum_layer_norm_row(n, a, b, c, b ? norm.residual_scale : nullptr, norm.weight, norm.bias, h_.layer_norm_eps,
                            out, kType);
  }

  void finish_row(const RowStep& step, const T* product, size_t row) {
    const size_t at = row * width_;
    const T* const residual = step.residual ? step.residual + at : nullptr;
    if (!step.sum) return layer_norm(width_, product + at, residual, nullptr, step.norm, step.normed + at);
    vec_.add_row(width_, product + at, residual, step.sum + at, kType);
    if (step.norm.weight) layer_norm(width_, step.sum + at, nullptr, nullptr, step.norm, step.normed + at);
  }

  void norm_rows(const RowStep& step, const T* product) {
    parallel_rows(width_, [&](size_t begin, size_t end) {
      for (size_t row = begin; row < end; ++row) finish_row(step, product, row);
    });
  }

  // act(x W^T + bias) + shift into `out`, or where else the host puts it; then `step` on its rows, if there is one.
  const T* linear(const Matrix& matrix, const T* x, Activation activation, T* out, const RowStep* step,
                  const float* shift = nullptr) {
    const GemmKernel* const own = dispatch_.gemm_for(matrix.header.layout);
    if constexpr (kType == DType::kBF16) {
      if (!own) {
        const T* product = host_.foreign_linear(matrix, x, rows_, activation);
        if (shift) product = shifted(product, matrix.n(), shift, out);
        if (step) stream_ ? finish_stream(*step, product) : norm_rows(*step, product);
        return product;
      }
    }
    GemmProblem problem;
    problem.m = tokens_;
    problem.n = matrix.n();
    problem.k = matrix.k();
    problem.lhs = x;
    problem.lhs_type = kType;
    problem.ld_lhs = problem.k;
    problem.panels = matrix.payload();
    problem.activation = activation;
    problem.epilogue.bias = matrix.bias;
    problem.epilogue.residual = shift;  // The same for every row.
    RowStep rest = step ? *step : RowStep{};
    const bool in_stream = step && stream_;
    if (in_stream) {
      rest = {};
      if (!step->post_norm.weight) {
        problem.epilogue.residual = stream_;
        problem.epilogue.ld_residual = problem.n;
      }
    }
    if (rest.sum) {
      // The kernel adds the residual in fp32, in its place.
      problem.epilogue.residual = rest.residual;
      problem.epilogue.residual_type = kType;
      problem.epilogue.ld_residual = problem.n;
      out = rest.sum;
      rest = {.norm = rest.norm, .normed = rest.normed};
    }
    const bool adds = problem.epilogue.residual && in_stream;  // `step` and `shift` are never both given.
    problem.epilogue.out = adds ? static_cast<void*>(stream_) : out;
    problem.epilogue.ld_out = problem.n;
    problem.epilogue.out_type = adds ? DType::kF32 : kType;
    const GemmPlan plan =
        finer_plan(*own, problem.m, problem.k, plan_gemm(*own, problem.m, problem.n, problem.k, host_.threads()));
    // Where a task computes whole rows, it finishes them while they are in its cache.
    const bool whole_rows = plan.panel_tasks == 1;
    PanelQueue queue(plan);
    parallel(plan.tasks(), [&](size_t task) {
      run_gemm_task(*own, vec_, problem, plan, task, &queue);
      if (!rest.norm.weight || !whole_rows) return;
      const GemmRows rows = task_rows(*own, tokens_, plan, task);
      for (size_t row = rows.begin; row < rows.end; ++row) finish_row(rest, out, row);
    });
    if (rest.norm.weight && !whole_rows) norm_rows(rest, out);
    if (in_stream) finish_stream(*step, adds ? nullptr : out);
    return out;
  }

  const T* shifted(const T* product, size_t n, const float* shift, T* out) {
    parallel_rows(n, [&](size_t begin, size_t end) {
      std::vector<float> sum(n);
      constexpr float kOne = 1.0f;
      for (size_t t = begin; t < end; ++t) {
        for (size_t j = 0; j < n; ++j) sum[j] = widened(product[t * n + j]) + shift[j];
        vec_.scale_rows(1, n, sum.data(), n, &kOne, out + t * n, n, kType);
      }
    });
    return out;
  }

  // Null where the model has no such table.
  static const T* row_of(const void* table, size_t row, size_t width) {
    return table ? static_cast<const T*>(table) + row * width : nullptr;
  }

  void embed() {
    const size_t e = h_.embedding_size;
    T* const out = model_.projection.packed ? shared_ : hidden_;
    clear_tail(out, e);
    parallel_rows(e, [&](size_t begin, size_t end) {
      const auto embed_token = [&](size_t t, size_t position) {
        const size_t type = batch_.type_ids ? static_cast<size_t>(batch_.type_ids[t]) : 0;
        layer_norm(e, row_of(model_.word, static_cast<size_t>(batch_.ids[t]), e), row_of(model_.position, position, e),
                   row_of(model_.token_type, type, e), model_.embedding_norm, out + t * e);
      };
      for_each_position_row(batch_.cu_seqlens, batch_.sequences, begin, end, h_.position_offset, batch_.ids,
                            h_.padding_id, embed_token);
    });
    if (!model_.projection.packed) return;
    const T* const projected = linear(model_.projection, out, Activation::kNone, hidden_, nullptr);
    if (projected != hidden_) std::memcpy(hidden_, projected, tokens_ * width_ * sizeof(T));
  }

  void rotate(const T* from, T* qkv, const float* table) {
    const size_t d = attention_.head_size, ld = qkv_width(), turned = (size_t{h_.num_heads} + h_.num_kv_heads) * d;
    parallel_rows(ld, [&](size_t begin, size_t end) {
      for_each_position(batch_.cu_seqlens, batch_.sequences, begin, end, [&](size_t t, size_t position) {
        const float* const cos = table + position * d;
        vec_.rotate_row(turned / d, d, cos, cos + d / 2, from + t * ld, qkv + t * ld, kType);
        if (from != qkv) {
          std::memcpy(qkv + t * ld + turned, from + t * ld + turned, (ld - turned) * sizeof(T));
        }
      });
    });
  }

  size_t qkv_width() const { return (size_t{h_.num_heads} + 2 * size_t{h_.num_kv_heads}) * h_.head_size; }

  void norm_heads(const EncoderLayer& layer, const T* from, T* qkv) {
    const size_t d = h_.head_size, ld = qkv_width();
    parallel_rows(ld, [&](size_t begin, size_t end) {
      for (size_t t = begin; t < end; ++t) {
        for (size_t i = 0; i < size_t{h_.num_heads} + h_.num_kv_heads; ++i) {
          const float* const weight = i < h_.num_heads ? layer.query_norm.weight : layer.key_norm.weight;
          vec_.sum_rms_norm_row(d, from + t * ld + i * d, nullptr, nullptr, weight, h_.layer_norm_eps,
                                qkv + t * ld + i * d, kType);
        }
        if (from != qkv) {
          const size_t done = (size_t{h_.num_heads} + h_.num_kv_heads) * d;
          std::memcpy(qkv + t * ld + done, from + t * ld + done, (ld - done) * sizeof(T));
        }
      }
    });
  }

  void attend(const EncoderLayer& layer, const T* x, const RowStep& after) {
    T* const own_qkv = shared_;
    T* const context = shared_ + rows_ * qkv_width();
    const size_t context_width = size_t{h_.num_heads} * h_.head_size;
    const T* qkv = linear(layer.qkv, x, Activation::kNone, own_qkv, nullptr);
    if (layer.query_norm.weight) {
      norm_heads(layer, qkv, own_qkv);
      qkv = own_qkv;
    }
    const float* const rotary = layer.local ? model_.rotary_local : model_.rotary;
    if (rotary) {
      rotate(qkv, own_qkv, rotary);
      qkv = own_qkv;
    }
    attention_.qkv = qkv;
    attention_.out = context;
    attention_.window = layer.local ? h_.window : kNoWindow;
    attention_.positions.keys = layer.position_keys;
    attention_.positions.queries = layer.position_queries;
    clear_tail(context, context_width);
    const GemmKernel& kernel = attention_gemm(dispatch_, kType);
    const std::vector<size_t>& starts = layer.local ? local_heads_ : global_heads_;
    parallel(starts.size() - 1, [&](size_t run) {
      for (size_t i = starts[run]; i < starts[run + 1]; ++i) {
        run_attention_head(kernel, vec_, attention_, i / attention_.heads, i % attention_.heads);
      }
    });
    linear(layer.out, context, Activation::kNone, product_, &after);
  }

  void feed_forward(const EncoderLayer& layer, const T* x, const RowStep& after) {
    const size_t n = h_.intermediate_size;
    const auto activation = static_cast<Activation>(h_.activation);
    const T* wide =
        linear(layer.up, x, h_.gated_ffn ? Activation::kNone : activation, shared_, nullptr, layer.ffn_shift);
    if (h_.gated_ffn) {
      T* const gated = shared_ + rows_ * 2 * n;
      clear_tail(gated, n);
      parallel_rows(2 * n, [&](size_t begin, size_t end) {
        for (size_t t = begin; t < end; ++t) {
          vec_.gate_row[h_.activation](n, wide + t * 2 * n, wide + t * 2 * n + n, gated + t * n, kType);
        }
      });
      wide = gated;
    }
    linear(layer.down, wide, Activation::kNone, product_, &after);
  }

  const EncoderModel& model_;
  const EncoderBatch& batch_;
  const Dispatch& dispatch_;
  EncoderHost& host_;
  const VecKernels& vec_;
  const EncoderHeader& h_;
  const size_t width_, tokens_, rows_;
  T *hidden_, *normed_, *product_, *shared_, *out_;
  float* stream_ = nullptr;  // [rows_, width_]: sums of residuals in fp32, instead of hidden_; see run_stream
  AttentionProblem attention_;
  std::vector<size_t> global_heads_, local_heads_;
  std::vector<int32_t> position_rows_;  // see PositionTables
};

/// One thread of a host's: runs its tasks itself.
class OneThread : public EncoderHost {
 public:
  size_t threads() const override { return 1; }
  void parallel(size_t tasks, void (*task)(void* context, size_t i), void* context) override {
    for (size_t i = 0; i < tasks; ++i) task(context, i);
  }
  size_t preferred_rows(size_t tokens) const override { return tokens; }
  const bf16* foreign_linear(const Matrix&, const bf16*, size_t, Activation) override { return nullptr; }
};

size_t sequence_start(const EncoderBatch& batch, size_t sequence) {
  return static_cast<size_t>(batch.cu_seqlens[sequence]);
}

size_t tokens_of(const EncoderBatch& batch, const SequenceRange& range) {
  return sequence_start(batch, range.last) - sequence_start(batch, range.first);
}

bool on_own_kernels(const EncoderModel& model, const Dispatch& dispatch) {
  const auto own = [&](const Matrix& m) { return !m.packed || dispatch.gemm_for(m.header.layout); };
  return own(model.projection) && std::all_of(model.layers.begin(), model.layers.end(), [&](const EncoderLayer& layer) {
           return own(layer.qkv) && own(layer.out) && own(layer.up) && own(layer.down);
         });
}

// Most tokens of a group on one thread.
size_t group_limit(const EncoderModel& model) {
  return std::max<size_t>(1, group_bytes() / (shared_width(model.header) * dtype_bytes(DType{model.header.type})));
}

// Shares for `threads` threads, each half of a thread's part of what is left, up to `limit` tokens and a sequence more:
// large ones first, small ones to even the ends out.
std::vector<SequenceRange> tapering_shares(const EncoderBatch& batch, size_t threads, size_t limit) {
  const auto wanted = [&](size_t left) { return std::clamp(left / (2 * threads), kMinShareTokens, limit); };
  std::vector<SequenceRange> shares;
  for (size_t first = 0, s = 0; s < batch.sequences; ++s) {
    const size_t left = batch.tokens - sequence_start(batch, first);
    if (s + 1 < batch.sequences && tokens_of(batch, {first, s + 1}) < wanted(left)) continue;
    shares.push_back({first, s + 1});
    first = s + 1;
  }
  return shares;
}

// `parts` shares or fewer, cut at the sequences that begin nearest to equal parts of the tokens.
std::vector<SequenceRange> equal_shares(const EncoderBatch& batch, size_t parts) {
  std::vector<SequenceRange> shares;
  size_t first = 0;
  for (size_t part = 1, s = 1; part < parts; ++part) {
    const size_t target = batch.tokens * part / parts;
    while (s < batch.sequences && sequence_start(batch, s) < target) ++s;
    const size_t before = s - 1;
    const bool nearer = target - std::min(target, sequence_start(batch, before)) < sequence_start(batch, s) - target;
    const size_t cut = nearer ? before : s;
    if (cut <= first || cut >= batch.sequences) continue;
    shares.push_back({first, cut});
    first = cut;
  }
  shares.push_back({first, batch.sequences});
  return shares;
}

// Sorts shares, largest first, and returns the tokens of the thread that is done last if each thread takes the next share
// as soon as it is free.
size_t longest_load(const EncoderBatch& batch, std::vector<SequenceRange>& shares, size_t threads) {
  std::sort(shares.begin(), shares.end(), [&](const SequenceRange& a, const SequenceRange& b) {
    const size_t left = tokens_of(batch, a), right = tokens_of(batch, b);
    return left != right ? left > right : a.first < b.first;
  });
  std::vector<size_t> load(threads, 0);
  for (const SequenceRange& share : shares) *std::min_element(load.begin(), load.end()) += tokens_of(batch, share);
  return *std::max_element(load.begin(), load.end());
}

template <typename T>
void run_range(const EncoderModel& model, const EncoderBatch& batch, const SequenceRange& range,
               const Dispatch& dispatch, EncoderHost& host, T* out) {
  EncoderBatch part = batch;
  const size_t skipped = sequence_start(batch, range.first);
  part.tokens = tokens_of(batch, range);
  if (part.tokens == 0) return;
  part.sequences = range.last - range.first;
  part.ids += skipped;
  if (part.type_ids) part.type_ids += skipped;
  if (part.attended) part.attended += range.first;
  std::vector<int32_t> cu_seqlens(batch.cu_seqlens + range.first, batch.cu_seqlens + range.last + 1);
  for (int32_t& offset : cu_seqlens) offset -= static_cast<int32_t>(skipped);
  part.cu_seqlens = cu_seqlens.data();
  const size_t elements = host.preferred_rows(part.tokens) * workspace_width<T>(model.header);
  T* const workspace = static_cast<T*>(thread_scratch(ScratchSlot::kEncoder, elements * sizeof(T)));
  Run<T>(model, part, dispatch, host, workspace, out + skipped * model.header.hidden_size)();
}

template <typename T>
void run_encoder_as(const EncoderModel& model, const EncoderBatch& batch, const Dispatch& dispatch, EncoderHost& host,
                    T* out) {
  std::vector<SequenceRange> shares;
  if (host.threads() > 1 && on_own_kernels(model, dispatch)) shares = share_sequences(model, batch, host.threads());
  if (shares.empty()) {
    for (const SequenceRange& group : group_sequences(model, batch, host.threads())) {
      run_range(model, batch, group, dispatch, host, out);
    }
    trim_thread_scratch(ScratchSlot::kEncoder, kKeptWorkspaceBytes);
    return;
  }
  struct Work {
    const EncoderModel& model;
    const EncoderBatch& batch;
    const Dispatch& dispatch;
    const std::vector<SequenceRange>& shares;
    T* out;
    std::atomic<size_t> next{0};
  } work{model, batch, dispatch, shares, out};
  const auto take = [](void* context, size_t) {
    Work& w = *static_cast<Work*>(context);
    OneThread alone;
    for (size_t i; (i = w.next.fetch_add(1, std::memory_order_relaxed)) < w.shares.size();) {
      run_range(w.model, w.batch, w.shares[i], w.dispatch, alone, w.out);
    }
    trim_thread_scratch(ScratchSlot::kEncoder, kKeptWorkspaceBytes);
  };
  host.parallel(host.threads(), take, &work);
}

}  // namespace

std::vector<SequenceRange> group_sequences(const EncoderModel& model, const EncoderBatch& batch, size_t threads) {
  const size_t limit = threads * group_limit(model);
  std::vector<SequenceRange> groups{{0, batch.sequences}};
  for (size_t s = 0; s < batch.sequences; ++s) {
    SequenceRange& group = groups.back();
    // A new group where the next sequence would not fit, unless what is left is small.
    if (s > group.first && tokens_of(batch, {group.first, s + 1}) > limit &&
        batch.tokens - sequence_start(batch, s) > limit / 4) {
      group.last = s;
      groups.push_back({s, batch.sequences});
    }
  }
  return groups;
}

std::vector<SequenceRange> share_sequences(const EncoderModel& model, const EncoderBatch& batch, size_t threads) {
  if (batch.sequences < 2 * threads || batch.tokens < 2 * threads * kMinShareTokens) return {};
  const size_t limit = std::max(group_limit(model), kMinShareTokens);
  std::vector<SequenceRange> best = tapering_shares(batch, threads, limit);
  size_t longest = longest_load(batch, best, threads);
  // Fewer tries than it takes to notice them: each costs some nanoseconds a sequence.
  for (size_t quarters = 4; quarters <= 16 && longest * threads > batch.tokens + batch.tokens / 64; ++quarters) {
    const size_t parts = threads * quarters / 4;
    if (batch.tokens < parts * kMinShareTokens) break;
    std::vector<SequenceRange> shares = equal_shares(batch, parts);
    const auto fits = [&](const SequenceRange& r) {
      return tokens_of(batch, r) >= kMinShareTokens && (tokens_of(batch, r) <= limit || r.last == r.first + 1);
    };
    if (!std::all_of(shares.begin(), shares.end(), fits)) continue;
    const size_t load = longest_load(batch, shares, threads);
    if (load < longest) {
      longest = load;
      best = std::move(shares);
    }
  }
  if (longest * threads > batch.tokens + batch.tokens / 8) return {};
  return best;
}

void run_encoder(const EncoderModel& model, const EncoderBatch& batch, const Dispatch& dispatch, EncoderHost& host,
                 void* out) {
  if (DType{model.header.type} == DType::kF32) {
    run_encoder_as(model, batch, dispatch, host, static_cast<float*>(out));
  } else {
    run_encoder_as(model, batch, dispatch, host, static_cast<bf16*>(out));
  }
}

}  // namespace torch_ext
