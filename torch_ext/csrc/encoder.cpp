#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.h"
#include "gemm.h"
#include "rows.h"

namespace torch_ext {
namespace {

// Activations of one part of a layer, per thread, that a group of sequences may take: they are to stay in the caches
// that the next part reads them from, while a larger group reads the weights less often.
constexpr size_t kGroupBytes = size_t{4} << 20;

// What is done to rows [begin, end) of a product when they are complete.
struct RowStep {
  const uint16_t* residual = nullptr;
  uint16_t* sum = nullptr;  // product + residual, where later layers add to it; else null
  Norm norm;                // of the sum
  uint16_t* normed = nullptr;
};

// Elements per row of the part of the workspace that attention and the feed-forward part use one after the other.
size_t shared_width(const EncoderHeader& h) {
  const size_t wide = h.gated_ffn ? 3 * size_t{h.intermediate_size} : h.intermediate_size;
  return std::max({4 * size_t{h.hidden_size}, wide, size_t{h.embedding_size}});
}

class Run {
 public:
  Run(const EncoderModel& model, const EncoderBatch& batch, const Dispatch& dispatch, EncoderHost& host,
      uint16_t* workspace, uint16_t* out)
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
    // Rows past the texts, if any, are computed on but never read: only they must not hold what is slow.
    for (uint16_t* const part : {hidden_, normed_}) clear_tail(part, width_);
    attention_.cu_seqlens = batch.cu_seqlens;
    attention_.sequences = batch.sequences;
    attention_.heads = h_.num_heads;
    attention_.head_size = width_ / h_.num_heads;
    attention_.scale = 1.0f / std::sqrt(static_cast<float>(attention_.head_size));
    attention_.relative_bias = model.relative_bias;
    attention_.bias_reach = h_.bias_reach;
    global_heads_ = balance_heads(attention_, host.threads());
    if (h_.window) {
      attention_.window = h_.window;
      local_heads_ = balance_heads(attention_, host.threads());
    }
  }

  void operator()() {
    const std::vector<EncoderLayer>& layers = model_.layers;
    embed();
    const uint16_t* x = hidden_;
    if (h_.norm_first && layers[0].attention_norm.weight) {
      norm_rows({nullptr, nullptr, layers[0].attention_norm, normed_}, hidden_);
      x = normed_;
    }
    for (size_t i = 0; i < layers.size(); ++i) {
      const EncoderLayer& layer = layers[i];
      const bool last = i + 1 == layers.size();
      RowStep after_attention = {hidden_, nullptr, layer.attention_norm, hidden_};
      RowStep after_ffn = {hidden_, nullptr, layer.ffn_norm, last ? out_ : hidden_};
      if (h_.norm_first) {
        after_attention = {hidden_, hidden_, layer.ffn_norm, normed_};
        after_ffn = {hidden_, hidden_, last ? model_.final_norm : layers[i + 1].attention_norm, last ? out_ : normed_};
      }
      attend(layer, x, after_attention);
      x = after_attention.normed;
      feed_forward(layer, x, after_ffn);
      x = after_ffn.normed;
    }
  }

 private:
  void clear_tail(uint16_t* part, size_t width) const {
    if (rows_ > tokens_) std::memset(part + tokens_ * width, 0, (rows_ - tokens_) * width * sizeof(uint16_t));
  }

  template <typename F>
  void parallel(size_t tasks, const F& fn) {
    if (tasks == 1) {
      fn(size_t{0});
      return;
    }
    host_.parallel(
        tasks, [](void* context, size_t i) { (*static_cast<const F*>(context))(i); },
        const_cast<void*>(static_cast<const void*>(&fn)));
  }

  // fn(begin, end) for parts of the tokens, each worth a thread.
  template <typename F>
  void parallel_rows(size_t width, const F& fn) {
    const size_t tasks = std::clamp<size_t>(tokens_ * width / kRowGrain, 1, host_.threads());
    parallel(tasks, [&](size_t i) { fn(tokens_ * i / tasks, tokens_ * (i + 1) / tasks); });
  }

  void layer_norm(size_t n, const uint16_t* a, const uint16_t* b, const uint16_t* c, const Norm& norm, uint16_t* out) {
    vec_.sum_layer_norm_row(n, a, b, c, b ? norm.residual_scale : nullptr, norm.weight, norm.bias, h_.layer_norm_eps,
                            out, DType::kBF16);
  }

