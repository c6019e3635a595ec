#include "runtime/engine.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "gemm.h"
#include "head.h"
#include "rows.h"
#include "runtime/error.h"

namespace torch_ext::runtime {
namespace {

// Logits that top_k and sparse hold at a time, in bytes.
constexpr size_t kLogitsBytes = size_t{16} << 20;

void check_ids(const char* name, const int64_t* ids, size_t tokens, int64_t rows) {
  for (size_t i = 0; i < tokens; ++i) {
    expect(ids[i] >= 0 && ids[i] < rows, "Encoder: expected ", name, " from 0 to ", rows - 1, ", got ", ids[i], " at ",
           i);
  }
}

// log(1 + max(x, 0)), or that of that. NaN stays NaN.
float saturated(float x, bool twice) {
  if (x <= 0.0f) return 0.0f;
  const float once = std::log1p(x);
  return twice ? std::log1p(once) : once;
}

// Columns that one task of sparse reduces.
constexpr size_t kSparseColumns = 1024;

}  // namespace

/// The engine's own threads. No matrix is PyTorch's here.
class Engine::Host : public EncoderHost {
 public:
  explicit Host(const ThreadPool::Options& options) : pool_(options) {}
  size_t threads() const override { return pool_.threads(); }
  void parallel(size_t tasks, void (*task)(void* context, size_t i), void* context) override {
    pool_.parallel(tasks, task, context);
  }
  size_t preferred_rows(size_t tokens) const override { return tokens; }
  const bf16* foreign_linear(const Matrix&, const bf16*, size_t, Activation) override { return nullptr; }
  void release_workspace() { pool_.on_each_thread(free_thread_scratch); }

