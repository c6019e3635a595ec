/// An encoder that runs without torch: batches of token ids in, vectors and logits out.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "encoder.h"
#include "pool.h"
#include "runtime/image.h"
#include "runtime/thread_pool.h"

namespace torch_ext::runtime {

struct Options {
  std::string dtype = {};      ///< "bf16", "fp32" or "int8"; empty: as the file was saved
  size_t threads = 0;          ///< 0: what affinity and quota of the process leave it
  std::vector<int> cpus = {};  ///< that its threads may run on; empty: those of the process
  bool pin = false;            ///< each thread to one of the CPUs
  bool shared = false;         ///< weights in memory that other processes can map
};

class States;

/// Vectors that are mostly zero: of text i the entries from bounds[i] to bounds[i + 1], by rising index.
struct SparseVectors {
  std::vector<int64_t> bounds = {0}, indices = {};
  std::vector<float> values = {};
};

/// How the logits of a text's tokens become one sparse vector, as in SPLADE: of max(logit, 0), log(1 + x) once or twice,
/// of which the largest over the tokens, or the sum.
struct SparsePooling {
  bool sum = false;
  bool twice = false;
};

/// Immutable but for its threads: several threads may call it at once, which take turns on its own.
class Engine : public std::enable_shared_from_this<Engine> {
 public:
  static std::shared_ptr<Engine> open(const std::string& path, const Options& options);
  static std::shared_ptr<Engine> from_weights(const std::string& name, const Specs& specs, const Weights& weights,
                                              const Options& options);
  static std::shared_ptr<Engine> from_image(int fd, const std::string& name, const Options& options);
  static std::shared_ptr<Engine> from_image(const std::string& path, const Options& options);

  /// Runs a batch of texts that lie one after the other.
  ///
  /// Ids may be out of range, and sequences empty or too long: throws kValue where something does not fit.
  std::unique_ptr<States> encode(EncoderBatch batch) const;

  /// Frees what its threads, and the caller's, keep for the next batch.
  void release_workspace() const;

  const Image& image() const { return image_; }
  const Dispatch& dispatch() const { return dispatch_; }
  EncoderHost& host() const;
  size_t threads() const;
  ~Engine();

 private:
  class Host;
  Engine(const Options& options);

  const Dispatch& dispatch_;
  std::unique_ptr<Host> host_;
  Image image_;
};

/// How embeddings are made of hidden states.
struct TextPooling {
  std::vector<Pooling> modes = {Pooling::kMean};  ///< of several, the vectors stand side by side
  bool normalize = false;
  size_t dimensions = 0;  ///< leading dimensions to keep; 0: all
  size_t skipped = 0;     ///< leading tokens of each text that do not count
};

/// Hidden states of a batch, and what a model makes of them.
class States {
 public:
  States(std::shared_ptr<const Engine> engine, size_t tokens, const int32_t* cu_seqlens, size_t texts);

  size_t tokens() const { return tokens_; }
  size_t texts() const { return cu_seqlens_.size() - 1; }
  const Engine& engine() const { return *engine_; }
  /// [tokens, hidden_size] of the encoder's type.
  const void* data() const { return hidden_.get(); }
  void* data() { return hidden_.get(); }
  const int32_t* cu_seqlens() const { return cu_seqlens_.data(); }

  /// out fp32 [tokens, hidden_size].
  void copy_hidden(float* out) const;
  /// out fp32 [texts, dimensions or, if that is 0, embedding_size(modes)]. A head for feature-extraction comes after the
  /// pooling and before the norm.
  void pool(const TextPooling& pooling, float* out) const;
  /// A vector of each token: out fp32 [tokens, embedding_size(1)]. A head for feature-extraction comes before the norm.
  void token_vectors(bool normalize, float* out) const;
  /// What the head says of each text, out fp32 [texts, outputs].
  void text_logits(float* out) const;
  /// What the head says of some tokens: out fp32 [count, outputs] for rows [count] of the batch; null: all tokens.
  void token_logits(const int64_t* rows, size_t count, float* out) const;
  /// The `k` best outputs for some tokens, best first, of equal ones the first: indices and probabilities [count, k].
  void top_k(const int64_t* rows, size_t count, size_t k, int64_t* indices, float* probabilities) const;

  /// A vector over the head's outputs for each text: the entries that are not 0. What is NaN or infinite is kept.
  SparseVectors sparse(const SparsePooling& pooling) const;

  /// Width of embeddings: that of hidden states for each way of pooling, or the outputs of a head for feature-extraction.
  size_t embedding_size(size_t modes = 1) const;
  /// Outputs of the head. Throws kValue where there is none.
  size_t outputs() const;

 private:
  const HeadModel& head() const;
  void check_rows(const int64_t* rows, size_t count) const;
  bool has_embedding_head() const;
  void check_head_width(size_t width) const;
  void pool_hidden(Pooling mode, bool normalize, size_t kept, size_t skipped, size_t stride, float* out) const;
  void cut_rows(const float* rows, size_t count, size_t width, size_t kept, bool normalize, float* out) const;

  struct Free {
    void operator()(void* p) const;
  };
  std::shared_ptr<const Engine> engine_;
  size_t tokens_;
  std::vector<int32_t> cu_seqlens_;
  std::unique_ptr<void, Free> hidden_;
};

}  // namespace torch_ext::runtime