  void finish_row(const RowStep& step, const uint16_t* product, size_t row) {
    const size_t at = row * width_;
    const uint16_t* const residual = step.residual ? step.residual + at : nullptr;
    if (!step.sum) return layer_norm(width_, product + at, residual, nullptr, step.norm, step.normed + at);
    vec_.add_row(width_, product + at, residual, step.sum + at, DType::kBF16);
    if (step.norm.weight) layer_norm(width_, step.sum + at, nullptr, nullptr, step.norm, step.normed + at);
  }

  void norm_rows(const RowStep& step, const uint16_t* product) {
    parallel_rows(width_, [&](size_t begin, size_t end) {
      for (size_t row = begin; row < end; ++row) finish_row(step, product, row);
    });
  }

  // act(x W^T + bias) into `out`, or where else the host puts it; then `step` on its rows, if there is one.
  const uint16_t* linear(const Matrix& matrix, const uint16_t* x, Activation activation, uint16_t* out,
                         const RowStep* step) {
    const Layout layout = matrix.header.layout;
    const GemmKernel* const own = layout == Layout::kS8Groups ? dispatch_.gemm_s8 : dispatch_.isa->gemm;
    if (!own || own->layout != layout) {
      const uint16_t* const product = host_.foreign_linear(matrix, x, rows_, activation);
      if (step) norm_rows(*step, product);
      return product;
    }
    GemmProblem problem;
    problem.m = tokens_;
    problem.n = matrix.n();
    problem.k = matrix.k();
    problem.lhs = x;
    problem.ld_lhs = problem.k;
    problem.panels = matrix.payload();
    problem.activation = activation;
    problem.epilogue.bias = matrix.bias;
    RowStep rest = step ? *step : RowStep{};
    if (rest.sum) {
      // The kernel adds the residual in fp32, in its place.
      problem.epilogue.residual = rest.residual;
      problem.epilogue.residual_type = DType::kBF16;
      problem.epilogue.ld_residual = problem.n;
      out = rest.sum;
      rest = {nullptr, nullptr, rest.norm, rest.normed};
    }
    problem.epilogue.out = out;
    problem.epilogue.ld_out = problem.n;
    problem.epilogue.out_type = DType::kBF16;
    const GemmPlan plan = plan_gemm(*own, problem.m, problem.n, problem.k, host_.threads());
    // Where a task computes whole rows, it finishes them while they are in its cache.
    const bool whole_rows = plan.panel_tasks == 1;
    parallel(plan.tasks(), [&](size_t task) {
      run_gemm_task(*own, vec_, problem, plan, task);
      if (!rest.norm.weight || !whole_rows) return;
      const GemmRows rows = task_rows(*own, tokens_, plan, task);
      for (size_t row = rows.begin; row < rows.end; ++row) finish_row(rest, out, row);
    });
    if (rest.norm.weight && !whole_rows) norm_rows(rest, out);
    return out;
  }

  void embed() {
    const size_t e = h_.embedding_size;
    uint16_t* const out = model_.projection.packed ? shared_ : hidden_;
    clear_tail(out, e);
    parallel_rows(e, [&](size_t begin, size_t end) {
      const auto embed_token = [&](size_t t, size_t position) {
        const size_t type = batch_.type_ids ? static_cast<size_t>(batch_.type_ids[t]) : 0;
        layer_norm(e, model_.word + static_cast<size_t>(batch_.ids[t]) * e,
                   model_.position ? model_.position + position * e : nullptr,
                   model_.token_type ? model_.token_type + type * e : nullptr, model_.embedding_norm, out + t * e);
      };
      for_each_position_row(batch_.cu_seqlens, batch_.sequences, begin, end, h_.position_offset, batch_.ids,
                            h_.padding_id, embed_token);
    });
    if (!model_.projection.packed) return;
    const uint16_t* const projected = linear(model_.projection, out, Activation::kNone, hidden_, nullptr);
    if (projected != hidden_) std::memcpy(hidden_, projected, tokens_ * width_ * sizeof(uint16_t));
  }

  void rotate(const uint16_t* from, uint16_t* qkv, const float* table) {
    const size_t d = attention_.head_size, ld = 3 * width_;
    parallel_rows(ld, [&](size_t begin, size_t end) {
      for_each_position(batch_.cu_seqlens, batch_.sequences, begin, end, [&](size_t t, size_t position) {
        const float* const cos = table + position * d;
        vec_.rotate_row(2 * size_t{h_.num_heads}, d, cos, cos + d / 2, from + t * ld, qkv + t * ld, DType::kBF16);
        if (from != qkv) {
          std::memcpy(qkv + t * ld + 2 * width_, from + t * ld + 2 * width_, width_ * sizeof(uint16_t));
        }
      });
    });
  }