 private:
  ThreadPool pool_;
};

static ThreadPool::Options pool_options(const Options& options) {
  expect(options.threads <= 4096, "Encoder: expected threads of at most 4096, got ", options.threads);
  const size_t threads = options.threads        ? options.threads
                         : options.cpus.empty() ? default_threads()
                                                : options.cpus.size();
  return {.threads = threads, .cpus = options.cpus, .pin = options.pin};
}

Engine::Engine(const Options& options) : dispatch_(own_dispatch()), host_(new Host(pool_options(options))) {}
Engine::~Engine() = default;

EncoderHost& Engine::host() const { return *host_; }
size_t Engine::threads() const { return host_->threads(); }

std::shared_ptr<Engine> Engine::open(const std::string& path, const Options& options) {
  const ModelFile model = read_model_file(path, options.dtype);
  return from_weights(path, model.specs, model.weights, options);
}

std::shared_ptr<Engine> Engine::from_weights(const std::string& name, const Specs& specs, const Weights& weights,
                                             const Options& options) {
  const std::shared_ptr<Engine> engine(new Engine(options));
  engine->image_ = Image::pack(name, specs, weights, engine->dispatch_, *engine->host_, options.shared);
  return engine;
}

std::shared_ptr<Engine> Engine::from_image(int fd, const std::string& name, const Options& options) {
  const std::shared_ptr<Engine> engine(new Engine(options));
  engine->image_ = Image::map(fd, name, engine->dispatch_);
  return engine;
}

std::shared_ptr<Engine> Engine::from_image(const std::string& path, const Options& options) {
  const std::shared_ptr<Engine> engine(new Engine(options));
  engine->image_ = Image::map(path, engine->dispatch_);
  return engine;
}

std::unique_ptr<States> Engine::encode(EncoderBatch batch) const {
  const EncoderSpec& spec = image_.specs().encoder;
  const int32_t* const cu_seqlens = batch.cu_seqlens;
  const size_t texts = batch.sequences, tokens = batch.tokens;
  expect(texts >= 1, "Encoder: expected at least one text (cu_seqlens [texts + 1]), got an empty batch");
  expect(cu_seqlens[0] == 0 && cu_seqlens[texts] >= 0 && static_cast<size_t>(cu_seqlens[texts]) == tokens,
         "Encoder: expected cu_seqlens from 0 to ", tokens, " (tokens), got ", cu_seqlens[0], " to ",
         cu_seqlens[texts]);
  for (size_t i = 0; i < texts; ++i) {
    expect(cu_seqlens[i] < cu_seqlens[i + 1], "Encoder: expected cu_seqlens to rise, got ", cu_seqlens[i], " then ",
           cu_seqlens[i + 1], ": text ", i, " has no tokens");
    const int64_t length = int64_t{cu_seqlens[i + 1]} - cu_seqlens[i];
    expect(length <= spec.max_positions, "Encoder: text ", i, " has ", length, " tokens, the model takes at most ",
           spec.max_positions, ": truncate it");
    expect(!batch.attended || (batch.attended[i] >= 1 && batch.attended[i] <= length),
           "Encoder: expected attended from 1 to the ", length, " tokens of text ", i, ", got ",
           batch.attended ? batch.attended[i] : 0);
  }
  check_ids("input_ids", batch.ids, tokens, spec.vocab_size);
  if (batch.type_ids) {
    check_ids("token_type_ids", batch.type_ids, tokens, std::max<int64_t>(spec.type_vocab_size, 1));
    if (!spec.type_vocab_size) batch.type_ids = nullptr;
  }
  auto states = std::make_unique<States>(shared_from_this(), tokens, cu_seqlens, texts);
  run_encoder(image_.encoder(), batch, dispatch_, *host_, states->data());
  return states;
}

void Engine::release_workspace() const { host_->release_workspace(); }

void States::Free::operator()(void* p) const { std::free(p); }

States::States(std::shared_ptr<const Engine> engine, size_t tokens, const int32_t* cu_seqlens, size_t texts)
    : engine_(std::move(engine)), tokens_(tokens), cu_seqlens_(cu_seqlens, cu_seqlens + texts + 1) {
  const EncoderHeader& h = engine_->image().encoder().header;
  const size_t bytes = tokens * h.hidden_size * dtype_bytes(DType{h.type});
  hidden_.reset(std::aligned_alloc(kPackedAlignment, round_up(bytes, kPackedAlignment)));
  if (!hidden_) fail(ErrorCode::kMemory, "Encoder: no memory for hidden states of ", bytes, " bytes");
}

const HeadModel& States::head() const {
  const std::optional<HeadModel>& head = engine_->image().head();
  expect(head.has_value(), "Encoder: this model has no head: its hidden states and embeddings are all it answers");
  return *head;
}

size_t States::outputs() const { return head().out.n(); }

bool States::has_embedding_head() const {
  const std::optional<HeadSpec>& spec = engine_->image().specs().head;
  return spec && spec->task == "feature-extraction";
}

size_t States::embedding_size(size_t modes) const {
  return has_embedding_head() ? outputs() : modes * engine_->image().encoder().header.hidden_size;
}

void States::copy_hidden(float* out) const {
  const EncoderHeader& h = engine_->image().encoder().header;
  const size_t n = h.hidden_size;
  const DType type{h.type};
  if (type == DType::kF32) {
    std::memcpy(out, hidden_.get(), tokens_ * n * sizeof(float));
    return;
  }
  const auto* const from = static_cast<const bf16*>(hidden_.get());
  for (size_t i = 0; i < tokens_ * n; ++i) out[i] = widened(from[i]);
}

void States::check_head_width(size_t width) const {
  const HeadSpec& spec = *engine_->image().specs().head;
  expect(static_cast<size_t>(spec.hidden_size) == width, "Encoder: expected vectors of ", spec.hidden_size,
         " for the head, got ", width, ": ask for as many poolings as it was made for");
}

void States::pool(const TextPooling& p, float* out) const {
  const size_t hidden = engine_->image().encoder().header.hidden_size, count = p.modes.size();
  const size_t width = embedding_size(count), kept = p.dimensions ? p.dimensions : width;
  expect(count > 0, "Encoder: expected at least one pooling");
  expect(kept <= width, "Encoder: expected dimensions of at most ", width, ", got ", p.dimensions);
  const bool projects = has_embedding_head();
  if (!projects && count == 1) return pool_hidden(p.modes[0], p.normalize, kept, p.skipped, kept, out);
  if (projects) check_head_width(count * hidden);
  std::vector<float> pooled(texts() * count * hidden);
  for (size_t i = 0; i < count; ++i) {
    pool_hidden(p.modes[i], false, hidden, p.skipped, count * hidden, pooled.data() + i * hidden);
  }
  if (!projects) return cut_rows(pooled.data(), texts(), width, kept, p.normalize, out);
  std::vector<float> vectors(texts() * width);
  run_head(head(), pooled.data(), DType::kF32, texts(), engine_->dispatch(), engine_->host(), vectors.data());
  cut_rows(vectors.data(), texts(), width, kept, p.normalize, out);
}

void States::token_vectors(bool normalize, float* out) const {
  const EncoderHeader& h = engine_->image().encoder().header;
  const size_t width = embedding_size();
  if (!has_embedding_head() && !normalize) return copy_hidden(out);
  std::vector<float> vectors(tokens_ * width);
  if (has_embedding_head()) {
    check_head_width(h.hidden_size);
    run_head(head(), hidden_.get(), DType{h.type}, tokens_, engine_->dispatch(), engine_->host(), vectors.data());
  } else {
    copy_hidden(vectors.data());
  }
  cut_rows(vectors.data(), tokens_, width, width, normalize, out);
}

// Rows [count, width], each a text of one token now: cut to [count, kept], and of length 1.
void States::cut_rows(const float* rows, size_t count, size_t width, size_t kept, bool normalize, float* out) const {
  std::vector<int32_t> one_each(count + 1);
  std::iota(one_each.begin(), one_each.end(), 0);
  const PoolProblem problem{.hidden = rows,
                            .type = DType::kF32,
                            .width = width,
                            .cu_seqlens = one_each.data(),
                            .mode = Pooling::kCls,
                            .normalize = normalize,
                            .kept = kept,
                            .out = out};
  pool_texts(problem, *engine_->dispatch().vec, 0, count);
}

void States::pool_hidden(Pooling mode, bool normalize, size_t kept, size_t skipped, size_t stride, float* out) const {
  const EncoderHeader& h = engine_->image().encoder().header;
  const PoolProblem problem{.hidden = hidden_.get(),
                            .type = DType{h.type},
                            .width = h.hidden_size,
                            .cu_seqlens = cu_seqlens(),
                            .mode = mode,
                            .normalize = normalize,
                            .kept = kept,
                            .skipped = skipped,
                            .stride = stride,
                            .out = out};
  const size_t count = texts();
  const size_t tasks = std::clamp<size_t>(tokens_ * h.hidden_size / kRowGrain, 1, std::min(count, engine_->threads()));
  run_tasks(engine_->host(), tasks, [&](size_t i) {
    pool_texts(problem, *engine_->dispatch().vec, count * i / tasks, count * (i + 1) / tasks);
  });
}

void States::text_logits(float* out) const {
  const HeadModel& model = head();
  const HeadSpec& spec = *engine_->image().specs().head;
  expect(spec.task == "text-classification", "Encoder: expected a head for text-classification, this one is for ",
         spec.task);
  const auto width = static_cast<size_t>(spec.hidden_size);
  std::vector<float> pooled(texts() * width);
  pool_hidden(*find_pooling(spec.pooling), false, width, 0, width, pooled.data());
  run_head(model, pooled.data(), DType::kF32, texts(), engine_->dispatch(), engine_->host(), out);
}

void States::check_rows(const int64_t* rows, size_t count) const {
  const auto tokens = static_cast<int64_t>(tokens_);
  for (size_t i = 0; i < count; ++i) {
    expect(rows[i] >= 0 && rows[i] < tokens, "Encoder: expected rows from 0 to ", tokens - 1, ", got ", rows[i]);
  }
}

void States::token_logits(const int64_t* rows, size_t count, float* out) const {
  const HeadModel& model = head();
  const std::string& task = engine_->image().specs().head->task;
  expect(task != "text-classification", "Encoder: expected a head for tokens, this one is for ", task,
         ": ask for text_logits");
  const EncoderHeader& h = engine_->image().encoder().header;
  const DType type{h.type};
  check_head_width(h.hidden_size);
  if (!rows) {
    run_head(model, hidden_.get(), type, tokens_, engine_->dispatch(), engine_->host(), out);
    return;
  }
  check_rows(rows, count);
  const size_t row_bytes = h.hidden_size * dtype_bytes(type);
  std::vector<char> gathered(count * row_bytes);
  for (size_t i = 0; i < count; ++i) {
    const char* const row = static_cast<const char*>(hidden_.get()) + static_cast<size_t>(rows[i]) * row_bytes;
    std::memcpy(gathered.data() + i * row_bytes, row, row_bytes);
  }
  run_head(model, gathered.data(), type, count, engine_->dispatch(), engine_->host(), out);
}

void States::top_k(const int64_t* rows, size_t count, size_t k, int64_t* indices, float* probabilities) const {
  const size_t n = outputs();
  expect(k >= 1 && k <= n, "Encoder: expected k from 1 to ", n, ", got ", k);
  check_rows(rows, count);
  const size_t step = std::max<size_t>(1, kLogitsBytes / (n * sizeof(float)));
  std::vector<float> logits(std::min(step, count) * n);
  for (size_t first = 0; first < count; first += step) {
    const size_t part = std::min(step, count - first);
    token_logits(rows + first, part, logits.data());
    run_tasks(engine_->host(), part, [&](size_t i) {
      const float* const row = logits.data() + i * n;
      std::vector<int64_t> order(n);
      std::iota(order.begin(), order.end(), int64_t{0});
      // NaN comes last, so that the order is one.
      const auto better = [&](int64_t a, int64_t b) {
        const float x = std::isnan(row[a]) ? -INFINITY : row[a], y = std::isnan(row[b]) ? -INFINITY : row[b];
        return x != y ? x > y : a < b;
      };
      std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k), order.end(), better);
      std::vector<float> scores(round_up(n, kMaxVecWidth));
      std::copy(row, row + n, scores.begin());
      const float sum = engine_->dispatch().vec->softmax_row(scores.data(), n, 1.0f);
      for (size_t j = 0; j < k; ++j) {
        indices[(first + i) * k + j] = order[j];
        probabilities[(first + i) * k + j] = scores[static_cast<size_t>(order[j])] / sum;
      }
    });
  }
}