  void attend(const EncoderLayer& layer, const uint16_t* x, const RowStep& after) {
    uint16_t* const own_qkv = shared_;
    uint16_t* const context = shared_ + rows_ * 3 * width_;
    const uint16_t* qkv = linear(layer.qkv, x, Activation::kNone, own_qkv, nullptr);
    const float* const rotary = layer.local ? model_.rotary_local : model_.rotary;
    if (rotary) {
      rotate(qkv, own_qkv, rotary);
      qkv = own_qkv;
    }
    attention_.qkv = qkv;
    attention_.out = context;
    attention_.window = layer.local ? h_.window : kNoWindow;
    clear_tail(context, width_);
    const GemmKernel& kernel = attention_gemm(dispatch_, DType::kBF16);
    const std::vector<size_t>& starts = layer.local ? local_heads_ : global_heads_;
    parallel(starts.size() - 1, [&](size_t run) {
      for (size_t i = starts[run]; i < starts[run + 1]; ++i) {
        run_attention_head(kernel, vec_, attention_, i / attention_.heads, i % attention_.heads);
      }
    });
    linear(layer.out, context, Activation::kNone, product_, &after);
  }

  void feed_forward(const EncoderLayer& layer, const uint16_t* x, const RowStep& after) {
    const size_t n = h_.intermediate_size;
    const auto activation = static_cast<Activation>(h_.activation);
    const uint16_t* wide = linear(layer.up, x, h_.gated_ffn ? Activation::kNone : activation, shared_, nullptr);
    if (h_.gated_ffn) {
      uint16_t* const gated = shared_ + rows_ * 2 * n;
      clear_tail(gated, n);
      parallel_rows(2 * n, [&](size_t begin, size_t end) {
        for (size_t t = begin; t < end; ++t) {
          vec_.gate_row[h_.activation](n, wide + t * 2 * n, wide + t * 2 * n + n, gated + t * n, DType::kBF16);
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
  uint16_t *hidden_, *normed_, *product_, *shared_, *out_;
  AttentionProblem attention_;
  std::vector<size_t> global_heads_, local_heads_;
};

}  // namespace

EncoderGroups group_sequences(const EncoderModel& model, const EncoderBatch& batch, const EncoderHost& host) {
  const size_t row_bytes = shared_width(model.header) * sizeof(uint16_t);
  const size_t limit = std::max<size_t>(1, host.threads() * kGroupBytes / row_bytes);
  EncoderGroups groups = {{0}, 0};
  const auto at = [&](size_t sequence) { return static_cast<size_t>(batch.cu_seqlens[sequence]); };
  for (size_t s = 0; s < batch.sequences; ++s) {
    const size_t first = groups.starts.back();
    // A new group where the next sequence would not fit, unless what is left is small.
    if (s > first && at(s + 1) - at(first) > limit && batch.tokens - at(s) > limit / 4) groups.starts.push_back(s);
  }
  groups.starts.push_back(batch.sequences);
  for (size_t g = 0; g + 1 < groups.starts.size(); ++g) {
    groups.most_tokens = std::max(groups.most_tokens, at(groups.starts[g + 1]) - at(groups.starts[g]));
  }
  return groups;
}

size_t encoder_workspace_elements(const EncoderModel& model, size_t rows) {
  return rows * (3 * size_t{model.header.hidden_size} + shared_width(model.header));
}

void run_encoder(const EncoderModel& model, const EncoderBatch& batch, const EncoderGroups& groups,
                 const Dispatch& dispatch, EncoderHost& host, uint16_t* workspace, uint16_t* out) {
  std::vector<int32_t> cu_seqlens;
  for (size_t g = 0; g + 1 < groups.starts.size(); ++g) {
    const size_t first = groups.starts[g], last = groups.starts[g + 1];
    const int32_t start = batch.cu_seqlens[first];
    const auto skipped = static_cast<size_t>(start);
    EncoderBatch group = batch;
    group.tokens = static_cast<size_t>(batch.cu_seqlens[last] - start);
    if (group.tokens == 0) continue;
    group.sequences = last - first;
    group.ids += skipped;
    if (group.type_ids) group.type_ids += skipped;
    cu_seqlens.assign(batch.cu_seqlens + first, batch.cu_seqlens + last + 1);
    for (int32_t& offset : cu_seqlens) offset -= start;
    group.cu_seqlens = cu_seqlens.data();
    Run(model, group, dispatch, host, workspace, out + skipped * model.header.hidden_size)();
  }
}

}  // namespace torch_ext