SparseVectors States::sparse(const SparsePooling& pooling) const {
  const size_t n = outputs();
  const size_t step = std::clamp<size_t>(kLogitsBytes / (n * sizeof(float)), 1, tokens_);
  std::vector<float> logits(step * n), vector(n);
  std::vector<int64_t> rows(step);
  SparseVectors result;
  size_t text = 0;
  for (size_t first = 0; first < tokens_; first += step) {
    const size_t part = std::min(step, tokens_ - first);
    std::iota(rows.begin(), rows.end(), static_cast<int64_t>(first));
    token_logits(rows.data(), part, logits.data());
    // Texts of which tokens are among these rows; of the first one, others may have come before.
    for (size_t row = 0; row < part; ++text) {
      const auto begin = static_cast<size_t>(cu_seqlens_[text]), end = static_cast<size_t>(cu_seqlens_[text + 1]);
      const size_t last = std::min(end - first, part);
      const bool fresh = begin >= first, whole = end <= first + part;
      run_tasks(engine_->host(), (n + kSparseColumns - 1) / kSparseColumns, [&](size_t task) {
        const size_t from = task * kSparseColumns, to = std::min(n, from + kSparseColumns);
        float* const at = vector.data();
        if (fresh) std::fill(at + from, at + to, 0.0f);
        for (size_t i = row; i < last; ++i) {
          const float* const x = logits.data() + i * n;
          if (pooling.sum) {
            for (size_t j = from; j < to; ++j) at[j] += saturated(x[j], pooling.twice);
          } else {
            // NaN wins, and stays.
            for (size_t j = from; j < to; ++j) at[j] = x[j] <= at[j] || at[j] != at[j] ? at[j] : x[j];
          }
        }
      });
      if (!whole) break;
      for (size_t j = 0; j < n; ++j) {
        if (vector[j] == 0.0f) continue;
        result.indices.push_back(static_cast<int64_t>(j));
        result.values.push_back(pooling.sum ? vector[j] : saturated(vector[j], pooling.twice));
      }
      result.bounds.push_back(static_cast<int64_t>(result.indices.size()));
      row = last;
    }
  }
  return result;
}

}  // namespace torch_ext::runtime
